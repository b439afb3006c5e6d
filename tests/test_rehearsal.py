"""The scripts at full width on a GPU that is not there: errors, waiting, precision, memory.

Every tensor is a fake one on a fake cuda:0 (tests/fake_cuda), whose shapes, types, devices and
storages are true. What kernels compute, how long they take, NCCL and streams are not rehearsed.

Here networks have few layers. With REHEARSAL=full (`make rehearse`) they have all of theirs.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from conftest import config as config_of
from fake_cuda import shim
from safetensors import safe_open

import adm
import adp
from families import full, load_teacher
from sizing import measure, plan

FULL = os.environ.get("REHEARSAL") == "full"
PEAKS = ROOT / "tests" / "fake_cuda" / "peaks.json"

# {name: (words of the command line, ranks)}. Nothing here depends on a model's recipe.
ALWAYS = "--paper --iterations 2 --samples 1 --sample-every 0"
PAIRS = "--random-init --count 2 --steps 2 --batch-size 2"
ONE = "--batch-size 1 --lora-rank 0 --no-gradient-checkpointing"
LORA = "--batch-size 1 --lora-rank 64 --gradient-checkpointing"
SHARDED = "--batch-size 8 --lora-rank 0 --gradient-checkpointing"
OFFLOAD = "--batch-size 2 --lora-rank 0 --no-gradient-checkpointing --accumulate 2 --offload"
HOW = {
    "full": (f"{ONE} --sample-every 2", 1),
    "LoRA": (LORA, 1),
    "8 ranks": (SHARDED, 8),
    "offload": (f"{OFFLOAD} --ema 0.9", 1),
    "LoRA, 8 ranks": (f"{LORA} --batch-size 8", 8),
    "8 ranks by 4": (f"{SHARDED} --sample-every 2 --shard-ranks 4", 8),
    "8 ranks, live": (f"{SHARDED} --sample-every 2 --embed live", 8),
    "after adp.py": (ONE, 1),
    "LoRA after adp.py": (LORA, 1),
    "8 ranks after adp.py": (SHARDED, 8),
    "full, resumed": (f"{ONE} --iterations 3 --resume", 1),
    "8 ranks, resumed": (f"{SHARDED} --iterations 3 --resume", 8),
    "offload, resumed": (f"{OFFLOAD} --ema 0.9 --iterations 3 --resume", 1),
    # By the seed iteration 2 trains the first of two steps.
    "full, damped": (f"{ONE} --damping 0.1 --fake-samples last --seed 2", 1),
}
USUAL = ("full", "LoRA", "8 ranks", "offload")
FROM_ADP = {"after adp.py": "full", "LoRA after adp.py": "LoRA", "8 ranks after adp.py": "8 ranks"}


def runs():
    """(model, script, how) of each run, in an order in which one finds what it reads."""
    later = ["wan-1.3b", "flux-dev"]
    for model in ["sdxl", "sd3", "cogvideox-5b"] + later * FULL:
        yield from ((model, script, how) for how in USUAL for script in ("adm", "adp"))
    yield from (("sd3", "adm", how) for how in HOW if how not in USUAL)
    for model in ("sd3.5-large", "cogvideox-2b"):  # what they have that the others have not
        yield model, "adm", "8 ranks" if FULL else "full"
    if FULL:
        yield "wan-14b", "adm", "8 ranks"
        yield from (("wan-2.2-5b", script, "8 ranks") for script in ("adm", "adp"))
    else:
        yield "wan-1.3b", "adp", "full"
        yield "flux-dev", "adm", "full"


RUNS = list(runs())
NAMES = [" ".join(run) for run in RUNS]
PICTURED = [" ".join(run) for run in RUNS if "--sample-every" in HOW[run[2]][0]]
# {name: (settings, GPUs, blocks)} of runs with another depth than the plan's table was measured at.
PLANNED = {
    "sd3 adm LoRA, 6 blocks": ({"lora_rank": 64}, 1, 6),
    "sd3 adp LoRA, 6 blocks": ({"lora_rank": 64}, 1, 6),
}
if FULL:
    PLANNED["sd3 adm 8 ranks, 6 blocks"] = ({"lora_rank": 0}, 8, 6)
ENCODED = ["sdxl encode", "sd3 encode", "cogvideox-2b encode"]


def read_by(model, script, how):
    """The names of runs that this one goes on from, or is compared with."""
    if "resumed" in how:
        yield f"{model} {script} {how.removesuffix(', resumed')}"
    if how in FROM_ADP:
        yield f"{model} adp {FROM_ADP[how]}"
    if "by 4" in how:  # compared with
        yield f"{model} {script} {how.removesuffix(' by 4')}"


def specs(folder, wanted):
    """What rehearse.py is to run for the runs of these names, and first what they read."""
    (folder / "prompts.txt").write_text("a red fox\ntwo dogs on a hill\n" * 16)
    prompts = ["--prompts", str(folder / "prompts.txt")]
    all_runs = dict(zip(NAMES, RUNS, strict=True))
    training = wanted - {*ENCODED, *PLANNED}
    wanted = wanted | {other for name in training for other in read_by(*all_runs[name])}
    chosen = [(name, run) for name, run in all_runs.items() if name in wanted]
    encoded = [name.split()[0] for name in ENCODED if name in wanted]
    live = [model for _, (model, _, how) in chosen if "live" in how]
    done = []
    for model in dict.fromkeys(encoded + live):
        words = [model, str(folder / f"{model} whole")]
        done.append({"name": f"{model} folder", "script": "folder", "words": words})
    for model in encoded:
        words = ["--model", str(folder / f"{model} whole"), *prompts]
        words += ["--out", str(folder / f"{model} encode")]
        done.append({"name": f"{model} encode", "script": "encode", "words": words})
    for model in dict.fromkeys(model for _, (model, script, _) in chosen if script == "adp"):
        words = ["--model", model, *PAIRS.split(), *prompts, "--out", str(folder / model)]
        done.append({"name": f"{model} pairs", "script": "pairs", "words": words})
    for name, (model, script, how) in chosen:
        flags, world = HOW[how]
        which = ["--model", model, "--random-init"]
        if "live" in how:
            which = ["--model", str(folder / f"{model} whole")]
        words = [*which, *ALWAYS.split(), *flags.split()]
        words += ["--out", str(folder / name.removesuffix(", resumed"))]
        if script == "adm":
            words += ["--student-steps", "2" if how.startswith("full") else "1", *prompts]
        else:
            words += ["--pairs", str(folder / model), "--mse-iterations", "0"]
        if how in FROM_ADP:
            words += ["--init", str(folder / f"{model} adp {FROM_ADP[how]}")]
        done.append({"name": name, "script": script, "words": words, "world": world})
    for name in sorted(wanted & {*PLANNED}):  # last: from here on networks have so many blocks
        _, row, blocks = planned(name)
        its = measure.specs_of(row, blocks, folder / f"planned-{len(done)}")  # without a space
        done += [{**spec, "name": name} for spec in its]
    return done


def planned(name):
    """(the settings, the row of the plan's table, how many blocks) of one of PLANNED."""
    settings, world, blocks = PLANNED[name]
    stage = adm if " adm " in name else adp
    cfg = stage.Config(model="sd3", **settings, gradient_checkpointing=True, sample_every=0)
    cfg = replace(cfg, batch_size=2 * world, samples=1)  # two micro-batches
    return cfg, measure.training_row(cfg, "--model sd3", 1, world), blocks


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, pytestconfig, request):
    """{name of a run: what was noted}, of those that a chosen test asks for (-k)."""
    here = [item for item in request.session.items if item.path == request.path]
    cases = [getattr(item, "callspec", None) for item in here]
    wanted = {case.params["name"] for case in cases if case and "name" in case.params}
    folder = tmp_path_factory.mktemp("rehearsal")
    problem = shim.other_torch()
    if problem:
        pytest.fail(problem, pytrace=False)
    if not shim.compiler():
        pytest.skip("fake CUDA needs a C++ compiler: install g++")
    cached = hasattr(pytestconfig, "cache")  # not so with -p no:cacheprovider
    library = shim.build(pytestconfig.cache.mkdir("fake_cuda") if cached else folder)
    (folder / "runs.json").write_text(json.dumps(specs(folder, wanted)))
    command = [sys.executable, str(ROOT / "tests" / "fake_cuda" / "rehearse.py"), str(library)]
    command += [str(folder / "runs.json")] + ["--shallow"] * (not FULL)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    noted = [json.loads(line) for line in done.stdout.splitlines()]
    seen = ROOT / "out" / "rehearsal.json" if FULL else folder / "noted.json"
    seen.parent.mkdir(exist_ok=True)
    seen.write_text(json.dumps(noted, indent=1) + "\n")
    return {"folder": folder, **{one["name"]: one for one in noted}}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def run(name, rehearsed):
    if rehearsed[name]["error"]:
        pytest.skip("it did not run to its end")
    return rehearsed[name]


def test_it_runs_to_its_end(name, rehearsed):
    """No device or type error: iterations, checkpoint and export."""
    assert not rehearsed[name]["error"], rehearsed[name]["error"]
    assert len(rehearsed[name]["iterations"]) == (1 if "resumed" in name else 2)


def test_pairs_are_collected(rehearsed):
    made = {name: one["error"] for name, one in rehearsed.items() if name.endswith("pairs")}
    assert not any(made.values()), made


@pytest.mark.parametrize("name", ENCODED)
def test_prompts_are_encoded_by_real_text_encoders(name, rehearsed):
    """CLIP-L, CLIP-bigG and T5-XXL as the model has them, in bf16."""
    noted = rehearsed[name]
    assert not noted["error"], noted["error"]
    model = name.split()[0]
    kinds = {"sdxl": 2, "sd3": 3, "cogvideox-2b": 1}
    assert len(noted["encoders"]) == kinds[model]
    assert all(kind.endswith(": bfloat16 on cuda:0") for kind in noted["encoders"])
    shapes = load_teacher(model, random_init=True).cond_shapes()
    with safe_open(rehearsed["folder"] / name / "000000.safetensors", "pt") as f:
        slices = {n: f.get_slice(n) for n in f.keys()}  # noqa: SIM118  it is no dictionary
        stored = {n: (x.get_dtype(), x.get_shape()) for n, x in slices.items()}
    assert stored == {n: ("BF16", [32, *shape]) for n, shape in shapes.items()}
    is_as_recorded(name, noted["end"]["peak"])


# --- Waiting ------------------------------------------------------------------------------------


def waits_by_place(iteration):
    """{file and function that waited: times}"""
    places = {}
    for what, times in iteration["waits"].items():
        innermost = what.split(" < ")[0]
        place = innermost.rpartition(":")[0].split()[-1] + " " + innermost.split()[-1]
        places[place] = places.get(place, 0) + times
    return places


def test_the_host_waits_once_an_iteration_for_its_log_row(name, run):
    how = RUNS[NAMES.index(name)][2]
    steady = waits_by_place(run["iterations"][-1])  # in the first, tables and moments are made
    if "resumed" in how:
        pytest.skip("it has no second iteration")
    expected = {"folder.py record": 1}
    if "live" in how:  # the stock pipeline sends each encoder its tokens
        expected["pipeline_stable_diffusion_3.py _get_clip_prompt_embeds"] = 2
        expected["pipeline_stable_diffusion_3.py _get_t5_prompt_embeds"] = 1
    assert steady == expected, run["iterations"][-1]["waits"]


def test_nothing_crosses_without_waiting_but_rows_and_the_moments_of_offload(name, run):
    """In each micro-batch a row's conditioning, and of a pair its noise and its sample.

    With --offload each moment comes and goes as often.
    """
    model, script, how = RUNS[NAMES.index(name)]
    if "resumed" in how:
        pytest.skip("it has no second iteration")
    rows, there, back = 0, 0, 0
    for what, times in run["iterations"][-1]["copies"].items():
        if "rows.py" in what:
            rows += times
        elif "to the device" in what and what.endswith(" in_parts"):
            there += times
        else:
            assert "to the host" in what and what.endswith(" put_away"), what
            back += times
    conditioning = len(load_teacher(model, random_init=True).cond_shapes())
    micro_batches = 2 if "offload" in how else 1
    if "live" in how:  # it is encoded there
        conditioning = 0
    assert rows == micro_batches * (conditioning + 2 * (script == "adp"))
    assert there == back and bool(there) == ("offload" in how)


# --- Precision ----------------------------------------------------------------------------------


def test_what_is_trained_is_float32_and_so_is_its_gradient(name, run):
    script = RUNS[NAMES.index(name)][1]
    networks = ["fake", "heads", "student"] if script == "adm" else ["heads", "student"]
    expected = [f"{network}: float32 on cuda:0" for network in networks]
    assert run["parameters"] == expected
    assert run["gradients"] == expected


def test_gradients_are_averaged_over_the_ranks_in_float32(name, run):
    averaged = [kind for kind in run["reduced"] if kind.startswith("backward")]
    expected = ["backward: reduce-scatter torch.float32"] * ("8 ranks" in name)
    if "by 4" in name:  # then over the groups
        expected = ["backward: all-reduce torch.float32", *expected]
    assert averaged == expected


def test_no_buffer_is_in_half_precision(name, run):
    seen = {buffer.split(": ")[0] for buffer in run["buffers"]}
    if name.startswith("sd3"):  # its positions; of a UNet there is none
        assert {"teacher", "student"} <= seen
    if " adp " in name:  # ImageNet's mean, for D's encoder
        assert "heads" in seen
    for buffer in run["buffers"]:
        assert buffer.split(": ")[1] in ("float32 on cuda:0", "int64 on cuda:0"), buffer


def test_no_time_is_in_half_precision(run):
    assert len(run["times"]) >= 2  # of the roles, and of the embeddings in them
    for t in run["times"]:
        assert t.split(": ")[1] in ("float32 on cuda:0", "int64 on cuda:0"), t


def test_conditioning_is_in_float32(run):
    assert run["conditions"]
    for kind in run["conditions"]:
        assert kind.endswith(": float32 on cuda:0"), kind


# --- Memory -------------------------------------------------------------------------------------


def test_between_iterations_there_is_what_must_be_and_no_more(name, run):
    """Weights, buffers, AdamW's moments and the average; VAE and encoders where they stay."""
    held = run["held"]
    trained = sum(held.get(network, 0) for network in ("student", "fake", "heads"))
    expected = sum(held.values())
    if "offload" in name:
        expected += held["student"]  # the average
    else:
        expected += 2 * trained
    left = [iteration["left"] for iteration in run["iterations"]]
    assert left[-1] <= left[0] * 1.001
    # The rest is conditioning and latents: of no prompt, of the last batch, for pictures. Wan's
    # take 8.4 MB each, CogVideoX's half of that.
    rest = 6e7 if "wan" in name else 3e7
    assert expected <= left[-1] <= expected * 1.01 + rest


def test_less_is_in_memory_where_a_flag_says_so(name, run, rehearsed):
    model, script, how = RUNS[NAMES.index(name)]
    full = rehearsed.get(f"{model} {script} full")
    if not set(how.split(", ")) & {"LoRA", "8 ranks", "offload"} or not full or full["error"]:
        pytest.skip("nothing to compare with")
    assert run["iterations"][-1]["peak"] < full["iterations"][-1]["peak"]


@pytest.mark.parametrize("name", ["sd3 adm 8 ranks by 4"])
def test_a_group_of_ranks_holds_its_networks_in_parts(name, run, rehearsed):
    """Four hold together what otherwise eight do."""
    of_eight = rehearsed[name.removesuffix(" by 4")]
    for network in ("teacher", "student", "fake", "heads"):
        assert run["held"][network] == pytest.approx(2 * of_eight["held"][network], rel=0.01)


@pytest.mark.parametrize("name", ["sd3 adm 8 ranks, live"])
def test_text_encoders_that_stay_are_in_parts(name, run):
    assert run["encoders"]
    assert all(": its part, bfloat16 on" in kind for kind in run["encoders"]), run["encoders"]


@pytest.mark.parametrize("name", PICTURED)
def test_a_picture_leaves_nothing_behind(name, run):
    """The VAE that decodes it goes again."""
    assert run["pictured"] <= run["iterations"][-1]["left"] * 1.01  # and the batch's latents
    is_as_recorded(f"{name}, picture", run["end"]["peaks"]["VAE"])


RENEWS = (
    "if that is meant, record it anew, REHEARSAL_RECORD=1, and what the plan has of such a model, "
    "python tools/plan.py record --models MODEL --again"
)


def is_as_recorded(name, peak):
    """Within 3%."""
    depth = "full depth" if FULL else "shallow"
    recorded = json.loads(PEAKS.read_text()) if PEAKS.exists() else {}
    peak = round(peak / 1e9, 3)
    if os.environ.get("REHEARSAL_RECORD"):
        recorded.setdefault(depth, {})[name] = peak
        PEAKS.write_text(json.dumps(recorded, indent=1) + "\n")
    if name not in recorded.get(depth, {}):
        pytest.skip("there is no figure yet")
    assert peak == pytest.approx(recorded[depth][name], rel=0.03), RENEWS


def test_the_peak_is_as_recorded(name, run):
    is_as_recorded(name, run["iterations"][-1]["peak"])


@pytest.mark.parametrize("name", PLANNED)
def test_each_phase_is_within_three_percent_of_the_plan(name, rehearsed, monkeypatch):
    """Of a depth that the table's line is drawn through; moments come after the first iteration."""
    noted = rehearsed[name]
    assert not noted["error"], noted["error"]
    cfg, row, blocks = planned(name)
    kind, config = full.DENOISERS["sd3"]
    monkeypatch.setitem(full.DENOISERS, "sd3", (kind, measure.with_blocks(config, blocks)))
    for made in (full.skeleton, plan.opened, plan.built):
        made.cache_clear()
    found = plan.plan_of(cfg, PLANNED[name][1])
    for made in (full.skeleton, plan.opened, plan.built):
        made.cache_clear()
    if not found.measured:
        pytest.skip("the table has no such settings yet")
    moments = 2 * sum(noted["held"].get(network, 0) for network in ("student", "fake", "heads"))
    peaks = noted["rounds"][1][1]
    compared = set(found.phases) & set(peaks)
    last = "backward of the fake score, fake" if " adm " in name else "backward of the heads, heads"
    assert {"forward of student", "backward of the generator, student", last} <= compared
    for phase in compared:
        assert found.phases[phase] == pytest.approx(peaks[phase] + moments, rel=0.03), phase
    passes = [size for phase, size in found.phases.items() if phase != "updates"]
    assert max(passes) == pytest.approx(max(peaks[p] for p in compared) + moments, rel=0.03)


@pytest.mark.skipif(not FULL, reason="the plan is of all blocks: make rehearse")
def test_the_peak_is_within_three_percent_of_the_plan(name, run):
    """Of settings that the plan's table has."""
    model, script, how = RUNS[NAMES.index(name)]
    flags, world = HOW[how]
    words = f"--model {model} {ALWAYS} {flags} --sample-every 0".split()
    stage = adm.Config if script == "adm" else adp.Config
    found = plan.plan_of(config_of(stage, *words), world)
    if not found.measured:
        pytest.skip("the table has no such settings")
    assert run["iterations"][-1]["peak"] == pytest.approx(found.peak[0], rel=0.03)
