"""The experiment on digits: every method in equal time, its rate found by a search.

Every method has SECONDS of iterations on one thread; in adp+… a tenth of them are ADP's. The
learning rate of its student is the best of RATES by Fréchet distance to the teacher's samples,
tried on another seed for 0.3 of the time (the start that adp+… have from ADP is whole there). The
recipe was chosen on further seeds, from 10 on.
"""

import csv
import math
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

import adm
import adp
import data
from families import load_teacher
from models import load_denoiser
from runtime.files import read_json, remove, write_json
from runtime.script import run
from toy.digits_measure import NUMBERS, judge
from toy.digits_samples import RESULTS, open_run, sample, teacher_samples

HOME = Path("out/digits")  # of all runs
SEARCH_JSON = RESULTS / "digits-search.json"
DIGITS_JSON = RESULTS / "digits.json"
ABLATIONS_JSON = RESULTS / "digits-ablations.json"
SECONDS = 240
RATES = (3e-6, 1e-5, 3e-5, 1e-4)
SEEDS = (0, 1, 2)
SEARCH_SEED = 100
ADP_FIRST = "adp.py --ema 0"  # so short that an average would still be its start
METHODS = {
    "mse": "adp.py --loss mse",
    "adp": "adp.py",
    "dmd": "adm.py --loss dmd --student-steps 1",
    "adm": "adm.py --student-steps 1",
    "adp+dmd": "adm.py --loss dmd --student-steps 1",
    "adp+adm": "adm.py --student-steps 1",
    "dmd, 4 steps": "adm.py --loss dmd --student-steps 4",
    "adm, 4 steps": "adm.py --student-steps 4",
}
ABLATIONS = (  # method, flags that differ, and the rate if that differs
    ("adm, 4 steps", "--fake-samples each", None),
    ("dmd, 4 steps", "--fake-samples each", None),
    ("adp+adm", "--ema 0", None),
    ("adp+adm", "--ema 0", 1e-5),
    ("adp+adm", "", 1e-5),
)

# --- One trial ------------------------------------------------------------------------------------


def trial(method, seed, rate, plan, share=1.0, more=""):
    """One run of a method in SECONDS, measured: a row of digits.json.

    plan: what `speeds` and `search` found. Of its last stage the run has this share, and `more` are
    flags of that stage that differ.
    """
    flags = METHODS[method]
    seconds, init, commands = SECONDS, None, []
    if method.startswith("adp+"):
        init = HOME / f"adp-first-{seed}"
        iterations = round(SECONDS / 10 / plan["seconds"]["adp.py"])
        commands.append(line(ADP_FIRST, init.name, seed, iterations, plan["rates"]["adp"]))
        seconds = 0.9 * SECONDS
    words = f"{method} {seed} {rate:g} {share:g} {more}".replace(",", "").split()
    iterations = round(seconds * share / plan["seconds"][flags])
    commands.append(line(f"{flags} {more}".strip(), "-".join(words), seed, iterations, rate, init))

    rows = []  # of all stages' logs
    for command in commands:
        folder, log = execute(command)
        rows += log
    family = load_teacher("digits")
    x = sample(family, *open_run(folder, family), 0, NUMBERS)  # (1200, 64)
    return {
        "method": method,
        "seed": seed,
        **judge(x, teacher_samples(family)),
        "seconds": round(sum(float(row["seconds"]) for row in rows), 1),
        "iterations": len(rows),
        "rate": rate,
        "command": " && ".join(commands),
    }


def line(flags, out, seed, iterations, rate=None, init=None):
    """The command line of a run, which keeps eight checkpoints."""
    words = [f"python {flags} --iterations {iterations} --seed {seed}"]
    if flags.startswith("adp.py"):
        words.append(f"--pairs {HOME}/pairs --mse-iterations {iterations * 3 // 4}")
    if rate:
        name = "--lr-mse" if "--loss mse" in flags else "--lr-student"
        words.append(f"{name} {rate:g}")
    if init:
        words.append(f"--init {init}")
    every = math.ceil(iterations / 8)
    words.append(f"--checkpoint-every {every} --keep-checkpoints 8 --sample-every 0")
    words.append(f"--out {HOME / out}")
    return " ".join(words)


def execute(command):
    """Run this command line of adp.py or adm.py in this process, unless that has been done.

    Returns (its folder, the rows of its log).
    """
    _, script, *argv = command.split()
    folder = Path(argv[-1])
    if not (folder / "pipeline").exists():
        remove(folder)  # broken off
        module = {"adp.py": adp, "adm.py": adm}[script]
        run(module.main, module.Config, argv, prog=script)
    with open(folder / "log.csv") as f:
        return folder, list(csv.DictReader(f))


def curve(row):
    """[[iteration, fd_teacher, coverage], …] of the last run of a trial's row.

    At its start and at its checkpoints, the last of which is its end; of the average of the
    student's weights, where there is one.
    """
    family = load_teacher("digits")
    teacher = teacher_samples(family)
    folder = Path(row["command"].split()[-1])
    student, schedule, steps = open_run(folder, family)
    init = read_json(folder / "config.json", "run", "config")["config"]["init"]
    first = load_denoiser(family) if init == "teacher" else open_run(init, family)[0]

    def point(iteration, denoiser):
        now = judge(sample(family, denoiser, schedule, steps, 0, NUMBERS), teacher)
        return [iteration, now["fd_teacher"], now["coverage"]]

    points = [point(0, first)]
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        weights = checkpoint / "ema.safetensors"
        if not weights.exists():
            weights = checkpoint / "student.safetensors"
        read_weights(student.own_parameters(), weights)
        points.append(point(int(checkpoint.name), student))
    return points


def read_weights(parameters, file):
    """Fill {name: parameter} from a checkpoint's file."""
    saved = load_file(file)
    for name, p in parameters.items():
        p.data.copy_(saved[f"weight/{name}"])


# --- The commands, in their order -----------------------------------------------------------------


def speeds():
    """results/digits-search.json: seconds an iteration of each kind, one kind after the other.

    And the pairs, if there are none.
    """
    if not (HOME / "pairs").exists():
        run(data.pairs, data.PairsConfig, ["--out", f"{HOME}/pairs"], prog="data.py pairs")
    plan = {"seconds": {}, "trials": [], "rates": {}}
    for i, flags in enumerate(dict.fromkeys(METHODS.values())):
        _, log = execute(line(flags, f"speed-{i}", SEARCH_SEED, 40))
        taken = [float(row["seconds"]) for row in log]
        # ADP's regression, three quarters of it, and its adversaries.
        early, late = np.median(taken[10:30]), np.median(taken[30:])
        plan["seconds"][flags] = float(0.75 * early + 0.25 * late)
    write_json(SEARCH_JSON, plan)


def search(methods=()):
    """Adds the best rate of these methods (default: all) to results/digits-search.json."""
    for method in methods or METHODS:
        plan = read_json(SEARCH_JSON, "speeds", "seconds")
        trials = trials_of_rates(method, plan)
        plan = read_json(SEARCH_JSON, "speeds", "seconds")  # two searches may go side by side
        plan["trials"] += trials
        plan["rates"][method] = min(trials, key=lambda row: row["fd_teacher"])["rate"]
        write_json(SEARCH_JSON, plan)


def trials_of_rates(method, plan):
    """Rows of a method's trials: from 1e-5 down RATES, or else up, as long as it gets better."""
    start = RATES.index(1e-5)
    trials = [trial(method, SEARCH_SEED, RATES[start], plan, 0.3)]
    first = best = trials[0]["fd_teacher"]
    for way in (reversed(RATES[:start]), RATES[start + 1 :]):
        for rate in way:
            trials.append(trial(method, SEARCH_SEED, rate, plan, 0.3))
            distance = trials[-1]["fd_teacher"]
            if distance > best:
                break
            best = distance
        if best < first:
            break
    return trials


def experiment(seeds=()):
    """results/digits.json: every method with these seeds (default: SEEDS), beside other rows."""
    for seed in seeds or SEEDS:
        for method in METHODS:
            keep(method, seed, DIGITS_JSON)


def ablations(seeds=()):
    """results/digits-ablations.json: each of ABLATIONS likewise."""
    for seed in seeds or SEEDS:
        for method, more, rate in ABLATIONS:
            keep(method, seed, ABLATIONS_JSON, more, rate)


def keep(method, seed, path, more="", rate=None):
    """Run a trial in full, and put its row into the json file, in the place of one like it.

    rate: its method's from the search, unless it is given.
    """
    plan = read_json(SEARCH_JSON, "search", "rates")
    row = trial(method, seed, rate or plan["rates"][method], plan, more=more)
    row["flags"] = more
    row["curve"] = curve(row)
    runs = read_json(path, "results", "runs")["runs"] if path.exists() else []
    others = [r for r in runs if kind(r) != kind(row)]
    write_json(path, {"runs": [*others, row]})


def kind(row):
    """Rows of the same kind are of the same run."""
    return row["method"], row["seed"], row["flags"], row["rate"]
