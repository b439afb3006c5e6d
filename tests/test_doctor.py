"""The doctor: speaks of a run that is broken, says what to turn, and is silent on a healthy one."""

import csv
import json
import re

import numpy as np
import pytest
from conftest import ROOT, call
from PIL import Image

import adm
import tools.curves
from runtime import doctor
from toy import broken

ADM = {"stage": "adm", "loss": "adm", "warmup": 60, "batch_size": 16}
ADP = {"stage": "adp", "loss": "adp", "mse_iterations": 120, "batch_size": 16}
MSE = {**ADP, "loss": "mse"}


def healthy(config, n=240, seed=0):
    """Columns (n,) as noisy as a real log's; the fake score leaves the teacher at the start."""
    rng = np.random.default_rng(seed)

    def noisy(level, share):
        return level * (1 + share * rng.normal(size=n))

    alone = np.arange(1, n + 1) <= config.get("warmup", config.get("mse_iterations"))
    columns = {
        "loss_fake": noisy(0.37, 0.25),
        "dmd_loss": noisy(0.2 * np.minimum(1, np.arange(n) / 30), 0.4),
        "loss_mse": noisy(0.05 + 0.15 * np.exp(-np.arange(n) / 40), 0.2),
        "d_accuracy": 0.55 + 0.05 * rng.normal(size=n),
        "loss_discriminator": noisy(1.9, 0.02),
        "grad_norm_student": np.where(alone, np.nan, noisy(1.9, 0.3)),
        "grad_norm_fake": noisy(0.7, 0.2),
        "grad_norm_heads": noisy(1.5, 0.3),
        "x0_mean": 0.01 * rng.normal(size=n),
        "x0_std": noisy(0.93 + 0.1 * np.arange(n) / n, 0.05),
        "skipped": np.zeros(n),
    }
    if config["stage"] == "adm":
        del columns["loss_mse"]
    else:
        del columns["loss_fake"], columns["dmd_loss"], columns["grad_norm_fake"]
        columns["d_accuracy_pixel"] = columns["d_accuracy"].copy()
        columns["d_accuracy"][alone] = columns["loss_discriminator"][alone] = np.nan
        columns["grad_norm_student"] = noisy(0.6, 0.2)
    return columns


def examined(folder, config, columns, scale=1.0):
    """What the doctor finds in this run, whose latents are `scale` as large."""
    columns = dict(columns)
    for name in ("x0_mean", "x0_std"):
        columns[name] = columns[name] * scale
    for name in ("loss_fake", "loss_mse"):
        if name in columns:
            columns[name] = columns[name] * scale**2
    n = len(columns["x0_std"])
    rows = zip(range(1, n + 1), *columns.values(), strict=True)
    folder.mkdir(exist_ok=True)
    with open(folder / "log.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["iteration", *columns])
        writer.writerows([["" if np.isnan(x) else x for x in row] for row in rows])
    (folder / "config.json").write_text(json.dumps({"config": config}))
    return doctor.examine(folder)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("config", [ADM, ADP, MSE, {**ADM, "warmup": 0}])
def test_silence_on_a_healthy_run(tmp_path, config, scale):
    for seed in range(5):
        for n in (2, 20, 50, 240, 1000):
            assert examined(tmp_path / "run", config, healthy(config, n, seed), scale) == []


def test_silence_on_dmd_which_has_no_discriminator(tmp_path):
    columns = healthy(ADM)
    for name in ("d_accuracy", "loss_discriminator", "grad_norm_heads"):
        columns[name] = np.full(240, np.nan)
    assert examined(tmp_path / "run", {**ADM, "loss": "dmd"}, columns) == []


def from_row(row, last, first=1.0):
    """A change of a column: from this row on it is multiplied by `first` to `last`, a line."""

    def change(y):
        factor = np.ones(len(y))
        factor[row:] = np.linspace(first, last, len(y) - row)
        return y * factor

    return change


CHANCE = {"d_accuracy": lambda y: y - 0.05, "loss_discriminator": lambda y: 1.99 + (y - 1.9) / 8}
FAULTS = {  # what the doctor is to turn: of which run, which columns are how
    "lower --lr-student, x0_std": (ADM, {"x0_std": from_row(60, 3)}),
    "lower --lr-student, x0_std shrinks": (ADM, {"x0_std": from_row(60, 0.3)}),
    "lower --lr-student, x0_mean": (ADM, {"x0_mean": from_row(60, 200)}),
    "lower --lr-student, or raise --lr-fake": (ADM, {"loss_fake": from_row(60, 9)}),
    "lower --lr-student, dmd_loss": (ADM, {"dmd_loss": from_row(80, 5, 0.1)}),
    "lower --lr-fake": (ADM, {"dmd_loss": lambda y: y + 3}),
    "raise --lr-fake": (ADM, {"dmd_loss": lambda y: y * 1e-5}),
    "lower --lr-heads": (ADM, {"loss_discriminator": lambda y: 2 + (y > 1.97)}),  # but now and then
    "otherwise lower --lr-heads": (ADM, {"d_accuracy": lambda y: 0 * y + 0.99}),
    "otherwise lower --lr-heads, pixel": (ADP, {"d_accuracy_pixel": lambda y: 0 * y + 0.99}),
    "raise --lr-heads": (ADM, CHANCE),
    "lower --lr-mse": (MSE, {"loss_mse": from_row(100, 5)}),
    "lower --lr-mse, at once": (ADP, {"loss_mse": lambda y: y * 9 ** (np.arange(len(y)) > 0)}),
    "lower --lr-student, loss_mse": (ADP, {"loss_mse": from_row(130, 5)}),
    "with a lower --lr-fake": (ADM, {"skipped": lambda y: 1.0 * (np.arange(len(y)) > 220)}),
}


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("turn", FAULTS)
def test_each_fault_is_seen_in_any_scale(tmp_path, turn, scale):
    """In a column that shows it, and nothing else is found."""
    config, changes = FAULTS[turn]
    columns = healthy(config)
    for name, change in changes.items():
        columns[name] = change(columns[name])
    columns["grad_norm_fake"] = np.where(columns["skipped"] > 0, np.nan, 0.7)
    (finding,) = examined(tmp_path / "run", config, columns, scale)
    assert finding.column in changes
    assert turn.split(",")[0] in finding.turn


def test_dead_heads_and_a_fake_score_that_rests_are_told_from_chance(tmp_path):
    """All three leave d_accuracy at one half; the first two leave loss_discriminator at 2."""
    columns = healthy(ADM)
    columns["d_accuracy"] = np.full(240, 0.5)
    columns["loss_discriminator"] = CHANCE["loss_discriminator"](columns["loss_discriminator"])
    (chance,) = examined(tmp_path / "run", ADM, columns)
    columns["loss_discriminator"] = np.full(240, 2.0)
    (dead,) = examined(tmp_path / "run", ADM, columns)
    columns["dmd_loss"] *= 1e-5
    (rests,) = examined(tmp_path / "run", ADM, columns)
    turns = [f.turn for f in (chance, dead, rests)]
    assert turns == ["raise --lr-heads, or --dt", "lower --lr-heads", "raise --lr-fake"]


def test_every_rule_has_its_row_in_the_readme(tmp_path):
    readme = (ROOT / "runtime" / "README.md").read_text()
    spoken = set()
    for config, changes in FAULTS.values():
        columns = healthy(config)
        columns |= {name: change(columns[name]) for name, change in changes.items()}
        for finding in examined(tmp_path / "run", config, columns):
            spoken.add(finding.means)
            assert f"| {finding.means} | {finding.turn.split(', with')[0]}" in readme
    assert len(spoken) == len(doctor.RULES)


def test_the_experiment_has_its_tables_and_picture(tmp_path, monkeypatch):
    """As of runs that are there: what breaks each is in its folder's name."""

    def made(base, flags, seed=0):
        config = ADP if base == broken.ADP else ADM
        columns = healthy(config, seed=seed)
        if flags == "--lr-student 1e-3":
            columns["x0_std"] = from_row(130, 9)(columns["x0_std"])
        folder = tmp_path / f"{base} {flags} {seed}"
        examined(folder, {**config, "clip": 1.0}, columns)
        return folder

    monkeypatch.setattr(broken, "made", made)
    monkeypatch.setattr(broken, "PICTURE", tmp_path / "broken.png")
    _, *rows = broken.table()
    assert [row[0] for row in rows] == [
        "`adm.py --guidance 1 --lr-student 1e-3`",
        "`adp.py --mse-iterations 150 --lr-student 1e-3`",
    ]
    assert all(row[1].startswith("x0_std went from") for row in rows)
    assert all(row[4].startswith("x0_std went from") and "→" in row[5] for row in rows)
    _, *silent = broken.table_of_silence()
    assert len(silent) == 5 and not any("NOT SILENT" in row[0] for row in silent)
    clipped = (healthy(ADM)["grad_norm_fake"] > 1).mean()
    assert f"fake {clipped:.0%}" in silent[0][-1]
    broken.picture()
    assert Image.open(tmp_path / "broken.png").size[0] > 1000


def test_few_rows_are_not_judged(tmp_path):
    """Of eight only that their updates were skipped."""
    for turn, (config, changes) in FAULTS.items():
        columns = healthy(config)
        columns |= {name: change(columns[name]) for name, change in changes.items()}
        last = {name: y[-8:] for name, y in columns.items()}
        found = examined(tmp_path / "run", {**config, "warmup": 0}, last)
        assert [f.column for f in found] == ["skipped"] * ("with a lower" in turn)


def test_chance_is_not_judged_on_few_samples(tmp_path):
    """180 rows of 16 samples tell 0.50 from 0.55, those of four do not."""
    columns = healthy(ADM)
    columns |= {name: change(columns[name]) for name, change in CHANCE.items()}
    assert examined(tmp_path / "run", ADM, columns)
    assert not examined(tmp_path / "run", {**ADM, "batch_size": 4}, columns)


def test_a_good_student_leaves_chance_to_d(tmp_path):
    """As after ADP on digits: a dmd_loss of 0.07, where D's hinge is 1.97."""
    columns = healthy(ADM)
    columns["dmd_loss"] *= 0.07 / 0.2
    columns["d_accuracy"] -= 0.04
    columns["loss_discriminator"] += 0.07
    assert examined(tmp_path / "run", ADM, columns) == []


def test_the_start_of_a_run_is_no_fault(tmp_path):
    """While the student rests, D may be at chance or win, and the fake score leave the teacher."""
    columns = healthy(ADM)
    columns["d_accuracy"][:60] = 1
    columns["dmd_loss"][:60] *= 1e-6
    columns["loss_discriminator"][:60] = 2
    columns["loss_fake"][:60] *= 3
    assert examined(tmp_path / "run", ADM, columns) == []


def test_at_most_three_lines_the_worst_first(tmp_path):
    columns = healthy(ADM)
    wanted = ("with a lower --lr-fake", "lower --lr-fake", "lower --lr-student, x0_std")
    for turn in (*wanted, "otherwise lower --lr-heads"):
        for name, change in FAULTS[turn][1].items():
            columns[name] = change(columns[name])
    found = examined(tmp_path / "run", ADM, columns)
    assert [f.column for f in found] == ["skipped", "x0_std", "dmd_loss", "d_accuracy"]
    lines = doctor.advice(tmp_path / "run")
    assert len(lines) == 3 and lines[0].startswith("updates skipped in 19 of 240 iterations: ")
    assert all(line.endswith(f.turn) for line, f in zip(lines, found, strict=False))


def digits(out, *flags):
    """A run of thirty iterations on the digits, as short as can be."""
    args = ["--iterations", 30, "--warmup", 5, "--batch-size", 4, "--head-width", 8]
    args += ["--student-steps", 1, "--sample-every", 0, "--checkpoint-every", 30, "--log-every", 0]
    call(adm.main, adm.Config, *args, "--out", out, *flags)


def test_a_broken_run_ends_with_advice(tmp_path, capsys):
    """As a line on stderr; the command that draws its curves says the same."""
    out = tmp_path / "out"
    digits(out, "--lr-student", 1e-2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 3
    assert re.match(rf"{out}: x0_\w+ went from .*: .*; lower --lr-student", lines[0])
    tools.curves.main([str(out), "--out", str(tmp_path / "curves.png")])
    assert capsys.readouterr().out.splitlines() == [*lines, str(tmp_path / "curves.png")]


def test_a_healthy_run_ends_in_silence(tmp_path, capsys):
    digits(tmp_path / "out")
    assert capsys.readouterr().err == ""
