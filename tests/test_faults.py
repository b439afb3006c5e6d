"""What clusters do to a run.

Processes killed at every step, signals, damaged and hostile checkpoints, full disks, NaNs, dying
ranks.
"""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import call, ended, read_log, same_log, start, tree
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import adm
import data
import families.export
import models
import runtime.files
import runtime.folder

TINY = ["--head-width", 8, "--sample-every", 0, "--student-steps", 1]  # as quick as it gets
TINY += ["--log-every", 0]  # stderr has what goes wrong
RUN4 = ["--iterations", 4, "--batch-size", 2, "--checkpoint-every", 2]
LONG = 120  # iterations of the long run


@pytest.fixture(scope="session")
def here(tmp_path_factory, teachers, few_prompts):
    """The flags that every run here has: a teacher's folder and its encoded prompts."""
    model = teachers["tiny-sd3"].folder
    prompts = tmp_path_factory.mktemp("faults") / "prompts"
    flags = ["--model", model, "--prompts", few_prompts, "--out", prompts]
    call(data.encode, data.EncodeConfig, *flags)
    return ["--model", model, "--prompts", prompts, *TINY]


@pytest.fixture(scope="module", autouse=True)
def long_run(here, tmp_path_factory):
    """A long run beside the tests: (its processes and files, where it writes what it holds)."""
    folder = tmp_path_factory.mktemp("long")
    seen = folder / "seen"
    args = [*here, "--iterations", LONG, "--batch-size", 1, "--checkpoint-every", LONG // 5]
    args += ["--out", folder / "out"]
    processes, errors = start(folder, adm.main, adm.Config, args, hook=(watched, seen))
    yield (processes, errors), seen
    for process in processes:
        process.kill()


@pytest.fixture(scope="session")
def run4(here, tmp_path_factory):
    """A run of 4 iterations on two ranks, checkpoints after 2 and 4."""
    out = tmp_path_factory.mktemp("run4") / "out"
    codes, said = ranks(out.parent, [*here, *RUN4, "--out", out], 2)
    assert codes == [0, 0], said
    return out


def ranks(tmp_path, args, world=1, hook=None):
    """Run adm.py: ([exit code], [what each rank said])."""
    return ended(*start(tmp_path, adm.main, adm.Config, args, world, hook))


def rows(folder):
    """log.csv without what depends on the clock."""
    lines = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(lines[0]) if name not in ("seconds", "peak_memory_gb")]
    return [[line[i] for i in kept] for line in lines]


def checkpoints(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def same_run(a, b):
    """The same log, checkpoints and student, to the last bit, and no other files."""
    assert rows(a) == rows(b)
    written = []
    for folder in (a, b):
        files = tree(folder)
        of_their_own = ("config.json", "log.csv")
        written.append({k: v for k, v in files.items() if not k.endswith(of_their_own)})
    a, b = written
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


# --- kill -9 --------------------------------------------------------------------------------------


CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove")  # audit events


def die_at(rank, step):
    """SIGKILL of rank 0 at the step-th thing that is done to the run's folder.

    Just before it is done; of safetensors' writing, in its middle.
    """
    if rank != 0:
        return
    save = runtime.files.save_file
    done = 0

    def count():
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, args):
        if event == "open":
            path, _, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            if isinstance(path, str) and "/out/" in path and writes:
                count()
        elif event in CHANGES and "/out" in str(args[0]):
            count()

    def half(tensors, path):
        if done + 1 == step:
            save(tensors, path)
            os.truncate(path, path.stat().st_size // 2)
        count()
        save(tensors, path)

    sys.addaudithook(audit)
    runtime.files.save_file = half


def test_a_run_killed_again_and_again_is_one_that_never_was(here, tmp_path):
    """Each time a little later in what it does to its folder, until it gets through."""
    args = [*here, "--iterations", 2, "--batch-size", 1, "--checkpoint-every", 2]
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    assert ranks(tmp_path, [*args, "--out", whole])[0] == [0]
    killed = 0
    for step in range(1, 999, 4):
        resume = ["--resume"] if (out / "config.json").exists() else []
        codes, said = ranks(tmp_path, [*args, "--out", out, *resume], hook=(die_at, step))
        assert "damaged" not in said[0], said
        if codes == [0]:
            break
        assert codes == [-signal.SIGKILL], said
        killed += 1
    assert killed >= 7
    same_run(whole, out)


def test_a_rank_killed_while_it_writes_a_checkpoint_ends_all_and_costs_nothing(
    run4, here, tmp_path
):
    out = tmp_path / "out"
    args = [*here, *RUN4, "--out", out]
    codes, said = ranks(tmp_path, args, 2, (die_at, 44))
    assert codes[0] == -signal.SIGKILL and codes[1] > 0, said
    assert checkpoints(out) == ["000002", "000004.partial"]
    codes, said = ranks(tmp_path, [*args, "--resume"], 2)
    assert codes == [0, 0] and "damaged" not in said[0], said
    same_run(run4, out)


# --- Signals --------------------------------------------------------------------------------------


def signalled(rank, who, at, *signals):
    """These signals come to rank `who` in the middle of an iteration.

    Before its optimizers' step number `at`.
    """
    done = 0

    def hook(*args):
        nonlocal done
        done += 1
        if done == at:
            for s in signals:
                os.kill(os.getpid(), s)

    if rank == who:
        register_optimizer_step_pre_hook(hook)


@pytest.mark.parametrize("world, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_one_rank_ends_all_after_the_iteration(world, number, run4, here, tmp_path):
    out = tmp_path / "out"
    args = [*here, *RUN4, "--out", out]
    signals = (number, signal.SIGTERM, signal.SIGTERM)
    codes, said = ranks(tmp_path, args, world, (signalled, world - 1, 8, *signals))
    assert codes == [0] * world and said[1:] == [""] * (world - 1), said
    assert said[0].count("\n") == 1
    line = "stopped after iteration 3, as asked: the same command with --resume goes on"
    assert line in said[0]
    assert checkpoints(out) == ["000002", "000003"]
    if world == 2:  # then on one rank: what an iteration draws does not depend on their number
        codes, said = ranks(tmp_path, [*args, "--resume"])
        assert codes == [0], said
        same_log(run4, out, atol=1e-4, rtol=1e-3)


def test_a_second_ctrl_c_ends_at_once(here, tmp_path):
    out = tmp_path / "out"
    twice = (signalled, 0, 5, signal.SIGINT, signal.SIGINT)
    codes, _ = ranks(tmp_path, [*here, "--out", out], hook=twice)
    assert codes != [0]
    assert len(rows(out)) == 2  # the header and iteration 1


# --- Numbers that are none ------------------------------------------------------------------------

# By its learning rate an optimizer is known.
RATES = {"student": 1e-3, "fake": 2e-3, "heads": 3e-3}
RATE_FLAGS = [word for name, rate in RATES.items() for word in (f"--lr-{name}", rate)]


def poisoned(rank, who):
    """Rank `who` meets a number that is none in iterations 2 to 4, and each rank says what moves.

    A NaN in the student's loss in 2, an infinite loss with finite gradient of the fake score in 3,
    an infinite gradient of a finite loss of the heads in 4.
    """
    generator_loss = adm.generator_loss
    fake_score_loss = adm.fake_score_loss
    discriminator_loss = adm.discriminator_loss
    names = {rate: name for name, rate in RATES.items()}
    iteration = 0
    before = []

    def generator(*args):
        nonlocal iteration
        iteration += 1
        loss = generator_loss(*args)
        if iteration == 2 and rank == who:
            return loss * float("nan")
        return loss

    def fake_score(*args):
        loss = fake_score_loss(*args)
        if iteration == 3 and rank == who:
            return loss + float("inf")
        return loss

    def heads(*args):
        loss = discriminator_loss(*args)
        if iteration == 4 and rank == who:
            return loss + (loss - loss.detach()).sqrt()
        return loss

    def state(optimizer):
        """Copies of the weights and of what AdamW keeps of them."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        mine = [p.detach() for p in parameters]
        for p in parameters:
            mine += optimizer.state[p].values()
        return [(x.to_local() if isinstance(x, DTensor) else x).clone() for x in mine]

    def about_to_step(optimizer, *args):
        before[:] = state(optimizer)

    def has_stepped(optimizer, *args):
        after = state(optimizer)
        assert all(x.isfinite().all() for x in after)
        if not all(map(torch.equal, before, after)):
            name = names[optimizer.param_groups[0]["lr"]]
            print(f"{iteration} {name} moved", file=sys.stderr)

    register_optimizer_step_pre_hook(about_to_step)
    register_optimizer_step_post_hook(has_stepped)
    adm.generator_loss = generator
    adm.fake_score_loss = fake_score
    adm.discriminator_loss = heads


def test_all_ranks_skip_an_update_that_is_not_finite_on_one(here, tmp_path):
    out = tmp_path / "out"
    args = [*here, "--iterations", 5, "--batch-size", 2, *RATE_FLAGS, "--out", out]
    codes, said = ranks(tmp_path, args, 2, (poisoned, 1))
    assert codes == [0, 0], said
    expected = {f"{i} {name} moved" for i in range(1, 6) for name in RATES}
    expected -= {"2 student moved", "3 fake moved", "4 heads moved"}
    for one in said:
        assert {line for line in one.splitlines() if line.endswith(" moved")} == expected
    assert read_log(out)["skipped"] == [0, 1, 1, 1, 0]


def never_finite(rank):
    """The fake score's loss is never a number."""
    fake_score_loss = adm.fake_score_loss
    adm.fake_score_loss = lambda *args: fake_score_loss(*args) + float("inf")


def test_twenty_skipped_in_a_row_stop_the_run(here, tmp_path):
    out = tmp_path / "out"
    args = [*here, "--iterations", 6, "--ttur", 4, "--batch-size", 1, "--out", out]
    codes, said = ranks(tmp_path, args, hook=(never_finite,))
    assert codes == [1] and read_log(out)["skipped"] == [4] * 5
    last = said[0].splitlines()[-1]
    assert "stopped after iteration 5: 20 updates of fake in a row met" in last
    assert "Traceback" not in said[0]
    assert f"{out}: updates skipped in 5 of 5 iterations: " in said[0]  # the doctor
    assert checkpoints(out) == ["000005"]
    codes, said = ranks(tmp_path, [*args, "--resume"])
    assert codes == [0] and read_log(out)["skipped"] == [4] * 5 + [0], said


# --- Checkpoints: damaged, full disks, hostile, other world sizes ---------------------------------


def resumed(run4, here, tmp_path, change, world=2):
    """run4, changed by change(newest checkpoint), resumed: (folder, exit codes, what was said)."""
    out = tmp_path / "out"
    shutil.copytree(run4, out)
    change(out / "checkpoints" / "000004")
    return out, *ranks(tmp_path, [*here, *RUN4, "--out", out, "--resume"], world)


def part(checkpoint, network, number=1):
    """The file of one of run4's two ranks."""
    return checkpoint / f"{network}-{number:05d}-of-00002.safetensors"


def flip(file, at=-1):
    """Change one bit of the byte there."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": lambda c: flip(part(c, "fake", 2)),  # which rank 1 reads
    "truncated": lambda c: os.truncate(part(c, "heads"), 999),
    "empty": lambda c: part(c, "student").write_bytes(b""),
    "state": lambda c: flip(c / "state.json", 20),
    "missing": lambda c: part(c, "student", 2).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_once_and_the_one_before_it_taken_by_all(
    damage, run4, here, networks, tmp_path
):
    world = 2 if damage == "flipped" else 1
    out, codes, said = resumed(run4, here, tmp_path, DAMAGES[damage], world)
    assert codes == [0] * world and said[1:] == [""] * (world - 1), said
    named = [line for line in said[0].splitlines() if "000004 is damaged" in line]
    assert len(named) == 1 and "going back to the checkpoint before it" in named[0], said
    check(out / "checkpoints" / "000004", networks)  # it came again
    same_log(run4, out, atol=1e-4, rtol=1e-3)
    if world == 2:
        same_run(run4, out)


@pytest.fixture(scope="session")
def networks(teachers):
    """The networks of run4, {name: {name: parameter}}."""
    teacher, student, fake = models.make_roles(teachers["tiny-sd3"], ("student", "fake"))
    heads = models.LatentDiscriminator(teacher, 8).heads
    return {
        "student": student.own_parameters(),
        "fake": fake.own_parameters(),
        "heads": dict(heads.named_parameters()),
    }


def check(checkpoint, networks):
    """As one rank does it."""
    sums = [runtime.folder.hashes(checkpoint)]
    runtime.folder.check_checkpoint(checkpoint, networks, sums)


@pytest.fixture
def checkpoint(run4, tmp_path):
    """A copy of a whole checkpoint of run4."""
    return shutil.copytree(run4 / "checkpoints" / "000004", tmp_path / "000004")


def test_a_flipped_bit_is_found(checkpoint, networks):
    """In each byte of state.json; in a network's header and its first, middle and last number."""
    check(checkpoint, networks)
    state = checkpoint / "state.json"
    places = [(state, at) for at in range(state.stat().st_size)]
    for file in checkpoint.glob("*.safetensors"):
        numbers = 8 + int.from_bytes(file.read_bytes()[:8], "little")  # where they begin
        middle = (numbers + file.stat().st_size) // 2
        places += [(file, at) for at in (0, 9, numbers - 1, numbers, middle, -1)]
    for file, at in places:
        flip(file, at)
        with pytest.raises((ValueError, OSError), match="checksums|state.json"):
            check(checkpoint, networks)
        flip(file, at)
    check(checkpoint, networks)


class Evil:
    """Whoever unpickles it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def refusal(checkpoint, networks, monkeypatch):
    """What is said of a checkpoint that is refused, before anything of it is loaded."""
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises((ValueError, runtime.folder.SafetensorError)) as e:
        check(checkpoint, networks)
    assert not Path("evil").exists()
    return str(e.value)


def reseal(checkpoint):
    """Make the checksums right again."""
    state = runtime.folder.checkpoint_state(4, [runtime.folder.hashes(checkpoint)])
    runtime.files.write_json(checkpoint / "state.json", state)


STATES = {
    "parent": lambda state: {"iteration": 4, "sha256": {"../../student": "0"}},
    "absolute": lambda state: {"iteration": "/tmp/4", "sha256": {}},
    "list": lambda state: [1, 2],
    "iteration": lambda state: {**state, "iteration": 10**30},
}


@pytest.mark.parametrize("kind", STATES)
def test_a_strange_state_is_refused(kind, checkpoint, networks, monkeypatch):
    file = checkpoint / "state.json"
    runtime.files.write_json(file, STATES[kind](json.loads(file.read_text())))
    assert "state.json" in refusal(checkpoint, networks, monkeypatch)


def linked(checkpoint):
    file = part(checkpoint, "fake")
    file.symlink_to(file.rename(checkpoint.parent / "elsewhere.safetensors"))


def pickle_beside(checkpoint):
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Evil()))


@pytest.mark.parametrize("change", [linked, pickle_beside])
def test_other_files_than_a_checkpoints_are_refused(change, checkpoint, networks, monkeypatch):
    change(checkpoint)
    assert "other files" in refusal(checkpoint, networks, monkeypatch)


def test_a_pipe_in_place_of_tensors_is_refused(checkpoint, networks, monkeypatch):
    file = part(checkpoint, "fake")
    file.unlink()
    os.mkfifo(file)
    other_end = os.open(file, os.O_RDWR)  # whoever opens the pipe does not wait for ever
    try:
        assert "other files" in refusal(checkpoint, networks, monkeypatch)
    finally:
        os.close(other_end)


def test_a_pickle_in_place_of_tensors_is_refused(checkpoint, networks, monkeypatch):
    """Even where its checksum is right."""
    part(checkpoint, "heads").write_bytes(pickle.dumps(Evil()))
    reseal(checkpoint)
    assert "header" in refusal(checkpoint, networks, monkeypatch).lower()


def tensors_changed(checkpoint, name, change):
    """Write the first rows of a network again, as change(tensors) leaves them."""
    tensors = load_file(part(checkpoint, name))
    change(tensors)
    save_file(tensors, part(checkpoint, name))


BIAS = "weight/0.to_logit.bias"
TENSORS = {
    "shape": lambda t: t.update({BIAS: torch.zeros(2)}),
    "dtype": lambda t: t.update({BIAS: torch.zeros(1, dtype=torch.int64)}),
    "key gone": lambda t: t.pop(BIAS),
    "AdamW": lambda t: t.pop("adamw/0/step"),
    "key more": lambda t: t.update({"../../x": torch.zeros(1)}),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_other_tensors_than_the_networks_are_refused(kind, checkpoint, networks, monkeypatch):
    """Even where their checksums are right."""
    tensors_changed(checkpoint, "heads", TENSORS[kind])
    reseal(checkpoint)
    assert "other tensors" in refusal(checkpoint, networks, monkeypatch)


def test_a_run_without_one_whole_checkpoint_is_refused_and_left_as_it_is(run4, here, tmp_path):
    """Two ranks: one line, exit code 2, nothing loaded and nothing lost."""
    before = {}

    def change(newest):
        shutil.rmtree(newest.with_name("000002"))
        tensors_changed(newest, "heads", TENSORS["key gone"])
        reseal(newest)
        before.update(tree(newest.parent.parent))

    out, codes, said = resumed(run4, here, tmp_path, change)
    assert codes[0] == 2 and codes[1] in (1, 2), said
    assert said[0].count("\n") == 1 and "to_logit.bias" in said[0] and said[1] == "", said
    assert tree(out) == before


def small_files(rank):
    """From the second checkpoint on the system refuses rank 0 files of more than 100 kB."""
    save = runtime.folder.Run.save
    saved = 0

    def spy(self, *args):
        nonlocal saved
        saved += 1
        if saved == 2 and rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        save(self, *args)

    runtime.folder.Run.save = spy


def stopped_by_a_full_disk(out, codes, said, words):
    """A run that had no room for its second checkpoint: {file: content} of the first."""
    assert set(codes) == {1} and said[1:] == [""] * (len(said) - 1), said
    assert said[0].count("\n") == 1 and words in said[0] and "--resume" in said[0], said
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "config.json", "log.csv"]
    assert checkpoints(out) == ["000002"]
    kept = tree(out / "checkpoints" / "000002")
    assert len(kept) == 3 * len(codes) + 1  # three networks in parts, and state.json
    return kept


def test_a_limit_on_file_sizes_costs_nothing_that_was_there(run4, here, tmp_path):
    out = tmp_path / "out"
    codes, said = ranks(tmp_path, [*here, *RUN4, "--out", out], 2, (small_files,))
    kept = stopped_by_a_full_disk(out, codes, said, "File too large")
    assert kept == tree(run4 / "checkpoints" / "000002")


def test_a_full_disk_costs_nothing_that_was_there(run4, here, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(map(len, tree(run4 / "checkpoints").values())) * 3 // 4
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    out = disk / "out"
    args = [*here, *RUN4, "--out", out]
    try:
        codes, said = ranks(tmp_path, args)
        stopped_by_a_full_disk(out, codes, said, "No space left on device")
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", disk], check=True)
        codes, said = ranks(tmp_path, [*args, "--resume"])  # with room again
        assert codes == [0], said
        same_log(run4, out, atol=1e-4, rtol=1e-3)
    finally:
        subprocess.run(["umount", disk], check=True)


def no_room_for_weights(rank):
    """The first file of an exported student does not fit."""

    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    families.export.save_file = refuse


def test_an_export_that_does_not_fit_ends_all_ranks_and_costs_nothing(run4, here, tmp_path):
    """They have agreed on it: none waits for the next tensor."""
    out = shutil.copytree(run4, tmp_path / "out")
    before = tree(out / "pipeline")
    args = [*here, *RUN4, "--out", out, "--resume"]
    codes, said = ranks(tmp_path, args, 2, (no_room_for_weights,))
    assert codes == [1, 1] and said[1] == "", said
    assert said[0].count("\n") == 1 and "No space left on device" in said[0], said
    assert tree(out / "pipeline") == before and not (out / "pipeline.partial").exists()


def test_checkpoints_are_ordered_by_number_not_by_name(run4, here, tmp_path):
    """A run goes on from 1000000, not from 999999, and the latter is the older to be removed."""
    out = shutil.copytree(run4, tmp_path / "out")
    folder = out / "checkpoints"
    for was, number in (("000002", 999_999), ("000004", 1_000_000)):
        newest = (folder / was).rename(folder / str(number))
        state = json.loads((newest / "state.json").read_text())
        runtime.files.write_json(newest / "state.json", {**state, "iteration": number})
    for name in ("000002.partial", ".000003", "12x"):
        (folder / name).mkdir()
    flags = ["--iterations", 1_000_001, "--batch-size", 2, "--checkpoint-every", 1]
    codes, said = ranks(tmp_path, [*here, *flags, "--out", out, "--resume"])
    assert codes == [0], said
    assert len(rows(out)) == len(rows(run4)) + 1  # one iteration
    assert checkpoints(out) == [".000003", "1000000", "1000001", "12x"]


# --- A rank that dies -----------------------------------------------------------------------------


def test_a_rank_that_dies_ends_the_others(here, tmp_path):
    """The other one, waiting for it in an all-reduce, ends with an error, and saves nothing."""
    out = tmp_path / "out"
    args = [*here, "--iterations", 5000, "--batch-size", 2, "--checkpoint-every", 5000]
    killed = (signalled, 1, 8, signal.SIGKILL)  # in the middle of iteration 3
    codes, said = ranks(tmp_path, [*args, "--out", out], 2, killed)
    assert codes == [1, -signal.SIGKILL] and "as asked" not in said[0], said
    assert len(rows(out)) == 3  # the header and two iterations
    assert not (out / "checkpoints").exists()


# --- Long runs ------------------------------------------------------------------------------------


def watched(rank, seen):
    """Writes resident bytes and open files after each iteration."""
    record = runtime.folder.Run.record

    def spy(self, *args):
        record(self, *args)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        handles = len(os.listdir("/proc/self/fd"))
        with open(seen, "a") as f:
            f.write(f"{pages * resource.getpagesize()} {handles}\n")

    runtime.folder.Run.record = spy


def test_a_long_run_keeps_memory_and_file_handles(long_run):
    process, seen = long_run
    codes, said = ended(*process, timeout=200)
    assert codes == [0], said
    lines = [line.split() for line in seen.read_text().splitlines()]
    assert len(lines) == LONG
    memory = [int(resident) for resident, _ in lines]
    handles = [int(count) for _, count in lines]
    warm = LONG // 3
    assert max(memory[warm:]) <= 1.005 * memory[warm]  # 25 kB an iteration
    assert max(handles[warm:]) == handles[warm]
