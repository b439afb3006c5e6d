"""Two ranks, each with half of every network, are one: losses, checkpoints, export, resuming. Then accumulation and offload.

The runs of two ranks all happen in one torchrun (tests/two_ranks.py), those of one rank in this process.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

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
import adp
import data
import models
from conftest import call, same_log, shell
from test_reference import check_adm, check_adp
from families import full
from tools import plan

SMALL = dict(iterations=2, batch_size=4, head_width=32, sample_every=0, checkpoint_every=1)
LORA = dict(lora_rank=2, gradient_checkpointing=True, accumulate=2, lr_student=1e-4, lr_fake=1e-4)
EMA = dict(ema=0.75)
OURS = dict(damping=0.1, fake_samples="last", fake_gradient="straight-through", dt=0.25)
OFFLOADED = dict(offload=True, gradient_checkpointing=True, dt=0.25)
# adp is first: SAM loads before there are ranks.
RUNS = {"adp": ("adp", dict(model="tiny-sd3", mse_iterations=1, sample_every=1, **EMA)),
        "sdxl": ("adm", dict(model="tiny-sdxl", student_steps=4, **OURS)),
        "ema": ("adm", dict(model="tiny-cogvideox-5b", **EMA, **OFFLOADED)),
        "lora": ("adm", dict(model="tiny-sd3", **LORA)),
        "dmd": ("adm", dict(model="tiny-sd3", loss="dmd", ttur=3, lr_student=1e-3, lr_fake=1e-3))}
PAIRS = dict(model="tiny-sd3", count=5, steps=2, shard_size=1)


def checkpoint(folder, iteration, name):
    return load_file(folder / "checkpoints" / f"{iteration:06d}" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, encoded):
    """{ranks: folder of its runs and pairs}. Two ranks also resume: one-two and two-two, from ema's
    first checkpoint."""
    folder = tmp_path_factory.mktemp("sharding")
    one, two = folder / "one", folder / "two"

    def config(stage, changes, out, **more):
        source = {"prompts": str(encoded[changes["model"]])}
        if stage == "adp":
            source = {"pairs": str(one / "pairs")}
        return {**SMALL, **source, **changes, "out": str(out), **more}

    def pairs(out):
        return {**PAIRS, "prompts": str(encoded[PAIRS["model"]]), "out": str(out)}
    data.pairs(data.PairsConfig(**pairs(one / "pairs")))

    for name, (stage, changes) in RUNS.items():
        module = {"adm": adm, "adp": adp}[stage]
        module.main(module.Config(**config(stage, changes, one / name)))
    shutil.copytree(one / "ema", folder / "one-two"), shutil.rmtree(folder / "one-two" / "checkpoints" / "000002")
    specs = [(stage, config(stage, changes, two / name)) for name, (stage, changes) in RUNS.items()]
    stage, changes = RUNS["ema"]
    specs.append((stage, config(stage, changes, folder / "one-two", resume=True)))
    specs.append((stage, config(stage, changes, folder / "two-two", resume=True), str(two / "ema")))
    specs.append(("pairs", pairs(two / "pairs")))
    (folder / "runs.json").write_text(json.dumps(specs))
    done = shell("torchrun", "--standalone", "--nproc_per_node=2", "tests/two_ranks.py", folder / "runs.json")
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "Error" in line]
    assert "Warning" not in done.stderr.replace("UserWarning: Already found a `peft_config`", ""), done.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(runs, name):
    one, two = runs / "one" / name, runs / "two" / name
    same_log(one, two, atol=1e-4, rtol=1e-3)
    for network in ("student", "fake" if name == "dmd" else "heads"):
        a, b = checkpoint(one, 2, network), checkpoint(two, 2, network)
        assert a.keys() == b.keys() and all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)
        assert any(key.endswith("exp_avg") for key in a)
        for key in a:  # Adam turns a rounding error in a gradient near 0 into a step of up to the learning rate: moments, not weights
            if key.endswith("exp_avg"):
                assert_close(a[key], b[key], atol=1e-5, rtol=1e-3)
    family = families.load_teacher(RUNS[name][1]["model"])
    a, b = (models.load_denoiser(family, folder=f / "pipeline").net.state_dict() for f in (one, two))
    rate = RUNS[name][1].get("lr_student", (adm if RUNS[name][0] == "adm" else adp).Config.lr_student)
    assert all((a[k] - b[k]).abs().max() <= 4 * rate for k in a)


def test_two_ranks_make_the_same_pairs(runs):
    family = families.load_teacher(PAIRS["model"])
    one, two = (data.Rows(runs / ranks / "pairs", "pairs", family) for ranks in ("one", "two"))
    every = range(PAIRS["count"])
    assert_close(one[every], two[every], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_do_what_the_reference_does(runs, name):
    check = {"adm": check_adm, "adp": check_adp}[RUNS[name][0]]
    check(runs / "two" / name)


def test_resume_with_two_ranks_is_bitwise_and_with_other_numbers_close(runs, encoded, tmp_path):
    one, two = runs / "one" / "ema", runs / "two" / "ema"
    same_log(two, runs / "two-two", atol=0, rtol=0)
    for name in ("student", "fake", "heads", "ema"):
        assert (two / "checkpoints/000002" / f"{name}.safetensors").read_bytes() == \
            (runs / "two-two" / "checkpoints/000002" / f"{name}.safetensors").read_bytes()
    same_log(one, runs / "one-two", atol=1e-4, rtol=1e-3)
    shutil.copytree(two, tmp_path / "two-one")
    shutil.rmtree(tmp_path / "two-one" / "checkpoints" / "000002")
    flags = RUNS["ema"][1]
    prompts = str(encoded[flags["model"]])
    config = {**SMALL, **flags, "prompts": prompts, "out": str(tmp_path / "two-one")}
    adm.main(adm.Config(**{**config, "accumulate": 2, "offload": False}, resume=True))  # memory flags may change too
    same_log(one, tmp_path / "two-one", atol=1e-4, rtol=1e-3)


def test_the_average_is_exported(runs):
    """ema = decay · ema + (1 − decay) · student after each update, float32, from the student's first weights."""
    for name in ("ema", "adp"):
        first = models.load_denoiser(families.load_teacher(RUNS[name][1]["model"]))
        for folder in (runs / "one" / name, runs / "two" / name):
            exported = models.load_denoiser(first.family, folder=folder / "pipeline").net.state_dict()
            saved = [checkpoint(folder, i, network) for i in (1, 2) for network in ("student", "ema")]
            for n, start in first.own_parameters().items():
                s1, e1, s2, e2 = (tensors[f"weight/{n}"] for tensors in saved)
                assert_close(e1, 0.75 * start + 0.25 * s1, atol=1e-7, rtol=1e-6)
                assert_close(e2, 0.75 * e1 + 0.25 * s2, atol=1e-7, rtol=1e-6)
                assert torch.equal(exported[n], e2) and e2.dtype == torch.float32
            assert any(not torch.equal(saved[3][k], saved[2][k]) for k in saved[3])


def test_adapters_alone_are_saved_and_load_into_the_stock_pipeline(runs):
    from diffusers import DiffusionPipeline
    for folder in (runs / "one" / "lora", runs / "two" / "lora"):
        for network in ("student", "fake"):
            assert all(".lora_" in key for key in checkpoint(folder, 2, network) if key.startswith("weight/"))
        family = families.load_teacher("tiny-sd3")
        pipe = DiffusionPipeline.from_pretrained(family.folder)
        pipe.load_lora_weights(folder / "pipeline" / "lora")
        pipe.fuse_lora(), pipe.unload_lora_weights()
        merged, teacher = models.load_denoiser(family, folder=folder / "pipeline").net.state_dict(), models.load_denoiser(family).net.state_dict()
        for name, w in pipe.transformer.state_dict().items():
            assert_close(w, merged[name], atol=1e-6, rtol=1e-6)
        assert any(not torch.equal(w, teacher[name]) for name, w in merged.items())


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("adp", "dmd")])
def test_the_plan_is_what_ranks_hold(runs, name):
    """Every entry, summed over the parts that a rank of a real run held, to 1%."""
    flags = RUNS[name][1]
    family = families.load_teacher(flags["model"])
    rows = plan.states(plan.build(family, flags.get("lora_rank", 0), 32, torch.float32), 2, flags.get("ema", 0))
    for rank in (0, 1):
        held = json.loads((runs / "two" / name / f"held-{rank}.json").read_text())
        for role in ("student", "heads", "fake"):
            assert rows[role]["weights"] == pytest.approx(held[role]["weights"], rel=0.01)
            assert rows[role]["optimizer"] == pytest.approx(held[role]["optimizer"], rel=0.01)
        for role, gradients in zip(("student", "heads", "fake") * 2, held["gradients"], strict=True):
            assert rows[role]["gradients"] == pytest.approx(gradients, rel=0.01)
        assert rows["teacher"]["weights"] == pytest.approx(held["teacher"]["weights"], rel=0.01)
        assert rows["buffers"]["weights"] == held["buffers"] and rows["student"]["ema"] == held.get("ema", {"weights": 0})["weights"]
    alone = plan.states(plan.build(family, flags.get("lora_rank", 0), 32, torch.float32), 1)  # one rank has twice as much
    whole = sum(w.nbytes for k, w in checkpoint(runs / "one" / name, 2, "fake").items() if k.startswith("weight/"))
    assert alone["fake"]["weights"] == whole == pytest.approx(2 * rows["fake"]["weights"], rel=0.01)


def test_planned_activations_are_what_autograd_saves():
    """On a real CPU pass of the student in bf16 and on its meta twin; the batch and straight-through count."""
    family = families.load_teacher("tiny-sd3")
    count = {}
    for batch in (1, 2):
        count[batch] = plan.activations(family, plan.build(family), family.latent_shape(), batch)[0]
    for k in count[1]:
        assert count[2][k] == pytest.approx(2 * count[1][k], rel=0.02)
    less = plan.activations(family, plan.build(family), family.latent_shape(), 1, "straight-through")[0]
    assert less["fake"] == 0 < count[1]["fake"] and less["student"] == count[1]["student"]
    checkpointed = plan.activations(family, plan.build(family, gradient_checkpointing=True), family.latent_shape(), 1)[0]
    assert checkpointed["student"] < count[1]["student"] / 3
    real = models.load_denoiser(family)
    real.net.bfloat16().requires_grad_(True)
    x, t, cond = torch.randn(1, *family.latent_shape()).bfloat16(), torch.tensor([500.0]), family.random_cond(["a"])
    with plan.FlashAttention(), plan.Saved(real) as saved:
        real(x, t, {k: c.bfloat16() for k, c in cond.items()})
    assert saved.bytes == pytest.approx(count[1]["student"], rel=0.02)  # a CPU keeps LayerNorm's statistics in bf16, others do not


# --- Random weights at full size ------------------------------------------------------------------------------------

def test_full_size_configs_are_the_published_ones():
    sizes = {"sdxl": 2_567_463_684, "sd3": 2_028_328_000, "sd3.5-large": 8_056_627_520, "cogvideox-2b": 1_693_783_872,
             "cogvideox-5b": 5_570_283_072}
    for name, n in sizes.items():
        family = families.load_teacher(name, random_init=True)
        assert sum(p.numel() for p in family.meta_net.parameters()) == n
    assert family.latent_shape() == (13, 16, 60, 90)


@pytest.mark.parametrize("name", families.TINY)
def test_random_conditioning_has_the_real_ones_shape(name, conditionings, teachers):
    noise = teachers[name].random_cond(["a red fox", "two dogs"])
    assert {k: c.shape for k, c in noise.items()} == {k: c.shape for k, c in conditionings[name].items()}
    assert torch.equal(teachers[name].random_cond(["two dogs"])["prompt_embeds"][0], noise["prompt_embeds"][1])
    assert not torch.equal(noise["prompt_embeds"][0], noise["prompt_embeds"][1])


def test_random_init_goes_through_every_script(tmp_path, few_prompts, monkeypatch):
    """SD3's config, two narrow layers of it: encode, pairs, adp, adm from its student; a second build is the same network."""
    kind, config = full.DENOISERS["sd3"]
    monkeypatch.setitem(full.DENOISERS, "sd3", (kind, {**config, "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}))
    full.skeleton.cache_clear()
    common = ["--model", "sd3", "--random-init"]
    training = [*common, "--head-width", 32, "--batch-size", 2, "--iterations", 1, "--sample-every", 0]
    call(data.encode, data.EncodeConfig, *common, "--prompts", few_prompts, "--out", tmp_path / "prompts")
    call(data.pairs, data.PairsConfig, *common, "--prompts", tmp_path / "prompts", "--count", 2, "--steps", 1, "--resolution", 128,
         "--out", tmp_path / "pairs")
    call(adp.main, adp.Config, *training, "--pairs", tmp_path / "pairs", "--no-pixel", "--mse-iterations", 0, "--out", tmp_path / "adp")
    call(adm.main, adm.Config, *training, "--prompts", tmp_path / "prompts", "--init", tmp_path / "adp", "--resolution", 128,
         "--out", tmp_path / "adm")
    one, two = (models.load_denoiser(families.load_teacher("sd3", random_init=True)).net.state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    full.skeleton.cache_clear()
    with pytest.raises(runtime.settings.BadInput, match="--random-init is for sdxl"):
        families.load_teacher("tiny-sd3", random_init=True)


def test_offloaded_moments_are_the_same_moments():
    """On a CPU nothing moves, bit for bit; state_dict and load_state_dict too."""
    weights = torch.randn(5, 3)
    found = []
    for kind in (torch.optim.AdamW, runtime.optimize.OffloadedAdamW):
        p = torch.nn.Parameter(weights.clone())
        optimizer = kind([p], 0.1)
        for i in range(4):
            p.grad = torch.full_like(p, 0.1 * i) * weights
            optimizer.step()
            other = kind([p], 0.1)
            other.load_state_dict(optimizer.state_dict())
            optimizer = other
        found.append((p.detach(), optimizer.state[p]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(v, found[1][1][k]) for k, v in found[0][1].items())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_is_not_taken_on_a_gradient_that_is_not_finite(bad):
    """One number is enough, and an infinite one too, which clipping would turn into NaN."""
    p = torch.nn.Parameter(torch.ones(3))
    (optimizer,) = runtime.optimize.make_optimizers(
        {"student": {"p": p}}, {"student": 0.1}, SimpleNamespace(offload=False, beta1=0.9)).values()
    optimizer.skipped = []
    p.grad = torch.tensor([1.0, bad, 0.0])
    runtime.optimize.step(optimizer, 1.0)
    assert p.tolist() == [1, 1, 1] and p.grad is None and [int(s) for s in optimizer.skipped] == [1]
    p.grad = torch.ones(3)
    runtime.optimize.step(optimizer, 1.0)
    assert (p < 1).all() and [int(s) for s in optimizer.skipped] == [1, 0]


def test_a_batch_that_does_not_divide_is_refused():
    ranks = runtime.ranks.Ranks()
    assert ranks.mine(6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
    with pytest.raises(runtime.settings.BadInput, match="--batch-size 6: no multiple of 1 ranks x --accumulate 4"):
        ranks.mine(6, 4)
    ranks.rank, ranks.world = 1, 2
    assert ranks.mine(8, 2) == [range(4, 6), range(6, 8)]
