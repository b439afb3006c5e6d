"""README.md says what is: its commands run, its flags, files, names and columns exist, and the files keep to their sizes."""

import dataclasses
import re
import shlex
import subprocess
import sys

import pytest
import transformers

import adm
import adp
import data
from conftest import ROOT, call, shell
from toy import plan

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)
COMMANDS = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]
SCRIPTS = {"adm.py": (adm.Config, adm.check), "adp.py": (adp.Config, adp.check), "data.py encode": (data.EncodeConfig, None),
           "data.py pairs": (data.PairsConfig, None), "models.py": (plan.Config, None)}
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
    parser = transformers.HfArgumentParser(config_class, allow_abbrev=False)
    cfg = config_class(**vars(parser.parse_args(flags)))  # exits on an unknown flag or value
    if check:
        check(cfg)


def test_offline_commands_run_in_order_and_the_result_opens(tmp_path):
    assert len(OFFLINE) == 3
    for command in OFFLINE:
        script, flags = split(command)
        done = subprocess.run([sys.executable, str(ROOT / script.split()[0]), *script.split()[1:], *flags], cwd=tmp_path,
                              capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    (snippet,) = [block for kind, block in BLOCKS if kind == "python"]
    done = subprocess.run([sys.executable, "-c", snippet + "image.save('fox.png')"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "fox.png").exists(), done.stderr
    assert sorted(p.name for p in (tmp_path / "out" / "dmdx").iterdir()) == ["checkpoints", "config.json", "log.csv", "pipeline", "prompts", "samples"]


def test_make_targets_exist():
    for command in [c for c in COMMANDS if c.startswith("make")]:
        assert subprocess.run(["make", "-n", command.split()[1]], cwd=ROOT, capture_output=True).returncode == 0
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_and_flags_exist():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / path).exists(), path
    fields = {"--" + name.replace("_", "-") for config, _ in SCRIPTS.values() for name in (f.name for f in dataclasses.fields(config))}
    fields |= {"--no-pixel", "--help", "--json"}
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"torchrun --nproc_per_node=\d", "", TEXT)):
        assert flag in fields, flag


def test_symbols_and_columns_are_in_the_code():
    code = "".join((ROOT / name).read_text() for name in ("ode.py", "models.py", "adp.py", "adm.py"))
    table = TEXT.split("## Symbols")[1].split("##")[0]
    names = [name for row in table.splitlines()[4:] if "|" in row for name in re.findall(r"`([^`]+)`", row.split("|")[2])]
    assert len(names) > 12 and all(re.search(rf"\b{name}\b", code) for name in names), names
    columns = {n for row in TEXT.split("## log.csv")[1].split("##")[0].splitlines() if row.startswith("| `")
               for n in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert columns == set(adm.COLUMNS) | {"skipped", "seconds", "peak_memory_gb"}


def test_sizes():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in ("README.md", "ode.py", "models.py", "data.py", "adp.py", "adm.py")}
    limits = {"README.md": 250, "ode.py": 255, "models.py": 690, "data.py": 560, "adp.py": 350, "adm.py": 400}
    assert all(lines[name] <= limit for name, limit in limits.items()), lines
    for script in ("adp.py", "adm.py"):
        loop = next(i for i, line in enumerate((ROOT / script).read_text().splitlines(), 1) if "for iteration in" in line)
        assert loop <= 200
    assert {p.name for p in ROOT.glob("*.py")} == {"ode.py", "models.py", "data.py", "adp.py", "adm.py"}


def test_prompts_are_a_few_hundred_different_ones():
    prompts = data.read_prompts(data.PROMPTS)
    assert 200 <= len(prompts) == len(set(prompts)) <= 1000


def test_every_flag_has_a_help_text():
    for config, _ in SCRIPTS.values():
        assert all(f.metadata.get("help") for f in dataclasses.fields(config))
    done = shell("python", "adm.py", "--help")
    assert done.returncode == 0 and "--fake-gradient" in done.stdout and "\n    python adm.py   " in done.stdout  # as typed


def test_the_toys_table_is_what_its_script_prints():
    done = shell("python", "toy/claims.py", "readme")
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 6 and done.stdout.strip() in TEXT, done.stderr


def test_plans_are_what_models_py_prints(capsys):
    """The whole output that the README shows, and of its table one column of each kind."""
    table = TEXT.split("### Sizing a run")[1]

    def planned(*flags):
        call(plan.plan, plan.Config, "--gradient-checkpointing", *flags)
        return capsys.readouterr().out
    assert planned("--model", "sd3.5-large") in TEXT
    for flags in (["sd3"], ["cogvideox-2b", "--world-size", 1, "--lora-rank", 64]):
        out = planned("--model", *flags)
        sums = re.search(r"sum +\S+ +(\S+) +(\S+) +(\S+)", out).groups()
        (activations,), (peak,) = re.findall(r"activations +(\S+)", out), re.findall(r"peak +(\S+)", out)
        assert ", ".join(sums) in table and f"{activations} → {peak}" in table, out
