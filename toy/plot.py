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

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.script import in_one_line, plain_parser
from runtime.settings import BadInput
from toy.gmm import load_mixture
from toy.run import by, fresh

# {method: (title, colour, line)}. Where lines coincide, a broken one shows what is under it.
LOOK = {
    "mse": ("regression (A1)", "tab:brown", "-"),
    "adp": ("ADP (A5)", "tab:green", "--"),
    "dmd": ("DMD (B2)", "tab:red", "-"),
    "step": ("step (ours)", "tab:olive", "-"),
    "adm-paper": ("ADM as published (B1)", "tab:orange", "-"),
    "adm-recipe": ("ADM, our recipe", "gold", "-"),
    "dmd2": ("DMD2", "tab:pink", "-."),
    "adp+dmd": ("ADP + DMD (B3)", "tab:purple", "-"),
    "adp+step": ("ADP + step (ours)", "tab:cyan", "-"),
    "adp+adm-paper": ("DMDX as published (B4)", "tab:blue", (0, (2, 2))),
    "adp+adm-recipe": ("DMDX, our recipe", "black", ":"),
}


def seeds(runs):
    """How many, as text: "5 seeds"."""
    n = len(by(runs, "seed"))
    return "1 seed" if n == 1 else f"{n} seeds"


def as_they_are(runs):
    """Those of toy/claims.py that are named otherwise than their method have other settings."""
    return [r for r in runs if r.get("name", r["method"]) == r["method"]]


def legend_below(figure, ax):
    """One legend of all of ax's lines or bars, under the whole figure, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        figure.legend(handles, labels, ncols=min(4, len(labels)), frameon=False, **where)


def samples(runs):
    """Target and each method's samples of the first seed; the numbers are means over seeds."""
    groups = by(runs, "method")
    mixture = load_mixture(runs[0]["mixture"], runs[0]["separation"])
    target = fresh(mixture, 0)[:1000].numpy()  # (1000, 2)
    panels = 1 + len(groups)
    columns = 4 if panels > 6 else min(3, panels)
    rows = -(-panels // columns)
    size = (3 * columns, 3.45 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    limit = 1.25 * np.abs(target).max()
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, ("target", *groups), strict=False):
        ax.set_axis_on()
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        points, colour, title = target, "black", "target"
        if name != "target":
            group = groups[name]
            points = group[0]["points"]
            title, colour, _ = LOOK[name]
            covered = np.mean([r["modes_covered"] for r in group])
            tv = np.mean([r["tv"] for r in group])
            said = f"{covered:g} of {group[0]['modes']} modes, TV {tv:.3f}"
            ax.set_xlabel(said, fontsize=13)
        ax.plot(*np.array(points).T, ".", ms=2.5, alpha=0.5, color=colour)  # of (1000, 2)
        ax.set_title(title, fontsize=13)
    figure.suptitle(f"points: one seed; numbers: means over {seeds(runs)}", fontsize=11)
    return figure


def bands(ax, groups, field):
    """Mean over seeds of a history's field and a band from least to greatest, a line a method."""
    for name, runs in groups.items():
        of_seeds = []
        for r in runs:
            of_seeds.append([p for p in r["history"] if field in p])
        if not of_seeds[0]:
            continue
        x = [p["iteration"] for p in of_seeds[0]]
        y = np.array([[p[field] for p in points] for points in of_seeds])  # (S, points)
        title, colour, line = LOOK[name]
        ax.plot(x, y.mean(0), label=title, color=colour, linestyle=line)
        ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
    ax.set_xlabel("student updates")


def log_axis(ax):
    """A logarithmic y axis whose ticks are plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def curves(runs):
    """TV and modes covered while the students train."""
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


def phase(runs):
    """TV at each separation, a line a method: from the teacher, and after ADP."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    places = {s: x for x, s in enumerate(sorted(by(runs, "separation")))}
    for ax, after_adp in zip(axes, (False, True), strict=True):
        shown = {}
        for name, group in by(runs, "method").items():
            on_pairs = name in ("mse", "adp") or name.startswith("adp+")
            if on_pairs == after_adp:
                shown[name] = group
        for i, (name, group) in enumerate(shown.items()):
            at = by(group, "separation")
            tv = [[r["tv"] for r in at[s]] for s in sorted(at)]
            x = [places[s] + 0.08 * (i - (len(shown) - 1) / 2) for s in sorted(at)]
            sd = [np.std(values, ddof=len(values) > 1) for values in tv]
            title, colour, _ = LOOK[name]
            look = {"color": colour, "marker": "o", "capsize": 3, "lw": 1.8, "ms": 5}
            ax.errorbar(x, [np.mean(v) for v in tv], sd, label=title, **look)
        ax.set_title("after ADP" if after_adp else "from the teacher", fontsize=12)
        ax.set_xlabel("separation of the modes: radius / σ")
        ax.set_xticks(list(places.values()), [f"{s:.3g}" for s in places])
        ax.grid(axis="y", alpha=0.3)
        if shown:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
            ax.legend(ncols=3, frameon=False, fontsize=9, **below)
    for ax in axes:
        ax.set_ylabel("TV (0 is perfect)")
        ax.set_ylim(0, None)
    updates = runs[0]["iterations"]
    what = f"mean over {seeds(runs)} after {updates:,} updates; bars: ± one sd"
    figure.suptitle(f"one step; {what}; points are moved aside a little", fontsize=11)
    return figure


def main(argv=None):
    parser = plain_parser(__doc__)
    parser.add_argument("files", nargs="+", help="results.json of a run, or files of toy/results/")
    parser.add_argument("--out", default="out/toy", help="folder of the pictures")
    with in_one_line("plot.py"):
        args = parser.parse_args(argv)
        draw(args.files, Path(args.out))


def draw(files, folder):
    """All pictures of these files, in the folder. Raises BadInput for a file without results."""
    everything, pictures = [], {}
    for path in map(Path, files):
        try:
            runs = as_they_are(json.loads(path.read_text())["runs"])
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
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    main()
