"""The experiment on digits: every method from the same starts, in as many iterations, and timed.

ADP comes first, and so short that a second stage has work to do (ours). Every second stage has
ITERATIONS updates of its student, after the recipe's warm-up. The student's learning rate is the
best of RATES by Fréchet distance to the teacher's images, tried on another seed, for each method
and for each that differs by flags in SEARCHED; that of regression alone, and of ADP, is their
recipe's.
"""

from functools import cache
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

import adm
import adp
import data
from families import load_teacher, recipes
from models import load_denoiser
from runtime import curves
from runtime.files import read_json, remove, write_json
from runtime.script import run
from toy.claims import best_rate, what_of
from toy.digits_changes import CHANGES, NONE, changed
from toy.digits_measure import NUMBERS
from toy.digits_samples import RESULTS, judge, open_run, sample, teacher_samples

HOME = Path("out/digits")  # of all runs
SEARCH_JSON = RESULTS / "digits-search.json"
DIGITS_JSON = RESULTS / "digits.json"
LEVERS_JSON = RESULTS / "digits-levers.json"
COST_JSON = RESULTS / "digits-cost.json"
FIRST = 150  # iterations of the ADP that adp+… begin with
ITERATIONS = 300
LONGER = 1500  # of regression alone, for about as long by the clock as two stages
WARMUP = recipes.ADM["digits"]["warmup"]
POINTS = 3  # of a curve, after its start
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
SEEDS = (0, 1, 2)
SEARCH_SEED = 100
PAPER = "adm.py --paper --head-width 64"  # as written, but for the width of the heads
ADP_FIRST = "adp.py --ema 0"  # so short that an average would still be its start
METHODS = {
    "mse": "adp.py --loss mse",
    "mse-longer": "adp.py --loss mse",
    "adp": "adp.py",
    "adp+dmd": "adm.py --loss dmd",
    "adp+step": "adm.py --loss step",
    "adp+adm-recipe": "adm.py",
    "adp+adm-paper": PAPER,
    "dmd": "adm.py --loss dmd",
    "step": "adm.py --loss step",
    "adm-recipe": "adm.py",
    "dmd, four steps": "adm.py --loss dmd",
    "step, four steps": "adm.py --loss step",
    "adm-recipe, four steps": "adm.py",
    "adm-paper, four steps": PAPER,
}
DMD, STEP, ADM = "adp+dmd", "adp+step", "adp+adm-recipe"
FOUR_STEPS = ("dmd, four steps", "step, four steps", "adm-recipe, four steps")
PAPERS_DT, TTUR, BETA = f"--dt {1 / 64}", "--ttur 4", "--beta1 0.5"
FLAGS = {  # that differ: of which methods
    **{f"--dt {dt}": (STEP, ADM) for dt in (1 / 256, 1 / 64, 1 / 16, 1 / 2)},  # for 1/4
    f"{PAPERS_DT} --gen-weight dmd": (STEP,),
    "--gen-weight dmd": (ADM,),
    TTUR: (DMD, STEP, ADM),
    "--batch-size 64": (DMD, ADM),
    BETA: (DMD, STEP, ADM, *FOUR_STEPS),
    f"{BETA} {TTUR}": (DMD, ADM),
    "--beta1 0": (ADM,),
    "--head-width 256": (ADM,),
}
SEARCHED = (PAPERS_DT, TTUR, BETA, f"{BETA} {TTUR}")  # these at a rate of their own
# What could help: a method, flags of it that differ, and one of digits_changes.py's CHANGES.
LEVERS = [(method, flags, NONE) for flags, methods in FLAGS.items() for method in methods]
LEVERS += [(ADM, "", change) for change in CHANGES if change != NONE]
AFTER_ADP = (DMD, STEP, ADM, "adp+adm-paper")
# Those that are compared at equal time: their updates' cost is measured.
TIMED = (BETA, TTUR, "--batch-size 64", "--head-width 256")
CASES = [(method, "", NONE) for method in AFTER_ADP]
CASES += [w for w in LEVERS if w[0] in AFTER_ADP and (w[1] in TIMED or w[2] != NONE)]
SECOND_STAGES = [method for method, flags in METHODS.items() if flags.startswith("adm.py")]

# --- One trial ------------------------------------------------------------------------------------


def trial(method, seed, rate, more="", change=NONE):
    """One run of a method, measured: a row of digits.json but for its curve.

    more: flags of that stage that differ. change: one of digits_changes.py's CHANGES.
    """
    flags = METHODS[method]
    words = f"{method} {seed} {rate or ''} {ITERATIONS} {more} {change}".replace(",", "")
    out = HOME / "-".join(words.replace("--", "").split())
    if flags.startswith("adp.py"):
        iterations = LONGER if method == "mse-longer" else FIRST + ITERATIONS
        commands, kind = [], pairs_and_regression(iterations)
    else:
        iterations = ITERATIONS
        init, commands = start(method, seed)
        steps = 4 if method.endswith("four steps") else 1
        kind = second_stage(init, steps, iterations, warmup_of(method), rate)
    line = f"python {flags} {kind} {more} {written(seed, out, iterations // POINTS)}"
    commands.append(" ".join(line.split()))
    with changed(change):
        for command in commands:
            folder = execute(command)
    seconds = curves.read(folder)["seconds"]  # (iterations,)
    return {
        "method": method,
        "seed": seed,
        **measured(folder),
        "seconds": round(sum(seconds), 1),
        "iterations": len(seconds),
        "rate": rate,
        "flags": more,
        "change": change,
        "command": " && ".join(commands),
    }


def warmup_of(method):
    """How many of its first iterations a second stage's student rests."""
    return 0 if METHODS[method] == PAPER else WARMUP


def start(method, seed):
    """(--init of a second stage, the command lines that make it)."""
    if not method.startswith("adp+"):
        return "teacher", []
    out = HOME / f"adp-first-{seed}"
    kind = f"{pairs_and_regression(FIRST)} {written(seed, out, 0)}"
    return out, [f"python {ADP_FIRST} {kind}"]


def second_stage(init, steps, iterations, warmup, rate):
    """Flags of adm.py: its student's start, steps, updates after the warm-up, and rate."""
    student = f"--student-steps {steps} --iterations {iterations + warmup} --init {init}"
    return f"{student} --warmup {warmup} --lr-student {rate:g}"


def pairs_and_regression(iterations):
    """Flags of adp.py: of its iterations four in five are regression's."""
    regression = iterations * 4 // 5
    return f"--pairs {HOME}/pairs --iterations {iterations} --mse-iterations {regression}"


def written(seed, out, every):
    """Flags of a run: its seed, and what it writes where."""
    checkpoints = f"--checkpoint-every {every} --keep-checkpoints {POINTS + 1}" if every else ""
    return f"{checkpoints} --sample-every 0 --seed {seed} --out {out}".strip()


def execute(command):
    """The folder of a run of adp.py or adm.py by this command line, in this process.

    It is not run again where it has been.
    """
    _, script, *argv = command.split()
    folder = Path(argv[-1])
    if not (folder / "pipeline").exists():
        remove(folder)  # broken off
        module = {"adp.py": adp, "adm.py": adm}[script]
        run(module.main, module.Config, argv, prog=script)
    return folder


@cache
def measured(folder):
    """`judge`'s row of the student that a run exported. folder: a Path."""
    family = load_teacher("digits")
    images = sample(family, *open_run(folder, family), 0, NUMBERS)  # (1000, 3, 32, 32)
    return judge(images, teacher_samples(family))


def curve(folder):
    """[[iteration, fd, fd_any, coverage], …] of a run, at its start and its checkpoints.

    The start is what the run of its --init exported, the last checkpoint what this one did.
    """
    init = read_json(folder / "config.json", "run", "config")["config"]["init"]
    iterations = len(curves.read(folder)["iteration"])
    family = load_teacher("digits")
    teacher = teacher_samples(family)
    student, schedule, steps = open_run(folder, family)

    def judged(denoiser):
        return judge(sample(family, denoiser, schedule, steps, 0, NUMBERS), teacher)

    rows = {0: judged(load_denoiser(family)) if init == "teacher" else measured(Path(init))}
    for iteration in at_checkpoints(folder, student):
        rows[iteration] = measured(folder) if iteration == iterations else judged(student)
    return [[at, row["fd"], row["fd_any"], row["coverage"]] for at, row in rows.items()]


def at_checkpoints(folder, student):
    """Yields the iteration of each checkpoint of a run, once the student has its weights.

    They are the average's, where there is one.
    """
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        weights = checkpoint / "ema.safetensors"
        if not weights.exists():
            weights = checkpoint / "student.safetensors"
        read_weights(student.own_parameters(), weights)
        yield int(checkpoint.name)


def read_weights(parameters, file):
    """Fill {name: parameter} from a checkpoint's file."""
    saved = load_file(file)
    for name, p in parameters.items():
        p.data.copy_(saved[f"weight/{name}"])


# --- The commands, in their order -----------------------------------------------------------------


def pairs():
    """The teacher's pairs, on which ADP and regression are trained; nothing if they are there."""
    if not (HOME / "pairs").exists():
        run(data.pairs, data.PairsConfig, ["--out", f"{HOME}/pairs"], prog="data.py pairs")


def search(methods=()):
    """results/digits-search.json: the best rate of these methods (default: all), and the trials.

    Of each method as it is, then with each of SEARCHED. It goes on where it was.
    """
    pairs()
    for method, flags in to_search():
        if not methods or method in methods:
            search_one(method, flags)


def to_search():
    """[(method, flags that differ), …]: what has a rate of its own."""
    with_flags = [(method, flags) for method, flags, _ in LEVERS if flags in SEARCHED]
    return [(method, "") for method in SECOND_STAGES] + with_flags


def search_one(method, flags):
    """The best rate of a method with these flags, and what has been tried, into the json file."""
    tried = [row for row in plan()["trials"] if (row["method"], row["flags"]) == (method, flags)]
    trials = {f"{row['rate']:g}": row["fd"] for row in tried}

    def fd(rate):
        row = trial(method, SEARCH_SEED, rate, more=flags)
        now = plan()  # another search may go on beside this
        now["trials"].append(row)
        write_json(SEARCH_JSON, now)
        return row["fd"]

    if flags:  # upwards first: D or fake score learn more, and the student may, too
        best = best_rate(trials, RATES[::-1], plan()["rates"][method], fd)
    else:
        best = best_rate(trials, RATES, 1e-5, fd)
    now = plan()
    now["rates"][f"{method} {flags}".strip()] = best
    write_json(SEARCH_JSON, now)


def plan():
    """What results/digits-search.json holds."""
    if SEARCH_JSON.exists():
        return read_json(SEARCH_JSON, "search", "rates")
    return {"rates": {}, "trials": []}


def rate_of(method, flags):
    """The student's rate by the search: of these flags, or else of the method; None of neither."""
    rates = plan()["rates"]
    return rates.get(f"{method} {flags}".strip(), rates.get(method))


def experiment(methods=()):
    """results/digits.json: what it lacks of these methods (default: all)."""
    pairs()
    for method in methods or METHODS:
        for seed in seeds_of(method):
            keep(method, seed, DIGITS_JSON)


def seeds_of(method, flags=""):
    """Those that a method is judged by: what takes four steps was registered with fresh ones.

    With flags that differ it has two more.
    """
    if not method.endswith("four steps"):
        return SEEDS
    return (3, 4, 5, 6, 7) if flags else (3, 4, 5)


def levers(methods=()):
    """results/digits-levers.json: each of LEVERS likewise."""
    pairs()
    for method, more, change in LEVERS:
        if not methods or method in methods:
            for seed in seeds_of(method, more):
                keep(method, seed, LEVERS_JSON, more, change)


def cost(turns=5, iterations=10):
    """results/digits-cost.json: how long an update of each of CASES takes, DMD's being 1.

    It is one in which the student learns. Runs of so many take turns, so that what else the machine
    does slows all; of a turn each has its median update, of the turns the median ratio.
    """
    pairs()
    init, commands = start(DMD, SEEDS[0])
    for command in commands:
        execute(command)
    kind = second_stage(init, 1, iterations, 0, 1e-5)
    out = HOME / "cost"
    ratios = {what: [] for what in CASES}
    for _ in range(turns):
        took = {}
        for method, more, change in CASES:
            remove(out)
            with changed(change):
                execute(f"python {METHODS[method]} {kind} {more} {written(0, out, 0)}")
            took[method, more, change] = np.median(curves.read(out)["seconds"])
        for what, seconds in took.items():
            ratios[what].append(seconds / took[DMD, "", NONE])
    rows = []
    for (method, more, change), many in ratios.items():
        about = {"method": method, "flags": more, "change": change}
        rows.append({**about, "cost": round(float(np.median(many)), 3)})
    write_json(COST_JSON, {"runs": rows})


def runs_of(path):
    """The rows of a json file of results; none where there is no file yet."""
    return read_json(path, "results", "runs")["runs"] if path.exists() else []


def keep(method, seed, path, more="", change=NONE):
    """Run a trial at its rate and put its row into the json file, if it is not there."""
    there = [what_of(row) for row in runs_of(path) if row["seed"] == seed]
    if (method, more, change) in there:
        return
    row = trial(method, seed, rate_of(method, more), more=more, change=change)
    row["curve"] = curve(Path(row["command"].split()[-1]))
    # Read once more: another may have been written meanwhile.
    write_json(path, {"runs": [*runs_of(path), row]})
