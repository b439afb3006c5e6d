"""The READMEs say what is: their commands run, and flags, files, names and columns exist."""

import dataclasses
import os
import re
import shlex
import subprocess
from pathlib import Path

import bench_peers
import pytest
from conftest import ROOT, script

import adm
import adp
import data
import models
from runtime.flags import parser_of
from runtime.lines import Lines
from runtime.script import parse
from tools import plan, sample, score

README = ROOT / "README.md"
READMES = [README, *sorted(ROOT.glob("[a-z]*/README.md"))]
READMES.append(ROOT / "toy" / "digits-teacher" / "README.md")
TEXT = README.read_text()
EVERYWHERE = "\n".join(path.read_text() for path in READMES)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in re.findall(r"```(\w+)\n(.*?)```", EVERYWHERE, re.S)
    if kind == "sh"
    for line in block.replace("\\\n", "").splitlines()
    if line.strip()
]
SCRIPTS = {
    "adm.py": (adm.Config, adm.check),
    "adp.py": (adp.Config, adp.check),
    "data.py encode": (data.EncodeConfig, None),
    "data.py pairs": (data.PairsConfig, None),
    "tools/plan.py adm": (plan.AdmConfig, plan.check),
    "tools/plan.py adp": (plan.AdpConfig, plan.check),
    "tools/plan.py pairs": (plan.PairsConfig, None),
    "tools/plan.py encode": (plan.EncodeConfig, None),
    "tools/plan.py record": (plan.RecordConfig, None),
    "tools/sample.py": (sample.Config, None),
    "tools/score.py": (score.Config, score.check),
    "tests/bench_peers.py": (bench_peers.Config, None),
}
# Of scripts whose flags are their own, and of other programs.
OTHER_FLAGS = {"--no-pixel", "--no-measure", "--help", "--json", "--nproc_per_node", "--rehearse"}
OTHER_FLAGS |= {"--no-deps", "--logdir", "--videos_path", "--dimension"}
OTHER_FLAGS |= {"--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}
OTHER_FLAGS |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"}
OFFLINE = [c for c in COMMANDS if "tiny-" in c]


def split(command):
    """A README's command → (script, its flags)."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    for length in (2, 1):
        name = " ".join(words[at : at + length])
        if name in SCRIPTS:
            return name, words[at + length :]
    raise AssertionError(f"{command}: a script that is not known here")


def test_the_readme_is_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 100


PAGES = [f"{folder}/README.md" for folder in ("families", "runtime", "sizing", "tools", "toy")]


@pytest.mark.parametrize("page", [*PAGES, "toy/WHY.md", "toy/CLAIMS.md"])
def test_prose_keeps_to_a_hundred_columns(page):
    """Tables, pictures and code may be wider."""
    text = (ROOT / page).read_text()
    prose = re.sub("^```.*?^```", "", text, flags=re.M | re.S).splitlines()
    assert not [line for line in prose if len(line) > 100 and not line.startswith(("|", "!"))]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("make", "pip"))])
def test_commands_are_accepted(command):
    name, flags = split(command)
    config_class, check = SCRIPTS[name]
    cfg = parse(parser_of(config_class), config_class, flags)
    if check:
        check(cfg)


def test_the_demos_commands_are_accepted_and_each_reads_what_one_before_it_wrote():
    """Those of the stages and the tools; toy/run.py and toy/plot.py have tests of their own."""
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.replace("\\\n", "").splitlines()
    commands = [line for line in lines if re.search(r"python \S+\.py ", line)]
    written = []
    for command in commands:
        if "python toy/" not in command:
            name, flags = split(command)
            config_class, check = SCRIPTS[name]
            cfg = parse(parser_of(config_class), config_class, flags)
            if check:
                check(cfg)
        *words, out = re.sub(r"(.*) --out (\S+)(.*)", r"\1\3 \2", command).split()
        for word in words[1:]:
            if word.startswith("out/"):
                assert any(f"{word}/".startswith(f"{folder}/") for folder in written), word
            elif "/" in word:
                assert (ROOT / word).exists(), word
        written.append(out)
    assert len(commands) == 11 and written[-1].endswith("/scores")


def test_offline_commands_run_in_order_and_the_result_opens(tmp_path):
    assert len(OFFLINE) == 3
    home = tmp_path / "home"
    home.mkdir()
    for command in OFFLINE:
        name, flags = split(command)
        done = script(tmp_path, *name.split(), *flags, cwd=home)
        assert done.returncode == 0, done.stderr
    (snippet,) = [block for kind, block in BLOCKS if kind == "python"]
    (tmp_path / "snippet.py").write_text(snippet + "image.save('fox.png')")
    done = script(tmp_path, tmp_path / "snippet.py", cwd=home)
    assert done.returncode == 0 and (home / "fox.png").exists(), done.stderr
    written = sorted(path.name for path in (home / "out" / "dmdx").iterdir())
    files = ["config.json", "curves.png", "log.csv"]
    assert written == sorted([*files, "checkpoints", "pipeline", "prompts", "samples"])


def test_make_targets_exist_and_ci_runs_the_tests():
    targets = set(re.findall(r"^make (\w+)|`make (\w+)", EVERYWHERE, re.M))
    targets = {one or other for one, other in targets}
    assert {"demo", "test"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, target
    only_said = {**os.environ, "MAKEFLAGS": "n"}  # make says what it would do
    done = subprocess.run([ROOT / ".ci" / "run"], env=only_said, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m pytest" in done.stdout, done.stderr


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_exist(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
    for link in links:
        assert (path.parent / link).exists(), link
    if path == README:
        assert len(links) > 10


def test_files_that_a_rooms_readme_lists_are_all_that_it_has():
    for path in READMES:
        rows = re.findall(r"^\| (`.*?) \|", path.read_text(), re.M)
        named = set(re.findall(r"`(\w+\.py)`", " ".join(rows)))
        there = {file.name for file in path.parent.glob("*.py")}
        if path != README and there:
            assert named == there, path


def test_flags_exist():
    fields = {f.name for config, _ in SCRIPTS.values() for f in dataclasses.fields(config)}
    known = OTHER_FLAGS | {"--" + name.replace("_", "-") for name in fields}
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]", EVERYWHERE))
    assert len(flags) > 20 and flags <= known | {"--lr"}, flags - known  # `--lr-…`


def test_symbols_are_in_the_code():
    files = ("ode.py", "models.py", "adp.py", "adm.py")
    code = "".join((ROOT / name).read_text() for name in files).replace(models.__doc__, "")
    table = models.__doc__.split("ode.py:\n\n")[1].strip().splitlines()
    names = [name for row in table for name in re.split(" {2,}", row.strip())[1].split(", ")]
    assert {"student", "teacher", "x0_hat", "dt"} <= set(names)
    assert all(re.search(rf"\b{name}\b", code) for name in names), names


def test_prompts_are_a_few_hundred_different_ones():
    prompts = list(Lines(data.PROMPTS))
    assert 200 <= len(prompts) == len(set(prompts)) <= 1000


def test_every_flag_has_a_help_text(tmp_path):
    for config, _ in SCRIPTS.values():
        assert all(f.metadata.get("help") for f in dataclasses.fields(config))
    done = script(tmp_path, "adm.py", "--help")
    assert done.returncode == 0 and "--fake-gradient" in done.stdout
    assert "\n    python adm.py   " in done.stdout  # as typed


def test_the_toys_table_is_what_its_script_prints(tmp_path):
    done = script(tmp_path, "toy/claims.py", "readme")
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 6, done.stderr
    assert done.stdout.strip() in TEXT


def test_the_digits_rows_are_those_of_the_long_table():
    long = Path(ROOT / "toy" / "README.md").read_text()
    columns = ("method", "fd", "fd_any", "coverage", "iterations")

    def rows(text):
        """{method: {column: cell}} of the table in which the digits are measured."""
        lines = text[text.index("| method | fd |") :].split("\n\n")[0].splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}

    shown, measured = rows(TEXT), rows(long)
    assert len(shown) > 5
    for method, row in shown.items():
        assert row == {name: measured[method][name] for name in columns}, method
