"""tests/bench_peers.py without any clone of a peer: its own side, and what it refuses."""

import json
import subprocess

import bench_peers
from conftest import call, refused


def test_without_a_clone_the_table_has_this_projects_updates(tmp_path, capsys, monkeypatch):
    """A DMD update has 5 forward passes, an ADM update 2 more in part, through the heads' maps."""
    monkeypatch.setattr(bench_peers, "WARM_UP", 0)
    monkeypatch.setattr(bench_peers, "PROMPTS", ["a red fox"])
    monkeypatch.setattr(bench_peers, "B", 1)
    file = tmp_path / "peers.json"
    call(bench_peers.main, bench_peers.Config, "--repeats", 1, "--json", file)
    results = json.loads(file.read_text())
    rows = results["cost"]
    assert results["commits"] == results["differences"] == {}
    assert rows["ADM"]["ratio"] == [1, 1, 1]
    assert all(len(row["seconds"]) == 1 for row in rows.values())

    def passes(label, way):
        counts = rows[label]["passes"]
        return [counts[role][way] for role in ("student", "teacher", "fake")]

    assert passes("ADM", "forward") == [[1, 0], [2, 2], [2, 0]]  # [whole, in part]
    assert passes("ADM", "backward") == [[1, 0], [0, 1], [2, 0]]
    assert passes("ADM --gradient-checkpointing", "backward") == passes("ADM", "backward")
    assert passes("ADM --fake-gradient straight-through", "backward") == [[1, 0], [0, 1], [1, 0]]
    assert passes("ADM --ttur 5", "backward") == [[1, 0], [0, 1], [6, 0]]
    assert passes("DMD", "forward") == [[1, 0], [2, 0], [2, 0]]
    assert passes("DMD --ttur 5", "forward") == [[5, 0], [2, 0], [6, 0]]
    assert passes("DMD --ttur 5", "backward") == [[1, 0], [0, 0], [5, 0]]
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"| {label} |") for line in said for label in rows) == len(rows)
    assert "1, 2 + 2p, 2 | 1, 1p, 2 |" in "\n".join(said)


def test_a_checkout_that_is_none_is_refused_in_one_line(tmp_path, capsys):
    def line(*flags):
        return refused(capsys, bench_peers.main, bench_peers.Config, *flags)

    assert line("--dmd2", tmp_path / "none").endswith("none: no such folder")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    commit = ["commit", "--quiet", "--allow-empty", "--message", "empty"]
    subprocess.run([*git, *who, *commit], check=True)
    asked = [*git, "rev-parse", "HEAD"]
    found = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    for flag, name in (("--dmd2", "DMD2"), ("--fastgen", "FastGen")):
        said = line(flag, tmp_path)
        written = f"written for {name} {bench_peers.WRITTEN_FOR[name][:9]}"
        assert said.endswith(f"{written}, this is {found[:9]}") and " has no " in said
    assert "no folder" in line("--json", tmp_path / "none" / "peers.json")
