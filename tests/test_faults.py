"""What clusters do to a run: processes killed at every step, signals, damaged and hostile checkpoints, full disks, NaNs, dying ranks."""

import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close

import runtime.files
import runtime.folder
import runtime.optimize
import runtime.ranks
import runtime.script
import runtime.settings
import adm
import data
import models
from conftest import FORK, call, read_log

TINY = ["--head-width", 8, "--sample-every", 0, "--student-steps", 1]  # as quick as it gets
RUN4 = ["--iterations", 4, "--batch-size", 2, "--checkpoint-every", 2]
LONG = 150  # iterations of the long run


@pytest.fixture(scope="session")
def here(tmp_path_factory, teachers, few_prompts):
    """The flags that every run here has: a teacher's folder and its encoded prompts."""
    model, prompts = teachers["tiny-sd3"].folder, tmp_path_factory.mktemp("faults") / "prompts"
    call(data.encode, data.EncodeConfig, "--model", model, "--prompts", few_prompts, "--out", prompts)
    return ["--model", model, "--prompts", prompts, *TINY]


@pytest.fixture(scope="module", autouse=True)
def long_run(here, tmp_path_factory):
    """A long run beside the tests: (its process and errors, where it writes what it holds)."""
    folder = tmp_path_factory.mktemp("long")
    args = [*here, "--iterations", LONG, "--batch-size", 1, "--checkpoint-every", LONG // 5,
            "--out", folder / "out"]
    return start(folder, args, 1, (watched, folder / "seen")), folder / "seen"


@pytest.fixture(scope="session")
def run4(here, tmp_path_factory):
    """A run of 4 iterations on two ranks, checkpoints after 2 and 4."""
    out = tmp_path_factory.mktemp("run4") / "out"
    codes, said = ranks(out.parent, [*here, *RUN4, "--out", out], 2)
    assert codes == [0, 0], said
    return out


def child(rank, world, port, errors, args, hook):
    """A rank, as torchrun would start it."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if hook:
        hook[0](rank, *hook[1:])
    call(adm.main, adm.Config, *args)


def start(tmp_path, args, world=1, hook=None):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    errors = [tmp_path / f"stderr-{rank}" for rank in range(world)]
    ranks = [FORK.Process(target=child, args=(rank, world, port, errors[rank], args, hook)) for rank in range(world)]
    for p in ranks:
        p.start()
    return ranks, errors


def ended(ranks, errors, timeout=60):
    """([exit code], [what each rank said]); a rank that outlives the timeout is an error."""
    for p in ranks:
        p.join(timeout)
        if p.exitcode is None:
            for other in ranks:
                other.kill()
            pytest.fail("a rank hangs")
    return [p.exitcode for p in ranks], [e.read_text() for e in errors]


def ranks(*args, **kwargs):
    return ended(*start(*args, **kwargs))


def rows(folder):
    """log.csv without what depends on the clock."""
    lines = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    return [[x for x, name in zip(line, lines[0]) if name not in ("seconds", "peak_memory_gb")] for line in lines]


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def same_run(a, b):
    """The same log, checkpoints and student, to the last bit, and no other files."""
    assert rows(a) == rows(b)
    a, b = ({k: v for k, v in files(f).items() if not k.endswith(("config.json", "log.csv"))} for f in (a, b))
    assert a.keys() == b.keys() and [k for k in a if a[k] != b[k]] == []


# --- kill -9 ---------------------------------------------------------------------------------------------------------

def die_at(rank, step, who):
    """SIGKILL at the step-th thing that is done to the run's folder, just before it is done; of safetensors' writing, in its middle."""
    done, save = [0], runtime.files.save_file

    def count():
        done[0] += 1
        if done[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, args):
        if event == "open" and isinstance(args[0], str) and "/out/" in args[0] and args[2] & (os.O_WRONLY | os.O_RDWR):
            count()
        elif event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove") and "/out" in str(args[0]):
            count()

    def half(tensors, path):
        if done[0] + 1 == step:
            save(tensors, path)
            os.truncate(path, path.stat().st_size // 2)
        count()
        save(tensors, path)
    if rank == who:
        sys.addaudithook(audit)
        runtime.files.save_file = half


@pytest.mark.parametrize("world, steps", [
    (1, range(1, 999, 3)), (2, (44, 999))])  # 44: in the middle of the second checkpoint
def test_kill_9_at_any_step(world, steps, run4, here, tmp_path):
    """A run that is killed again and again, each time a little later in what it does to its folder, is one that never was."""
    out = tmp_path / "out"
    if world == 2:
        args, whole = [*here, *RUN4], run4
    else:
        args = [*here, "--iterations", 2, "--batch-size", 1, "--checkpoint-every", 2]
        whole = tmp_path / "whole"
        assert ranks(tmp_path, [*args, "--out", whole])[0] == [0]
    for killed, step in enumerate(steps):
        resume = ["--resume"] if (out / "config.json").exists() else []
        codes, said = ranks(tmp_path, [*args, "--out", out, *resume], world, (die_at, step, 0))
        assert codes[0] in (0, -signal.SIGKILL) and "damaged" not in said[0], said
        if codes == [0] * world:
            break
    assert killed >= (1 if world == 2 else 7)
    same_run(whole, out)


# --- Signals ---------------------------------------------------------------------------------------------------------

def signalled(rank, who, at, *signals):
    """These signals come to rank `who` in the middle of an iteration, before its optimizers' step number `at`."""
    done = [0]

    def hook(*args):
        done[0] += 1
        for s in signals if (rank, done[0]) == (who, at) else ():
            os.kill(os.getpid(), s)
    register_optimizer_step_pre_hook(hook)


@pytest.mark.parametrize("world, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_one_rank_ends_all_after_the_iteration(world, number, run4, here, tmp_path):
    out = tmp_path / "out"
    codes, said = ranks(tmp_path, [*here, *RUN4, "--out", out], world, (signalled, world - 1, 8, number, *[signal.SIGTERM] * 2))
    assert codes == [0] * world and said[1:] == [""] * (world - 1), said
    assert said[0].count("\n") == 1 and "stopped after iteration 3, as asked: the same command with --resume goes on" in said[0]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["000002", "000003"]
    if world == 2:  # then on one rank: what an iteration draws does not depend on their number
        codes, said = ranks(tmp_path, [*here, *RUN4, "--out", out, "--resume"])
        assert codes == [0], said
        whole, parts = read_log(run4), read_log(out)
        for name in whole.keys() - {"seconds", "peak_memory_gb"}:
            assert_close(parts[name], whole[name], atol=1e-4, rtol=1e-3, msg=lambda m: name + m)


def test_a_second_ctrl_c_ends_at_once(here, tmp_path):
    codes, _ = ranks(tmp_path, [*here, "--out", tmp_path / "out"], 1, (signalled, 0, 5, signal.SIGINT, signal.SIGINT))
    assert codes != [0] and len(rows(tmp_path / "out")) == 2  # the header and iteration 1


# --- Numbers that are none -------------------------------------------------------------------------------------------

def poisoned(rank, who, always=False):
    """Rank `who` meets a NaN in the student's loss in iteration 2, an infinite loss with finite gradient of the fake score in 3, an
    infinite gradient of a finite loss of the heads in 4. always: the fake score's loss is never a number. Each rank says what it skips."""
    iteration, before = [0], []
    generator_loss, fake_score_loss, discriminator_loss = adm.generator_loss, adm.fake_score_loss, adm.discriminator_loss

    def generator(*args):
        iteration[0] += 1
        return generator_loss(*args) * (float("nan") if iteration[0] == 2 and rank == who and not always else 1)

    def fake_score(*args):
        return fake_score_loss(*args) + (float("inf") if (always or iteration[0] == 3) and rank == who else 0)

    def heads(*args):
        loss = discriminator_loss(*args)
        return loss + (loss - loss.detach()).sqrt() if iteration[0] == 4 and rank == who and not always else loss

    def state(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        mine = [p.detach() for p in parameters] + [optimizer.state[p][s] for p in parameters for s in optimizer.state[p]]
        return [(x.to_local() if isinstance(x, DTensor) else x).clone() for x in mine]

    def about_to_step(optimizer, *args):
        before[:] = state(optimizer)

    def has_stepped(optimizer, *args):
        moved = not all(map(torch.equal, before, state(optimizer)))
        print(f"{iteration[0]} {'skipped' if optimizer.found_inf else 'done'} {'moved' if moved else 'same'}", file=sys.stderr)
        assert all(x.isfinite().all() for x in state(optimizer))
    register_optimizer_step_pre_hook(about_to_step)
    register_optimizer_step_post_hook(has_stepped)
    adm.generator_loss, adm.fake_score_loss, adm.discriminator_loss = generator, fake_score, heads


def test_all_ranks_skip_an_update_that_is_not_finite_on_one(here, tmp_path):
    codes, said = ranks(tmp_path, [*here, "--iterations", 5, "--batch-size", 2, "--out", tmp_path / "out"], 2, (poisoned, 1))
    assert codes == [0, 0], said
    updates = [[line for line in one.splitlines() if line[0].isdigit()] for one in said]
    good, bad = "done moved", "skipped same"  # student, heads, fake score
    assert updates[0] == updates[1] == [f"{i} {what}" for i, whats in enumerate(
        ([good] * 3, [bad, good, good], [good, good, bad], [good, bad, good], [good] * 3), 1) for what in whats]
    assert read_log(tmp_path / "out")["skipped"] == [0, 1, 1, 1, 0]


def test_twenty_skipped_in_a_row_stop_the_run(here, tmp_path):
    args = [*here, "--iterations", 13, "--ttur", 2, "--batch-size", 1, "--out", tmp_path / "out"]
    codes, said = ranks(tmp_path, args, 1, (poisoned, 0, True))
    assert codes == [1] and read_log(tmp_path / "out")["skipped"] == [2] * 10
    assert "stopped after iteration 10: 20 updates of fake in a row met" in said[0].splitlines()[-1]
    assert "Traceback" not in said[0] and (tmp_path / "out" / "checkpoints" / "000010").is_dir()
    codes, said = ranks(tmp_path, [*args, "--resume"])
    assert codes == [0] and read_log(tmp_path / "out")["skipped"] == [2] * 10 + [0] * 3, said


# --- Checkpoints: damaged, full disks, hostile, other world sizes ----------------------------------------------------

def resumed(run4, here, tmp_path, change, world=2, hook=None):
    """run4, changed by change(newest checkpoint), resumed: (folder, exit codes, what was said)."""
    out = tmp_path / "out"
    shutil.copytree(run4, out)
    change(out / "checkpoints" / "000004")
    return out, *ranks(tmp_path, [*here, *RUN4, "--out", out, "--resume"], world, hook)


def flip(file, at=-1):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


DAMAGES = {"flipped": lambda c: flip(c / "fake.safetensors"), "truncated": lambda c: os.truncate(c / "heads.safetensors", 999),
           "empty": lambda c: (c / "student.safetensors").write_bytes(b""), "state": lambda c: flip(c / "state.json", 20),
           "missing": lambda c: (c / "student.safetensors").unlink()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_once_and_the_one_before_it_taken_by_all(damage, run4, here, tmp_path):
    out, codes, said = resumed(run4, here, tmp_path, DAMAGES[damage], 2 if damage == "flipped" else 1)
    assert set(codes) == {0} and said[1:] in ([], [""]), said
    named = [line for line in said[0].splitlines() if "000004 is damaged" in line]
    assert len(named) == 1 and "going back to the checkpoint before it" in named[0], said
    if len(codes) == 2:
        same_run(run4, out)


@pytest.fixture(scope="session")
def networks(teachers):
    """The networks of run4, as Run knows them."""
    teacher, student, fake = models.make_roles(teachers["tiny-sd3"], ("student", "fake"))
    heads = models.LatentDiscriminator(teacher, 8).heads
    return {"student": student.own_parameters(), "fake": fake.own_parameters(), "heads": dict(heads.named_parameters())}


@pytest.fixture
def checkpoint(run4, tmp_path):
    return shutil.copytree(run4 / "checkpoints" / "000004", tmp_path / "000004")


def test_a_flipped_bit_is_found(checkpoint, networks):
    """In each byte of state.json; in a network's header and its first, middle and last number."""
    runtime.folder.check_checkpoint(checkpoint, networks)
    state = checkpoint / "state.json"
    places = [(state, at) for at in range(state.stat().st_size)]
    for name in networks:
        file = checkpoint / f"{name}.safetensors"
        numbers = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        middle = (numbers + file.stat().st_size) // 2
        places += [(file, at) for at in (0, 9, numbers - 1, numbers, middle, -1)]
    for file, at in places:
        flip(file, at)
        with pytest.raises((ValueError, OSError), match="checksums|state.json"):
            runtime.folder.check_checkpoint(checkpoint, networks)
        flip(file, at)
    runtime.folder.check_checkpoint(checkpoint, networks)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def tensors_changed(checkpoint, name, change):
    tensors = load_file(checkpoint / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / f"{name}.safetensors")


def linked(file, target):
    target.write_bytes(file.read_bytes()) if target.suffix else target.mkdir()
    file.unlink()
    file.symlink_to(target)


HOSTILE = {  # what is wrong with it, and what is said; afterwards all checksums are right
    "parent": ("state.json", lambda c: {"iteration": 4, "sha256": {"../../student": "0"}}),
    "absolute": ("state.json", lambda c: {"iteration": "/tmp/4", "sha256": {}}),
    "list": ("state.json", lambda c: [1, 2]),
    "iteration": ("state.json", lambda c: {**json.loads((c / "state.json").read_text()), "iteration": 10 ** 30}),
    "link": ("other files", lambda c: linked(c / "fake.safetensors", c.parent / "elsewhere.safetensors")),
    "pipe": ("other files", lambda c: ((c / "fake.safetensors").unlink(), os.mkfifo(c / "fake.safetensors")) and None),
    "pickle": ("eader", lambda c: (c / "heads.safetensors").write_bytes(pickle.dumps(Evil())) and None),
    "beside": ("other files", lambda c: (c / "optimizer.pt").write_bytes(pickle.dumps(Evil())) and None),
    "shape": ("other tensors", lambda c: tensors_changed(c, "heads", lambda t: t.update({"weight/0.to_logit.bias": torch.zeros(2)}))),
    "dtype": ("other tensors", lambda c: tensors_changed(c, "heads", lambda t: t.update({"weight/0.to_logit.bias": torch.zeros(1, dtype=torch.int64)}))),
    "key gone": ("other tensors", lambda c: tensors_changed(c, "heads", lambda t: t.pop("weight/0.to_logit.bias") and None)),
    "AdamW": ("other tensors", lambda c: tensors_changed(c, "heads", lambda t: t.pop("adamw/0/step") and None)),
    "key more": ("other tensors", lambda c: tensors_changed(c, "heads", lambda t: t.update({"../../x": torch.zeros(1)}))),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_checkpoint_from_elsewhere_is_data(kind, checkpoint, networks, monkeypatch):
    """What is no plain checkpoint of these networks is refused before anything of it is loaded, even where its checksums are right."""
    monkeypatch.chdir(checkpoint.parent)
    says, change = HOSTILE[kind]
    state = change(checkpoint)
    if says != "other files":
        runtime.files.write_json(checkpoint / "state.json", state or runtime.folder.checkpoint_state(4, checkpoint, networks))
    with pytest.raises((ValueError, runtime.folder.SafetensorError)) as e:
        runtime.folder.check_checkpoint(checkpoint, networks)
    assert (says in str(e.value) or "checksums" in str(e.value) and state) and not Path("evil").exists(), e.value


def test_a_run_without_one_whole_checkpoint_is_refused_and_left_as_it_is(run4, here, tmp_path):
    """Two ranks: one line, exit code 2, nothing loaded and nothing lost."""
    def change(newest):
        shutil.rmtree(newest.with_name("000002"))
        tensors_changed(newest, "heads", lambda t: t.pop("weight/0.to_logit.bias"))
        names = ("student", "fake", "heads")
        runtime.files.write_json(newest / "state.json", runtime.folder.checkpoint_state(4, newest, names))
    out, codes, said = resumed(run4, here, tmp_path, change)
    assert codes[0] == 2 and codes[1] in (1, 2) and said[1] == "" and said[0].count("\n") == 1 and "to_logit.bias" in said[0], said
    assert rows(out) == rows(run4) and (out / "checkpoints" / "000004").is_dir()


def full(rank, *_):
    """From the second checkpoint on the operating system refuses rank 0 files of more than 100 kB."""
    save, saved = runtime.folder.Run.save, [0]

    def spy(self, *args):
        saved[0] += 1
        if saved[0] == 2 and rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        save(self, *args)
    runtime.folder.Run.save = spy


@pytest.mark.parametrize("kind", ["File too large", "No space left on device"])
def test_a_full_disk_costs_nothing_that_was_there(kind, run4, here, tmp_path):
    """Real errors of the operating system: a limit on file sizes (two ranks), and a small file system (one rank)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    world = 2 if kind == "File too large" else 1
    size = sum(len(content) for content in files(run4 / "checkpoints").values()) * 3 // 4
    if world == 1 and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        args = [*here, *RUN4, "--out", disk / "out"]
        codes, said = ranks(tmp_path, args, world, (full,) if world == 2 else None)
        assert set(codes) == {1} and said[0].count("\n") == 1 and kind in said[0] and "--resume" in said[0] and said[1:] in ([], [""]), said
        found = files(disk / "out")
        assert {k.split("/")[0] for k in found} == {"config.json", "log.csv", "checkpoints"} and not [k for k in found if "partial" in k]
        assert [p.name for p in (disk / "out" / "checkpoints").iterdir()] == ["000002"]
        kept = [k for k in found if "000002" in k]
        assert len(kept) == 4  # three networks and state.json
        if world == 2:
            assert all(found[k] == (run4 / k).read_bytes() for k in kept)
        if world == 1:  # with room again
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", disk], check=True)
            codes, said = ranks(tmp_path, [*args, "--resume"])
            assert codes == [0] and len(rows(disk / "out")) == 5, said
    finally:
        if world == 1:
            subprocess.run(["umount", disk], check=True)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("999999", "1000000", "000002", "1000001.partial", ".000003", "12x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    run = runtime.folder.Run.__new__(runtime.folder.Run)
    run.folder = tmp_path
    assert [p.name for p in run.checkpoints()] == ["000002", "999999", "1000000"]


# --- A rank that dies ------------------------------------------------------------------------------------------------

def killed(rank, who, at):
    """SIGKILL of rank `who` in the middle of an iteration, before its update number `at`."""
    signalled(rank, who, at, signal.SIGKILL)


def test_a_rank_that_dies_ends_the_others(here, tmp_path):
    """The other one, waiting for it in an all-reduce, ends with an error, and saves nothing."""
    out = tmp_path / "out"
    args = [*here, "--iterations", 5000, "--batch-size", 2, "--checkpoint-every", 5000]
    codes, said = ranks(tmp_path, [*args, "--out", out], 2, (killed, 1, 8))
    assert codes == [1, -signal.SIGKILL] and "as asked" not in said[0], said
    assert len(rows(out)) == 3  # the header and two iterations
    assert not (out / "checkpoints").exists()


# --- Long runs -------------------------------------------------------------------------------------------------------

def watched(rank, seen):
    """Writes resident bytes and open files after each iteration."""
    record = runtime.folder.Run.record

    def spy(self, *args):
        record(self, *args)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open(seen, "a") as f:
            f.write(f"{pages * resource.getpagesize()} {len(os.listdir('/proc/self/fd'))}\n")
    runtime.folder.Run.record = spy


def test_a_long_run_keeps_memory_and_file_handles(long_run):
    process, seen = long_run
    codes, said = ended(*process, timeout=200)
    assert codes == [0], said
    memory, handles = zip(*(map(int, line.split()) for line in seen.read_text().splitlines()))
    warm = LONG // 3
    assert len(memory) == LONG
    assert max(memory[warm:]) <= 1.005 * memory[warm]  # 20 kB an iteration
    assert max(handles[warm:]) == handles[warm]
