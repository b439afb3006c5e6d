"""The scripts through their command lines.

Every stage on every family, phases, resuming, ranks, and what users get wrong.
"""

import json
import os
import shutil
from collections import Counter

import pytest
import torch
from conftest import call, played, read_log, refused, same_log, script, tree
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.models.sam.modeling_sam import SamVisionLayer

import adm
import adp
import data
import models
from ode import teacher_sample, with_guidance
from runtime.settings import BadInput

QUICK = ("--head-width", 32, "--batch-size", 2, "--sample-every", 0)
SHARD_0 = "000000.safetensors"
SHARD_1 = "000001.safetensors"  # the last of sdxl_pairs
ADM_COLUMNS = {
    *("iteration", "loss_generator", "loss_discriminator", "loss_fake", "dmd_loss"),
    *("d_accuracy", "grad_norm_student", "grad_norm_fake", "grad_norm_heads"),
    *("seconds", "peak_memory_gb"),
}


@pytest.fixture(scope="session")
def sdxl_adp(tmp_path_factory, sdxl_pairs):
    """A finished ADP run on tiny-sdxl: regression, then both discriminators."""
    out = tmp_path_factory.mktemp("runs") / "adp"
    flags = ["--iterations", 4, "--mse-iterations", 2, "--lr-student", 1e-3]
    call(adp.main, adp.Config, *adp_args(sdxl_pairs, out), *flags, "--sample-every", 2)
    return out


@pytest.fixture(scope="session")
def sd3_adm(tmp_path_factory, encoded):
    """A finished ADM run on tiny-sd3: 4 iterations, checkpoints after 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "adm"
    call(adm.main, adm.Config, *adm_args(encoded, out), "--checkpoint-every", 2)
    return out


def adm_args(encoded, out, model="tiny-sd3", iterations=4):
    args = ["--model", model, "--prompts", encoded[model], "--out", out]
    return [*args, "--iterations", iterations, *QUICK]


def adp_args(pairs, out, model="tiny-sdxl"):
    return ["--model", model, "--pairs", pairs, "--out", out, *QUICK]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- End to end -----------------------------------------------------------------------------------


def test_sd3_end_to_end(tmp_path, few_prompts):
    """encode → pairs → adp → adm → stock diffusers.

    test_readme.py does the like on SDXL, each command a process.
    """
    prompts = tmp_path / "prompts"
    pairs = tmp_path / "pairs"
    first = tmp_path / "adp"
    out = tmp_path / "adm"
    sd3 = ["--model", "tiny-sd3"]
    call(data.encode, data.EncodeConfig, *sd3, "--prompts", few_prompts, "--out", prompts)
    flags = ["--prompts", prompts, "--out", pairs, "--count", 5, "--steps", 3]
    call(data.pairs, data.PairsConfig, *sd3, *flags)
    flags = ["--iterations", 2, "--mse-iterations", 1]
    call(adp.main, adp.Config, *adp_args(pairs, first, "tiny-sd3"), *flags)
    flags = ["--prompts", prompts, "--init", first, "--out", out, "--iterations", 2]
    flags += ["--student-steps", 1, "--sample-every", 1, "--head-width", 32]
    call(adm.main, adm.Config, *sd3, *flags)

    files = ["config.json", "curves.png", "log.csv"]
    assert names(out) == sorted([*files, "checkpoints", "pipeline", "samples"])
    sheets = ["000001-batch.png", "000001.png", "000002-batch.png", "000002.png"]
    assert names(out / "samples") == sheets
    suffixes = {p.suffix for p in out.rglob("*")}
    assert not suffixes & {".bin", ".pt", ".partial"}
    config = json.loads((out / "config.json").read_text())
    assert config["student"] == {"prediction": "flow", "times": [1000.0], "renoise": True}
    assert config["config"]["iterations"] == 2 and config["versions"]["torch"] == torch.__version__
    pipe = DiffusionPipeline.from_pretrained(out / "pipeline")
    image = pipe("a red fox", num_inference_steps=1, guidance_scale=1.0).images[0]
    assert image.size == (32, 32)


def test_adp_regresses_and_then_meets_both_discriminators(sdxl_adp):
    log = read_log(sdxl_adp)
    assert log["loss_discriminator"][:2] == [None, None]
    assert None not in log["loss_discriminator"][2:] + log["loss_mse"]
    for name in ("d_accuracy", "d_accuracy_pixel"):
        assert all(0 <= a <= 1 for a in log[name][2:])
    assert names(sdxl_adp / "samples") == ["000002.png", "000004.png"]


def test_adm_after_adp_trains_and_exports_a_flow(sdxl_adp, encoded, teachers, tmp_path):
    """The student goes on from ADP's weights as a flow; the fake score begins as the teacher."""
    out = tmp_path / "adm"
    call(adm.main, adm.Config, *adm_args(encoded, out, "tiny-sdxl", 2), "--init", sdxl_adp)
    config = json.loads((out / "config.json").read_text())
    assert config["student"] == {"prediction": "flow", "times": [999.0], "renoise": False}

    family = teachers["tiny-sdxl"]
    teacher = models.load_denoiser(family).own_parameters()
    of_adp = models.load_denoiser(family, folder=sdxl_adp / "pipeline").own_parameters()
    assert max((of_adp[name] - teacher[name]).abs().max() for name in teacher) > 1e-3
    for network, began in (("student", of_adp), ("fake", teacher)):
        ended = load_file(out / "checkpoints" / "000002" / f"{network}.safetensors")
        for name, p in began.items():  # two updates, at learning rates of 1e-6 and 2e-6
            assert_close(ended[f"weight/{name}"], p.detach(), atol=1e-5, rtol=0)

    pipe = DiffusionPipeline.from_pretrained(out / "pipeline")
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    image = pipe("a red fox", num_inference_steps=1, guidance_scale=1.0).images[0]
    assert image.size == (64, 64)


def test_cogvideox_adm_with_other_frames(encoded, tmp_path):
    out = tmp_path / "out"
    args = adm_args(encoded, out, "tiny-cogvideox-2b", 2)
    call(adm.main, adm.Config, *args, "--frames", 17)
    assert "num_frames=17" in (out / "pipeline" / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(out / "pipeline")
    how = {"num_inference_steps": 4, "guidance_scale": 1.0, "num_frames": 17}
    latents = pipe("a red fox", **how, output_type="latent").frames
    assert latents.shape == (1, 5, 16, 16, 16)


def test_cogvideox_adm_draws_its_samples(encoded, tmp_path):
    out = tmp_path / "out"
    args = adm_args(encoded, out, "tiny-cogvideox-5b", 1)
    call(adm.main, adm.Config, *args, "--sample-every", 1, "--batch-size", 1)
    pipe = DiffusionPipeline.from_pretrained(out / "pipeline")
    how = {"num_inference_steps": 4, "guidance_scale": 1.0, "num_frames": 9}
    frames = pipe("a red fox", **how).frames[0]
    assert len(frames) == 9 and frames[0].size == (128, 128)
    sheets = ["000001-batch.gif", "000001-batch.png", "000001.gif", "000001.png"]
    assert names(out / "samples") == sheets
    assert played(out / "samples" / "000001.gif") == 9 * 120  # 8 a second, in hundredths of one


@pytest.mark.parametrize(
    "model, size, latents, made",
    [
        ("tiny-wan", ["--resolution", 64, "--frames", 5], (2, 16, 16, 16), (5, 64, 64, 3)),
        ("tiny-flux", ["--resolution", "32x40"], (16, 16, 20), (32, 40, 3)),
    ],
)
def test_the_later_families_end_to_end(tmp_path, few_prompts, teachers, model, size, latents, made):
    """encode → pairs → adp, by both discriminators → adm, resumed bitwise → stock diffusers."""
    prompts = tmp_path / "prompts"
    pairs = tmp_path / "pairs"
    first = tmp_path / "adp"
    out = tmp_path / "adm"
    again = tmp_path / "again"
    flags = ["--model", model, "--prompts", few_prompts, "--out", prompts]
    call(data.encode, data.EncodeConfig, *flags)
    flags = ["--model", model, "--prompts", prompts, "--out", pairs, *size]
    call(data.pairs, data.PairsConfig, *flags, "--count", 2, "--steps", 2)
    family = teachers[model]
    texts = data.Prompts(prompts, family)
    x_T, x_0, cond = data.Pairs(pairs, family).batch([0], texts)  # (1, ...) each
    with torch.no_grad():
        none = texts.unconditional(1)
        guided = with_guidance(models.load_denoiser(family), cond, none, family.guidance)
        solved = teacher_sample(guided, family.schedule_at(latents), x_T, 2)
    assert_close(solved, x_0, atol=1e-4, rtol=1e-4)

    flags = ["--iterations", 2, "--mse-iterations", 1]
    call(adp.main, adp.Config, *adp_args(pairs, first, model), *flags)
    assert read_log(first)["d_accuracy_pixel"][1] is not None
    flags = ["--model", model, "--prompts", prompts, "--init", first, "--iterations", 2, *size]
    flags += [*QUICK, "--checkpoint-every", 1]
    call(adm.main, adm.Config, *flags, "--sample-every", 2, "--out", out)
    if len(latents) == 4:
        assert played(out / "samples" / "000002.gif") == made[0] * 60  # 16 a second
    assert "000002.png" in names(out / "samples")
    config = json.loads((out / "config.json").read_text())
    times = family.schedule_at(latents).timesteps(4)[:4].tolist()
    assert config["student"] == {"prediction": "flow", "times": times, "renoise": True}
    assert config["latent_shape"] == list(latents)

    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "000002")
    call(adm.main, adm.Config, *flags, "--sample-every", 0, "--out", again, "--resume")
    same_log(out, again, atol=0, rtol=0)
    assert tree(out / "checkpoints" / "000002") == tree(again / "checkpoints" / "000002")

    pipe = DiffusionPipeline.from_pretrained(out / "pipeline")
    how = json.loads((out / "pipeline" / "model_index.json").read_text())["_sampling"]
    (shown,) = pipe("a red fox", **how, output_type="np")[0]
    assert shown.shape == made


def test_a_run_logs_each_iteration_in_full_and_keeps_its_checkpoints(sd3_adm):
    log = read_log(sd3_adm)
    assert log.keys() > ADM_COLUMNS
    assert log["iteration"] == [1, 2, 3, 4]
    assert not [name for name, values in log.items() if None in values]
    folder = sd3_adm / "checkpoints"
    assert names(folder) == ["000002", "000004"]
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_the_student_that_is_exported_is_the_one_that_trained(sd3_adm, teachers):
    family = teachers["tiny-sd3"]
    exported = models.load_denoiser(family, folder=sd3_adm / "pipeline").net.state_dict()
    checkpoint = load_file(sd3_adm / "checkpoints" / "000004" / "student.safetensors")
    moved = 0
    for name, p in models.load_denoiser(family).net.named_parameters():
        assert torch.equal(exported[name], checkpoint[f"weight/{name}"])
        moved += not torch.equal(exported[name], p)
    assert moved > 10


# --- Phases ---------------------------------------------------------------------------------------


def clipped(out):
    """{network: (norm in the log, norm of the clipped gradient)} of a run of one iteration."""
    log = read_log(out)
    beta1 = json.loads((out / "config.json").read_text())["config"]["beta1"]
    found = {}
    for file in (out / "checkpoints" / "000001").glob("*.safetensors"):
        moments = [x.flatten() for name, x in load_file(file).items() if name.endswith("exp_avg")]
        norm = float(torch.cat(moments).norm()) / (1 - beta1)  # a first moment is (1 − β1) g
        found[file.stem] = log[f"grad_norm_{file.stem}"][0], norm
    return found


@pytest.mark.parametrize("clip", [1e-4, 1e4])
def test_each_network_is_clipped_and_logs_the_norm_before(clip, encoded, sdxl_pairs, tmp_path):
    args = adm_args(encoded, tmp_path / "adm", iterations=1)
    call(adm.main, adm.Config, *args, "--clip", clip)
    args = [*adp_args(sdxl_pairs, tmp_path / "adp"), "--iterations", 1, "--mse-iterations", 0]
    call(adp.main, adp.Config, *args, "--clip", clip)
    for stage, networks in (("adm", {"student", "fake", "heads"}), ("adp", {"student", "heads"})):
        found = clipped(tmp_path / stage)
        assert found.keys() == networks
        for norm, after in found.values():
            assert norm > 1e-3
            assert after == pytest.approx(min(norm, clip), rel=1e-3)


def test_with_checkpointing_sams_layers_run_once_more(sdxl_pairs, tmp_path, monkeypatch):
    """Else the student's images go through them with a graph, the pairs' without."""
    passes = Counter()
    plain = SamVisionLayer.forward

    def counted(self, *args, **kwargs):
        passes[flag] += 1
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(SamVisionLayer, "forward", counted)
    for flag in ("--no-gradient-checkpointing", "--gradient-checkpointing"):
        args = adp_args(sdxl_pairs, tmp_path / flag.strip("-"))
        call(adp.main, adp.Config, *args, "--iterations", 1, "--mse-iterations", 0, flag)
    layers = 4
    assert list(passes.values()) == [2 * layers, 3 * layers]


def test_adp_skips_an_update_that_is_not_finite(sdxl_pairs, tmp_path):
    """A pair that is no number costs the updates of iterations that draw it, and nothing else."""
    bad = shutil.copytree(sdxl_pairs, tmp_path / "pairs")
    out = tmp_path / "out"
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["prompts"] = str(sdxl_pairs / manifest["prompts"])
    (bad / "manifest.json").write_text(json.dumps(manifest))
    rows = load_file(bad / "000001.safetensors")
    rows["x_0"][-1] = float("nan")
    save_file(rows, bad / "000001.safetensors")
    flags = ["--iterations", 6, "--mse-iterations", 3]
    call(adp.main, adp.Config, *adp_args(bad, out), *flags)
    log = read_log(out)
    hit = [value != value for value in log["loss_mse"]]
    assert True in hit[:3] and True in hit[3:] and False in hit  # in both phases, and not always
    updates = (1, 1, 1, 2, 2, 2)  # of an iteration
    assert log["skipped"] == [n if bad else 0 for bad, n in zip(hit, updates, strict=True)]
    for file in (out / "checkpoints" / "000006").glob("*.safetensors"):
        assert all(x.isfinite().all() for x in load_file(file).values())


# --- Resuming, seeds ------------------------------------------------------------------------------


def same_networks(a, b):
    """Two runs' checkpoints after iteration 4 are the same, to the last bit."""
    for name in ("student", "fake", "heads"):
        file = f"checkpoints/000004/{name}.safetensors"
        assert (a / file).read_bytes() == (b / file).read_bytes()


def test_the_same_seed_makes_the_same_run(sd3_adm, encoded, tmp_path):
    again = tmp_path / "again"
    call(adm.main, adm.Config, *adm_args(encoded, again), "--checkpoint-every", 2)
    same_log(sd3_adm, again, atol=0, rtol=0)
    same_networks(sd3_adm, again)


def test_another_seed_draws_other_samples(encoded, tmp_path):
    """With one step of the student, which is the same for all seeds, and networks as they begin."""
    losses = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        flags = ["--seed", seed, "--student-steps", 1]
        call(adm.main, adm.Config, *adm_args(encoded, out, iterations=1), *flags)
        losses += read_log(out)["loss_fake"]
    assert losses[0] != losses[1]


def test_resume_equals_the_uninterrupted_run_bitwise(sd3_adm, encoded, tmp_path):
    """As if it had died after iteration 3, whose row is in the log."""
    out = shutil.copytree(sd3_adm, tmp_path / "out")
    shutil.rmtree(out / "checkpoints" / "000004")
    lines = (out / "log.csv").read_text().splitlines(keepends=True)
    (out / "log.csv").write_text("".join(lines[:4]))
    call(adm.main, adm.Config, *adm_args(encoded, out), "--checkpoint-every", 2, "--resume")
    same_log(sd3_adm, out, atol=0, rtol=0)
    same_networks(sd3_adm, out)


def test_pairs_resume_and_do_not_depend_on_batches(sdxl_pairs, encoded, tmp_path, teachers):
    family = teachers["tiny-sdxl"]
    prompts = encoded["tiny-sdxl"]
    out = shutil.copytree(sdxl_pairs, tmp_path / "pairs")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest |= {"complete": False, "prompts": os.path.relpath(prompts, out)}
    (out / "manifest.json").write_text(json.dumps(manifest))
    first = out / SHARD_0
    first.write_bytes(first.read_bytes()[:-100])  # killed while writing
    kept = (out / SHARD_1).stat().st_mtime_ns
    with pytest.raises(BadInput, match="half-written"):
        data.Pairs(out, family)

    flags = ["--model", "tiny-sdxl", "--prompts", prompts, "--out", out, "--count", 6]
    flags += ["--steps", 3, "--shard-size", 4, "--batch-size", 3]
    call(data.pairs, data.PairsConfig, *flags)
    assert (out / SHARD_1).stat().st_mtime_ns == kept
    before = data.Pairs(sdxl_pairs, family)[range(6)]
    after = data.Pairs(out, family)[range(6)]
    assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_pairs_are_the_teachers_guided_ode(sdxl_pairs, teachers):
    """Against diffusers' DDIM with the stock UNet: pair 4 has prompt 0 again, other noise."""
    family = teachers["tiny-sdxl"]
    pairs = data.Pairs(sdxl_pairs, family)
    assert pairs.manifest["guidance"] == 5.0 and pairs.manifest["steps"] == 3
    assert pairs[[4]]["prompt"].tolist() == [0]
    prompts = data.Prompts(pairs.prompts, family)
    x_T, x_0, cond = pairs.batch([0, 4], prompts)  # (2, 4, 32, 32) and {name: (2, ...)}
    assert not torch.equal(x_T[0], x_T[1])
    none = prompts.unconditional(2)

    settings = {"clip_sample": False, "set_alpha_to_one": True}
    scheduler = DDIMScheduler.from_pretrained(family.folder / "scheduler", **settings)
    scheduler.set_timesteps(3)
    net = models.load_denoiser(family)
    x = x_T
    for t, s in ((999, 666), (666, 333), (333, -1)):
        with torch.no_grad():
            c = net(x, torch.full((2,), t), cond)[0]
            u = net(x, torch.full((2,), t), none)[0]
        # DDIM's step back is their quotient.
        scheduler.config.num_train_timesteps = t - s
        scheduler.num_inference_steps = 1
        x = scheduler.step(u + 5.0 * (c - u), t, x, eta=0.0)[0]
    assert_close(x_0, x, atol=2e-3, rtol=2e-3)


# --- What users get wrong -------------------------------------------------------------------------

BAD_FLAGS = [
    ("--student-steps 0", "--student-steps 0: at least 1"),
    ("--iterations 0", "--iterations 0"),
    ("--batch-size 0", "--batch-size 0"),
    ("--dt 0", "--dt 0"),
    ("--dt 0.97", "--dt 0.97"),
    ("--dt nan", "--dt nan"),
    ("--dt -0.1", "--dt -0.1"),
    ("--t-min 0.9 --t-max 0.5", "--t-min 0.9"),
    ("--t-max 1.5", "--t-max 1.5"),
    ("--t-min -0.1", "--t-min"),
    ("--resolution 16", "at least 8x8"),
    ("--resolution 33", "multiples of 4"),
    ("--frames 9", "video"),
    ("--model sd4", "unknown model 'sd4'"),
    ("--model sd3", "--model tiny-sd3"),
    ("--model /nowhere/at/all", "unknown model"),
    ("--prompts /no/such/file", "cannot read prompts"),
    ("--lr 1", "--lr"),
    ("--iter 1", "--iter"),
    ("--batch-size two", "--batch-size"),
    ("--loss gan", "--loss"),
    ("--lr-heads 0", "--lr-heads"),
    ("--init /nowhere", "holds no run"),
    ("--head-width 12", "--head-width 12"),
    ("--ttur 0", "--ttur 0"),
    ("--guidance -1", "--guidance"),
    ("--seed -1", "--seed"),
    ("--resume", "holds no run to resume"),
    ("--lr-student nan", "--lr-student nan"),
    ("stray", "stray"),
]


@pytest.mark.parametrize("flags, says", BAD_FLAGS)
def test_bad_adm_flags_are_refused_by_name(flags, says, encoded, tmp_path, capsys):
    out = tmp_path / "out"
    args = [*adm_args(encoded, out), *flags.split()]
    line = refused(capsys, adm.main, adm.Config, *args)
    assert line.startswith("adm.py: ") and says in line, line
    assert not out.exists()


BAD_PROMPTS = [
    (b"", "no prompts"),
    (b"\n  \n", "no prompts"),
    (b"caf\xe9\n", "not UTF-8"),
]


@pytest.mark.parametrize("content, says", BAD_PROMPTS)
def test_bad_prompts_files_are_refused(content, says, tmp_path, capsys):
    path = tmp_path / "p.txt"
    out = tmp_path / "out"
    path.write_bytes(content)
    for main, config in (
        (adm.main, adm.Config),
        (data.encode, data.EncodeConfig),
        (data.pairs, data.PairsConfig),
    ):
        assert says in refused(capsys, main, config, "--prompts", path, "--out", out)
        assert not out.exists()


def test_another_run_is_left_alone(sd3_adm, encoded, sdxl_pairs, capsys):
    before = tree(sd3_adm)
    of_adm = adm_args(encoded, sd3_adm)
    of_adp = adp_args(sdxl_pairs, sd3_adm)
    assert "another run" in refused(capsys, adm.main, adm.Config, *of_adm)
    assert "another run" in refused(capsys, adp.main, adp.Config, *of_adp)
    line = refused(capsys, adm.main, adm.Config, *of_adm, "--resume", "--beta1", 0.5)
    assert "beta1 = 0.9, not 0.5" in line
    line = refused(capsys, adp.main, adp.Config, *of_adp, "--resume")
    assert "stage = 'adm', not 'adp'" in line
    assert tree(sd3_adm) == before


def test_files_of_others_are_left_alone(tmp_path, capsys):
    mine = tmp_path / "mine"
    thesis = mine / "thesis.tex"
    mine.mkdir()
    thesis.write_text("years of work")
    for main, config in (
        (adm.main, adm.Config),
        (data.encode, data.EncodeConfig),
        (data.pairs, data.PairsConfig),
    ):
        assert "not empty" in refused(capsys, main, config, "--out", mine)
    for out in (thesis, thesis / "x"):
        assert "cannot create" in refused(capsys, adm.main, adm.Config, "--out", out)
    assert tree(tmp_path) == {"mine/thesis.tex": b"years of work"}


@pytest.fixture
def refuses(tmp_path, capsys):
    """refuses(says, script, *flags): a script refuses them in these words, and writes nothing."""
    out = tmp_path / "out"
    scripts = {
        "adm": (adm.main, adm.Config),
        "adp": (adp.main, adp.Config),
        "pairs": (data.pairs, data.PairsConfig),
    }

    def check(says, script, *flags):
        line = refused(capsys, *scripts[script], *flags, "--out", out)
        assert says in line and not out.exists(), line

    return check


def test_pairs_of_another_kind_are_refused(refuses, sdxl_pairs, encoded, tmp_path):
    sdxl = ["--model", "tiny-sdxl", "--pairs"]
    other_model = ["--model", "tiny-sd3", "--pairs", sdxl_pairs]
    refuses("was made with tiny-sdxl, not with tiny-sd3", "adp", *other_model)
    refuses("holds prompts, not pairs", "adp", *sdxl, encoded["tiny-sdxl"])
    refuses("holds no pairs", "adp", *sdxl, tmp_path)
    refuses("of shape (4, 32, 32), but", "adp", *sdxl, sdxl_pairs, "--resolution", 128)
    refuses("guidance 5.0, not 3.0", "adp", *sdxl, sdxl_pairs, "--guidance", 3)
    backbone = ["--pixel-backbone", "nobody/nothing"]
    refuses("--pixel-backbone", "adp", *sdxl, sdxl_pairs, *backbone)


def test_prompts_of_another_kind_are_refused(refuses, encoded, tmp_path):
    of_sdxl = ["--model", "tiny-sd3", "--prompts", encoded["tiny-sdxl"]]
    refuses("was made with tiny-sdxl, not with tiny-sd3", "adm", *of_sdxl)
    of_sd3 = ["--model", "tiny-sdxl", "--prompts", encoded["tiny-sd3"]]
    refuses("was made with tiny-sd3, not with tiny-sdxl", "pairs", *of_sd3)
    refuses("holds no prompts", "adm", "--model", "tiny-sd3", "--prompts", tmp_path)


def test_first_weights_of_another_kind_are_refused(
    refuses, sdxl_pairs, sdxl_adp, sd3_adm, tmp_path
):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"_class_name": "somebody else\'s"}')
    no_pipeline = shutil.ignore_patterns("pipeline")
    unfinished = shutil.copytree(sdxl_adp, tmp_path / "unfinished", ignore=no_pipeline)

    sd3 = ["--model", "tiny-sd3", "--init"]
    sdxl = ["--model", "tiny-sdxl", "--init"]
    refuses("holds no run of adp.py", "adm", "--init", foreign)
    refuses("one of tiny-sdxl, not of tiny-sd3", "adm", *sd3, sdxl_adp)
    refuses("another --lora-rank than 4", "adm", *sd3, sd3_adm, "--lora-rank", 4)
    refuses("not finished", "adm", *sdxl, unfinished)

    reads = ["--pairs", sdxl_pairs]
    refuses("holds no run of adp.py", "adp", *reads, *sdxl, foreign)
    refuses("one of tiny-sd3, not of tiny-sdxl", "adp", *reads, *sdxl, sd3_adm)
    refuses("another --lora-rank than 4", "adp", *reads, *sdxl, sdxl_adp, "--lora-rank", 4)
    refuses("not finished", "adp", *reads, *sdxl, unfinished)


def test_a_folder_without_a_run_is_not_resumed(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"_class_name": "somebody else\'s"}')
    line = refused(capsys, adm.main, adm.Config, "--out", tmp_path, "--resume")
    assert "holds no run to resume" in line


def test_pairs_refuses_settings_without_meaning_and_other_settings(
    refuses, sdxl_pairs, encoded, capsys
):
    for flag in ("--count", "--steps", "--batch-size", "--shard-size"):
        refuses(f"{flag} 0", "pairs", flag, 0)
    flags = ["--model", "tiny-sdxl", "--prompts", encoded["tiny-sdxl"], "--out", sdxl_pairs]
    line = refused(capsys, data.pairs, data.PairsConfig, *flags, "--steps", 9)
    assert "steps: 3 there, 9 now" in line


@pytest.mark.parametrize("damage", ["truncated", "missing", "unfinished", "no manifest"])
def test_damaged_pairs_are_refused(damage, refuses, sdxl_pairs, tmp_path):
    folder = shutil.copytree(sdxl_pairs, tmp_path / "pairs")
    shard = folder / SHARD_1
    manifest = folder / "manifest.json"
    says = "half-written"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage == "unfinished":
        found = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**found, "complete": False}))
    else:
        manifest.write_text("{")
        says = "holds no pairs"
    refuses(says, "adp", "--model", "tiny-sdxl", "--pairs", folder)


MISTAKES = [
    (("adm.py", "--model", "sd3", "--out", "out"), "--model tiny-sd3 runs offline"),
    (("data.py", "draw"), "there are encode and pairs"),
]


@pytest.mark.parametrize("command, says", MISTAKES)
def test_a_mistake_costs_a_user_one_line(command, says, tmp_path):
    done = script(tmp_path, *command, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done


def test_lora_from_adp_to_adm(sdxl_pairs, encoded, tmp_path):
    first = tmp_path / "adp"
    out = tmp_path / "adm"
    flags = ["--iterations", 2, "--mse-iterations", 1, "--lora-rank", 2, "--lr-student", 1e-2]
    call(adp.main, adp.Config, *adp_args(sdxl_pairs, first), *flags)
    flags = ["--init", first, "--lora-rank", 2, "--lr-student", 1e-9]
    call(adm.main, adm.Config, *adm_args(encoded, out, "tiny-sdxl", 1), *flags)

    file = "pipeline/lora/pytorch_lora_weights.safetensors"
    of_adp = load_file(first / file)
    of_adm = load_file(out / file)
    assert any(x.abs().sum() > 0 for name, x in of_adp.items() if "lora_B" in name)
    assert_close(of_adm, of_adp, atol=1e-6, rtol=0)  # ADM went on from where ADP left
    saved = load_file(out / "checkpoints" / "000001" / "student.safetensors")
    assert all("lora" in name for name in saved if name.startswith("weight/"))
