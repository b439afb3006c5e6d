"""README.md says what is: its commands run, and its flags, files, names and columns exist."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys

import pytest
import transformers

import adm
import adp
import data
from conftest import ROOT, call, script
from runtime.flags import parser_of
from tools import plan

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)
COMMANDS = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]
SCRIPTS = {"adm.py": (adm.Config, adm.check), "adp.py": (adp.Config, adp.check), "data.py encode": (data.EncodeConfig, None),
           "data.py pairs": (data.PairsConfig, None), "tools/plan.py": (plan.Config, None)}
OFFLINE = [c for c in COMMANDS if "tiny-" in c]


def split(command):
    """A README command → (script, flags)."""
    words = shlex.split(command)
    at = next(i for i, w in enumerate(words) if w.endswith(".py"))
    script = " ".join(words[at:at + 2]) if words[at] == "data.py" else words[at]
    return script, words[at + len(script.split()):]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make")])
def test_commands_are_accepted(command):
    script, flags = split(command)
    config_class, check = SCRIPTS[script]
    parser = parser_of(config_class)
    cfg = config_class(**vars(parser.parse_args(flags)))  # exits on an unknown flag or value
    if check:
        check(cfg)


def test_offline_commands_run_in_order_and_the_result_opens(tmp_path):
    """The last one, to which the others lead, in a process of its own, as a user would run it."""
    assert len(OFFLINE) == 3
    home = tmp_path / "home"
    home.mkdir()
    for command in OFFLINE:
        name, flags = split(command)
        argv = [*name.split(), *flags]
        if command == OFFLINE[-1]:
            argv = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
            done = subprocess.run(argv, cwd=home, capture_output=True, text=True, timeout=240)
        else:
            done = script(tmp_path, *argv, cwd=home)
        assert done.returncode == 0, done.stderr
    (snippet,) = [block for kind, block in BLOCKS if kind == "python"]
    (tmp_path / "snippet.py").write_text(snippet + "image.save('fox.png')")
    done = script(tmp_path, tmp_path / "snippet.py", cwd=home)
    assert done.returncode == 0 and (home / "fox.png").exists(), done.stderr
    assert sorted(p.name for p in (home / "out" / "dmdx").iterdir()) == [
        "checkpoints", "config.json", "log.csv", "pipeline", "prompts", "samples"]


def test_make_targets_exist_and_ci_runs_the_tests():
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make")]
    assert targets
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0
    only_said = {**os.environ, "MAKEFLAGS": "n"}  # make says what it would do
    done = subprocess.run([ROOT / ".ci" / "run"], env=only_said, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m pytest" in done.stdout, done.stderr


def test_links_and_flags_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert links
    for path in links:
        assert (ROOT / path).exists(), path
    fields = {"--" + name.replace("_", "-") for config, _ in SCRIPTS.values() for name in (f.name for f in dataclasses.fields(config))}
    fields |= {"--no-pixel", "--help", "--json"}
    without_torchruns = re.sub(r"torchrun --nproc_per_node=\d", "", TEXT)
    flags = re.findall(r"(?<![\w-])--[a-z][a-z-]+", without_torchruns)
    assert flags
    for flag in flags:
        assert flag in fields, flag


def test_symbols_and_columns_are_in_the_code():
    code = "".join((ROOT / name).read_text() for name in ("ode.py", "models.py", "adp.py", "adm.py"))
    table = TEXT.split("## Symbols")[1].split("##")[0]
    names = [name for row in table.splitlines()[4:] if "|" in row for name in re.findall(r"`([^`]+)`", row.split("|")[2])]
    assert len(names) > 12 and all(re.search(rf"\b{name}\b", code) for name in names), names
    columns = {n for row in TEXT.split("## log.csv")[1].split("##")[0].splitlines() if row.startswith("| `")
               for n in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert columns == set(adm.COLUMNS) | {"skipped", "seconds", "peak_memory_gb"}


def test_prompts_are_a_few_hundred_different_ones():
    prompts = data.read_prompts(data.PROMPTS)
    assert 200 <= len(prompts) == len(set(prompts)) <= 1000


def test_every_flag_has_a_help_text(tmp_path):
    for config, _ in SCRIPTS.values():
        assert all(f.metadata.get("help") for f in dataclasses.fields(config))
    done = script(tmp_path, "adm.py", "--help")
    assert done.returncode == 0 and "--fake-gradient" in done.stdout and "\n    python adm.py   " in done.stdout  # as typed


def test_the_toys_table_is_what_its_script_prints(tmp_path):
    done = script(tmp_path, "toy/claims.py", "readme")
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 6 and done.stdout.strip() in TEXT, done.stderr


def test_plans_are_what_the_tool_prints(capsys):
    """The whole output that the README shows, and of its table one column of each kind."""
    table = TEXT.split("### Sizing a run")[1]

    def planned(*flags):
        call(plan.plan, plan.Config, "--gradient-checkpointing", *flags)
        return capsys.readouterr().out
    full = planned("--model", "sd3.5-large")
    assert full in TEXT
    for out in (full, planned("--model", "cogvideox-2b", "--world-size", 1, "--lora-rank", 64)):
        sums = re.search(r"sum +\S+ +(\S+) +(\S+) +(\S+)", out).groups()
        (activations,), (peak,) = re.findall(r"activations +(\S+)", out), re.findall(r"peak +(\S+)", out)
        assert ", ".join(sums) in table and f"{activations} → {peak}" in table, out
