"""What the README shows of the experiment on digits: tables and pictures of its results."""

from operator import itemgetter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from families import load_teacher
from toy.claims import markdown, what_of
from toy.digits_changes import NONE
from toy.digits_experiment import (
    AFTER_ADP,
    COST_JSON,
    DIGITS_JSON,
    FOUR_STEPS,
    ITERATIONS,
    LEVERS,
    LEVERS_JSON,
    METHODS,
    WARMUP,
    curve,
    execute,
    pairs,
    runs_of,
    seeds_of,
    warmup_of,
)
from toy.digits_measure import NUMBERS, measure
from toy.digits_samples import REFERENCE, RESULTS, of_teacher, open_run, sample, teacher_samples
from toy.digits_teacher import held_out
from toy.plot import LOOK, logarithmic
from toy.run import by

COLUMNS = ("fd", "fd_named", "fd_any", "fd_real", "coverage", "diversity", "class_tv", "accuracy")
# {where a comparison of second stages starts: its methods}
STAGE_2 = {
    "one step, from ADP": AFTER_ADP,
    "one step, from the teacher": ("dmd", "step", "adm-recipe"),
}
MAPS_JSON = RESULTS / "digits-maps.json"  # of a teacher whose patches are one latent: see README
SHOWN = [*range(10), *range(500, 508)]  # the places, among NUMBERS, of the images in a picture


def readme():
    """Prints the README's tables of results/digits.json, -cost, -levers and -maps.json."""
    teacher = teacher_samples(load_teacher("digits"))
    runs, levers = runs_of(DIGITS_JSON), runs_of(LEVERS_JSON)
    tables = (
        table_of_methods(runs, teacher),
        table_at_equal_time([*runs, *levers]),
        table_of_levers([*runs, *levers], AFTER_ADP),
        table_of_levers([*runs, *levers], FOUR_STEPS, COLUMNS),
        table_of_levers(runs_of(MAPS_JSON), AFTER_ADP),
    )
    print("\n\n".join(map(markdown, tables)))


def table_of_methods(runs, teacher):
    """Rows: the teacher's own, then each method's mean and range over seeds."""
    yield "method", *COLUMNS, "iterations", "seconds"
    for kind in ("teacher, 28 steps", "teacher, 4 steps", "teacher, 1 step"):
        row = measure(teacher[kind], teacher[REFERENCE])
        yield kind, *(f"{row[name]:.3g}" for name in COLUMNS), "", ""
    for method in METHODS:
        mine = [run for run in runs if run["method"] == method]
        cells = [spread([run[name] for run in mine]) for name in COLUMNS]
        seconds = np.median([run["seconds"] for run in mine])
        yield method, *cells, f"{mine[0]['iterations']}", f"{seconds:.0f}"


def table_at_equal_time(runs):
    """Rows: where each of CASES stands when DMD as it is has done its iterations.

    By what its update costs (`cost`).
    """
    cost = "an update, DMD's being 1"
    yield "method", "what differs", cost, "iterations in DMD's time", "fd then"
    for case in runs_of(COST_JSON):
        mine = [run for run in runs if what_of(run) == what_of(case)]
        warmup = warmup_of(case["method"])
        then = min((ITERATIONS + WARMUP) / case["cost"], ITERATIONS + warmup)
        if mine:
            fd = spread([fd_at(then, run["curve"], warmup) for run in mine])
            yield case["method"], differs(case), f"{case['cost']:.2f}", f"{then:.0f}", fd


def fd_at(iteration, points, warmup):
    """fd between two points of a curve, on the line through their logarithms.

    While the student rests it is its start's.
    """
    iterations, fds, *_ = np.array(points).T  # (n,) each
    iterations = np.insert(iterations, 1, warmup)  # (n + 1,)
    fds = np.insert(fds, 1, fds[0])  # (n + 1,)
    return np.exp(np.interp(iteration, iterations, np.log(fds)))


def differs(row):
    """What sets a row of the results apart from its method as it is: flags, or a change."""
    return f"`{row['flags']}`" if row["flags"] else row["change"]


def spread(values):
    """A cell: mean and range, or the one value."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{np.mean(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def table_of_levers(runs, methods, columns=("fd", "fd_any")):
    """Rows: of these methods, and of those of LEVERS among the runs, mean and range over seeds."""
    yield "method", "what differs", "rate", "seeds", *columns
    wanted = [(method, "", NONE) for method in methods]
    wanted += [what for what in LEVERS if what[0] in methods]
    by_seed = sorted(runs, key=itemgetter("seed"))
    groups = by(by_seed, "method", "flags", "change")
    for what in wanted:
        for rate, mine in sorted(by(groups.get(what, []), "rate").items()):
            seeds = ", ".join(f"{run['seed']}" for run in mine)
            cells = [spread([run[name] for run in mine]) for name in columns]
            yield what[0], differs(mine[0]), f"{rate:g}", seeds, *cells


def picture():
    """results/digits-curves.png, of results alone, then results/digits.png, from the runs.

    Those that are not in out/ are made again, by their commands.
    """
    family = load_teacher("digits")
    teacher = teacher_samples(family)
    runs = runs_of(DIGITS_JSON)
    curves(runs, measure(teacher["teacher, 28 steps"], teacher[REFERENCE]))
    pairs()
    numbers = [NUMBERS[i] for i in SHOWN]
    rows = {"held-out images": some_held_out()}
    for kind in ("teacher, 28 steps", "teacher, 1 step"):
        rows[kind] = of_teacher(family, kind, numbers)
    for method in METHODS:
        first = method, seeds_of(method)[0]
        (run,) = [run for run in runs if (run["method"], run["seed"]) == first]
        for command in run["command"].split(" && "):
            folder = execute(command)
        rows[method] = sample(family, *open_run(folder, family), 0, numbers)
    sheet(rows, RESULTS / "digits.png")


def some_held_out():
    """(18, 3, 32, 32): a held-out image of each digit, then others."""
    images, labels = held_out()
    first = [int(np.flatnonzero(labels == digit)[0]) for digit in range(10)]
    others = np.random.default_rng(0).choice(len(labels), len(SHOWN) - 10, replace=False)
    return images[[*first, *others.tolist()]]


def sheet(rows, path):
    """A picture with one row of images for each {label: (N, 3, 32, 32)}.

    The same prompts and noises stand in the same columns: ten of one digit each, then "a
    handwritten digit".
    """
    figure = Figure(figsize=(14, 0.72 * len(rows) + 0.3))
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, x) in zip(axes, rows.items(), strict=True):
        grey = x.mean(1).clamp(-1, 1).numpy()  # (N, 32, 32)
        images = np.pad(grey, ((0, 0), (1, 1), (1, 1)), constant_values=1)  # (N, 34, 34)
        gap = np.ones((34, 12))
        axis.imshow(np.concatenate([*images[:10], gap, *images[10:]], 1), cmap="gray")
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    axes[0].set_title('"a handwritten zero" to "nine", then "a handwritten digit"', fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def curves(runs, teacher):
    """results/digits-curves.png: fd along stage 2, one line a seed, by iterations and by time.

    Time is iterations by what an update costs (`cost`). teacher: `measure`'s row of its own
    samples, dashed.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="col")
    costs = {what_of(case): case["cost"] for case in runs_of(COST_JSON)}
    shown = {}  # {label: line}, the same in every column
    for (upper, lower), (title, methods) in zip(axes.T, STAGE_2.items(), strict=True):
        for method in methods:
            from_teacher = method.removeprefix("adp+")
            after_adp = f"adp+{from_teacher}"  # an update takes as long
            name, colour = LOOK[from_teacher]
            style = {"color": colour, "lw": 1.2, "marker": ".", "ms": 5}
            for points in [run["curve"] for run in runs if run["method"] == method]:
                iterations, fds, *_ = np.array(points).T  # (n,) each
                (shown[name],) = upper.plot(iterations, fds, **style)
                lower.plot(iterations * costs[after_adp, "", NONE], fds, **style)
        style = {"color": "black", "lw": 0.8, "ls": "--"}
        for axis in (upper, lower):
            shown["teacher, 28 steps"] = axis.axhline(teacher["fd"], **style)
            logarithmic(axis)
        upper.set_title(title, fontsize=12)
        upper.set_xlabel("iterations")
        lower.set_xlabel("time, in updates of DMD")
    axes[0, 0].set_ylabel("fd (less is nearer)")
    axes[1, 0].set_ylabel("fd (less is nearer)")
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=5, fontsize=11)
    figure.savefig(RESULTS / "digits-curves.png", dpi=110)


def gain(first, second, out):
    """Draws fd along a run of adp.py and the run of adm.py that begins with it, in the file out.

    At their starts and their checkpoints; on a log scale, beside the teacher's own.
    """
    teacher = teacher_samples(load_teacher("digits"))
    own = measure(teacher["teacher, 28 steps"], teacher[REFERENCE])["fd"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    done = 0
    for folder, label, look in ((first, "ADP", "adp"), (second, "ADM, from there", "adm-recipe")):
        points = curve(Path(folder))
        iterations, fds, *_ = np.array(points).T  # (n,) each
        axis.plot(done + iterations, fds, color=LOOK[look][1], marker="o", label=label)
        done = iterations[-1]
    axis.axhline(own, color="black", ls="--", lw=1, label="the teacher in 28 steps, other noises")
    logarithmic(axis)
    axis.set_xlabel("iterations")
    axis.set_ylabel("Fréchet distance to the teacher's images")
    axis.legend()
    figure.savefig(out, dpi=110)
    print(f"{out}: the distance of a one-step student to its teacher, as it trains")
