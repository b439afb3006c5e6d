"""Pictures of toy/run.py's and toy/claims.py's results, from their .json files alone.

    python toy/plot.py out/toy/results.json --out out/toy
    python toy/plot.py toy/results/headline.json toy/results/separation-*.json --out toy/results

Each file that holds training curves gives <file>.png (target and every method's samples) and
<file>-curves.png (TV and modes covered, of 4,096 samples); all files together phase.png if they
hold several separations. toy/gmm.py defines TV and modes covered.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.script import in_one_line, plain_parser
from runtime.settings import BadInput
from toy.gmm import load_mixture
from toy.run import by

# {method: (title, colour)} in every picture of toy/. The colour is that of the last stage.
LOOK = {
    "mse": ("regression", "tab:brown"),
    "adp": ("ADP", "tab:gray"),
    "dmd": ("DMD", "tab:blue"),
    "step": ("step (ours)", "tab:green"),
    "adm-paper": ("ADM as published", "tab:red"),
    "adm-recipe": ("ADM by our recipe", "tab:orange"),
    "dmd2": ("DMD2", "tab:pink"),
    "adp+dmd": ("ADP + DMD", "tab:blue"),
    "adp+step": ("ADP + step (ours)", "tab:green"),
    "adp+adm-paper": ("DMDX as published", "tab:red"),
    "adp+adm-recipe": ("DMDX by our recipe", "tab:orange"),
}


def seeds(runs):
    """How many, as text: "5 seeds"."""
    n = len(by(runs, "seed"))
    return "1 seed" if n == 1 else f"{n} seeds"


def by_start(runs):
    """{where students begin: {method: runs}}."""
    starts = {"from the teacher": {}, "after ADP": {}}
    for method, group in by(runs, "method").items():
        on_pairs = method in ("mse", "adp") or method.startswith("adp+")
        starts["after ADP" if on_pairs else "from the teacher"][method] = group
    return starts


def legend_below(ax):
    """Where it hides nothing."""
    ax.legend(ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def logarithmic(ax):
    """The y axis, with its numbers as one says them."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def samples(runs):
    """Target and each method's samples of the first seed; the numbers are means over seeds."""
    mixture = load_mixture(runs[0]["mixture"], runs[0]["separation"])
    target = mixture.sample(1000, torch.Generator().manual_seed(10**6)).numpy()  # (1000, 2)
    panels = [(target, "target", "black", "")]
    for method, group in by(runs, "method").items():
        covered = np.mean([r["modes_covered"] for r in group])
        tv = np.mean([r["tv"] for r in group])
        said = f"{covered:g} of {group[0]['modes']} modes, TV {tv:.3f}"
        panels.append((np.array(group[0]["points"]), *LOOK[method], said))
    columns = 4 if len(panels) > 6 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns, 3.45 * rows + 0.4), layout="constrained")
    limit = 1.25 * np.abs(target).max()
    for i, (points, title, colour, said) in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, i)
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        ax.plot(*points.T, ".", ms=2.5, alpha=0.5, color=colour)  # of (1000, 2)
        ax.set_title(title, fontsize=13)
        ax.set_xlabel(said, fontsize=13)
    figure.suptitle(f"points: one seed; numbers: means over {seeds(runs)}", fontsize=11)
    return figure


def curves(runs):
    """TV and modes covered while students train: mean over seeds, and a band of all of them."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for (upper, lower), (start, groups) in zip(axes.T, by_start(runs).items(), strict=True):
        for ax, field in ((upper, "tv"), (lower, "modes_covered")):
            for method, group in groups.items():
                histories = [r["history"] for r in group]
                x = [point["iteration"] for point in histories[0]]
                y = np.array([[p[field] for p in points] for points in histories])  # (S, points)
                title, colour = LOOK[method]
                ax.plot(x, y.mean(0), label=title, color=colour)
                ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
        upper.set_title(start)
        logarithmic(upper)
        lower.set_xlabel("student updates")
        legend_below(lower)
    axes[0, 0].set_ylabel("TV (0 is perfect)")
    axes[1, 0].set_ylabel("modes covered")
    said = f"of 4,096 samples; lines: mean over {seeds(runs)}; bands: their range"
    figure.suptitle(said, fontsize=11)
    return figure


def phase(runs):
    """TV at each separation, a line a method: from the teacher, and after ADP."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    separations = sorted(by(runs, "separation"))
    for ax, (start, groups) in zip(axes, by_start(runs).items(), strict=True):
        for i, (method, group) in enumerate(groups.items()):
            x, mean, sd = [], [], []
            for separation, some in sorted(by(group, "separation").items()):
                tv = [r["tv"] for r in some]
                x.append(separations.index(separation) + 0.08 * (i - (len(groups) - 1) / 2))
                mean.append(np.mean(tv))
                sd.append(np.std(tv, ddof=len(tv) > 1))
            title, colour = LOOK[method]
            look = {"color": colour, "marker": "o", "capsize": 3, "lw": 1.8, "ms": 5}
            ax.errorbar(x, mean, sd, label=title, **look)
        ax.set(title=start, xlabel="separation of the modes: radius / σ", ylim=(0, None))
        ax.set_xticks(range(len(separations)), [f"{s:.3g}" for s in separations])
        ax.grid(axis="y", alpha=0.3)
        legend_below(ax)
    axes[0].set_ylabel("TV (0 is perfect)")
    said = f"one step; mean over {seeds(runs)} after {runs[0]['iterations']:,} updates"
    figure.suptitle(f"{said}; bars: ± one sd; points are moved aside a little", fontsize=11)
    return figure


def main(argv=None):
    parser = plain_parser(__doc__)
    about = "results.json of a run, or files of toy/results/"
    parser.add_argument("files", nargs="+", type=Path, help=about)
    parser.add_argument("--out", type=Path, default="out/toy", help="folder of the pictures")
    with in_one_line("plot.py"):
        args = parser.parse_args(argv)
        draw(args.files, args.out)


def draw(files, folder):
    """All pictures of these files, in the folder. Raises BadInput for a file without results."""
    everything, pictures = [], {}
    for path in files:
        try:
            runs = json.loads(path.read_text())["runs"]
            # What claims.py names otherwise than its method has other settings.
            runs = [r for r in runs if r.get("name", r["method"]) == r["method"]]
            first = next(iter(by(runs, "mixture", "separation").values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as e:
            what = f"no results file of toy/run.py or toy/claims.py ({type(e).__name__})"
            raise BadInput(f"{path} is {what}") from None
        everything += runs
        if "history" in first[0]:
            of_file = {path.stem: samples(first), f"{path.stem}-curves": curves(first)}
            pictures = of_file | pictures  # of one name, the first is drawn
    for group in by(everything, "mixture", "iterations").values():
        if len(by(group, "separation")) > 1:
            pictures["phase"] = phase(group)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=90)


if __name__ == "__main__":
    main()
