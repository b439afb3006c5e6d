"""Runs that are broken on purpose, and what the doctor (runtime/doctor.py) says of them.

    python toy/broken.py          # what has been run is not run again; about 50 minutes on one core

Prints the tables of runtime/README.md and draws its picture, runtime/broken.png: each column that
shows a fault, of the broken run over the healthy one. The doctor's bounds were set on a former
teacher of digits: both seeds are to confirm them.
"""

import sys
import textwrap
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

import data
from runtime import curves, doctor
from runtime.files import aside
from runtime.script import in_one_line, plain_parser, run
from toy.claims import markdown
from toy.digits_experiment import execute

HOME = Path("out/broken")
PAIRS = HOME / "pairs"
PICTURE = Path(__file__).resolve().parent.parent / "runtime" / "broken.png"
SEEDS = (0, 1)
# Without CFG: so dmd_loss is 0 where the fake score is the teacher.
ADM = "adm.py --iterations 300 --guidance 1"
FAR = f"{ADM} --student-steps 1 --dt 0.75"  # one step: far from the teacher
ADP = "adp.py --iterations 300 --mse-iterations 150"
BROKEN = (  # a healthy run, and what breaks it
    (ADM, "--lr-student 1e-3"),
    (ADM, "--lr-fake 3e-2"),
    (ADM, "--lr-fake 1e-7"),
    (ADM, "--lr-heads 2e-2 --damping 0"),
    (ADM, "--lr-heads 1e-6"),
    (FAR, "--lr-student 1e-8"),
    (ADP, "--lr-mse 1e-1"),
    (ADP, "--lr-student 1e-3"),
    (ADM, "--lr-fake 1e6"),
)
HARMLESS = {"--clip 1e-3": "grad_norm_student", "--warmup 0": "x0_std", "--damping 0": "d_accuracy"}
ACROSS = 4  # panels


def short(base, flags):
    """A run's command line without what all of them have."""
    return f"{base} {flags}".replace(" --iterations 300", "").strip()


@cache
def made(base, flags, seed=SEEDS[0]):
    """The folder of a run on digits with this command line; it is run unless it has been."""
    name = f"{short(base, flags)} {seed}".replace(".py", "").replace("--", "")
    folder = HOME / "-".join(name.split())
    pairs = f"--pairs {PAIRS}" if base == ADP else ""
    rest = f"--seed {seed} {pairs} --sample-every 0 --checkpoint-every 10000 --out {folder}"
    try:
        execute(f"python {base} {flags} {rest}")
    except SystemExit as e:
        if e.code != 1:  # by a signal; 1: by its skipped updates, which is what is to be seen
            raise
    return folder


def finite(y):
    """A column without its gaps."""
    return y[np.isfinite(y)]


def ends(log, column):
    """The means of a column's first and last tenths, as text."""
    first, *_, last = doctor.parts(finite(log[column]))
    return f"{first:.3g} → {last:.3g}"


def table():
    """Rows: one for each thing that the doctor finds in a broken run, of the first seed."""
    yield "broken by", "seen", "it means", "turn", "seed 1", "healthy"
    for base, flags in BROKEN:
        first, second = (doctor.examine(made(base, flags, seed)) for seed in SEEDS)
        healthy = curves.read(made(base, ""))
        again = {(f.column, f.means): f.seen for f in second}
        for f in first:
            seen = again.get((f.column, f.means), "not seen")
            what = f"`{short(base, flags)}`"
            yield what, f.seen, f.means, f.turn, seen, ends(healthy, f.column)


def table_of_silence():
    """Rows: runs of which the doctor says nothing, in a few columns' first and last tenths."""
    names = ("d_accuracy", "x0_std", "loss_fake", "dmd_loss")
    yield "run", *names, "above the clip"
    runs = [("", seed) for seed in SEEDS] + [(flags, SEEDS[0]) for flags in HARMLESS]
    for flags, seed in runs:
        folder = made(ADM, flags, seed)
        log = curves.read(folder)
        said = ", NOT SILENT" if doctor.examine(folder) else ""
        clipped = []  # the share of each network's gradients that were
        for name in doctor.RATES:
            norm = finite(log[f"grad_norm_{name}"])
            clipped.append(f"{name} {(norm > curves.clip_of(folder)).mean():.0%}")
        what = f"`python {short(ADM, flags)}`, seed {seed}{said}"
        yield what, *(ends(log, name) for name in names), ", ".join(clipped)


def picture():
    """runtime/broken.png: a panel a row of the tables."""
    panels = []
    for base, flags in BROKEN:
        findings = doctor.examine(made(base, flags))
        panels += [(base, flags, f.column) for f in findings if f.column != "skipped"]
    panels += [(ADM, flags, column) for flags, column in HARMLESS.items()]
    down = -(-len(panels) // ACROSS)
    width, height = 4.2 * ACROSS, 2.9 * down  # inches
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.6 / width, 0.8 / height, 1 - 0.2 / width, 1 - 0.7 / height, 0.2, 0.5)
    for i, (base, flags, column) in enumerate(panels, 1):
        axis = figure.add_subplot(down, ACROSS, i)
        _, logarithmic = curves.PANELS[column]
        for which, color in (("", "C0"), (flags, "C3")):
            log = curves.read(made(base, which))
            curves.curve(axis, log, column, color, logarithmic)
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
        if column.startswith("d_accuracy"):
            axis.set_ylim(-0.03, 1.03)
        harmless = " (harmless here)" if flags in HARMLESS else ""
        command = textwrap.fill(short(base, flags), 50, break_on_hyphens=False)
        axis.set_title(f"{command}\n{column}{harmless}", fontsize=10, loc="left")
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
    lines = [Line2D([], [], color="C0"), Line2D([], [], color="C3")]
    names = ["healthy: the same command without these flags", "with them"]
    figure.legend(lines, names, loc="lower center", ncols=2, frameon=False, fontsize=12)
    with aside(PICTURE) as partial:
        figure.savefig(partial, format="png", dpi=80)


def main():
    with in_one_line("broken.py"):
        plain_parser(__doc__).parse_args()
        if not PAIRS.exists():
            flags = ["--count", "2000", "--out", str(PAIRS)]
            run(data.pairs, data.PairsConfig, flags, prog="data.py pairs")
        print(f"{markdown(table())}\n\n{markdown(table_of_silence())}")
        picture()


if __name__ == "__main__":
    main()
