"""The curves of any number of runs in one picture, from their log.csv.

    python tools/curves.py out/adm
    python tools/curves.py out/a out/b --out compared.png

A panel a column of log.csv: each iteration faintly, the average on top, red ticks where updates
were skipped. A run draws its own, curves.png in its folder, with each sheet of samples. What the
doctor has to say of a run is printed too, as at its end: runtime/README.md.
"""

import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import curves, doctor
from runtime.script import in_one_line, plain_parser
from runtime.settings import BadInput, require


def main(argv=None):
    parser = plain_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of adp.py or adm.py, finished or not")
    parser.add_argument("--out", default="curves.png", help="PNG to write (default: curves.png)")
    with in_one_line("curves.py"):
        asked = parser.parse_args(argv)
        check_out(Path(asked.out))
        runs = dict.fromkeys(asked.runs)  # each once
        draw(runs, asked.out)
        for folder in runs:
            with suppress(BadInput):  # of one without config.json the doctor knows too little
                for line in doctor.advice(folder):
                    print(f"{folder}: {line}")
        print(asked.out)


def draw(runs, out):
    """The picture. Raises BadInput where it cannot be written, too."""
    try:
        curves.draw(runs, out)
    except OSError as e:
        raise BadInput(f"cannot write {out}: {e.strerror}") from None


def check_out(path):
    """Raises BadInput where the picture cannot go, or would take the place of something else."""
    require(path.suffix == ".png" and not path.is_dir(), f"--out {path}: a file, ….png")
    require(path.parent.is_dir(), f"--out {path}: there is no folder {path.parent}")


if __name__ == "__main__":
    main()
