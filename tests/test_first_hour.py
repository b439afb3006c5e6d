"""tools/first_hour_on_a_gpu.sh: it runs to its end on a CPU, and stops at a difference."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, script

from tools import first_hour

SCRIPT = ROOT / "tools" / "first_hour_on_a_gpu.sh"


def start(out, *flags, python=sys.executable):
    """The finished script, with this Python and this folder."""
    env = {**os.environ, "PYTHON": python, "OUT": str(out)}
    return subprocess.run(["bash", SCRIPT, *flags], env=env, capture_output=True, text=True)


@pytest.mark.skipif(os.environ.get("REHEARSAL") != "full", reason="minutes: by `make rehearse`")
def test_a_rehearsal_passes_all_checks_and_fills_the_table(tmp_path):
    out = tmp_path / "hour"
    done = start(out, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("updates skipped", "teacher = fake", "resumed", "exported", "passes", "digits"):
        assert f"as expected: {said}" in done.stdout or f" {said}" in done.stdout, said
    head, row = [(out / "table.md").read_text().splitlines()[i] for i in (2, -1)]
    assert head.count("|") == row.count("|") == 8 and "tiny-sdxl" in row


def test_without_a_gpu_it_stops_at_once(tmp_path):
    done = script(tmp_path, "tools/first_hour.py", "device")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "first_hour.py: DIFFERENT: GPU: expected one that torch sees, found none"
    done = start(tmp_path / "hour", python="false")  # as that check: it fails
    assert done.returncode == 1 and done.stdout.count("==") == 1
    assert start(tmp_path / "hour").returncode == 2  # it writes over nothing


def stops(capsys, *words):
    """The one line with which a check stops."""
    with pytest.raises(SystemExit) as e:
        first_hour.main(*map(str, words))
    assert e.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def write_log(folder, **changed):
    """A log.csv of one iteration as it should be, but for what is changed."""
    row = {"iteration": 1, "dmd_loss": 0.0, "skipped": 0, "peak_memory_gb": 1.0}
    row |= {"loss_fake": 1.0, "x0_std": 1.0, "grad_norm_fake": 1.0} | changed
    folder.mkdir()
    (folder / "log.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    return folder


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"skipped": 1}, "updates skipped: expected 0, found 1"),
        ({"dmd_loss": 1e-5}, "dmd_loss: expected below 1e-9, found 1e-05"),
    ],
)
def test_a_start_that_differs_stops_it(changed, said, tmp_path, capsys):
    flags = ["--model", "tiny-sd3", "--iterations", 1]
    first_hour.main("start", write_log(tmp_path / "good"), *map(str, flags))
    assert said in stops(capsys, "start", write_log(tmp_path / "bad", **changed), *flags)


def test_other_memory_time_and_scores_stop_it(tmp_path, capsys):
    good = write_log(tmp_path / "good")
    other = write_log(tmp_path / "other", x0_std=1.001)
    assert "resumed, iteration 1, x0_std" in stops(capsys, "resumed", good, other)
    first_hour.memory(11.2, 10.0, on_a_gpu=True)
    for found in (8.5, 11.4):
        with pytest.raises(first_hour.Different, match="peak memory: expected 8.70 to 11.30 GB"):
            first_hour.memory(found, 10.0, on_a_gpu=True)
    line = {"model": "tiny-sd3", "batch_size": 2, "ms_iteration": 100.0, "ratio": 1.31}
    (tmp_path / "line").write_text(json.dumps(line))
    flags = ["--model", "tiny-sd3", "--batch-size", 2]
    said = stops(capsys, "bench", tmp_path / "line", tmp_path / "table.md", *flags)
    assert said.endswith("iteration / its passes: expected at most 1.3, found 1.31")
    rows = {"student": {"clip": {"value": 40.0}, "distance": {"value": 0.2}}, "teacher": {}}
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    first_hour.main("digits", tmp_path, "41", "2", "0.1", "0.2")
    assert "digits, distance: expected 0.1" in stops(capsys, "digits", tmp_path, 41, 2, 0.1, 0.05)
