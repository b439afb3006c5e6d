"""What matters on a GPU alone, as far as a CPU can tell: waiting for the device.

Precision is test_bf16.py's.
"""

import json

import pytest
from conftest import script

SMALL = {"batch_size": 2, "head_width": 8, "sample_every": 0, "checkpoint_every": 100}
RUNS = {
    "sdxl": ("adm", {"model": "tiny-sdxl", "damping": 0.1, "iterations": 2}),
    "sd3": (
        "adm",
        {
            "model": "tiny-sd3",
            "accumulate": 2,
            "student_steps": 2,  # of which each iteration trains one
            "fake_samples": "last",
            "ema": 0.5,
            "offload": True,
            "iterations": 3,
        },
    ),
    "adp": (
        "adp",
        {
            "model": "tiny-sdxl",
            "mse_iterations": 0,
            "pixel_backbone": "tiny-sam",
            "iterations": 2,
        },
    ),
}


@pytest.fixture(scope="module")
def crossings(tmp_path_factory, encoded, sdxl_pairs):
    """{run: what went to and from the device in its iterations, but for the first}.

    In that one, tables and moments are made.
    """
    folder = tmp_path_factory.mktemp("far")
    specs = []
    for name, (stage, changes) in RUNS.items():
        source = {"pairs": str(sdxl_pairs)}
        if stage == "adm":
            source = {"prompts": str(encoded[changes["model"]])}
        specs.append((stage, {**SMALL, **source, **changes, "out": str(folder / name)}))
    (folder / "runs.json").write_text(json.dumps(specs))
    done = script(folder, "tests/far_device.py", folder / "runs.json")
    assert done.returncode == 0, done.stderr
    found = {}
    for name, (_, changes) in RUNS.items():
        iterations = json.loads((folder / name / "crossings.json").read_text())
        assert len(iterations) == changes["iterations"]
        found[name] = iterations[1:]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_host_waits_once_an_iteration_for_its_log_row(name, crossings):
    for iteration in crossings[name]:
        assert len(iteration["waits"]) == 1, iteration["waits"]


@pytest.mark.parametrize("name, tensors", [("sdxl", 2), ("sd3", 2 * 2), ("adp", 4)])
def test_nothing_but_rows_goes_to_the_device(name, tensors, crossings):
    """In each micro-batch two tensors of conditioning; and of a pair its noise and its sample."""
    for iteration in crossings[name]:
        rows = [copy for copy in iteration["copies"] if not is_of_moments(copy)]
        assert len(rows) == tensors, rows


def is_of_moments(copy):
    """Whether a crossing is of --offload: each moment goes to the device and back."""
    return "fetch" in copy or "put_away" in copy


def test_moments_come_and_go_without_waiting(crossings):
    for name, iterations in crossings.items():
        for iteration in iterations:
            there = [copy for copy in iteration["copies"] if "fetch" in copy]
            back = [copy for copy in iteration["copies"] if "put_away" in copy]
            assert len(there) == len(back)
            assert bool(there) == ("offload" in RUNS[name][1])
