"""Pictures of toy/run.py's and toy/claims.py's results, from their .json files alone.

    python toy/plot.py out/toy/results.json --out out/toy
    python toy/plot.py toy/results/{headline,grid25,phase,ablations}.json --out toy/results

Each file gives what it can: <file>.png (target and every method's samples), <file>-curves.png (TV and modes covered),
<file>-dmd-loss.png and <file>-gradient.png; all files together phase.png if they hold several separations, and ablations.png if
they hold named runs. divergences.png needs no file. Bands and bars are one sd over seeds.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy.gmm import Mixture, divergences

COLOUR = {"mse": "tab:brown", "adp": "tab:green", "dmd": "tab:red", "adm": "tab:orange", "adp+dmd": "tab:purple",
          "adp+adm": "tab:blue", "dmd2": "tab:pink"}
TITLE = {"mse": "MSE (A1)", "adp": "ADP (A5)", "dmd": "DMD (B2)", "adm": "ADM (B1)", "adp+dmd": "ADP + DMD (B3)",
         "adp+adm": "DMDX: ADP + ADM (B4)", "dmd2": "DMD2"}


def by(runs, *fields):
    """{value (or values) of the fields: runs}, in the order of appearance."""
    groups = {}
    for r in runs:
        groups.setdefault(r[fields[0]] if len(fields) == 1 else tuple(r[f] for f in fields), []).append(r)
    return groups


def first_world(results):
    """The runs of the file's first separation."""
    return next(iter(by(results["runs"], "mixture", "separation").values()))


def headline(results):
    """Target and each method's samples of the first seed; the numbers are means over seeds."""
    groups = by(first_world(results), "method")
    columns = 4
    rows = -(-(1 + len(groups)) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.45 * rows), squeeze=False)
    limit = 1.25 * np.abs(results["target"]).max()
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (name, runs) in zip(axes.flat, [("target", None), *groups.items()]):
        ax.set_axis_on()
        x = np.array(runs[0]["points"] if runs else results["target"])  # (1000, 2)
        ax.plot(*x.T, ".", ms=2.5, alpha=0.5, color=COLOUR[name] if runs else "black")
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        ax.set_title(TITLE[name] if runs else "target", fontsize=13)
        if runs:
            covered, tv = ([r[field] for r in runs] for field in ("modes_covered", "tv"))
            ax.set_xlabel(f"{np.mean(covered):g} of {runs[0]['modes']} modes, TV {np.mean(tv):.3f}", fontsize=13)
    return figure


def bands(ax, groups, field, of=lambda r: True):
    """Mean and ± sd band over seeds of a history's field, one line a method."""
    for name, runs in groups.items():
        points = [[p for p in r["history"] if field in p and of(p)] for r in runs]
        if not points[0]:
            continue
        x, y = [p["iteration"] for p in points[0]], np.array([[p[field] for p in seed] for seed in points])  # (S, points)
        ax.plot(x, y.mean(0), color=COLOUR[name], label=TITLE[name])
        ax.fill_between(x, y.min(0) if ax.get_yscale() == "log" else y.mean(0) - y.std(0),
                        y.max(0) if ax.get_yscale() == "log" else y.mean(0) + y.std(0), color=COLOUR[name], alpha=0.2, lw=0)
    ax.set_xlabel("student updates")


def curves(results):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    for ax, field, label in zip(axes, ("tv", "modes_covered"), ("TV", "modes covered")):
        bands(ax, by(first_world(results), "method"), field)
        ax.set_ylabel(label)
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=8)
    return figure


def dmd_loss(results):
    """The loss that ADM logs and never optimises."""
    figure, ax = plt.subplots(figsize=(6.5, 4))
    ax.set_yscale("log")
    groups = by(first_world(results), "method")
    bands(ax, {k: groups[k] for k in ("dmd", "adp+dmd", "adm", "adp+adm") if k in groups}, "dmd_loss")
    ax.set(ylabel="DMD loss (range over seeds)", title="DMD loss: logged under ADM, optimised under DMD")
    ax.legend(fontsize=8)
    return figure


def gradient(results):
    """The student's gradient norm in stage 2, with and without ADP. The two losses have different units: compare shapes."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    groups = by(first_world(results), "method")
    for ax, pair in zip(axes, (("dmd", "adp+dmd"), ("adm", "adp+adm"))):
        ax.set_yscale("log")
        bands(ax, {k: groups[k] for k in pair if k in groups}, "grad_norm", of=lambda p: "dmd_loss" in p)
        ax.set_ylabel("gradient norm of the student (range over seeds)")
        if ax.lines:
            ax.legend(fontsize=8)
    return figure


def phase(runs):
    """TV against separation, one curve a method; under it the share of modes covered."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    for ax, field, label in zip(axes, ("tv", "modes_covered"), ("TV", "modes covered")):
        for name, group in by(runs, "method").items():
            cells = sorted(by(group, "separation").items())
            x, y = [s for s, _ in cells], [[r[field] for r in at] for _, at in cells]
            mean, sd = ([f(v) for v in y] for f in (np.mean, np.std))
            ax.errorbar(x, mean, sd, marker="o", ms=4, capsize=2, color=COLOUR[name], label=TITLE[name])
        ax.set(xlabel="separation: radius / σ", ylabel=label)
    axes[0].legend(fontsize=8)
    return figure


def ablations(runs):
    """One bar a named run, its TV."""
    groups = by(runs, "name")
    figure, ax = plt.subplots(figsize=(8, 0.32 * len(groups) + 1))
    tv = [[r["tv"] for r in group] for group in groups.values()]
    ax.barh(list(groups), [np.mean(v) for v in tv], xerr=[np.std(v, ddof=1) for v in tv], capsize=2,
            color=[COLOUR[group[0]["method"]] for group in groups.values()])
    for i, (v, group) in enumerate(zip(tv, groups.values())):
        modes = np.mean([r["modes_covered"] for r in group])
        ax.text(np.mean(v) + np.std(v, ddof=1) + 0.005, i, f"{np.mean(v):.3f}, {modes:g} modes", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="TV", xlim=(0, 1.25 * max(map(np.mean, tv)) + 0.05))
    return figure


def divergence():
    """Reverse KL and TV by quadrature, in one dimension: a student slides off two modes, and one at 0 widens across them."""
    target, x = Mixture([[-2.0], [2.0]], [1, 1], 0.5), torch.linspace(-30, 50, 40001)[:, None]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    sweeps = (("student's mean (its σ is 0.5)", np.linspace(0, 12, 61), lambda c: Mixture([[c]], [1], 0.5)),
              ("student's σ (its mean is 0: dashed; on a mode: solid)", np.linspace(0.2, 5, 49), None))
    for ax, (label, values, student) in zip(axes, sweeps):
        other = ax.twinx()
        widening = [(lambda c: Mixture([[0.0]], [1], c), "--"), (lambda c: Mixture([[2.0]], [1], c), "-")]
        students = [(student, "-")] if student else widening
        for make, style in students:
            kl, tv = np.array([divergences(target, make(float(c)), x) for c in values]).T
            ax.plot(values, kl, style, color="tab:red")
            other.plot(values, tv, style, color="tab:blue")
            for axis, y, colour in ((ax, kl, "tab:red"), (other, tv, "tab:blue")):
                if not student:  # where each divergence would stop
                    axis.plot(values[y.argmin()], y.min(), "o", color=colour)
        ax.set_xlabel(label)
        ax.set_ylabel("reverse KL", color="tab:red")
        other.set_ylabel("TV", color="tab:blue")
        other.set_ylim(0, 1.05)
    axes[0].set_title("sliding off a target with modes at ±2, σ 0.5", fontsize=10)
    axes[1].set_title("widening across it (dots: least)", fontsize=10)
    axes[1].set_ylim(0, 12)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="results.json of a run, or files of toy/results/")
    parser.add_argument("--out", default="out/toy", help="folder of the pictures")
    args, runs, pictures = parser.parse_args(argv), [], {"divergences": divergence()}
    for path in map(Path, args.files):
        try:
            results = json.loads(path.read_text())
            runs += results["runs"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            parser.exit(2, f"plot.py: {path} is no results file of toy/run.py ({type(e).__name__})\n")
        if "target" in results and results["runs"]:
            new = {path.stem: headline(results), f"{path.stem}-curves": curves(results)}
            if any("dmd_loss" in p for r in results["runs"] for p in r["history"]):
                new |= {f"{path.stem}-dmd-loss": dmd_loss(results), f"{path.stem}-gradient": gradient(results)}
            pictures = new | pictures  # of two files of one name, the first is drawn
    plain = [r for r in runs if "name" not in r]
    for mixture, group in by(plain, "mixture").items():
        if len(by(group, "separation")) > 1:
            # At one separation only runs of the same length belong together.
            pictures["phase"] = phase([r for r in group if r["iterations"] == min(q["iterations"] for q in group)])
    if len(plain) < len(runs):
        pictures["ablations"] = ablations([r for r in runs if "name" in r])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.tight_layout()
        figure.savefig(Path(args.out) / f"{name}.png", dpi=90)


if __name__ == "__main__":
    main()
