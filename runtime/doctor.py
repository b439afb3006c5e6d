"""A doctor: what a run's log.csv shows to be wrong, what it means, and what to turn.

Every rule was written for runs that were broken on purpose (toy/broken.py); its bounds are ours.
They are ratios within the run, shares and normalised losses: no model's scale enters. A rule is
silent on fewer rows than it can tell from noise.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime import curves
from runtime.files import read_json

MOST = 3  # lines
FEW = 5  # rows whose mean is worth comparing
LEAST = 20  # rows without which nothing but skipped updates is judged
LONG = 100  # rows after which heads and fake score must have begun to learn
RATES = {"student": "--lr-student", "fake": "--lr-fake", "heads": "--lr-heads"}


class Finding(NamedTuple):
    """What is wrong with a run."""

    column: str  # of log.csv, which shows it
    seen: str
    means: str
    turn: str


class Case:
    """A run's log {column: (N,) float64, NaN where empty} and its settings."""

    def __init__(self, log, config):
        self.log = log
        self.config = config
        # The first iterations, in which the student meets no adversary: it rests, or regresses.
        self.alone = config.get("warmup" if config["stage"] == "adm" else "mse_iterations", 0)
        if config["loss"] == "mse":
            self.alone = len(log["iteration"])

    def early(self, name):
        """The finite values of a column, (n,), of those; `late`: of the others."""
        return self.finite(name, self.log["iteration"] <= self.alone)

    def late(self, name):
        return self.finite(name, self.log["iteration"] > self.alone)

    def finite(self, name, rows):
        column = self.log.get(name, np.full(len(rows), np.nan))
        return column[rows & np.isfinite(column)]


def parts(y):
    """The means of tenths of y (n,), each of five values or more: (p,). None of fewer than 20."""
    if len(y) < LEAST:
        return y[:0]
    tenths = np.array_split(y, min(10, len(y) // FEW))
    return np.array([tenth.mean() for tenth in tenths])


def last_half(y):
    """The last half of y (n,); nothing of fewer than 20."""
    return y[:0] if len(y) < LEAST else y[len(y) // 2 :]


def examine(folder):
    """The Findings on the run in a folder, the worst first; none if it is healthy.

    Raises BadInput where it has no log or no config.json, or where they are damaged.
    """
    log = curves.read(folder)
    config = read_json(Path(folder) / "config.json", "run", "config")["config"]
    case = Case(log, config)
    found = [rule(case) for rule in RULES]
    return [finding for finding in found if finding]


def advice(folder):
    """What `examine` finds, as at most three lines."""
    return [f"{f.seen}: {f.means}; {f.turn}" for f in examine(folder)[:MOST]]


# --- The rules, the most serious first: each a Finding, or None -----------------------------------


def skipped_updates(case):
    """In a twentieth of the iterations or more, and in three."""
    skipped = case.log["skipped"] > 0  # (N,)
    if skipped.sum() < 3 or skipped.mean() < 0.05:
        return None
    who = []  # whose gradient was finite elsewhere, and never there
    for name, rate in RATES.items():
        norm = case.log.get(f"grad_norm_{name}", np.array([np.nan]))
        if np.isfinite(norm).any() and not np.isfinite(norm[skipped]).any():
            who.append(rate)
    return Finding(
        "skipped",
        f"updates skipped in {skipped.sum()} of {len(skipped)} iterations",
        "a loss or gradient is not finite, a network has left its range",
        f"start again, or from an earlier checkpoint, with a lower {' or '.join(who) or 'rate'}",
    )


def student_runs_away(case):
    """x0_std a half above or below what it was before the adversary, or x0_mean half of it off."""
    spread, mean = parts(case.late("x0_std")), parts(case.late("x0_mean"))
    if not len(spread):
        return None
    first = {name: case.early(name)[-LEAST:] for name in ("x0_std", "x0_mean")}
    if len(first["x0_std"]) < FEW:
        first = {name: case.late(name)[:FEW] for name in first}
    start, start_mean = first["x0_std"].mean(), first["x0_mean"].mean()
    far = spread[np.abs(np.log(spread / start)).argmax()]
    far_mean = mean[np.abs(mean - start_mean).argmax()]
    why = ("the student runs away, and bad pictures follow", "lower --lr-student")
    if max(far / start, start / far) > 1.5:
        return Finding("x0_std", f"x0_std went from {start:.3g} to {far:.3g}", *why)
    if abs(far_mean - start_mean) > 0.5 * start:
        seen = f"x0_mean went from {start_mean:.3g} to {far_mean:.3g}, where x0_std is {start:.3g}"
        return Finding("x0_mean", seen, *why)
    return None


def regression_climbs(case):
    """ADP's loss_mse twice what it was at first, or its lowest tenth, while it is descended."""
    every = case.early("loss_mse")
    y = parts(every)
    if not len(y):
        return None
    lowest = min(every[0], y.min())  # the first: before any step
    if y[-1] < 2 * lowest:
        return None
    return Finding(
        "loss_mse",
        f"loss_mse rose from {lowest:.3g} to {y[-1]:.3g} in regression",
        "steps so long break the student, and what it was may not come back",
        "lower --lr-mse (without it, --lr-student)",
    )


def adversaries_undo_it(case):
    """ADP's loss_mse twice what regression left."""
    before, after = parts(case.early("loss_mse")), parts(case.late("loss_mse"))
    if not len(before) or not len(after) or after.max() < 2 * before[-1]:
        return None
    return Finding(
        "loss_mse",
        f"loss_mse rose from {before[-1]:.3g} to {after.max():.3g} under the adversaries",
        "they undo what regression has learnt",
        "lower --lr-student",
    )


def fake_is_lost(case):
    """dmd_loss above 2; a fake score that says x̂_0 leaves π/4, if distances are Gaussian."""
    y = parts(case.late("dmd_loss"))
    if not len(y) or y[-1] < 2:
        return None
    return Finding(
        "dmd_loss",
        f"dmd_loss is {y[-1]:.3g}",
        "the fake score is farther from the teacher than the student is, and follows nobody",
        "lower --lr-fake",
    )


def fake_falls_behind(case):
    """loss_fake three times its lowest tenth."""
    y = parts(case.finite("loss_fake", case.log["iteration"] > 0))
    if not len(y) or y[y.argmin() :].max() < 3 * y.min():
        return None
    return Finding(
        "loss_fake",
        f"loss_fake rose from {y.min():.3g} to {y[y.argmin() :].max():.3g}",
        "the student moves faster than the fake score can follow",
        "lower --lr-student, or raise --lr-fake or --ttur",
    )


def still_the_teacher(case):
    """Whether there is a dmd_loss that ends below a thousandth."""
    y = parts(case.late("dmd_loss"))
    return len(y) > 0 and y[-1] < 1e-3


def fake_is_the_teacher(case):
    """The same, for long. With guidance the two differ from the start."""
    y = case.late("dmd_loss")
    if len(y) < LONG or not still_the_teacher(case):
        return None
    return Finding(
        "dmd_loss",
        f"dmd_loss is {parts(y)[-1]:.2g}",
        "the fake score is still the teacher, and there is nothing to learn from",
        "raise --lr-fake",
    )


def heads_are_dead(case):
    """Three quarters of loss_discriminator's last half within a thousandth of their median.

    Though the fake score is not the teacher.
    """
    every = case.late("loss_discriminator")
    if len(every) < LONG or still_the_teacher(case):
        return None
    y = last_half(every)
    usual = np.median(y)
    if (np.abs(y - usual) < 1e-3 * usual).mean() < 0.75:
        return None
    return Finding(
        "loss_discriminator",
        f"loss_discriminator stays at {usual:.3f}",
        "D says the same of everything, its heads are dead",
        "lower --lr-heads",
    )


def discriminator_wins(case):
    """d_accuracy above 0.9 in the last half."""
    for name in ("d_accuracy", "d_accuracy_pixel"):
        y = last_half(case.late(name))
        if len(y) and y.mean() > 0.9:
            return Finding(
                name,
                f"{name} is {y.mean():.2f} in the last half",
                "D has won, and its gradient no longer says by how much",
                "raise --lr-student if the student stands still; otherwise lower --lr-heads",
            )
    return None


def discriminator_sees_nothing(case):
    """d_accuracy within 0.025 of chance in each quarter, of 2,000 samples or more.

    And loss_discriminator less than a tenth of dmd_loss below 2: there is something to be seen. A
    good student leaves D near chance too, but with it dmd_loss is small. ADP has no dmd_loss.
    """
    y = case.late("d_accuracy")
    distance = last_half(case.late("dmd_loss"))
    enough = len(y) * case.config["batch_size"] >= 2000 and len(distance)
    if not enough or heads_are_dead(case) or still_the_teacher(case):
        return None
    quarters = np.array([quarter.mean() for quarter in np.array_split(y, 4)])
    told = 2 - last_half(case.late("loss_discriminator")).mean()
    if np.abs(quarters - 0.5).max() > 0.025 or told > 0.1 * distance.mean():
        return None
    return Finding(
        "d_accuracy",
        f"d_accuracy stays at {y.mean():.3f}",
        "D sees next to nothing, though teacher and fake score differ; the student learns little",
        "raise --lr-heads, or --dt",
    )


def distance_rises(case):
    """dmd_loss three times what it had fallen to.

    After a fall by a third: at first it rises by itself, as the fake score leaves the teacher.
    """
    y = parts(case.late("dmd_loss"))
    before = case.early("dmd_loss")[-LEAST:]
    if len(y) and len(before):
        y = np.concatenate([[before.mean()], y])
    fallen = y[y < np.maximum.accumulate(y) / 1.5]
    if not len(fallen) or y[-1] < 3 * fallen.min() or still_the_teacher(case):
        return None
    return Finding(
        "dmd_loss",
        f"dmd_loss rose from {fallen.min():.3g} to {y[-1]:.3g}",
        "the student leaves the teacher's distribution",
        "lower --lr-student",
    )


RULES = (
    skipped_updates,
    student_runs_away,
    regression_climbs,
    adversaries_undo_it,
    fake_is_lost,
    fake_falls_behind,
    fake_is_the_teacher,
    heads_are_dead,
    discriminator_wins,
    discriminator_sees_nothing,
    distance_rises,
)
