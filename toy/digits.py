"""A real teacher in the box: its command line.

The teacher is a latent diffusion model of handwritten digits. It is made in digits_teacher.py,
sampled in digits_samples.py, measured in digits_measure.py; digits_experiment.py compares the
methods, digits_diagnosis.py asks why, digits_report.py prints what the README shows. Images of any
run are made and scored by tools/sample.py and tools/score.py, with the CLIP of digits_clip.py.

The teacher anew, seeded, and its samples, and the CLIP (minutes):

    python toy/digits.py train
    python toy/digits.py samples
    python toy/digits.py clip

What D learns of a student that rests; how near its teacher a student comes in each stage, drawn:

    python toy/digits.py diagnose out/adp diagnosis.json
    python toy/digits.py gain out/adp out/adm gain.png

The experiment and the README's tables and pictures of it (hours):

    python toy/digits.py search         # or of one method: search adm-recipe
    python toy/digits.py experiment     # or of one method
    python toy/digits.py levers         # or of one method
    python toy/digits.py cost           # of an update, by method and lever
    python toy/digits.py readme
    python toy/digits.py picture
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.script import in_one_line, quiet
from runtime.settings import require
from toy.digits_clip import clip
from toy.digits_diagnosis import diagnose
from toy.digits_experiment import LEVERS, METHODS, SECOND_STAGES, cost, experiment, levers, search
from toy.digits_report import gain, picture, readme
from toy.digits_samples import samples
from toy.digits_teacher import train

# {name: (what it does, {its argument: argparse's description of that})}
COMMANDS = {
    "train": (train, {}),
    "samples": (samples, {}),
    "clip": (clip, {}),
    "diagnose": (diagnose, {"init": {}, "out": {}}),
    "gain": (gain, {"first": {}, "second": {}, "out": {}}),
    "search": (search, {"methods": {"nargs": "*", "choices": SECOND_STAGES}}),
    "experiment": (experiment, {"methods": {"nargs": "*", "choices": list(METHODS)}}),
    "levers": (levers, {"methods": {"nargs": "*", "choices": sorted({m for m, *_ in LEVERS})}}),
    "cost": (cost, {}),
    "readme": (readme, {}),
    "picture": (picture, {}),
}


def main(name="--help", *words):
    if name in ("-h", "--help"):
        print(__doc__)
        return
    require(name in COMMANDS, f"{name!r} is no command: there are {', '.join(COMMANDS)}")
    command, arguments = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"digits.py {name}", description=command.__doc__)
    parser.error = lambda message: require(False, message)
    for argument, how in arguments.items():
        parser.add_argument(argument, **how)
    command(**vars(parser.parse_args(words)))


if __name__ == "__main__":
    quiet()
    with in_one_line("digits.py"):
        main(*sys.argv[1:])
