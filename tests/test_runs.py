"""A run's folder and the collections it reads.

Resuming, what may change then, growing pairs, and what scripts say.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import diffusers
import pytest
import torch
import transformers
from conftest import (
    FORK,
    call,
    ended,
    forget_ours,
    read_log,
    refused,
    same_log,
    script,
    shell,
    start,
    tree,
    write_to,
)
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close

import adm
import adp
import data
import families
import models
import runtime.files
import runtime.folder
from families.tiny import build
from runtime.rows import Rows
from runtime.settings import BadInput

QUICK = ["--head-width", 8, "--batch-size", 2, "--sample-every", 0]
EVERY = ["--checkpoint-every", 1, "--keep-checkpoints", 9]


def adm_flags(prompts, out, iterations, model="tiny-sd3"):
    flags = ["--model", model, "--prompts", prompts, "--out", out, "--iterations", iterations]
    return [*flags, "--student-steps", 1, *QUICK, *EVERY]


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


def checkpoint(run, iteration):
    return run / "checkpoints" / f"{iteration:06d}"


def damage(run, iteration, network="fake"):
    (checkpoint(run, iteration) / f"{network}.safetensors").write_bytes(b"damaged")


def weights(run, iteration, network="student"):
    """{"weight/<name>": tensor} in a checkpoint."""
    tensors = load_file(checkpoint(run, iteration) / f"{network}.safetensors")
    return {name: x for name, x in tensors.items() if name.startswith("weight/")}


def moved(run, iteration):
    """How far the student's weights went in this iteration, at most."""
    before = weights(run, iteration - 1)
    after = weights(run, iteration)
    return max((after[name] - before[name]).abs().max() for name in before)


def shift(file, metadata=None):
    """Add 1 to all tensors of a file."""
    save_file({name: x + 1 for name, x in load_file(file).items()}, file, metadata)


def refused_untouched(capsys, run, main, config_class, *flags):
    """The one line on a --resume that is refused; the run is as it was."""
    before = tree(run)
    line = refused(capsys, main, config_class, *flags, "--resume")
    assert tree(run) == before
    return line


# --- Resuming: what paths stand for ---------------------------------------------------------------

SPELLINGS = ["dots", "relative", "another clone", "encoded", "teacher's folder"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_resume_takes_the_same_data_by_any_name(
    spelling, few_prompts, encoded, teachers, run3, run2, tmp_path, monkeypatch
):
    prompts = few_prompts
    model = "tiny-sd3"
    if spelling == "dots":
        nowhere = tmp_path / "nowhere"
        nowhere.mkdir()
        up = os.path.relpath(few_prompts.parent, nowhere)
        prompts = nowhere / up / few_prompts.name
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
    config = config_of(run2)
    assert config["config"]["prompts"] == str(prompts)
    assert config["changes"] == []


def test_a_default_is_the_value_it_stands_for(few_prompts, run2, capsys):
    flags = adm_flags(few_prompts, run2, 3)
    line = refused_untouched(capsys, run2, adm.main, adm.Config, *flags, "--guidance", 5)
    assert "guidance = 7.0, not 5.0" in line
    call(adm.main, adm.Config, *flags, "--resume", "--guidance", 7)


def test_resume_refuses_another_text_in_the_same_file(few_prompts, tmp_path, capsys):
    prompts = shutil.copy(few_prompts, tmp_path / "prompts")
    out = tmp_path / "out"
    call(adm.main, adm.Config, *adm_flags(prompts, out, 1))
    with open(prompts, "a", encoding="utf-8") as f:
        f.write("one more\n")
    line = refused_untouched(capsys, out, adm.main, adm.Config, *adm_flags(prompts, out, 2))
    assert "text_sha256 of prompts" in line


def test_resume_refuses_another_text_in_the_same_folder(encoded, tmp_path, capsys):
    prompts = shutil.copytree(encoded["tiny-sd3"], tmp_path / "prompts")
    out = tmp_path / "out"
    call(adm.main, adm.Config, *adm_flags(prompts, out, 1))
    shutil.rmtree(prompts)
    other = tmp_path / "other.txt"
    other.write_text("something else\n")
    encode = ["--model", "tiny-sd3", "--prompts", other, "--out", prompts]
    call(data.encode, data.EncodeConfig, *encode)
    line = refused_untouched(capsys, out, adm.main, adm.Config, *adm_flags(prompts, out, 2))
    assert "text_sha256 of prompts" in line


def test_resume_compares_the_teachers_and_the_first_weights(
    few_prompts, run3, teachers, tmp_path, capsys
):
    init = shutil.copytree(run3, tmp_path / "init")
    model = shutil.copytree(teachers["tiny-sd3"].folder, tmp_path / "teacher")
    out = tmp_path / "out"
    call(adm.main, adm.Config, *adm_flags(few_prompts, out, 1, model), "--init", init)

    elsewhere = init.rename(tmp_path / "elsewhere")
    flags = adm_flags(few_prompts, out, 2, model)
    call(adm.main, adm.Config, *flags, "--init", elsewhere, "--resume")
    weights_file = "transformer/diffusion_pytorch_model.safetensors"
    shift(elsewhere / "pipeline" / weights_file)
    for init in (elsewhere, "teacher"):
        line = refused_untouched(capsys, out, adm.main, adm.Config, *flags, "--init", init)
        assert "weights_sha256 of init" in line
    shift(model / weights_file)
    line = refused_untouched(capsys, out, adm.main, adm.Config, *flags)
    assert "weights_sha256 of model" in line


def test_resume_compares_pairs_and_pixel_backbone(few_prompts, tmp_path, capsys):
    here = tmp_path / "here"
    out = tmp_path / "out"
    make = ["--model", "tiny-sdxl", "--prompts", few_prompts, "--out", here / "pairs"]
    make += ["--steps", 1, "--guidance", 1]
    call(data.pairs, data.PairsConfig, *make, "--count", 6)
    shutil.copytree(build("tiny-sam"), here / "sam")

    def flags(place, iterations):
        reads = ["--pairs", place / "pairs", "--pixel-backbone", place / "sam"]
        flags = ["--model", "tiny-sdxl", *reads, "--out", out, "--iterations", iterations]
        return [*flags, "--mse-iterations", 1, *QUICK, *EVERY]

    call(adp.main, adp.Config, *flags(here, 1))
    there = shutil.copytree(here, tmp_path / "there")
    call(adp.main, adp.Config, *flags(there, 2), "--resume")
    call(data.pairs, data.PairsConfig, *make, "--count", 7)
    line = refused_untouched(capsys, out, adp.main, adp.Config, *flags(here, 3))
    assert "count of pairs" in line and "= 6, not 7" in line
    shift(there / "sam" / "model.safetensors", {"format": "pt"})
    line = refused_untouched(capsys, out, adp.main, adp.Config, *flags(there, 3))
    assert "weights_sha256 of pixel_backbone" in line


def test_a_run_of_an_earlier_version_goes_on_under_the_same_paths(
    few_prompts, run3, run2, tmp_path, capsys
):
    config = config_of(run2)
    kept = ("config", "teacher", "student", "world_size", "versions", "guidance")  # all there was
    (run2 / "config.json").write_text(json.dumps({name: config[name] for name in kept}))
    other = shutil.copy(few_prompts, tmp_path / "copy.txt")
    line = refused_untouched(capsys, run2, adm.main, adm.Config, *adm_flags(other, run2, 3))
    assert f"prompts = '{few_prompts}', not '{other}'" in line
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), "--resume")
    same_log(run3, run2, atol=0, rtol=0)
    assert config_of(run2).keys() == config.keys()


# --- Resuming: what may change and is noted -------------------------------------------------------


def test_rates_may_change_and_the_history_is_kept(few_prompts, run2, capsys):
    higher = ["--resume", "--lr-student", 1e-2]
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), *higher)
    said = [line for line in capsys.readouterr().err.splitlines() if "lr_student" in line]
    assert len(said) == 1 and "from iteration 3 on lr_student = 0.01, before 1e-06" in said[0]
    first = {"iteration": 2, "lr_student": [1e-6, 1e-2]}
    assert config_of(run2)["changes"] == [first]
    assert config_of(run2)["config"]["lr_student"] == 1e-2
    assert moved(run2, 2) < 1e-5 and moved(run2, 3) > 1e-3

    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 4), *higher)
    assert "lr_student" not in capsys.readouterr().err
    assert config_of(run2)["changes"] == [first]

    last = ["--resume", "--lr-student", 1e-3, "--lr-fake", 1e-5, "--lr-heads", 1e-3]
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 5), *last)
    second = {"lr_student": [1e-2, 1e-3], "lr_fake": [2e-6, 1e-5], "lr_heads": [1e-4, 1e-3]}
    assert config_of(run2)["changes"] == [first, {"iteration": 4, **second}]
    assert config_of(run2)["config"]["lr_heads"] == 1e-3


def test_a_change_whose_iterations_come_again_is_forgotten(few_prompts, run2, capsys):
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), "--resume", "--lr-student", 1e-2)
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 4), "--resume", "--lr-student", 1e-3)
    for iteration in (3, 4):
        damage(run2, iteration, "student")
    capsys.readouterr()
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), "--resume", "--lr-student", 1e-3)
    assert "from iteration 3 on lr_student = 0.001, before 1e-06" in capsys.readouterr().err
    assert config_of(run2)["changes"] == [{"iteration": 2, "lr_student": [1e-6, 1e-3]}]


def test_the_average_may_begin_and_end(few_prompts, run2, teachers, tmp_path):
    def exported(run):
        """{"weight/<name>": tensor} of the pipeline's student."""
        denoiser = models.load_denoiser(teachers["tiny-sd3"], folder=run / "pipeline")
        return {f"weight/{name}": x for name, x in denoiser.net.state_dict().items()}

    fast = ["--resume", "--lr-student", 1e-2]
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), *fast, "--ema", 0.75)
    before = weights(run2, 2)
    after = weights(run2, 3)
    average = weights(run2, 3, "ema")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    expected = {name: 0.75 * before[name] + 0.25 * after[name] for name in before}
    assert_close(average, expected, atol=1e-7, rtol=1e-6)
    found = exported(run2)
    assert_close({name: found[name] for name in average}, average, atol=0, rtol=0)

    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 4), *fast)
    last = weights(run2, 4)
    assert not (checkpoint(run2, 4) / "ema.safetensors").exists()
    found = exported(run2)
    assert_close({name: found[name] for name in last}, last, atol=0, rtol=0)
    began = {"iteration": 2, "lr_student": [1e-6, 1e-2], "ema": [0.0, 0.75]}
    over = {"iteration": 3, "ema": [0.75, 0.0]}
    assert config_of(run2)["changes"] == [began, over]

    damage(run2, 4)
    again = shutil.copytree(run2, tmp_path / "again")
    call(adm.main, adm.Config, *adm_flags(few_prompts, again, 4), *fast)  # from 3, with an average
    assert config_of(again)["changes"] == [began, over]
    assert not (checkpoint(again, 4) / "ema.safetensors").exists()

    damage(run2, 3)
    call(adm.main, adm.Config, *adm_flags(few_prompts, run2, 3), *fast)  # from 2, which has none
    assert config_of(run2)["changes"] == [{"iteration": 2, "lr_student": [1e-6, 1e-2]}]


@pytest.mark.parametrize("had", [True, False])
def test_an_average_too_many_or_too_few_is_damage(had, few_prompts, tmp_path, capsys):
    """Checksums that fit are not enough: the run says which of its checkpoints have an average."""
    out = tmp_path / "out"
    flags = [*adm_flags(few_prompts, out, 2), "--ema", 0.5 if had else 0.0]
    call(adm.main, adm.Config, *flags)
    newest = checkpoint(out, 2)
    if had:
        (newest / "ema.safetensors").unlink()
    else:
        save_file(weights(out, 2), newest / "ema.safetensors")
    state = runtime.folder.checkpoint_state(2, [runtime.folder.hashes(newest)])
    runtime.files.write_json(newest / "state.json", state)
    call(adm.main, adm.Config, *flags, "--resume", "--ema", 0.25)
    assert "000002 is damaged (other files than a checkpoint's)" in capsys.readouterr().err


def test_adp_notes_its_regressions_rate(sdxl_pairs, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model", "tiny-sdxl", "--pairs", sdxl_pairs, "--out", out, "--loss", "mse"]
    flags += [*QUICK, *EVERY]
    call(adp.main, adp.Config, *flags, "--iterations", 1)
    call(adp.main, adp.Config, *flags, "--iterations", 2, "--resume", "--lr-mse", 1e-2)
    assert "from iteration 2 on lr_mse = 0.01, before None" in capsys.readouterr().err
    assert config_of(out)["changes"] == [{"iteration": 1, "lr_mse": [None, 1e-2]}]
    assert moved(out, 2) > 1e-3


# --- The end of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", [adm, adp])
def test_a_run_that_is_asked_to_stop_saves_and_ends(script, encoded, sdxl_pairs, tmp_path, capsys):
    out = tmp_path / "out"
    reads = ["--prompts", encoded["tiny-sdxl"]]
    if script is adp:
        reads = ["--pairs", sdxl_pairs]
    flags = ["--model", "tiny-sdxl", *reads, "--out", out, "--iterations", 5, *QUICK]
    flags += ["--sample-every", 5]

    def ask(*args):
        signal.raise_signal(signal.SIGTERM)

    asked = register_optimizer_step_pre_hook(ask)
    try:
        with pytest.raises(SystemExit) as e:
            call(script.main, script.Config, *flags)
    finally:
        asked.remove()
    assert e.value.code == 0
    assert "stopped after iteration 1, as asked" in capsys.readouterr().err
    assert read_log(out)["iteration"] == [1]
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["000001"]
    assert not (out / "pipeline").exists()
    assert (out / "curves.png").exists()  # of the whole log, though no sheet was due


# --- Growing pairs --------------------------------------------------------------------------------

SHARDS = ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
FINISHED = [*SHARDS, "manifest.json"]


def pairs_flags(encoded, out, count):
    flags = ["--model", "tiny-sdxl", "--prompts", encoded["tiny-sdxl"], "--out", out]
    return [*flags, "--count", count, "--steps", 2, "--batch-size", 2, "--shard-size", 4]


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
    return Rows(folder, "pairs", families.load_teacher("tiny-sdxl"))[range(count)]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_pairs_grow_to_what_they_would_have_been_at_once(six, grown, encoded, tmp_path, teachers):
    call(data.pairs, data.PairsConfig, *pairs_flags(encoded, tmp_path / "at-once", 11))
    assert_close(rows(grown, 11), rows(tmp_path / "at-once", 11), atol=1e-4, rtol=1e-4)
    assert (grown / SHARDS[0]).read_bytes() == (six / SHARDS[0]).read_bytes()
    assert (grown / SHARDS[0]).stat().st_mtime_ns == (six / SHARDS[0]).stat().st_mtime_ns
    assert_close(rows(grown, 6), rows(six, 6), atol=0, rtol=0)
    assert len(data.Pairs(grown, teachers["tiny-sdxl"])) == 11
    assert names(grown) == FINISHED


def test_pairs_grow_on_two_ranks(six, grown, encoded, tmp_path):
    out = shutil.copytree(six, six.parent / "two-ranks")
    flags = pairs_flags(encoded, out, 11)
    codes, said = ended(*start(tmp_path, data.pairs, data.PairsConfig, flags, 2))
    assert codes == [0, 0], said
    assert (out / SHARDS[0]).read_bytes() == (six / SHARDS[0]).read_bytes()
    assert_close(rows(out, 11), rows(grown, 11), atol=1e-4, rtol=1e-4)
    assert names(out) == FINISHED


def killed(step, flags):
    """The status of a process of `data.py pairs`, killed before the step-th file is there."""
    process = os.fork()
    if process == 0:
        done = 0

        def audit(event, args):
            nonlocal done
            if event == "os.rename" and "/pairs" in str(args[0]):
                done += 1
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        code = 1
        try:
            call(data.pairs, data.PairsConfig, *flags)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return status


def test_growing_that_is_killed_at_any_step_goes_on(
    six, grown, encoded, teachers, tmp_path, capsys
):
    for step in range(1, 9):
        folder = shutil.copytree(six, tmp_path / f"killed-{step}" / "pairs")
        status = killed(step, pairs_flags(encoded, folder, 11))
        if status == 0:
            break
        assert status == signal.SIGKILL
        if step > 1:  # before that it is still the six
            flags = ["--model", "tiny-sdxl", "--pairs", folder, "--out", tmp_path / "out"]
            assert "half-written" in refused(capsys, adp.main, adp.Config, *flags)
            fewer = pairs_flags(encoded, folder, 8)
            line = refused(capsys, data.pairs, data.PairsConfig, *fewer)
            assert "holds 11 pairs, more than 8" in line
        call(data.pairs, data.PairsConfig, *pairs_flags(encoded, folder, 11))
        for shard in SHARDS:
            assert (folder / shard).read_bytes() == (grown / shard).read_bytes()
        assert len(Rows(folder, "pairs", teachers["tiny-sdxl"])) == 11
        assert names(folder) == FINISHED
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
    with pytest.raises(BadInput, match="half-written or damaged"):
        Rows(out, "pairs", teachers["tiny-sdxl"])


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
        one_pair = 2 * 4 * 4 * 32 * 32  # bytes: two float32 latents of (4, 32, 32)
        assert shutil.disk_usage(disk).free < 16 * one_pair
        before = tree(disk)
        line = refused(capsys, data.pairs, data.PairsConfig, *pairs_flags(encoded, out, 40))
        assert "28 new pairs do not fit" in line and tree(disk) == before
        call(data.pairs, data.PairsConfig, *pairs_flags(encoded, out, 16))
        assert len(rows(out, 16)["prompt"]) == 16
    finally:
        subprocess.run(["umount", disk], check=True)


# --- The command line's words ---------------------------------------------------------------------

SCRIPTS = {
    "adm": (adm.main, adm.Config),
    "adp": (adp.main, adp.Config),
    "encode": (data.encode, data.EncodeConfig),
    "pairs": (data.pairs, data.PairsConfig),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_names_the_nearest(script, tmp_path, capsys):
    def said(*flags):
        line = refused(capsys, *SCRIPTS[script], *flags, "--out", tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return line

    wrong, right = "--batch-sise", "--batch-size"
    if script in ("adm", "adp"):
        wrong, right = "--lr-studnet", "--lr-student"
    with_underscore = wrong.replace("-s", "_s")
    for flags in ([wrong, 1], [f"{wrong}=1"], [with_underscore, 1], ["--random-init", wrong]):
        line = said(*flags)
        assert line.endswith(f": no such flag; did you mean {right}?"), line
    assert said("--zzzzzz", 1).endswith("--zzzzzz: no such flag")
    assert said("stray").endswith("stray: no such argument, all are flags")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("size", [0, -4])
def test_a_batch_has_at_least_one_sample(size, script, tmp_path, capsys):
    line = refused(capsys, *SCRIPTS[script], "--batch-size", size, "--out", tmp_path / "out")
    assert line.endswith(f"--batch-size {size}: at least 1") and not list(tmp_path.iterdir())


def test_an_unknown_command_names_the_nearest(tmp_path):
    done = script(tmp_path, "data.py", "pair", "--count", 3)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "'pair' is no command" in done.stderr and "did you mean pairs?" in done.stderr


# --- What is said, and what an import changes -----------------------------------------------------


def state_of_others():
    """What scripts set in other packages: how much they say, and which warnings are shown."""
    logs = [library.utils.logging for library in (transformers, diffusers)]
    verbosity = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() for log in logs]
    return verbosity, bars, list(warnings.filters)


def import_anew(said):
    """Import this project again, in a process where other packages say all they can.

    Whatever they do to themselves when they are imported, they have done. said: a file for stderr.
    """
    write_to(said, 2)
    ours = set(forget_ours())
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_info()
        library.utils.logging.enable_progress_bar()
    before = state_of_others()
    import adm  # noqa: F401
    import adp  # noqa: F401

    rooms = {"adm", "adp", "data", "models", "ode", "families", "runtime"}
    assert rooms <= ours & set(sys.modules)
    assert state_of_others() == before, (before, state_of_others())


def test_an_import_changes_nothing_of_other_packages(tmp_path):
    said = tmp_path / "stderr"
    process = FORK.Process(target=import_anew, args=(said,))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and said.read_text() == "", said.read_text()


def test_scripts_say_nothing_that_is_not_theirs(few_prompts, tmp_path):
    """adm.py as a user starts it: what is imported and run for the first time is silent too."""
    flags = [*adm_flags(few_prompts, tmp_path / "out", 1), "--lora-rank", 2, "--log-every", 0]
    done = shell("python", "adm.py", *flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_help_says_nothing_on_stderr(tmp_path):
    done = script(tmp_path, "toy/digits.py", "--help")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "handwritten digits" in done.stdout
