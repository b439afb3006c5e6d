"""What the README shows of the experiment on digits: tables and pictures of its results."""

import numpy as np
from matplotlib.figure import Figure

from families import load_teacher
from runtime.files import read_json
from toy.digits_experiment import DIGITS_JSON, METHODS
from toy.digits_measure import METRICS, NUMBERS, judge, pixels
from toy.digits_samples import RESULTS, open_run, sample, teacher_samples
from toy.digits_teacher import scans

# {where a comparison of ADM with DMD starts: (ADM's method, DMD's)}
STAGE_2 = {
    "one step, from ADP": ("adp+adm", "adp+dmd"),
    "one step, from the teacher": ("adm", "dmd"),
    "four steps, from the teacher": ("adm, 4 steps", "dmd, 4 steps"),
}


def read_runs():
    """The rows of results/digits.json."""
    return read_json(DIGITS_JSON, "results", "runs")["runs"]


def readme():
    """Prints the README's tables of results/digits.json."""
    runs = read_runs()
    teacher = teacher_samples(load_teacher("digits"))
    print("\n".join(table_of_methods(runs, teacher)))
    print()
    print("\n".join(table_of_stage_2(runs)))


def table_of_methods(runs, teacher):
    """Lines: the teacher's own rows, then each method's mean and range over seeds."""
    names = METRICS[:-1]
    lines = [
        f"| method | {' | '.join(names)} | iterations |",
        "| --- " * (len(names) + 2) + "|",
    ]
    for kind in ("teacher, 28 steps", "teacher, 1 step"):
        row = judge(teacher[kind], teacher)
        cells = " | ".join(f"{row[name]:.3g}" for name in names)
        lines.append(f"| {kind} | {cells} | |")
    for method in METHODS:
        mine = [run for run in runs if run["method"] == method]
        cells = []
        for name in names:
            values = [run[name] for run in mine]
            cells.append(f"{np.mean(values):.3g} ({min(values):.3g}–{max(values):.3g})")
        lines.append(f"| {method} | {' | '.join(cells)} | {mine[0]['iterations']} |")
    return lines


def table_of_stage_2(runs):
    """Lines: where ADM and DMD started and where each ended, seed by seed."""
    runs = sorted(runs, key=lambda run: run["seed"])
    lines = [
        "| fd_teacher; coverage, of each seed | start | ADM | DMD |",
        "| --- " * 4 + "|",
    ]
    for title, (adm, dmd) in STAGE_2.items():
        of_adm = [run["curve"] for run in runs if run["method"] == adm]
        of_dmd = [run["curve"] for run in runs if run["method"] == dmd]
        starts = [curve[0] for curve in of_adm]
        ends = [[curve[-1] for curve in curves] for curves in (of_adm, of_dmd)]
        cells = " | ".join(distances_and_coverages(points) for points in (starts, *ends))
        lines.append(f"| {title} | {cells} |")
    return lines


def distances_and_coverages(points):
    """A cell of points [iteration, fd_teacher, coverage] of curves, one a seed."""
    distances = ", ".join(f"{distance:.1f}" for _, distance, _ in points)
    coverages = ", ".join(f"{coverage:.3f}" for _, _, coverage in points)
    return f"{distances}; {coverages}"


def picture():
    """results/digits-curves.png, from digits.json alone, then results/digits.png, from the runs."""
    family = load_teacher("digits")
    teacher = teacher_samples(family)
    runs = read_runs()
    curves(runs, judge(teacher["teacher, 28 steps"], teacher))
    rows = {"held-out scans": some_scans()}
    for kind in ("teacher, 28 steps", "teacher, 1 step"):
        rows[kind] = teacher[kind][:20]
    order = list(METHODS)
    for run in sorted(runs, key=lambda run: order.index(run["method"])):
        if run["seed"] == 0:
            student = open_run(run["command"].split()[-1], family)
            rows[run["method"]] = sample(family, *student, 0, NUMBERS[:20])
    sheet(rows, RESULTS / "digits.png")


def some_scans():
    """(20, 64): two held-out scans of each digit, 0 to 9 and again."""
    images, labels = scans()[1]
    places = [np.flatnonzero(labels == digit)[:2] for digit in range(10)]
    return pixels(images[np.stack(places, 1).flatten()])


def sheet(rows, path):
    """A picture with one row of images for each {label: (N, 64)}.

    The same prompts and noises stand in the same columns.
    """
    figure = Figure(figsize=(11, 0.62 * len(rows)))
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, x) in zip(axes, rows.items(), strict=True):
        gutters = ((0, 0), (1, 1), (1, 1))  # a white pixel on each side of each image
        images = np.pad(x.reshape(-1, 8, 8), gutters)  # (N, 10, 10)
        axis.imshow(np.concatenate(list(images), 1), cmap="gray_r", vmin=0, vmax=16)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def curves(runs, teacher):
    """results/digits-curves.png: fd_teacher and coverage along stage 2, one line a seed.

    teacher: `judge`'s row of its own samples, dashed.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey="row")
    shown = {}  # {label: line}, the same in every column
    for (distance, coverage), (title, methods) in zip(axes.T, STAGE_2.items(), strict=True):
        for name, method, colour in zip(("ADM", "DMD"), methods, ("C3", "C0"), strict=True):
            style = {"color": colour, "lw": 1.2, "marker": ".", "ms": 4}
            for points in [run["curve"] for run in runs if run["method"] == method]:
                iterations, distances, coverages = np.array(points).T  # (n,) each
                share = iterations / iterations[-1]
                (shown[name],) = distance.plot(share, distances, **style)
                coverage.plot(share, coverages, **style)
        style = {"color": "black", "lw": 0.8, "ls": "--"}
        shown["teacher, 28 steps"] = distance.axhline(teacher["fd_teacher"], **style)
        coverage.axhline(teacher["coverage"], **style)
        distance.set_title(title, fontsize=10)
        distance.set_yscale("log")
        coverage.set_xlabel("share of the stage's iterations")
    axes[0, 0].set_ylabel("fd_teacher (less is nearer)")
    axes[1, 0].set_ylabel("coverage")
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(RESULTS / "digits-curves.png", dpi=110)
