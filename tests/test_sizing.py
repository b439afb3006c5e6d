"""The plan of a run's memory, and the run that is refused before anything is loaded."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, call, config, refused

import adm
import adp
import families
import models
import sizing.plan
from runtime.settings import BadInput
from sizing import count
from sizing.plan import cheapest, enough_gpus, plan_of, remedies, typed
from tools import plan

GB = 1e9


@pytest.fixture
def small_gpu(monkeypatch):
    """This process's device, as if it were a GPU of 24 GB."""
    monkeypatch.setattr(sizing.plan, "gpu_memory", lambda: 24 * GB)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_fetched(capsys, tmp_path, small_gpu):
    out = tmp_path / "out"
    line = refused(capsys, adm.main, adm.Config, "--model", "sdxl", "--out", out)
    assert "sdxl needs 109.86 GB of each of 1 GPU(s) with 24.00" in line
    assert "weights 25.78, gradients 20.64, moments 41.28, ema 10.27" in line
    flags = re.search("it fits with (.*)", line)[1].split()
    assert "--lora-rank" in flags
    assert plan_of(config(adm.Config, "--model", "sdxl", *flags), 1).peak[0] < 24 * GB
    assert not out.exists()


def test_what_fits_is_not_refused(tmp_path, small_gpu):
    flags = ["--model", "tiny-sd3", "--iterations", 1, "--batch-size", 1, "--head-width", 8]
    call(adm.main, adm.Config, *flags, "--sample-every", 0, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "pipeline").is_dir()


def test_adp_is_planned_with_the_latents_of_its_pairs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sizing.plan, "gpu_memory", lambda: 1)
    model = "tiny-cogvideox-2b"
    shape = families.load_teacher(model).latent_shape(None, 17)
    (tmp_path / "pairs").mkdir()
    manifest = json.dumps({"kind": "pairs", "shape": shape})
    (tmp_path / "pairs" / "manifest.json").write_text(manifest)
    flags = ["--model", model, "--pairs", tmp_path / "pairs", "--out", tmp_path / "out"]
    line = refused(capsys, adp.main, adp.Config, *flags)
    cfg = config(adp.Config, *flags)
    peak, phase = plan_of(cfg, 1, shape).peak
    assert f"needs {peak / 1e9:.2f} GB" in line and f"{phase}'s phase" in line
    assert "no flag makes it fit" in line
    assert plan_of(cfg, 1, shape).peak > plan_of(cfg, 1).peak
    assert not (tmp_path / "out").exists()


def test_the_number_of_gpus_that_is_advised_is_the_least():
    cfg = config(adm.Config, "--model", "sdxl")
    gpus = enough_gpus(cfg, 1, 60 * GB)
    assert plan_of(cfg, gpus).peak[0] <= 60 * GB < plan_of(cfg, gpus // 2).peak[0]
    assert enough_gpus(cfg, 1, 1 * GB) is None


def test_what_is_advised_can_be_typed():
    """Of one who gave --accumulate more of it; LoRA where no earlier run forbids it."""
    flags = ["--model", "tiny-sd3", "--batch-size", 8, "--accumulate", 2, "--head-width", 32]
    cfg = config(adm.Config, *flags)
    two = plan_of(cfg, 1).peak[0]
    less = plan_of(replace(cfg, accumulate=8, gradient_checkpointing=True), 1).peak[0]
    advice, _ = cheapest(cfg, 1, (two + less) / 2)
    assert "--accumulate 8" in advice or advice == "--gradient-checkpointing"
    assert plan_of(config(adm.Config, *flags, *advice.split()), 1).peak[0] < two
    offers = [settings for settings in remedies(cfg, 1) if "lora_rank" in settings]
    assert offers and all(settings["lr_fake"] == 1e-5 for settings in offers)
    after = replace(cfg, init="out/adp")
    assert not [settings for settings in remedies(after, 1) if "lora_rank" in settings]
    adp_offers = list(remedies(config(adp.Config, "--model", "tiny-sd3"), 1))
    assert adp_offers[-1]["pixel"] is False and typed({"pixel": False}) == "--no-pixel"


def test_numbers_of_gpus_that_do_not_divide_the_batch_are_not_advised():
    cfg = config(adm.Config, "--model", "tiny-sd3", "--batch-size", 8, "--accumulate", 4)
    assert enough_gpus(cfg, 1, 0) is None  # 2 would do it, 4 is no answer and no error


def test_groups_of_ranks_hold_what_so_many_ranks_alone_would(capsys):
    """Over all ranks a network takes less of each; what is gathered for a pass is the same."""
    flags = ["--model", "tiny-sd3", "--batch-size", 8, "--samples", 1]
    all_four, pairs = (config(adm.Config, *flags, *more) for more in ([], ["--shard-ranks", 2]))
    two, four, grouped = plan_of(all_four, 2), plan_of(all_four, 4), plan_of(pairs, 4)
    assert grouped.rows == two.rows and grouped.peak == two.peak > four.peak
    assert (grouped.each, grouped.accumulate) == (1, 2)
    copied = plan_of(replace(pairs, shard_ranks=1), 4)  # FSDP gathers all the same
    assert copied.rows == plan_of(all_four, 1).rows and copied.gathered == four.gathered > 0
    assert next(remedies(pairs, 4)) == {"shard_ranks": 4}
    assert "shard_ranks" not in next(remedies(all_four, 4))
    words = ["--model", "tiny-sd3", "--world-size", 4, "--shard-ranks", 3]
    said = refused(capsys, plan.show, plan.AdmConfig, *words)
    assert "--shard-ranks 3: does not divide the number of ranks, 4" in said


def test_latents_of_another_model_are_refused():
    cfg = config(adp.Config, "--model", "sdxl")
    with pytest.raises(BadInput, match="are not sdxl's"):
        plan_of(cfg, 1, (1, 8, 8))


def test_tiny_models_are_planned_with_the_encoder_that_they_use():
    tiny = plan_of(config(adp.Config), 1)
    assert tiny.rows["VAE, encoder"]["parameters"] < 1e6 and tiny.peak[0] < 1 * GB


def test_the_phases_are_sums_of_what_is_there(teachers):
    """By hand, where all is known: two micro-batches have all gradients from the start."""
    flags = ["--model", "tiny-sd3", "--batch-size", 2]
    one, two = (plan_of(config(adm.Config, *flags, "--accumulate", n), 1) for n in (1, 2))
    held = sum(two.total[name] for name in ("weights", "gradients", "moments"))
    assert two.phases["updates"] == one.phases["updates"] == held
    graph = sum(two.waiting["generator"].values())
    copies = 2 * (two.rows["student"]["parameters"] + two.rows["fake"]["parameters"])
    assert two.phases["generator"] == held + graph + copies
    before = held - one.total["gradients"]
    assert one.phases["generator"] == before + sum(one.waiting["generator"].values()) + copies
    less = plan_of(replace(config(adm.Config, *flags), offload=True), 1)
    moments = [row["moments"] for row in less.rows.values() if "moments" in row]
    assert less.phases["updates"] == held - sum(moments) + max(moments)
    average = plan_of(replace(config(adm.Config, *flags), ema=0.9), 1)
    assert average.total["ema"] == average.rows["student"]["weights"]


def planned(batch=1, fake_gradient="exact", gradient_checkpointing=False):
    """Bytes of activations of tiny-sd3, {network: bytes}."""
    family = families.load_teacher("tiny-sd3")
    cfg = adm.Config(
        model="tiny-sd3", fake_gradient=fake_gradient, gradient_checkpointing=gradient_checkpointing
    )
    parts = count.build(family, cfg)
    phases, _ = count.activations(family, parts, cfg, family.latent_shape(), batch)
    return phases["generator"]


def test_planned_activations_follow_the_batch_and_what_saves_memory():
    one, two = planned(), planned(batch=2)
    for network in one:
        assert two[network] == pytest.approx(2 * one[network], rel=0.02)
    around = planned(fake_gradient="straight-through")
    assert around["fake"] == 0 < one["fake"]
    assert around["student"] == one["student"]
    checkpointed = planned(gradient_checkpointing=True)
    assert checkpointed["student"] < one["student"] / 3


def test_planned_activations_are_what_autograd_saves():
    """On a real CPU pass of the student in bf16 and on its meta twin."""
    family = families.load_teacher("tiny-sd3")
    real = models.load_denoiser(family)
    real.net.bfloat16().requires_grad_(True)
    x = torch.randn(1, *family.latent_shape()).bfloat16()  # (1, ...)
    t = torch.tensor([500.0])  # (1,)
    cond = {name: c.bfloat16() for name, c in family.random_cond(["a"]).items()}
    with count.FlashAttention(), count.Saved(real) as counted:
        real(x, t, cond)
    # A CPU keeps LayerNorm's statistics in bf16, others do not.
    assert counted.bytes == pytest.approx(planned()["student"], rel=0.02)


def test_dmd_step_and_regression_have_no_adversary():
    for loss in ("dmd", "step"):
        alone = plan_of(config(adm.Config, "--model", "tiny-sd3", "--loss", loss), 1)
        waiting = alone.waiting["generator"]
        assert set(waiting) == {"student", "fake"} and waiting["fake"] == 0 < waiting["student"]
        assert "gradients" not in alone.rows["heads"]
    mse = plan_of(config(adp.Config, "--model", "tiny-sd3", "--loss", "mse"), 1)
    assert set(mse.waiting["generator"]) == {"student"} and "VAE, encoder" not in mse.rows


def test_the_tool_knows_recipes_and_both_stages(capsys):
    call(plan.show, plan.AdmConfig, "--model", "sd3", "--world-size", 8)
    shown = capsys.readouterr().out
    assert "1 a GPU x 8 GPUs x 4 micro-batches" in shown and "student             37.6M" in shown
    call(plan.show, plan.AdpConfig, "--model", "tiny-sd3", "--world-size", 1, "--gpu-gb", 0.2)
    shown = capsys.readouterr().out
    assert "VAE, encoder" in shown
    assert re.search("of 0.2, .*: it does not fit; with --", shown)
    assert "at least 1" in refused(capsys, plan.show, plan.AdmConfig, "--world-size", 0)
    assert "a multiple of 8" in refused(capsys, plan.show, plan.AdpConfig, "--head-width", 3)


def test_the_readmes_figures_are_what_the_tool_prints(capsys):
    """The whole output in sizing/README.md, and a row of README.md's table."""
    call(plan.show, plan.AdmConfig, "--model", "sdxl")
    shown = capsys.readouterr().out
    assert shown in (ROOT / "sizing" / "README.md").read_text()
    call(plan.show, plan.AdmConfig, "--model", "sdxl", "--world-size", 1)
    peak = re.search(r"^peak +(\S+)", shown, re.M)[1]
    alone = re.search(r"with (--\S+) it takes (\S+)", capsys.readouterr().out)
    checkpoint = re.search(r"^checkpoint +(\d+)", shown, re.M)[1]
    row = f"| {checkpoint} GB | {peak}; {alone[2]} with `{alone[1]}` |"
    assert row in (ROOT / "README.md").read_text()
