"""Shared by the tests: offline, one thread, one tiny teacher of each family, and the scripts run through their real CLI."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same everywhere

import atexit
import multiprocessing
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
import data

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # tiny networks gain nothing from a second thread, and lose much beside another busy process
FORK = multiprocessing.get_context("forkserver")  # of a process that has computed nothing
FORK.set_forkserver_preload(["adm", "adp", "families.tiny", "peft"])


@pytest.fixture(scope="session")
def teachers():
    return {name: families.load_teacher(name) for name in families.TINY}


@pytest.fixture(scope="session")
def conditionings(teachers):
    """{name: conditioning of two prompts}, by the real tokenizers and text encoders."""
    with torch.no_grad():
        return {name: family.encode(family.text_pipeline(), ["a red fox", "two dogs"]) for name, family in teachers.items()}


@pytest.fixture(scope="session")
def few_prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "few.txt"
    path.write_text("a red fox\n\ntwo dogs on a hill\n  a bowl of soup  \nein Fluß\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, few_prompts):
    """{model: folder of encoded prompts}"""
    folders = {name: tmp_path_factory.mktemp("encoded") / name for name in families.TINY}
    for name, folder in folders.items():
        call(data.encode, data.EncodeConfig, "--model", name, "--prompts", few_prompts, "--out", folder)
    return folders


@pytest.fixture(scope="session")
def sdxl_pairs(tmp_path_factory, encoded):
    folder = tmp_path_factory.mktemp("pairs") / "sdxl"
    call(data.pairs, data.PairsConfig, "--model", "tiny-sdxl", "--prompts", encoded["tiny-sdxl"], "--out", folder, "--count", 6,
         "--steps", 3, "--batch-size", 2, "--shard-size", 4)
    return folder


def call(main, config_class, *args):
    """Run a script's main in this process, through its command line."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        runtime.script.run(main, config_class, [str(a) for a in args], prog=main.__module__ + ".py")
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def shell(*command):
    """Run `python …` or `torchrun …` as a user would; returns the finished process."""
    tool = [sys.executable] if command[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
    return subprocess.run([*tool, *map(str, command[1:])], cwd=ROOT, capture_output=True, text=True, timeout=240)


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
    stdout, stderr = (file.read_text() for file in said.values())
    return subprocess.CompletedProcess(argv, process.exitcode, stdout, stderr)


def as_main(argv, cwd, said):
    """What `python *argv` does. said: {"stdout": file, "stderr": file}."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(said[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    tests = ROOT / "tests"
    ours = {"toy", *(file.stem for folder in (ROOT, tests) for file in folder.glob("*.py"))}
    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            del sys.modules[name]
    elsewhere = [folder for folder in sys.path if folder not in (str(ROOT), str(tests))]
    sys.path[:] = [str(Path(argv[0]).parent), *elsewhere]
    sys.argv = argv
    os.chdir(cwd)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # tiny models remove their folders; a forked child leaves that out


def read_log(folder):
    """log.csv as {column: [float or None]}."""
    import csv
    with open(Path(folder) / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    return {name: [float(r[name]) if r[name] else None for r in rows] for name in rows[0]}


def same_log(a, b, **tolerance):
    a, b = read_log(a), read_log(b)
    assert a.keys() == b.keys()
    for name in a.keys() - {"seconds", "peak_memory_gb"}:
        assert_close([float("nan") if x is None else x for x in a[name]], [float("nan") if x is None else x for x in b[name]],
                     equal_nan=True, msg=lambda m: f"{name}: {m}", **tolerance)


def refused(capsys, main, config_class, *args):
    """The one line that a mistake prints."""
    with pytest.raises(SystemExit) as e:
        call(main, config_class, *args)
    assert e.value.code == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


def tree(folder):
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}
