"""Shared by the tests: offline, one thread, one tiny teacher of each family.

The scripts are run through their real command lines, in this process, in children of a fork
server, or as a user starts them.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # also of the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same everywhere

import atexit
import csv
import gc
import multiprocessing
import runpy
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file
from torch.testing import assert_close

import data
import families
import runtime.script

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"

# Tiny networks gain nothing from a second thread, and lose much beside another busy process.
torch.set_num_threads(1)

FORK = multiprocessing.get_context("forkserver")  # of a process that has computed nothing
FORK.set_forkserver_preload(["adm", "adp", "families.tiny", "peft"])


def pytest_collection_finish():
    """Python need not look through all that is imported again and again: a tenth of the time."""
    gc.collect()
    gc.freeze()


# --- What many tests read -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def teachers():
    """{model: Family} of the tiny ones."""
    return {name: families.load_teacher(name) for name in families.TINY}


@pytest.fixture(scope="session")
def conditionings(teachers):
    """{name: conditioning of two prompts}, by the real tokenizers and text encoders."""
    texts = ["a red fox", "two dogs"]
    found = {}
    with torch.no_grad():
        for name, family in teachers.items():
            found[name] = family.encode(family.text_pipeline(), texts)
    return found


@pytest.fixture(scope="session")
def few_prompts(tmp_path_factory):
    """A text file of four prompts, a blank line and spaces."""
    path = tmp_path_factory.mktemp("prompts") / "few.txt"
    text = "a red fox\n\ntwo dogs on a hill\n  a bowl of soup  \nein Fluß\n"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, few_prompts):
    """{model: folder of encoded prompts}"""
    folders = {}
    for name in families.TINY:
        folders[name] = tmp_path_factory.mktemp("encoded") / name
        flags = ["--model", name, "--prompts", few_prompts, "--out", folders[name]]
        call(data.encode, data.EncodeConfig, *flags)
    return folders


@pytest.fixture(scope="session")
def sdxl_pairs(tmp_path_factory, encoded):
    """The folder of six pairs of tiny-sdxl: a whole shard of four, and two in the last."""
    folder = tmp_path_factory.mktemp("pairs") / "sdxl"
    flags = ["--model", "tiny-sdxl", "--prompts", encoded["tiny-sdxl"], "--out", folder]
    flags += ["--count", 6, "--steps", 3, "--batch-size", 2, "--shard-size", 4]
    call(data.pairs, data.PairsConfig, *flags)
    return folder


def played(path):
    """For how many milliseconds a GIF is shown, all its frames; the file may have joined some."""
    with Image.open(path) as image:
        return sum(frame.info["duration"] for frame in ImageSequence.Iterator(image))


# --- Running scripts ------------------------------------------------------------------------------


def config(config_class, *argv):
    """The config that a command line asks for."""
    parser = runtime.flags.parser_of(config_class)
    return runtime.script.parse(parser, config_class, [str(word) for word in argv])


def call(main, config_class, *args):
    """Run a script's main in this process, through its command line."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    argv = [str(arg) for arg in args]
    try:
        runtime.script.run(main, config_class, argv, prog=main.__module__ + ".py")
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def refused(capsys, main, config_class, *args):
    """The one line that a mistake prints."""
    capsys.readouterr()  # what runs before it said of their progress
    with pytest.raises(SystemExit) as e:
        call(main, config_class, *args)
    assert e.value.code == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def shell(*command):
    """Run `python …` or `torchrun …` as a user would; returns the finished process."""
    tool = [sys.executable]
    if command[0] == "torchrun":
        tool += ["-m", "torch.distributed.run"]
    argv = [*tool, *map(str, command[1:])]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600)


def script(tmp_path, *argv, cwd=ROOT):
    """`python script.py flags…`, as shell runs it, in a child of the fork server.

    It costs no import of torch and diffusers; this project's own modules are imported anew, from
    where the script looks. What it says passes through files in tmp_path.
    """
    said = {name: tmp_path / name for name in ("stdout", "stderr")}
    argv = [str(ROOT / argv[0]), *map(str, argv[1:])]
    process = FORK.Process(target=as_main, args=(argv, cwd, said))
    process.start()
    process.join(240)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"{argv} hangs")
    stdout = said["stdout"].read_text()
    stderr = said["stderr"].read_text()
    return subprocess.CompletedProcess(argv, process.exitcode, stdout, stderr)


def as_main(argv, cwd, said):
    """What `python *argv` does. said: {"stdout": file, "stderr": file}."""
    write_to(said["stdout"], 1)
    write_to(said["stderr"], 2)
    forget_ours()
    elsewhere = [folder for folder in sys.path if folder not in (str(ROOT), str(TESTS))]
    sys.path[:] = [str(Path(argv[0]).parent), *elsewhere]
    sys.argv = argv
    os.chdir(cwd)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # tiny models remove their folders; a forked child leaves that out


def write_to(file, descriptor):
    """From here on what this process writes to the descriptor goes into the file."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)


def forget_ours():
    """Take all modules of this project out of sys.modules; returns their names."""
    files = [*ROOT.glob("*.py"), *TESTS.glob("*.py")]
    ours = {"families", "runtime", "tools", "toy", *(file.stem for file in files)}
    found = [name for name in sys.modules if name.partition(".")[0] in ours]
    for name in found:
        del sys.modules[name]
    return found


def start(tmp_path, main, config_class, args, world=1, hook=None):
    """Start the ranks of a run of a script's main; returns (processes, files of what each says).

    hook (function, *arguments): called in each rank before, as function(rank, *arguments).
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes, errors = [], []
    for rank in range(world):
        error = tmp_path / f"stderr-{rank}"
        place = (rank, world, port)
        about = (place, error, main, config_class, args, hook)
        processes.append(FORK.Process(target=as_rank, args=about))
        errors.append(error)
    for process in processes:
        process.start()
    return processes, errors


def as_rank(place, error, main, config_class, args, hook):
    """A rank, as torchrun would start it. place: its number, how many there are, and a port."""
    write_to(error, 2)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank, world, port = map(str, place)
    if world != "1":
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if hook:
        function, *arguments = hook
        function(place[0], *arguments)
    call(main, config_class, *args)


def ended(processes, errors, timeout=60):
    """([exit code], [what each rank said]); a rank that outlives the timeout is an error."""
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            for other in processes:
                other.kill()
            pytest.fail("a rank hangs")
    return [p.exitcode for p in processes], [e.read_text() for e in errors]


# --- What a run leaves ----------------------------------------------------------------------------


def read_log(folder):
    """log.csv as {column: [float or None]}."""
    with open(Path(folder) / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    log = {}
    for name in rows[0]:
        log[name] = [float(row[name]) if row[name] else None for row in rows]
    return log


def same_log(a, b, **tolerance):
    """Two runs' logs are the same, but for what depends on the clock and the memory."""
    a, b = read_log(a), read_log(b)
    assert a.keys() == b.keys()
    for name in a.keys() - {"seconds", "peak_memory_gb"}:
        left, right = ([float("nan") if x is None else x for x in log[name]] for log in (a, b))
        of_column = f"{name}: {{}}".format
        assert_close(left, right, equal_nan=True, msg=of_column, **tolerance)


def saved(folder, iteration, network):
    """The tensors of one network in a run's checkpoint: each rank's rows, one after another."""
    files = (folder / "checkpoints" / f"{iteration:06d}").glob(f"{network}*.safetensors")
    parts = [load_file(file) for file in sorted(files)]
    whole = {}
    for key, first in parts[0].items():
        whole[key] = torch.cat([part[key] for part in parts]) if first.ndim else first
    return whole


def tree(folder):
    """{path in the folder: content} of its files."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}
