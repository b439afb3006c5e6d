"""A run's curves: log.csv as a picture, of one run or of several."""

import csv
import functools
from pathlib import Path

import numpy as np

from runtime.files import aside, read_json
from runtime.settings import BadInput

# Columns of log.csv, in this order: what stands above its panel, whether its axis is logarithmic.
PANELS = {
    "loss_generator": ("loss_generator", False),
    "loss_discriminator": ("loss_discriminator   (2: knows nothing)", False),
    "d_accuracy": ("d_accuracy   (0.5: chance, 1: D has won)", False),
    "d_accuracy_pixel": ("d_accuracy_pixel", False),
    "loss_fake": ("loss_fake", True),
    "loss_mse": ("loss_mse", True),
    "dmd_loss": ("dmd_loss", True),
    "grad_norm_student": ("grad_norm_student   (dashed: clip)", True),
    "grad_norm_fake": ("grad_norm_fake   (dashed: clip)", True),
    "grad_norm_heads": ("grad_norm_heads   (dashed: clip)", True),
    "x0_mean": ("x0_mean", False),
    "x0_std": ("x0_std", False),
    "seconds": ("seconds an iteration", True),
}
LEVELS = {"loss_discriminator": 2.0, "d_accuracy": 0.5, "d_accuracy_pixel": 0.5}
ACROSS = 4  # panels
POINTS = 2000  # of a faint line: of a longer run's, every second or third iteration is drawn


def read(folder):
    """log.csv of a run's folder: {column: (N,) float64}, NaN where a cell is empty.

    A last row that was cut off, by a kill, is left out. Raises BadInput where there is no log, or
    where it is damaged.
    """
    path = Path(folder) / "log.csv"
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f, strict=True))
        if None in rows[-1].values():
            rows.pop()
        log = {name: np.array([number(row[name]) for row in rows]) for name in rows[0]}
        log["iteration"], log["skipped"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error):
        problem = "log.csv is missing, empty or damaged"
        raise BadInput(f"{folder} holds no run of adp.py or adm.py: {problem}") from None
    return log


def number(cell):
    """A cell's number: NaN where it is empty."""
    return float("nan") if cell == "" else float(cell)


def smooth(y, window):
    """The mean over `window` iterations around each, (N,), of those that are finite; else NaN."""
    finite = np.isfinite(y)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, y, 0.0)]))  # (N + 1,)
    counts = np.cumsum(np.concatenate([[0], finite]))  # (N + 1,)
    at = np.arange(len(y))
    low = np.maximum(at - window // 2, 0)
    high = np.minimum(at + window // 2 + 1, len(y))
    with np.errstate(invalid="ignore"):
        mean = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return np.where(finite, mean, np.nan)


def window_of(n):
    """Over how many of n iterations an average goes: a thirtieth, an odd number."""
    return 2 * (n // 60) + 1


def draw(folders, path):
    """Draw the curves of these runs' folders into the PNG file `path`, whole or not at all.

    A panel a column: each iteration faintly, the average over a window of them on top; red ticks
    where updates were skipped. Returns the Figure. Raises BadInput where there is no log.
    """
    from matplotlib.figure import Figure  # half a second, needed for this alone
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatter, MaxNLocator

    logs = {str(folder): read(folder) for folder in folders}
    panels = [name for name in PANELS if any(has(log, name) for log in logs.values())]
    down = -(-(len(panels) + 1) // ACROSS)  # one for the legend
    width, height = 4.2 * ACROSS, 2.65 * down  # inches, as the distances below
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(down, ACROSS, squeeze=False).flatten()
    edges = {"left": 0.6 / width, "right": 1 - 0.2 / width}
    edges |= {"bottom": 0.5 / height, "top": 1 - 0.4 / height}
    figure.subplots_adjust(**edges, wspace=0.22, hspace=0.36)
    last = max(log["iteration"].max() for log in logs.values())
    for axis in axes[: len(panels)][-ACROSS:]:
        axis.set_xlabel("iteration", fontsize=9)
    for axis, name in zip(axes, panels, strict=False):
        title, logarithmic = PANELS[name]
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(-0.02 * last, 1.02 * last)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.tick_params(which="both", labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            # Numbers between the powers of ten too, where there are few of those.
            wanted = LogFormatter(minor_thresholds=(1.5, 0.5))
            wanted.set_axis(axis.yaxis)
            axis.yaxis.set_minor_formatter(functools.partial(minor_label, wanted))
        else:
            axis.ticklabel_format(axis="y", useOffset=False)
        for i, (folder, log) in enumerate(logs.items()):
            if has(log, name):
                curve(axis, log, name, f"C{i}", logarithmic)
            levels(axis, folder, name, f"C{i}")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()

    lines = [Line2D([], [], color=f"C{i}", label=named(f)) for i, f in enumerate(logs)]
    windows = sorted({window_of(len(log["iteration"])) for log in logs.values()})
    if windows != [1]:
        means = " or ".join(map(str, windows))
        lines.append(Line2D([], [], color="0.4", label=f"mean over {means} iterations"))
        lines.append(Line2D([], [], color="0.4", alpha=0.3, label="each iteration"))
    if any((log["skipped"] > 0).any() for log in logs.values()):
        skips = {"marker": "|", "markersize": 9, "linestyle": "none", "color": "red"}
        lines.append(Line2D([], [], **skips, label="an update was skipped"))
    axes[len(panels)].legend(handles=lines, loc="center left", frameon=False, fontsize=10)
    with aside(path) as partial:
        figure.savefig(partial, format="png", dpi=90)
    return figure


def minor_label(wanted, value, position):
    """A number on a logarithmic axis, where the formatter `wanted` would write one."""
    wanted.set_locs(wanted.axis.get_minorticklocs())
    return f"{value:g}" if wanted(value, position) else ""


def has(log, name):
    """Whether there is anything to draw of a column."""
    return name in log and bool(np.isfinite(log[name]).any())


def named(folder):
    """A run's name in the legend: its last letters, where it is long."""
    return folder if len(folder) <= 36 else f"…{folder[-35:]}"


def curve(axis, log, name, color, logarithmic):
    """A column of a log: faintly each iteration, then the average, then what was skipped."""
    x, y = log["iteration"], log[name]
    if logarithmic:
        y = np.where(y > 0, y, np.nan)
    every = -(-len(x) // POINTS)
    # A single iteration is no line, nor is one between two that are missing.
    marker = "." if np.isfinite(y).sum() < 20 else None
    axis.plot(x[::every], y[::every], color=color, alpha=0.35, linewidth=0.8, marker=marker)
    axis.plot(x, smooth(y, window_of(len(x))), color=color, linewidth=1.6)
    skipped = x[log["skipped"] > 0]
    bottom = np.zeros(len(skipped))
    where = axis.get_xaxis_transform()
    axis.plot(skipped, bottom, "|", color="red", markersize=9, transform=where, clip_on=False)


def levels(axis, folder, name, color):
    """Dashed: a column's known level, or where this run's gradients are clipped, if it is near."""
    level = LEVELS.get(name)
    if name.startswith("d_accuracy"):
        axis.set_ylim(-0.03, 1.03)
    if level is not None:
        axis.axhline(level, color="0.5", linewidth=0.8, linestyle="--")
    if name.startswith("grad_norm"):
        low, high = axis.get_ylim()
        clip = clip_of(folder)
        if clip and low / 10 < clip < high * 10:
            axis.axhline(clip, color=color, linewidth=0.8, linestyle="--")


def clip_of(folder):
    """A run's --clip, or None where config.json does not tell."""
    try:
        config = read_json(Path(folder) / "config.json", "run", "config")["config"]
    except BadInput:
        return None
    clip = config.get("clip")
    return clip if isinstance(clip, float) else None
