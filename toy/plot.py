"""Pictures of toy/run.py's and toy/claims.py's results, from their .json files alone.

    python toy/plot.py out/toy/results.json --out out/toy
    python toy/plot.py toy/results/{headline,grid25,phase,ablations}.json --out toy/results

Each file gives what it can: <file>.png (target and every method's samples), <file>-curves.png (TV
and modes covered), <file>-dmd-loss.png and <file>-gradient.png; all files together phase.png if
they hold several separations, and ablations.png if they hold named runs. divergences.png needs no
file. toy/gmm.py defines TV and modes covered.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy.gmm import Mixture, divergences

COLOUR = {
    "mse": "tab:brown",
    "adp": "tab:green",
    "dmd": "tab:red",
    "adm": "tab:orange",
    "adp+dmd": "tab:purple",
    "adp+adm": "tab:blue",
    "dmd2": "tab:pink",
    "step": "tab:olive",
    "adp+step": "tab:cyan",
}
# Where lines coincide, a broken one shows what is under it.
STYLE = {"mse": "-", "adp": "--", "adp+dmd": "-", "adp+adm": (0, (2, 2)), "dmd2": "-."}
TITLE = {
    "mse": "MSE (A1)",
    "adp": "ADP (A5)",
    "dmd": "DMD (B2)",
    "adm": "ADM (B1)",
    "adp+dmd": "ADP + DMD (B3)",
    "adp+adm": "DMDX: ADP + ADM (B4)",
    "dmd2": "DMD2",
    "step": "step (ours)",
    "adp+step": "ADP + step (ours)",
}


def by(runs, *fields):
    """{value (or values) of the fields: runs}, in the order of appearance."""
    groups = {}
    for r in runs:
        values = tuple(r[f] for f in fields)
        key = values[0] if len(values) == 1 else values
        groups.setdefault(key, []).append(r)
    return groups


def seeds(runs):
    """How many, as text: "5 seeds"."""
    n = len(by(runs, "seed"))
    return "1 seed" if n == 1 else f"{n} seeds"


def first_world(results):
    """The runs of the file's first separation."""
    return next(iter(by(results["runs"], "mixture", "separation").values()))


def legend_below(figure, ax):
    """One legend of all of ax's lines or bars, under the whole figure, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        figure.legend(handles, labels, ncols=min(4, len(labels)), frameon=False, **where)


def headline(results):
    """Target and each method's samples of the first seed; the numbers are means over seeds."""
    runs = first_world(results)
    groups = by(runs, "method")
    panels = 1 + len(groups)
    columns = 4 if panels > 6 else min(3, panels)
    rows = -(-panels // columns)
    size = (3 * columns, 3.45 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    limit = 1.25 * np.abs(results["target"]).max()
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, ("target", *groups), strict=False):
        ax.set_axis_on()
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        points, colour, title = results["target"], "black", "target"
        if name != "target":
            group = groups[name]
            points, colour, title = group[0]["points"], COLOUR[name], TITLE[name]
            covered = np.mean([r["modes_covered"] for r in group])
            tv = np.mean([r["tv"] for r in group])
            said = f"{covered:g} of {group[0]['modes']} modes, TV {tv:.3f}"
            ax.set_xlabel(said, fontsize=13)
        ax.plot(*np.array(points).T, ".", ms=2.5, alpha=0.5, color=colour)  # of (1000, 2)
        ax.set_title(title, fontsize=13)
    figure.suptitle(f"points: one seed; numbers: means over {seeds(runs)}", fontsize=11)
    return figure


def bands(ax, groups, field, wanted=lambda point: True):
    """Mean over seeds of a history's field and a band from least to greatest, a line a method."""
    for name, runs in groups.items():
        of_seeds = []
        for r in runs:
            of_seeds.append([p for p in r["history"] if field in p and wanted(p)])
        if not of_seeds[0]:
            continue
        x = [p["iteration"] for p in of_seeds[0]]
        y = np.array([[p[field] for p in points] for points in of_seeds])  # (S, points)
        line = {"color": COLOUR[name], "linestyle": STYLE.get(name, "-")}
        ax.plot(x, y.mean(0), label=TITLE[name], **line)
        ax.fill_between(x, y.min(0), y.max(0), color=COLOUR[name], alpha=0.15, lw=0)
    ax.set_xlabel("student updates")


def log_axis(ax):
    """A logarithmic y axis whose ticks are plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def curves(results):
    """TV and modes covered while the students train."""
    runs = first_world(results)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    log_axis(axes[0])
    for ax, field, label in zip(
        axes, ("tv", "modes_covered"), ("TV", "modes covered"), strict=True
    ):
        bands(ax, by(runs, "method"), field)
        ax.set_ylabel(label)
    figure.suptitle(f"lines: mean over {seeds(runs)}; bands: their range", fontsize=11)
    legend_below(figure, axes[0])
    return figure


def dmd_loss(results):
    """The loss that ADM logs and never optimises."""
    runs = first_world(results)
    groups = by(runs, "method")
    wanted = ("dmd", "adp+dmd", "adm", "adp+adm")
    figure, ax = plt.subplots(figsize=(7, 4.5))
    log_axis(ax)
    bands(ax, {name: groups[name] for name in wanted if name in groups}, "dmd_loss")
    ax.set_ylabel(f"DMD loss: mean and range of {seeds(runs)}")
    ax.set_title("DMD loss: logged under ADM, optimised under DMD", fontsize=11)
    legend_below(figure, ax)
    return figure


def gradient(results):
    """The student's gradient norm in stage 2, with and without ADP.

    The two losses have different units: compare shapes.
    """
    runs = first_world(results)
    groups = by(runs, "method")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for ax, pair in zip(axes, (("dmd", "adp+dmd"), ("adm", "adp+adm")), strict=True):
        log_axis(ax)
        chosen = {name: groups[name] for name in pair if name in groups}
        bands(ax, chosen, "grad_norm", wanted=lambda point: "dmd_loss" in point)
        ax.set_ylabel("student's gradient norm")
        if ax.lines:
            ax.legend(loc="lower left")
    figure.suptitle(f"lines: mean over {seeds(runs)}; bands: their range", fontsize=11)
    return figure


def phase(runs):
    """TV and modes covered at each separation, a bar a method: as lines, half of them coincide."""
    figure, axes = plt.subplots(2, 1, figsize=(11, 6.5), sharex=True)
    separations = sorted(by(runs, "separation"))
    groups = by(runs, "method")
    width = 0.8 / len(groups)
    for ax, field, label in zip(
        axes, ("tv", "modes_covered"), ("TV", "modes covered"), strict=True
    ):
        for i, (name, group) in enumerate(groups.items()):
            at = by(group, "separation")
            values = [[r[field] for r in at[s]] for s in separations if s in at]
            x = [k for k, s in enumerate(separations) if s in at]
            mean, sd = np.array([(np.mean(v), np.std(v, ddof=len(v) > 1)) for v in values]).T
            shifted = np.array(x) + (i - (len(groups) - 1) / 2) * width
            bar = {"color": COLOUR[name], "label": TITLE[name], "capsize": 2}
            ax.bar(shifted, mean, width, yerr=sd, error_kw={"lw": 1}, **bar)
        ax.set_ylabel(label)
    axes[1].set_xticks(range(len(separations)), [f"{s:.3g}" for s in separations])
    axes[1].set_xlabel("separation of the modes: radius / σ")
    updates = runs[0]["iterations"]
    said = f"mean over {seeds(runs)} after {updates} updates; thin lines: ± one sd"
    axes[0].set_title(said, fontsize=11)
    legend_below(figure, axes[0])
    return figure


def ablations(runs):
    """One bar a named run, its TV."""
    groups = by(runs, "name")
    figure, ax = plt.subplots(figsize=(8, 0.32 * len(groups) + 1.4))
    seen = set()
    for i, group in enumerate(groups.values()):
        method = group[0]["method"]
        tv = [r["tv"] for r in group]
        mean, sd = np.mean(tv), np.std(tv, ddof=len(tv) > 1)
        label = None if method in seen else TITLE[method]
        seen.add(method)
        ax.barh(i, mean, xerr=sd, capsize=2, color=COLOUR[method], label=label)
        modes = np.mean([r["modes_covered"] for r in group])
        said = f"{mean:.3f}, {modes:g} modes"
        ax.text(mean + sd + 0.005, i, said, va="center", fontsize=9)
    ax.set_yticks(range(len(groups)), list(groups))
    ax.invert_yaxis()
    greatest = max(np.mean([r["tv"] for r in group]) for group in groups.values())
    said = f"TV (mean over {seeds(runs)}; thin lines: ± one sd), modes covered"
    ax.set(xlabel=said, xlim=(0, 1.3 * greatest + 0.05))
    legend_below(figure, ax)
    return figure


def divergence():
    """Reverse KL and TV by quadrature, in one dimension.

    A student slides off two modes, and one at 0 or on a mode widens across them.
    """
    target = Mixture([[-2.0], [2.0]], [1, 1], 0.5)
    x = torch.linspace(-30, 50, 40001)[:, None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))

    def draw(ax, other, values, students, style):
        """The two divergences of students, one a value; returns them, (values,) each."""
        kl, tv = np.array([divergences(target, student, x) for student in students]).T
        ax.plot(values, kl, style, color="tab:red")
        other.plot(values, tv, style, color="tab:blue")
        return kl, tv

    def labelled(ax, what):
        """A second axis for TV, and what the axes are."""
        other = ax.twinx()
        ax.set_xlabel(what)
        ax.set_ylabel("reverse KL", color="tab:red")
        other.set_ylabel("TV", color="tab:blue")
        other.set_ylim(0, 1.05)
        return other

    means = np.linspace(0, 12, 61)
    other = labelled(left, "student's mean (its σ is 0.5)")
    draw(left, other, means, [Mixture([[float(m)]], [1], 0.5) for m in means], "-")
    left.set_title("sliding off a target with modes at ±2, σ 0.5", fontsize=11)

    stds = np.linspace(0.2, 5, 49)
    other = labelled(right, "student's σ (its mean is 0: dashed; on a mode: solid)")
    for mean, style in ((0.0, "--"), (2.0, "-")):
        students = [Mixture([[mean]], [1], float(s)) for s in stds]
        kl, tv = draw(right, other, stds, students, style)
        right.plot(stds[kl.argmin()], kl.min(), "o", color="tab:red")
        other.plot(stds[tv.argmin()], tv.min(), "o", color="tab:blue")
    right.set_title("widening across it (dots: where each divergence would stop)", fontsize=11)
    right.set_ylim(0, 12)
    return figure


def of_file(name, results):
    """{picture's name: figure} of one results file that draws samples."""
    pictures = {name: headline(results), f"{name}-curves": curves(results)}
    if any("dmd_loss" in p for r in results["runs"] for p in r["history"]):
        pictures[f"{name}-dmd-loss"] = dmd_loss(results)
        pictures[f"{name}-gradient"] = gradient(results)
    return pictures


def main(argv=None):
    how = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**how)
    parser.add_argument("files", nargs="+", help="results.json of a run, or files of toy/results/")
    parser.add_argument("--out", default="out/toy", help="folder of the pictures")
    args = parser.parse_args(argv)
    runs, pictures = [], {"divergences": divergence()}
    for path in map(Path, args.files):
        try:
            results = json.loads(path.read_text())
            runs += results["runs"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            what = f"no results file of toy/run.py ({type(e).__name__})"
            parser.exit(2, f"plot.py: {path} is {what}\n")
        if "target" in results and results["runs"]:
            pictures = of_file(path.stem, results) | pictures  # of one name, the first is drawn
    plain = [r for r in runs if "name" not in r]
    for group in by(plain, "mixture").values():
        if len(by(group, "separation")) > 1:
            # At one separation only runs of the same length belong together.
            least = min(r["iterations"] for r in group)
            pictures["phase"] = phase([r for r in group if r["iterations"] == least])
    if len(plain) < len(runs):
        pictures["ablations"] = ablations([r for r in runs if "name" in r])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.tight_layout()
        figure.savefig(Path(args.out) / f"{name}.png", dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    main()
