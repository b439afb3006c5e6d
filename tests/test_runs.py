"""A run's folder and the collections it reads: resuming, what may change then, growing pairs, and
what scripts say."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
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
from conftest import ROOT, call, read_log, refused, same_log, shell, tree

QUICK = ["--head-width", 8, "--batch-size", 2, "--sample-every", 0]
EVERY = ["--checkpoint-every", 1, "--keep-checkpoints", 9]


def adm_flags(prompts, out, iterations, model="tiny-sd3"):
    return ["--model", model, "--prompts", prompts, "--out", out, "--iterations", iterations,
            "--student-steps", 1, *QUICK, *EVERY]


@pytest.fixture(scope="module")
def run3(tmp_path_factory, few_prompts):
    """An ADM run on a text file, of three iterations and as many checkpoints."""
    out = tmp_path_factory.mktemp("run3") / "out"
    call(adm.main, adm.Config, *adm_flags(few_prompts, out, 3))
    return out


@pytest.fixture
def run2(run3, tmp_path):
    """The same as it was after two iterations."""
    return stopped(run3, tmp_path / "out", 2)


def stopped(run, out, iteration):
    """A copy of a run, without what came after this iteration."""
    shutil.copytree(run, out)
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name) > iteration:
            shutil.rmtree(folder)
    return out


def config_of(run):
    return json.loads((run / "config.json").read_text())


def weights(run, iteration, network="student"):
    tensors = load_file(run / "checkpoints" / f"{iteration:06d}" / f"{network}.safetensors")
    return {name: x for name, x in tensors.items() if name.startswith("weight/")}


def moved(run, iteration):
    """How far the student's weights went in this iteration, at most."""
    before, after = weights(run, iteration - 1), weights(run, iteration)
    return max((after[name] - before[name]).abs().max() for name in before)


def refused_untouched(capsys, run, main, config_class, *flags):
    """The one line on a --resume that is refused; the run is as it was."""
    before = tree(run)
    line = refused(capsys, main, config_class, *flags, "--resume")
    assert tree(run) == before
    return line


# --- Resuming: what paths stand for --------------------------------------------------------------

SPELLINGS = ["dots", "relative", "another clone", "encoded", "teacher's folder"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_resume_takes_the_same_data_by_any_name(
        spelling, few_prompts, encoded, teachers, run3, run2, tmp_path, monkeypatch):
    prompts, model = few_prompts, "tiny-sd3"
    if spelling == "dots":
        prompts = few_prompts.parent / "nowhere" / ".." / few_prompts.name
        (few_prompts.parent / "nowhere").mkdir()
    elif spelling == "relative":
        monkeypatch.chdir(few_prompts.parent)
        prompts = few_prompts.name
    elif spelling == "another clone":
        prompts = shutil.copy(few_prompts, tmp_path / "copy.txt")
    elif spelling == "encoded":
        prompts = encoded["tiny-sd3"]
    else:
        model = shutil.copytree(teachers["tiny-sd3"].folder, tmp_path / "teacher")
    call(adm.main, adm.Config, *adm_flags(prompts, run2, 3, model), "--resume")
    same_log(run3, run2, atol=0, rtol=0)
    assert config_of(run2)["config"]["prompts"] == str(prompts) and config_of(run2)["changes"] == []


def test_a_default_is_the_value_it_stands_for(few_prompts, run2, capsys):
    flags = adm_flags(few_prompts, run2, 3)
    line = refused_untouched(capsys, run2, adm.main, adm.Config, *flags, "--guidance", 5)
    assert "guidance = 7.0, not 5.0" in line
    call(adm.main, adm.Config, *flags, "--resume", "--guidance", 7)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_resume_refuses_another_text_under_the_same_path(
        kind, few_prompts, encoded, tmp_path, capsys):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    if kind == "file":
        shutil.copy(few_prompts, prompts)
    else:
        shutil.copytree(encoded["tiny-sd3"], prompts)
    call(adm.main, adm.Config, *adm_flags(prompts, out, 1))
    if kind == "file":
        with open(prompts, "a", encoding="utf-8") as f:
            f.write("one more\n")
    else:
        shutil.rmtree(prompts)
        other = tmp_path / "other.txt"
        other.write_text("something else\n")
        call(data.encode, data.EncodeConfig,
             "--model", "tiny-sd3", "--prompts", other, "--out", prompts)
    line = refused_untouched(capsys, out, adm.main, adm.Config, *adm_flags(prompts, out, 2))
    assert "text_sha256 of prompts" in line


def test_resume_compares_the_teachers_and_the_first_weights(
        few_prompts, run3, teachers, tmp_path, capsys):
    init, out = shutil.copytree(run3, tmp_path / "init"), tmp_path / "out"
    model = shutil.copytree(teachers["tiny-sd3"].folder, tmp_path / "teacher")
    call(adm.main, adm.Config, *adm_flags(few_prompts, out, 1, model), "--init", init)

    def move(folder):
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file({name: x + 1 for name, x in load_file(file).items()}, file)
    elsewhere = init.rename(tmp_path / "elsewhere")
    flags = adm_flags(few_prompts, out, 2, model)
    call(adm.main, adm.Config, *flags, "--init", elsewhere, "--resume")
    move(elsewhere / "pipeline")
    for init in (elsewhere, "teacher"):
        line = refused_untouched(capsys, out, adm.main, adm.Config, *flags, "--init", init)
        assert "weights_sha256 of init" in line
    move(model)
    line = refused_untouched(capsys, out, adm.main, adm.Config, *flags)
    assert "weights_sha256 of model" in line


def test_resume_compares_pairs_and_pixel_backbone(few_prompts, tmp_path, capsys):
    from families.tiny import build
    here, out = tmp_path / "here", tmp_path / "out"
    make = ["--model", "tiny-sdxl", "--prompts", few_prompts, "--steps", 1, "--guidance", 1]
    call(data.pairs, data.PairsConfig, *make, "--count", 6, "--out", here / "pairs")
    shutil.copytree(build("tiny-sam"), here / "sam")

    def flags(place, iterations):
        reads = ["--pairs", place / "pairs", "--pixel-backbone", place / "sam"]
        return ["--model", "tiny-sdxl", *reads, "--out", out, "--iterations", iterations,
                "--mse-iterations", 1, *QUICK, *EVERY]
    call(adp.main, adp.Config, *flags(here, 1))
    there = shutil.copytree(here, tmp_path / "there")
    call(adp.main, adp.Config, *flags(there, 2), "--resume")
    call(data.pairs, data.PairsConfig, *make, "--count", 7, "--out", here / "pairs")
    line = refused_untouched(capsys, out, adp.main, adp.Config, *flags(here, 3))
    assert "count of pairs" in line and "= 6, not 7" in line
    file = there / "sam" / "model.safetensors"
    save_file({name: x + 1 for name, x in load_file(file).items()}, file, {"format": "pt"})
    line = refused_untouched(capsys, out, adp.main, adp.Config, *flags(there, 3))
    assert "weights_sha256 of pixel_backbone" in line


def test_a_run_of_an_earlier_version_goes_on_under_the_same_paths(
        few_prompts, run3, run2, tmp_path, capsys):
    config = config_of(run2)
    kept = ("config", "teacher", "student", "world_size", "versions", "guidance")  # all there was
    (run2 / "config.json").write_text(json.dumps({name: config[name] for name in kept}))
    other = shutil.copy(few_prompts, tmp_path / "copy.txt")
    line = refused_untouched(capsys, run2, adm.main, adm.Config, *adm_flags(other, run2, 3))
    assert f"prompts = '{few_prompts}', not '{other}'" in line
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), "--resume")
    same_log(run3, run2, atol=0, rtol=0)
    assert config_of(run2).keys() == config.keys()


# --- Resuming: what may change and is noted ------------------------------------------------------

def test_rates_may_change_and_the_history_is_kept(few_prompts, run2, capsys):
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), "--resume", "--lr-student", 1e-2)
    said = [line for line in capsys.readouterr().err.splitlines() if "lr_student" in line]
    assert len(said) == 1 and "from iteration 3 on lr_student = 0.01, before 1e-06" in said[0]
    first = {"iteration": 2, "lr_student": [1e-6, 1e-2]}
    assert config_of(run2)["changes"] == [first] and config_of(run2)["config"]["lr_student"] == 1e-2
    assert moved(run2, 2) < 1e-5 and moved(run2, 3) > 1e-3
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 4), "--resume", "--lr-student", 1e-2)
    assert "lr_student" not in capsys.readouterr().err and config_of(run2)["changes"] == [first]
    last = ["--lr-student", 1e-3, "--lr-fake", 1e-5, "--lr-heads", 1e-3]
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 5), "--resume", *last)
    second = {"iteration": 4, "lr_student": [1e-2, 1e-3], "lr_fake": [2e-6, 1e-5],
              "lr_heads": [1e-4, 1e-3]}
    config = config_of(run2)
    assert config["changes"] == [first, second] and config["config"]["lr_heads"] == 1e-3


def test_a_change_whose_iterations_come_again_is_forgotten(few_prompts, run2, capsys):
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), "--resume", "--lr-student", 1e-2)
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 4), "--resume", "--lr-student", 1e-3)
    for iteration in (3, 4):
        (run2 / "checkpoints" / f"{iteration:06d}" / "student.safetensors").write_bytes(b"damaged")
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), "--resume", "--lr-student", 1e-3)
    assert "from iteration 3 on lr_student = 0.001, before 1e-06" in capsys.readouterr().err
    assert config_of(run2)["changes"] == [{"iteration": 2, "lr_student": [1e-6, 1e-3]}]


def test_the_average_may_begin_and_end(few_prompts, run2, teachers, tmp_path):
    def exported(run):
        return models.load_denoiser(teachers["tiny-sd3"], folder=run / "pipeline").net.state_dict()
    fast = ["--resume", "--lr-student", 1e-2]
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), *fast, "--ema", 0.75)
    before, after, average = weights(run2, 2), weights(run2, 3), weights(run2, 3, "ema")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in average:
        assert_close(average[name], 0.75 * before[name] + 0.25 * after[name], atol=1e-7, rtol=1e-6)
        assert torch.equal(exported(run2)[name.removeprefix("weight/")], average[name])
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 4), *fast)
    assert not (run2 / "checkpoints" / "000004" / "ema.safetensors").exists()
    for name, x in weights(run2, 4).items():
        assert torch.equal(exported(run2)[name.removeprefix("weight/")], x)
    began = {"iteration": 2, "lr_student": [1e-6, 1e-2], "ema": [0.0, 0.75]}
    assert config_of(run2)["changes"] == [began, {"iteration": 3, "ema": [0.75, 0.0]}]
    (run2 / "checkpoints" / "000004" / "fake.safetensors").write_bytes(b"damaged")
    again = shutil.copytree(run2, tmp_path / "again")
    call(adm.main, adm.Config, *adm_flags(few_prompts, again, 4), *fast)  # from 3, with an average
    assert not (again / "checkpoints" / "000004" / "ema.safetensors").exists()
    (run2 / "checkpoints" / "000003" / "fake.safetensors").write_bytes(b"damaged")
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), *fast)  # from 2, which has none
    assert config_of(run2)["changes"] == [{"iteration": 2, "lr_student": [1e-6, 1e-2]}]


@pytest.mark.parametrize("had", [True, False])
def test_an_average_too_many_or_too_few_is_damage(had, few_prompts, tmp_path, capsys):
    """Checksums that fit are not enough: the run says which of its checkpoints have an average."""
    flags = [*adm_flags(few_prompts, tmp_path / "out", 2), "--ema", 0.5 if had else 0.0]
    call(adm.main, adm.Config, *flags)
    newest = tmp_path / "out" / "checkpoints" / "000002"
    if had:
        (newest / "ema.safetensors").unlink()
    else:
        save_file(weights(tmp_path / "out", 2), newest / "ema.safetensors")
    names = sorted(file.stem for file in newest.glob("*.safetensors"))
    runtime.files.write_json(newest / "state.json", runtime.folder.checkpoint_state(2, newest, names))
    call(adm.main, adm.Config, *flags, "--resume", "--ema", 0.25)
    assert "000002 is damaged (other files than a checkpoint's)" in capsys.readouterr().err


def test_adp_notes_its_regressions_rate(sdxl_pairs, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model", "tiny-sdxl", "--pairs", sdxl_pairs, "--out", out, "--loss", "mse",
             *QUICK, *EVERY]
    call(adp.main, adp.Config, *flags, "--iterations", 1)
    call(adp.main, adp.Config, *flags, "--iterations", 2, "--resume", "--lr-mse", 1e-2)
    assert "from iteration 2 on lr_mse = 0.01, before None" in capsys.readouterr().err
    assert config_of(out)["changes"] == [{"iteration": 1, "lr_mse": [None, 1e-2]}]
    assert moved(out, 2) > 1e-3


# --- The end of a run ----------------------------------------------------------------------------

@pytest.mark.parametrize("script", [adm, adp])
def test_saving_only_saves_and_the_loop_ends(
        script, encoded, sdxl_pairs, tmp_path, monkeypatch, capsys):
    """A run that is asked to stop: its checkpoint is written, and then it ends."""
    save, saved = runtime.folder.Run.save, []
    asked = register_optimizer_step_pre_hook(lambda *args: signal.raise_signal(signal.SIGTERM))

    def spy(run, iteration, *args):
        save(run, iteration, *args)
        saved.append(iteration)
    monkeypatch.setattr(runtime.folder.Run, "save", spy)
    reads = ["--pairs", sdxl_pairs] if script is adp else ["--prompts", encoded["tiny-sdxl"]]
    out = tmp_path / "out"
    flags = ["--model", "tiny-sdxl", *reads, "--out", out, "--iterations", 5, *QUICK]
    with pytest.raises(SystemExit) as e, contextlib.closing(SimpleNamespace(close=asked.remove)):
        call(script.main, script.Config, *flags)
    assert e.value.code == 0 and saved == [1] and len(read_log(out)["iteration"]) == 1
    assert "stopped after iteration 1, as asked" in capsys.readouterr().err
    assert not (out / "pipeline").exists()


# --- Growing pairs -------------------------------------------------------------------------------

SHARDS = ["000000.safetensors", "000001.safetensors", "000002.safetensors"]


def pairs_flags(encoded, out, count):
    return ["--model", "tiny-sdxl", "--prompts", encoded["tiny-sdxl"], "--out", out,
            "--count", count, "--steps", 2, "--batch-size", 2, "--shard-size", 4]


@pytest.fixture(scope="module")
def six(tmp_path_factory, encoded):
    """Six pairs: a whole shard of four, and two in the last."""
    out = tmp_path_factory.mktemp("six") / "pairs"
    call(data.pairs, data.PairsConfig, *pairs_flags(encoded, out, 6))
    return out


@pytest.fixture(scope="module")
def grown(six, encoded):
    """The six, and then eleven: four, four and three."""
    out = shutil.copytree(six, six.parent / "grown")
    call(data.pairs, data.PairsConfig, *pairs_flags(encoded, out, 11))
    return out


def rows(folder, count):
    return data.Rows(folder, "pairs", families.load_teacher("tiny-sdxl"))[range(count)]


def test_pairs_grow_to_what_they_would_have_been_at_once(six, grown, encoded, tmp_path, teachers):
    call(data.pairs, data.PairsConfig, *pairs_flags(encoded, tmp_path / "at-once", 11))
    assert_close(rows(grown, 11), rows(tmp_path / "at-once", 11), atol=1e-4, rtol=1e-4)
    assert (grown / SHARDS[0]).read_bytes() == (six / SHARDS[0]).read_bytes()
    assert (grown / SHARDS[0]).stat().st_mtime_ns == (six / SHARDS[0]).stat().st_mtime_ns
    before, after = rows(six, 6), rows(grown, 6)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(data.Pairs(grown, teachers["tiny-sdxl"])) == 11
    assert sorted(p.name for p in grown.iterdir()) == [*SHARDS, "manifest.json"]


def test_pairs_grow_on_two_ranks(six, grown, encoded, tmp_path):
    out = shutil.copytree(six, six.parent / "two-ranks")
    launcher = ["torchrun", "--standalone", "--nproc_per_node=2"]
    done = shell(*launcher, "data.py", "pairs", *pairs_flags(encoded, out, 11))
    assert done.returncode == 0, done.stderr
    assert (out / SHARDS[0]).read_bytes() == (six / SHARDS[0]).read_bytes()
    assert_close(rows(out, 11), rows(grown, 11), atol=1e-4, rtol=1e-4)


def killed(step, flags):
    """The status of a process of `data.py pairs`, killed before the step-th file is there."""
    process = os.fork()
    if process == 0:
        done = [0]

        def audit(event, args):
            if event == "os.rename" and "/pairs" in str(args[0]):
                done[0] += 1
                if done[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(audit)
        try:
            call(data.pairs, data.PairsConfig, *flags)
        finally:
            os._exit(0 if done[0] < step else 1)
    return os.waitpid(process, 0)[1]


def test_growing_that_is_killed_at_any_step_goes_on(
        six, grown, encoded, teachers, tmp_path, capsys):
    for step in range(1, 9):
        folder = shutil.copytree(six, tmp_path / f"killed-{step}" / "pairs")
        status = killed(step, pairs_flags(encoded, folder, 11))
        if status == 0:
            break
        assert status == signal.SIGKILL
        flags = ["--model", "tiny-sdxl", "--pairs", folder, "--out", tmp_path / "out"]
        if step > 1:  # before that it is still the six
            assert "half-written" in refused(capsys, adp.main, adp.Config, *flags)
            assert "holds 11 pairs, more than 8" in refused(
                capsys, data.pairs, data.PairsConfig, *pairs_flags(encoded, folder, 8))
        call(data.pairs, data.PairsConfig, *pairs_flags(encoded, folder, 11))
        for shard in SHARDS:
            assert (folder / shard).read_bytes() == (grown / shard).read_bytes()
        assert len(data.Rows(folder, "pairs", teachers["tiny-sdxl"])) == 11
        assert sorted(p.name for p in folder.iterdir()) == [*SHARDS, "manifest.json"]
    assert status == 0 and step > 4


def test_fewer_or_other_pairs_are_refused_and_the_same_are_left(grown, encoded, capsys):
    before = tree(grown)
    times = [(grown / shard).stat().st_mtime_ns for shard in SHARDS]
    line = refused(capsys, data.pairs, data.PairsConfig, *pairs_flags(encoded, grown, 10))
    assert "holds 11 pairs, more than 10" in line
    flags = [*pairs_flags(encoded, grown, 12), "--seed", 1]
    line = refused(capsys, data.pairs, data.PairsConfig, *flags)
    assert "seed: 0 there, 1 now" in line
    call(data.pairs, data.PairsConfig, *pairs_flags(encoded, grown, 11))
    assert tree(grown) == before
    assert times == [(grown / shard).stat().st_mtime_ns for shard in SHARDS]


def test_a_shard_with_too_few_rows_is_damage(grown, six, teachers, tmp_path):
    out = shutil.copytree(grown, tmp_path / "pairs")
    shutil.copy(six / SHARDS[1], out)
    with pytest.raises(runtime.settings.BadInput, match="half-written or damaged"):
        data.Rows(out, "pairs", teachers["tiny-sdxl"])


def test_only_new_pairs_need_room_on_the_disk(encoded, tmp_path, capsys):
    """A file system that has room for four more of 33 kB, but not for all sixteen."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    out = disk / "pairs"
    try:
        call(data.pairs, data.PairsConfig, *pairs_flags(encoded, out, 12))
        assert shutil.disk_usage(disk).free < 16 * 2 * 4 * 4 * 32 * 32
        before = tree(disk)
        line = refused(capsys, data.pairs, data.PairsConfig, *pairs_flags(encoded, out, 40))
        assert "28 new pairs do not fit" in line and tree(disk) == before
        call(data.pairs, data.PairsConfig, *pairs_flags(encoded, out, 16))
        assert len(rows(out, 16)["prompt"]) == 16
    finally:
        subprocess.run(["umount", disk], check=True)


# --- The command line's words --------------------------------------------------------------------

SCRIPTS = {"adm": (adm.main, adm.Config), "adp": (adp.main, adp.Config),
           "encode": (data.encode, data.EncodeConfig), "pairs": (data.pairs, data.PairsConfig)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_names_the_nearest(script, tmp_path, capsys):
    trains = script in ("adm", "adp")
    wrong, right = ("--lr-studnet", "--lr-student") if trains else ("--batch-sise", "--batch-size")
    flagged = [[wrong, "1"], [f"{wrong}=1"], [wrong.replace("-s", "_s"), "1"]]
    for flags in (*flagged, ["--random-init", wrong]):
        line = refused(capsys, *SCRIPTS[script], *flags, "--out", tmp_path / "out")
        assert line.endswith(f": no such flag; did you mean {right}?"), line
    line = refused(capsys, *SCRIPTS[script], "--zzzzzz", "1", "--out", tmp_path / "out")
    assert line.endswith("--zzzzzz: no such flag")
    line = refused(capsys, *SCRIPTS[script], "stray", "--out", tmp_path / "out")
    assert line.endswith("stray: no such argument, all are flags") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("size", [0, -4])
def test_a_batch_has_at_least_one_sample(size, script, tmp_path, capsys):
    line = refused(capsys, *SCRIPTS[script], "--batch-size", size, "--out", tmp_path / "out")
    assert line.endswith(f"--batch-size {size}: at least 1") and not list(tmp_path.iterdir())


def test_an_unknown_command_names_the_nearest():
    done = shell("python", "data.py", "pair", "--count", 3)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "'pair' is no command" in done.stderr and "did you mean pairs?" in done.stderr


# --- What is said, and what an import changes ----------------------------------------------------

IMPORT = """
import sys, warnings
import adm, adp  # whatever other packages do to themselves, they do now
import diffusers, transformers
ours = [name for name in ("adm", "adp", "data", "models", "ode") if sys.modules.pop(name)]
transformers.utils.logging.set_verbosity_info()
transformers.utils.logging.enable_progress_bar()
diffusers.utils.logging.set_verbosity_info()
diffusers.utils.logging.enable_progress_bar()

def state():
    logs = [library.utils.logging for library in (transformers, diffusers)]
    return ([log.get_verbosity() for log in logs], [log.is_progress_bar_enabled() for log in logs],
            list(warnings.filters))
before = state()
import adm, adp
assert set(ours) <= set(sys.modules) and state() == before, (before, state())
"""


def test_an_import_changes_nothing_of_other_packages():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_scripts_say_nothing_that_is_not_theirs(few_prompts, tmp_path):
    run = [*adm_flags(few_prompts, tmp_path / "out", 1), "--lora-rank", 2]
    for command in (["adm.py", *run], ["toy/digits.py", "--help"]):
        done = shell("python", *command)
        assert done.returncode == 0 and done.stderr == "", done.stderr
