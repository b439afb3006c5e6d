"""The experiment on digits: every method from the same starts, in as many iterations, timed.

ADP comes first, and short, so that a second stage has work to do (ours). Every second stage has
ITERATIONS iterations of its student, after the recipe's warm-up. The student's learning rate is the
best of RATES by Fréchet distance to the teacher's images, tried on another seed in the same way.
"""

import csv
from pathlib import Path

from safetensors.torch import load_file

import adm
import adp
import data
from families import load_teacher, recipes
from models import load_denoiser
from runtime.files import read_json, remove, write_json
from runtime.script import run
from toy.digits_measure import NUMBERS
from toy.digits_samples import RESULTS, judge, open_run, sample, teacher_samples

HOME = Path("out/digits")  # of all runs
SEARCH_JSON = RESULTS / "digits-search.json"
DIGITS_JSON = RESULTS / "digits.json"
ITERATIONS = 400
WARMUP = recipes.ADM["digits"]["warmup"]
POINTS = 4  # of a curve, after its start
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
SEEDS = (0, 1, 2)
SEARCH_SEED = 100
ADP_FIRST = "adp.py --iterations 150 --mse-iterations 120 --ema 0"
AS_WRITTEN = "adm.py --paper --head-width 64"  # as in the paper, but for the width of the heads
# {method: (its command, which of the others it has its rate from)}
METHODS = {
    "adp, longer": (f"adp.py --iterations {ITERATIONS} --mse-iterations {ITERATIONS * 4 // 5}", None),
    "adp+dmd": ("adm.py --loss dmd", None),
    "adp+step": ("adm.py --loss step", None),
    "adp+adm, as written": (AS_WRITTEN, None),
    "adp+adm": ("adm.py", None),
}
