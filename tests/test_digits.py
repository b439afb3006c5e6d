"""The digits teacher: that it is what its README says, that its measure measures, and that the real scripts distil it."""

import json
import re
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import families
import families.base
import families.export
import runtime.files
import runtime.folder
import runtime.optimize
import runtime.ranks
import runtime.script
import runtime.settings
import adm
from families import recipes
import adp
import data
import models
from conftest import call, read_log, script
from ode import student_sample
from toy import digits


@pytest.fixture(scope="module")
def family():
    return families.load_teacher("digits")


@pytest.fixture(scope="module")
def teacher(family):
    return digits.teacher_samples(family)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A short ADP run, and a short ADM run from it, on a few pairs."""
    at = tmp_path_factory.mktemp("digits")
    call(data.pairs, data.PairsConfig, "--out", at / "pairs", "--count", 300, "--steps", 8)
    call(adp.main, adp.Config, "--pairs", at / "pairs", "--iterations", 110,
         "--mse-iterations", 100, "--lr-mse", 3e-4, "--ema", 0.9, "--sample-every", 0,
         "--out", at / "adp")
    call(adm.main, adm.Config, "--init", at / "adp", "--student-steps", 1, "--iterations", 20, "--warmup", 8, "--checkpoint-every", 8,
         "--keep-checkpoints", 3, "--sample-every", 20, "--out", at / "adm")
    return at


# --- The folder ------------------------------------------------------------------------------------------------------

def test_the_folder_is_what_its_readme_says(family, teacher):
    said = (digits.TEACHER / "README.md").read_text()
    assert digits.fingerprint() in said
    assert sum(f.stat().st_size for f in digits.TEACHER.rglob("*")) <= 8e6
    assert not [f for f in digits.TEACHER.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]
    x = teacher["teacher, 28 steps"]
    row = digits.measure(x[:600], digits.LABELS, teacher["reference"], x[600:])
    assert digits.table({"teacher, 28 steps": row})[2] in said


@pytest.mark.parametrize("tokens", [{"max_sequence_length": 4}, {}])
def test_stock_diffusers_draws_the_digit_that_was_asked_for(tokens):
    pipe = diffusers.DiffusionPipeline.from_pretrained(digits.TEACHER)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(list(digits.PROMPTS[:10]), num_inference_steps=12, guidance_scale=2.0, output_type="np",
                  generator=torch.Generator().manual_seed(0), **tokens).images  # (10, 8, 8, 3)
    said = digits.features()[1].predict(16 * images.mean(-1).reshape(10, 64))
    assert (said == np.arange(10)).sum() >= 8  # chance: 1


def test_held_out_scans_are_not_trained_on():
    (images, labels), (held, held_labels) = digits.scans()
    assert (len(images), len(held)) == (1497, 300)
    assert np.bincount(held_labels).tolist() == [30] * 10
    both = torch.cat([images, held]).flatten(1)
    from sklearn.datasets import load_digits
    assert sorted(map(tuple, ((both[:, :64] + 1) * 8).tolist())) == sorted(map(tuple, load_digits().data.tolist()))


def test_help_shows_the_defaults_that_hold(capsys):
    for argv, warmup in (([], recipes.ADM["digits"]["warmup"]),
                         (["--model", "sd3"], recipes.ADM["sd3"]["warmup"]),
                         (["--paper"], 0), (["--model", "tiny-sd3"], 0)):
        with pytest.raises(SystemExit):
            call(adm.main, adm.Config, *argv, "--help")
        shown = " ".join(capsys.readouterr().out.split("--warmup INT")[-1].split("--dt")[0].split())
        assert f"(default: {warmup})" in shown


def test_one_guidance_scale_everywhere():
    assert {digits.GUIDANCE} == {made["digits"]["guidance"] for made in (recipes.ADM, recipes.PAIRS)}


def test_text_is_as_long_as_its_tokenizer_says(family, teachers):
    assert family.text_tokens == 4 and digits.opened(family)[0]["prompt_embeds"].shape == (12, 9, 32)
    assert teachers["tiny-sd3"].text_tokens == 256 and teachers["tiny-sdxl"].text_tokens is None


# --- The measure: known cases ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real():
    """(held-out scans (300, 64), their labels)"""
    images, labels = digits.scans()[1]
    return digits.pixels(images), labels.numpy()


def test_real_against_itself_is_perfect(real, teacher):
    row = digits.measure(*real, teacher["reference"])
    assert row["fd_real"] == pytest.approx(0, abs=1e-6) and row["coverage"] == row["precision"] == 1
    assert row["diversity"] == pytest.approx(1) and row["accuracy"] > 0.97 and row["class_tv"] is None


def test_a_collapsed_set_covers_little_and_is_not_diverse(real, teacher):
    x, labels = real
    one_a_class = np.stack([x[np.flatnonzero(labels == label)[0]] for label in labels])
    row = digits.measure(one_a_class, labels, teacher["reference"])
    assert row["diversity"] == 0 and row["coverage"] < 0.4 and row["precision"] == 1 and row["accuracy"] > 0.9
    assert row["fd_real"] > 20 and digits.measure(*real, teacher["reference"], one_a_class[:30])["class_tv"] > 0


def test_noise_is_far_off(real, teacher):
    noise = np.random.default_rng(0).uniform(0, 16, real[0].shape)
    row = digits.measure(noise, real[1], teacher["reference"])
    assert max(row["precision"], row["coverage"], row["density"]) < 0.1 and row["fd_real"] > 300 and row["accuracy"] < 0.3


def test_a_lost_class_shows_in_class_tv(real, teacher):
    reference = teacher["reference"].copy()
    x, labels = real
    reference[600:900], reference[900:] = x, x  # as if the teacher drew every digit equally often
    assert digits.measure(x, labels, reference, x)["class_tv"] == pytest.approx(0, abs=1e-9)
    assert digits.measure(x, labels, reference, x[labels != 3])["class_tv"] == pytest.approx(0.1, abs=0.01)


def test_frechet_of_shifted_and_scaled_gaussians():
    x = np.random.default_rng(0).normal(size=(20000, 4))
    assert digits.frechet(x, x + 3) == pytest.approx(36, rel=1e-6)
    assert digits.frechet(x, 2 * x) == pytest.approx(4, rel=0.05)  # Σ (σ − 2σ)² + |mean|², the mean being near 0


# --- Distilled by the real scripts -----------------------------------------------------------------------------------

def test_short_adp_and_adm_beat_the_teacher_in_one_step(family, teacher, distilled):
    """By a wide margin: a fifth of its Fréchet distance to the teacher's samples (about 300)."""
    untrained = teacher["teacher, 1 step"]
    limit = digits.measure(untrained[:600], digits.LABELS, teacher["reference"], untrained[600:])["fd_teacher"] / 5
    for name in ("adp", "adm"):
        x = digits.sample(family, *digits.open_run(distilled / name, family), 0, digits.NUMBERS)
        row = digits.measure(x[:600], digits.LABELS, teacher["reference"], x[600:])
        assert all(np.isfinite(v) for v in row.values()) and row["fd_teacher"] < limit and row["coverage"] > 0.7
        log = read_log(distilled / name)
        assert all(np.isfinite(v) for column in log.values() for v in column if v is not None)


def test_the_student_rests_during_the_warm_up(family, distilled):
    """Fake score and heads train from the first iteration, the student after --warmup iterations."""
    load = lambda step, name: load_file(distilled / f"adm/checkpoints/{step:06d}/{name}.safetensors")  # noqa: E731
    start = models.load_denoiser(family, folder=distilled / "adp" / "pipeline").own_parameters()
    warm, done = ({k.removeprefix("weight/"): w for k, w in load(step, "student").items() if k.startswith("weight/")} for step in (8, 20))
    assert all(torch.equal(warm[name], p) for name, p in start.items())
    assert not all(torch.equal(done[name], p) for name, p in start.items())
    fake = load(8, "fake")
    assert any(not torch.equal(fake[f"weight/{name}"], p) for name, p in models.load_denoiser(family).own_parameters().items())
    log = read_log(distilled / "adm")
    assert log["grad_norm_student"][:8] == [None] * 8 and None not in log["grad_norm_student"][8:] + log["grad_norm_heads"]


def test_the_exported_student_is_ours_in_stock_diffusers(family, distilled):
    pipe = diffusers.DiffusionPipeline.from_pretrained(distilled / "adm" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert "max_sequence_length=4" in (distilled / "adm" / "pipeline" / "README.md").read_text()
    x_T = torch.randn(3, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
    theirs = pipe(list(digits.PROMPTS[:3]), num_inference_steps=1, guidance_scale=1.0, max_sequence_length=4, latents=x_T,
                  output_type="latent").images
    denoiser, schedule, steps = digits.open_run(distilled / "adm", family)
    cond = {name: c[:3] for name, c in digits.opened(family)[0].items()}
    with torch.no_grad():
        ours = student_sample(lambda x, t: denoiser(x, t, cond)[0], schedule, x_T, schedule.timesteps(steps)[:-1], None)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_eval_writes_table_and_picture(distilled, tmp_path):
    runs = distilled / "adp", distilled / "adm"
    done = script(tmp_path, "toy/digits.py", "eval", *runs, "--out", tmp_path / "eval")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "eval" / "table.json").read_text())
    assert done.stdout.strip() == (tmp_path / "eval" / "table.md").read_text().strip()
    assert len(rows) == 7 and set(rows[str(distilled / "adm")]) == {*digits.METRICS, "nfe", "ms"}
    assert [rows[name]["nfe"] for name in rows] == [None, 1, 2, 28, 56, 1, 1]
    assert (tmp_path / "eval" / "samples.png").stat().st_size > 5000


@pytest.mark.parametrize("arguments, said", [
    (["evil"], "no command"), (["eval", "nowhere"], "nowhere"), (["eval", "--what"], "--what"), (["eval", "--out"], "--out")])
def test_mistakes(arguments, said):
    with pytest.raises(runtime.settings.BadInput, match=said):
        digits.main(*arguments)


def test_eval_writes_over_nothing(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(runtime.settings.BadInput, match="not empty"):
        digits.main("eval", "--out", str(tmp_path))


def test_curve_and_steps_of_a_run(distilled, family, teacher, capsys):
    """The curve begins with the run's start and ends with what it exported, the average; in the warm-up the student rests."""
    start, end = (digits.judge(digits.sample(family, *digits.open_run(distilled / name, family), 0, digits.NUMBERS), teacher)
                  for name in ("adp", "adm"))
    points = digits.curve({"command": f"python adm.py --out {distilled / 'adm'}"})
    first, last = ([row["fd_teacher"], row["coverage"]] for row in (start, end))
    assert [point[0] for point in points] == [0, 8, 16, 20]
    assert points[0][1:] == points[1][1:] == first != points[2][1:] and points[3][1:] == last != points[2][1:]
    capsys.readouterr()
    digits.main("steps", str(distilled / "adm"))
    assert capsys.readouterr().out.splitlines()[2:] == digits.table({"step 1 of 1": end})[2:]


def test_tables_of_the_readme_are_what_the_script_prints(tmp_path):
    done = script(tmp_path, "toy/digits.py", "readme")
    tables = done.stdout.strip().split("\n\n")
    text = (digits.TEACHER.parent.parent / "README.md").read_text()
    assert done.returncode == 0 and len(tables) == 2 and all(table in text for table in tables), done.stderr


def test_committed_results_are_whole():
    """One row a method and seed, each with its metrics, the commands that made it and the curve of its last run; none is missing."""
    runs = json.loads((digits.RESULTS / "digits.json").read_text())["runs"]
    assert sorted((r["method"], r["seed"]) for r in runs) == sorted(product(digits.METHODS, digits.SEEDS))
    plan = json.loads((digits.RESULTS / "digits-search.json").read_text())
    for row in runs:
        assert {"method", "seed", "fd_teacher", "fd_real", "coverage", "density", "precision", "diversity", "class_tv", "seconds",
                "iterations", "command"} <= set(row)
        assert all(np.isfinite(v) for v in row.values() if isinstance(v, float))
        assert row["rate"] == plan["rates"][row["method"]] and f"--seed {row['seed']} " in row["command"]
        budgets = [int(n) for n in re.findall(r" --iterations (\d+)", row["command"])]
        assert row["iterations"] == sum(budgets) and [row["curve"][0][0], row["curve"][-1][0]] == [0, budgets[-1]]
        assert row["curve"][-1][1:] == pytest.approx([row["fd_teacher"], row["coverage"]])
