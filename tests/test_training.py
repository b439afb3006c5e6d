"""The scripts through their command lines: every stage on every family, phases, resuming, ranks, and what users get wrong."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
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
from conftest import call, read_log, refused, same_log, script, tree

QUICK = ("--head-width", 32, "--batch-size", 2, "--sample-every", 0)
ADM_COLUMNS = ["iteration", "loss_generator", "loss_discriminator", "loss_fake", "dmd_loss", "d_accuracy", "grad_norm_student",
               "grad_norm_fake", "grad_norm_heads", "seconds", "peak_memory_gb"]


@pytest.fixture(scope="session")
def sdxl_adp(tmp_path_factory, sdxl_pairs):
    """A finished ADP run on tiny-sdxl: regression, then both discriminators."""
    out = tmp_path_factory.mktemp("runs") / "adp"
    call(adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", sdxl_pairs, "--out", out, "--iterations", 4, "--mse-iterations", 2,
         "--head-width", 32, "--batch-size", 2, "--sample-every", 2, "--lr-student", 1e-3)
    return out


@pytest.fixture(scope="session")
def sd3_adm(tmp_path_factory, encoded):
    """A finished ADM run on tiny-sd3: 4 iterations, checkpoints after 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "adm"
    call(adm.main, adm.Config, *adm_args(encoded, out), "--checkpoint-every", 2)
    return out


def adm_args(encoded, out, model="tiny-sd3", iterations=4):
    return ["--model", model, "--prompts", encoded[model], "--out", out, "--iterations", iterations, *QUICK]


# --- End to end ------------------------------------------------------------------------------------------------------

def test_sd3_end_to_end(tmp_path, few_prompts):
    """encode → pairs → adp → adm → stock diffusers. (test_readme.py does the like on SDXL, each command a process.)"""
    p = {name: tmp_path / name for name in ("prompts", "pairs", "adp", "adm")}
    call(data.encode, data.EncodeConfig, "--model", "tiny-sd3", "--prompts", few_prompts, "--out", p["prompts"])
    call(data.pairs, data.PairsConfig, "--model", "tiny-sd3", "--prompts", p["prompts"], "--count", 5, "--steps", 3, "--out", p["pairs"])
    call(adp.main, adp.Config, "--model", "tiny-sd3", "--pairs", p["pairs"], "--out", p["adp"], "--iterations", 2, "--mse-iterations", 1, *QUICK)
    call(adm.main, adm.Config, "--model", "tiny-sd3", "--prompts", p["prompts"], "--init", p["adp"], "--out", p["adm"], "--iterations", 2,
         "--student-steps", 1, "--sample-every", 1, "--head-width", 32)
    assert sorted(x.name for x in p["adm"].iterdir()) == ["checkpoints", "config.json", "log.csv", "pipeline", "samples"]
    assert sorted(x.name for x in (p["adm"] / "samples").iterdir()) == ["000001.png", "000002.png"]
    assert not list(p["adm"].rglob("*.bin")) + list(p["adm"].rglob("*.pt")) + list(p["adm"].rglob("*.partial"))
    config = json.loads((p["adm"] / "config.json").read_text())
    assert config["student"] == {"prediction": "flow", "times": [1000.0], "renoise": True}
    assert config["config"]["iterations"] == 2 and config["versions"]["torch"] == torch.__version__
    pipe = DiffusionPipeline.from_pretrained(p["adm"] / "pipeline")
    assert pipe("a red fox", num_inference_steps=1, guidance_scale=1.0).images[0].size == (32, 32)


def test_sdxl_end_to_end(sdxl_adp, encoded, tmp_path):
    """After ADP the student is flow-parameterised, trained on and exported as such; fake and teacher stay what they were."""
    log = read_log(sdxl_adp)
    assert log["loss_discriminator"][:2] == [None, None] and None not in log["loss_discriminator"][2:]
    assert None not in log["loss_mse"] and all(0 <= a <= 1 for a in log["d_accuracy"][2:] + log["d_accuracy_pixel"][2:])
    assert sorted(x.name for x in (sdxl_adp / "samples").iterdir()) == ["000002.png", "000004.png"]
    out = tmp_path / "adm"
    call(adm.main, adm.Config, *adm_args(encoded, out, "tiny-sdxl", 2), "--init", sdxl_adp)
    config = json.loads((out / "config.json").read_text())
    assert config["student"] == {"prediction": "flow", "times": [999.0], "renoise": False}
    pipe = DiffusionPipeline.from_pretrained(out / "pipeline")
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipe("a red fox", num_inference_steps=1, guidance_scale=1.0).images[0].size == (64, 64)


def test_cogvideox_adm_with_other_frames(encoded, tmp_path):
    args = adm_args(encoded, tmp_path / "out", "tiny-cogvideox-2b", 2)
    call(adm.main, adm.Config, *args, "--frames", 17)
    assert "num_frames=17" in (tmp_path / "out" / "pipeline" / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    latents = pipe("a red fox", num_inference_steps=4, guidance_scale=1.0, num_frames=17,
                   output_type="latent").frames
    assert latents.shape == (1, 5, 16, 16, 16)


def test_cogvideox_adm_draws_its_samples(encoded, tmp_path):
    args = adm_args(encoded, tmp_path / "out", "tiny-cogvideox-5b", 1)
    call(adm.main, adm.Config, *args, "--sample-every", 1, "--batch-size", 1)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    frames = pipe("a red fox", num_inference_steps=4, guidance_scale=1.0, num_frames=9).frames[0]
    assert len(frames) == 9 and frames[0].size == (128, 128)
    assert (tmp_path / "out" / "samples" / "000001.png").exists()


def test_cogvideox_adp_sees_frames(encoded, tmp_path):
    name, out = "tiny-cogvideox-5b", tmp_path / "adp"
    call(data.pairs, data.PairsConfig, "--model", name, "--prompts", encoded[name], "--out", tmp_path / "pairs", "--count", 2,
         "--steps", 1, "--guidance", 1)
    call(adp.main, adp.Config, "--model", name, "--pairs", tmp_path / "pairs", "--out", out, "--iterations", 1, "--mse-iterations", 0, *QUICK)
    assert read_log(out)["d_accuracy_pixel"][0] is not None


def test_log_and_output_folder(sd3_adm):
    log = read_log(sd3_adm)
    assert set(ADM_COLUMNS) < log.keys() and log["iteration"] == [1, 2, 3, 4] and None not in sum(log.values(), [])
    assert sorted(x.name for x in (sd3_adm / "checkpoints").iterdir()) == ["000002", "000004"]
    assert {x.suffix for x in (sd3_adm / "checkpoints").rglob("*") if x.is_file()} == {".safetensors", ".json"}


def test_the_student_that_is_exported_is_the_one_that_trained(sd3_adm, teachers):
    exported = models.load_denoiser(families.load_teacher("tiny-sd3"), folder=sd3_adm / "pipeline").net.state_dict()
    checkpoint = load_file(sd3_adm / "checkpoints" / "000004" / "student.safetensors")
    moved = 0
    for name, p in models.load_denoiser(teachers["tiny-sd3"]).net.named_parameters():
        assert torch.equal(exported[name], checkpoint[f"weight/{name}"])
        moved += not torch.equal(exported[name], p)
    assert moved > 10


# --- Phases ----------------------------------------------------------------------------------------------------------

def test_real_and_fake_step_from_the_same_noisy_sample_by_dt(encoded, tmp_path, monkeypatch):
    """x_real and x_fake start at one x_t and land Δt lower, within the range; on a fresh run, fake is the teacher without CFG."""
    steps = []
    real_step = type(families.load_teacher("tiny-sd3").schedule).pf_ode_step

    def spy(self, x_t, out, t, s):
        steps.append((x_t, t, s))
        return real_step(self, x_t, out, t, s)
    monkeypatch.setattr("ode.FlowSchedule.pf_ode_step", spy)
    call(adm.main, adm.Config, *adm_args(encoded, tmp_path / "out", iterations=6), "--dt", 0.1, "--t-min", 0.3, "--t-max", 0.6)
    assert len(steps) == 12
    for (x_a, t_a, s_a), (x_b, t_b, s_b) in zip(steps[::2], steps[1::2]):
        assert torch.equal(x_a, x_b) and torch.equal(t_a, t_b) and torch.equal(s_a, s_b)
        assert_close(t_a - s_a, torch.full((2,), 100.0))
        assert (s_a >= 300 - 1e-3).all() and (t_a <= 600).all()
        assert t_a.dtype == torch.float32


def clipped(out):
    """{network: (norm in the log, norm of the clipped gradient)} of a run of one iteration."""
    log, found = read_log(out), {}
    beta1 = json.loads((out / "config.json").read_text())["config"]["beta1"]
    for file in (out / "checkpoints" / "000001").glob("*.safetensors"):
        moments = [x.flatten() for name, x in load_file(file).items() if name.endswith("exp_avg")]
        norm = float(torch.cat(moments).norm()) / (1 - beta1)  # a first moment is (1 − β1) g
        found[file.stem] = log[f"grad_norm_{file.stem}"][0], norm
    return found


@pytest.mark.parametrize("clip", [1e-4, 1e4])
def test_each_network_is_clipped_and_logs_the_norm_before(clip, encoded, sdxl_pairs, tmp_path):
    call(adm.main, adm.Config, *adm_args(encoded, tmp_path / "adm", iterations=1), "--clip", clip)
    call(adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", sdxl_pairs,
         "--out", tmp_path / "adp", "--iterations", 1, "--mse-iterations", 0, *QUICK,
         "--clip", clip)
    for stage, networks in (("adm", {"student", "fake", "heads"}), ("adp", {"student", "heads"})):
        found = clipped(tmp_path / stage)
        assert found.keys() == networks
        for norm, after in found.values():
            assert norm > 1e-3
            assert after == pytest.approx(min(norm, clip), rel=1e-3)


def test_adp_skips_an_update_that_is_not_finite(sdxl_pairs, tmp_path):
    """A pair that is no number costs the updates of iterations that draw it, and nothing else."""
    bad, out = shutil.copytree(sdxl_pairs, tmp_path / "pairs"), tmp_path / "out"
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["prompts"] = str(sdxl_pairs / manifest["prompts"])
    (bad / "manifest.json").write_text(json.dumps(manifest))
    rows = load_file(bad / "000001.safetensors")
    rows["x_0"][-1] = float("nan")
    save_file(rows, bad / "000001.safetensors")
    call(adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", bad, "--out", out,
         "--iterations", 6, "--mse-iterations", 3, *QUICK)
    log = read_log(out)
    hit = [value != value for value in log["loss_mse"]]
    assert True in hit[:3] and True in hit[3:] and False in hit  # in both phases, and not always
    updates = (1, 1, 1, 2, 2, 2)  # of an iteration
    assert log["skipped"] == [n if bad else 0 for bad, n in zip(hit, updates)]
    for file in (out / "checkpoints" / "000006").glob("*.safetensors"):
        assert all(x.isfinite().all() for x in load_file(file).values())


# --- Resuming, seeds, ranks ------------------------------------------------------------------------------------------

def test_same_seed_same_run_other_seed_other_run(sd3_adm, encoded, tmp_path):
    call(adm.main, adm.Config, *adm_args(encoded, tmp_path / "again"), "--checkpoint-every", 2)
    same_log(sd3_adm, tmp_path / "again", atol=0, rtol=0)
    a, b = ((f / "checkpoints" / "000004" / "student.safetensors").read_bytes() for f in (sd3_adm, tmp_path / "again"))
    assert a == b
    call(adm.main, adm.Config, *adm_args(encoded, tmp_path / "other"), "--seed", 1)
    assert read_log(tmp_path / "other")["loss_fake"] != read_log(sd3_adm)["loss_fake"]


def test_resume_equals_the_uninterrupted_run_bitwise(sd3_adm, encoded, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(sd3_adm, out)
    shutil.rmtree(out / "checkpoints" / "000004")  # as if it had died after iteration 3, whose row is in the log
    (out / "log.csv").write_text("".join((sd3_adm / "log.csv").read_text().splitlines(True)[:4]))
    call(adm.main, adm.Config, *adm_args(encoded, out), "--checkpoint-every", 2, "--resume")
    same_log(sd3_adm, out, atol=0, rtol=0)
    for name in ("student", "fake", "heads"):
        file = f"checkpoints/000004/{name}.safetensors"
        assert (sd3_adm / file).read_bytes() == (out / file).read_bytes()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(sd3_adm, encoded, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(sd3_adm, out)
    file = out / "checkpoints" / "000004" / "fake.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    call(adm.main, adm.Config, *adm_args(encoded, out), "--checkpoint-every", 2, "--resume")
    assert "000004 is damaged" in capsys.readouterr().err
    same_log(sd3_adm, out, atol=0, rtol=0)


def test_pairs_resume_and_do_not_depend_on_batches(sdxl_pairs, encoded, tmp_path, teachers):
    out = tmp_path / "pairs"
    args = ["--model", "tiny-sdxl", "--prompts", encoded["tiny-sdxl"], "--out", out, "--count", 6, "--steps", 3, "--shard-size", 4]
    shutil.copytree(sdxl_pairs, out)
    manifest = json.loads((out / "manifest.json").read_text())
    prompts = runtime.folder.os.path.relpath(encoded["tiny-sdxl"], out)
    (out / "manifest.json").write_text(json.dumps({**manifest, "complete": False, "prompts": prompts}))
    (out / "000000.safetensors").write_bytes((out / "000000.safetensors").read_bytes()[:-100])  # killed while writing
    kept = (out / "000001.safetensors").stat().st_mtime_ns
    with pytest.raises(runtime.settings.BadInput, match="half-written"):
        data.Pairs(out, teachers["tiny-sdxl"])
    call(data.pairs, data.PairsConfig, *args, "--batch-size", 3)
    assert (out / "000001.safetensors").stat().st_mtime_ns == kept
    before, after = data.Pairs(sdxl_pairs, teachers["tiny-sdxl"]), adp.Pairs(out, teachers["tiny-sdxl"])
    for a, b in zip(before.batch(range(6))[:2], after.batch(range(6))[:2]):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_pairs_are_the_teachers_guided_ode(sdxl_pairs, teachers):
    """Against diffusers' DDIM with the stock UNet: pair 4 has prompt 0 again, other noise."""
    from diffusers import DDIMScheduler
    family = teachers["tiny-sdxl"]
    pairs = data.Pairs(sdxl_pairs, family)
    assert pairs.manifest["guidance"] == 5.0 and pairs.manifest["steps"] == 3 and pairs[[4]]["prompt"].tolist() == [0]
    x_T, x_0, cond = pairs.batch([0, 4])
    assert not torch.equal(x_T[0], x_T[1])
    scheduler, net = DDIMScheduler.from_pretrained(family.folder / "scheduler", clip_sample=False, set_alpha_to_one=True), models.load_denoiser(family)
    scheduler.set_timesteps(3)
    x, none = x_T, pairs.prompts.unconditional(2)
    for t, s in ((999, 666), (666, 333), (333, -1)):
        with torch.no_grad():
            c, u = (net(x, torch.full((2,), t), k)[0] for k in (cond, none))
        scheduler.config.num_train_timesteps, scheduler.num_inference_steps = (t - s), 1  # DDIM's step back is their quotient
        x = scheduler.step(u + 5.0 * (c - u), t, x, eta=0.0)[0]
    assert_close(x_0, x, atol=2e-3, rtol=2e-3)


# --- What users get wrong --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, says", [
    (["--student-steps", "0"], "--student-steps 0: at least 1"), (["--iterations", "0"], "--iterations 0"),
    (["--batch-size", "0"], "--batch-size 0"), (["--dt", "0"], "--dt 0"), (["--dt", "0.97"], "--dt 0.97"), (["--dt", "nan"], "--dt nan"),
    (["--dt", "-0.1"], "--dt -0.1"), (["--t-min", "0.9", "--t-max", "0.5"], "--t-min 0.9"), (["--t-max", "1.5"], "--t-max 1.5"),
    (["--t-min", "-0.1"], "--t-min"), (["--resolution", "16"], "at least 8x8"), (["--resolution", "33"], "multiples of 4"),
    (["--frames", "9"], "video"), (["--model", "sd4"], "unknown model 'sd4'"), (["--model", "sd3"], "--model tiny-sd3"),
    (["--model", "/nowhere/at/all"], "unknown model"), (["--prompts", "/no/such/file"], "cannot read prompts"), (["--lr", "1"], "--lr"),
    (["--iter", "1"], "--iter"), (["--batch-size", "two"], "--batch-size"), (["--loss", "gan"], "--loss"), (["--lr-heads", "0"], "--lr-heads"),
    (["--init", "/nowhere"], "holds no run"), (["--head-width", "12"], "--head-width 12"), (["--ttur", "0"], "--ttur 0"),
    (["--guidance", "-1"], "--guidance"), (["--seed", "-1"], "--seed"), (["--resume"], "holds no run to resume"),
    (["--lr-student", "nan"], "--lr-student nan"), (["stray"], "stray")])
def test_bad_adm_flags(args, says, encoded, tmp_path, capsys):
    line = refused(capsys, adm.main, adm.Config, *adm_args(encoded, tmp_path / "out"), *args)
    assert line.startswith("adm.py: ") and says in line, line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, says", [(b"", "no prompts"), (b"\n  \n", "no prompts"), (b"caf\xe9\n", "not UTF-8")])
def test_bad_prompts_files(content, says, tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes(content)
    for main, config in ((adm.main, adm.Config), (data.encode, data.EncodeConfig), (data.pairs, data.PairsConfig)):
        assert says in refused(capsys, main, config, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(sd3_adm, sdxl_adp, encoded, sdxl_pairs, tmp_path, capsys):
    before = tree(sd3_adm)
    assert "another run" in refused(capsys, adm.main, adm.Config, *adm_args(encoded, sd3_adm))
    flags = [*adm_args(encoded, sd3_adm), "--resume", "--beta1", "0.5"]
    line = refused(capsys, adm.main, adm.Config, *flags)
    assert "beta1 = 0.9, not 0.5" in line
    assert "another run" in refused(capsys, adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", sdxl_pairs, "--out", sd3_adm)
    line = refused(capsys, adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", sdxl_pairs, "--out", sd3_adm, "--resume")
    assert "stage = 'adm', not 'adp'" in line and tree(sd3_adm) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for main, config, args in ((adm.main, adm.Config, []), (data.encode, data.EncodeConfig, []), (data.pairs, data.PairsConfig, [])):
        assert "not empty" in refused(capsys, main, config, *args, "--out", tmp_path / "mine")
    assert list(tree(tmp_path)) == ["mine/thesis.tex"]
    assert "cannot create" in refused(capsys, adm.main, adm.Config, "--out", tmp_path / "mine" / "thesis.tex" / "x")
    assert "cannot create" in refused(capsys, adm.main, adm.Config, "--out", tmp_path / "mine" / "thesis.tex")


def test_other_models_data_is_refused(sdxl_pairs, sdxl_adp, sd3_adm, encoded, tmp_path, capsys):
    def check(says, main, config, *args):
        line = refused(capsys, main, config, *args, "--out", tmp_path / "out")
        assert says in line and not (tmp_path / "out").exists(), line
    check("was made with tiny-sdxl, not with tiny-sd3", adp.main, adp.Config, "--model", "tiny-sd3", "--pairs", sdxl_pairs)
    check("holds prompts, not pairs", adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", encoded["tiny-sdxl"])
    check("holds no pairs", adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", tmp_path)
    check("of shape (4, 32, 32), but", adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", sdxl_pairs, "--resolution", "128")
    check("guidance 5.0, not 3.0", adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", sdxl_pairs, "--guidance", "3")
    check("--pixel-backbone", adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", sdxl_pairs, "--pixel-backbone", "nobody/nothing")
    check("was made with tiny-sdxl, not with tiny-sd3", adm.main, adm.Config, "--model", "tiny-sd3", "--prompts", encoded["tiny-sdxl"])
    check("holds no prompts", adm.main, adm.Config, "--model", "tiny-sd3", "--prompts", tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "somebody else\'s"}')
    check("holds no run of adp.py", adm.main, adm.Config, "--init", tmp_path)
    assert "holds no run to resume" in refused(capsys, adm.main, adm.Config, "--out", tmp_path, "--resume")
    check("one of tiny-sdxl, not of tiny-sd3", adm.main, adm.Config, "--model", "tiny-sd3", "--init", sdxl_adp)
    check("another --lora-rank than 4", adm.main, adm.Config, "--model", "tiny-sd3", "--init", sd3_adm, "--lora-rank", "4")
    no_pipeline = shutil.ignore_patterns("pipeline")
    unfinished = shutil.copytree(sdxl_adp, tmp_path / "unfinished", ignore=no_pipeline)
    check("not finished", adm.main, adm.Config, "--model", "tiny-sdxl", "--init", unfinished)
    for says, *flags in (("holds no run of adp.py", "--init", tmp_path),
                         ("one of tiny-sd3, not of tiny-sdxl", "--init", sd3_adm),
                         ("another --lora-rank than 4", "--init", sdxl_adp, "--lora-rank", "4"),
                         ("not finished", "--init", unfinished)):
        check(says, adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", sdxl_pairs, *flags)
    check("was made with tiny-sd3, not with tiny-sdxl", data.pairs, data.PairsConfig, "--model", "tiny-sdxl", "--prompts", encoded["tiny-sd3"])
    for flag in ("--count", "--steps", "--batch-size", "--shard-size"):
        check(f"{flag} 0", data.pairs, data.PairsConfig, flag, "0")
    line = refused(capsys, data.pairs, data.PairsConfig, "--model", "tiny-sdxl", "--prompts", encoded["tiny-sdxl"], "--out", sdxl_pairs, "--steps", 9)
    assert "steps: 3 there, 9 now" in line


@pytest.mark.parametrize("damage", ["truncated", "missing", "unfinished", "no manifest"])
def test_damaged_pairs_are_refused(damage, sdxl_pairs, tmp_path, capsys):
    folder = tmp_path / "pairs"
    shutil.copytree(sdxl_pairs, folder)
    shard, manifest = folder / "000001.safetensors", folder / "manifest.json"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage == "unfinished":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    else:
        manifest.write_text("{")
    line = refused(capsys, adp.main, adp.Config, "--model", "tiny-sdxl", "--pairs", folder, "--out", tmp_path / "out")
    assert ("holds no pairs" if damage == "no manifest" else "half-written") in line


def test_mistakes_as_a_user_sees_them(tmp_path):
    for command, says in ((["adm.py", "--model", "sd3", "--out", tmp_path / "o"], "--model tiny-sd3 runs offline"),
                          (["data.py", "draw"], "there are encode and pairs")):
        done = script(tmp_path, *command)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr


def test_lora_from_adp_to_adm(sdxl_pairs, encoded, tmp_path):
    common = ["--model", "tiny-sdxl", "--lora-rank", 2, "--lr-student", 1e-2, *QUICK]
    call(adp.main, adp.Config, "--pairs", sdxl_pairs, "--out", tmp_path / "adp", "--iterations", 2, "--mse-iterations", 1, *common)
    call(adm.main, adm.Config, "--prompts", encoded["tiny-sdxl"], "--init", tmp_path / "adp", "--out", tmp_path / "adm", "--iterations", 1,
         *common[:-2], "--lr-student", 1e-9, "--sample-every", 0)
    a, b = (load_file(tmp_path / s / "pipeline" / "lora" / "pytorch_lora_weights.safetensors") for s in ("adp", "adm"))
    assert a.keys() == b.keys() and any(v.abs().sum() > 0 for k, v in a.items() if "lora_B" in k)
    assert_close(a, b, atol=1e-6, rtol=0)  # ADM went on from where ADP left
    saved = load_file(tmp_path / "adm" / "checkpoints" / "000001" / "student.safetensors")
    assert all("lora" in k for k in saved if k.startswith("weight/"))
