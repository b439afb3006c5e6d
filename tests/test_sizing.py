"""The plan of a run's memory, and the run that is refused before anything is loaded."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT, call, config, refused

import adm
import adp
import families
import sizing.plan
from runtime.settings import BadInput
from sizing import measure
from sizing.measure import typed
from sizing.plan import cheapest, enough_gpus, plan_of, remedies
from tools import plan

GB = 1e9


@pytest.fixture
def small_gpu(monkeypatch):
    """This process's device, as if it were a GPU of 24 GB."""
    monkeypatch.setattr(sizing.plan, "gpu_memory", lambda: 24 * GB)


def test_what_fits_is_not_refused(tmp_path, small_gpu):
    flags = ["--model", "tiny-sd3", "--iterations", 1, "--batch-size", 1, "--head-width", 8]
    call(adm.main, adm.Config, *flags, "--sample-every", 0, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "pipeline").is_dir()


def test_adp_is_planned_with_the_latents_of_its_pairs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sizing.plan, "gpu_memory", lambda: 1)
    model = "tiny-cogvideox-2b"
    shape = families.load_teacher(model).latent_shape(None, 17)
    (tmp_path / "pairs").mkdir()
    manifest = json.dumps({"kind": "pairs", "shape": shape})
    (tmp_path / "pairs" / "manifest.json").write_text(manifest)
    flags = ["--model", model, "--pairs", tmp_path / "pairs", "--out", tmp_path / "out"]
    line = refused(capsys, adp.main, adp.Config, *flags)
    cfg = config(adp.Config, *flags)
    peak, phase = plan_of(cfg, 1, shape).peak
    assert f"needs {peak / 1e9:.2f} GB" in line and f"(planned, {phase}; " in line
    assert "no flag makes it fit" in line
    assert not (tmp_path / "out").exists()


# Of a network that nobody has rehearsed: {phase: MB at each of the two depths}, of a first
# micro-batch and of a later one.
GROWS = {"forward": [[1000, 500], [3000, 900]], "backward, student": [[100, 2000], [100, 2400]]}


@pytest.fixture
def of_any_row(monkeypatch):
    monkeypatch.setattr(sizing.plan, "table", lambda: Always(GROWS))


class Always(dict):
    """It has every key, each with the same value."""

    def __init__(self, value):
        self.value = value

    def __contains__(self, key):
        return True

    def __getitem__(self, key):
        return self.value


def test_a_run_that_cannot_fit_is_refused_before_anything_is_fetched(
    capsys, tmp_path, small_gpu, of_any_row
):
    out = tmp_path / "out"
    words = ["--model", "sdxl", "--sample-every", 0]
    line = refused(capsys, adm.main, adm.Config, *words, "--out", out)
    peak, phase = plan_of(config(adm.Config, *words), 1).peak
    assert f"sdxl needs {peak / 1e9:.2f} GB of each of 1 GPU(s) with 24.00" in line
    assert f"(planned, {phase}; " in line and peak > 97 * GB
    assert "weights 25.78, gradients 20.64, moments 41.28, ema 10.27" in line
    flags = re.search("it fits with (.*)", line)[1].split()
    assert "--lora-rank" in flags
    assert plan_of(config(adm.Config, *words, *flags), 1).needed < 24 * GB
    assert not out.exists()


def test_the_number_of_gpus_that_is_advised_is_the_least(of_any_row):
    cfg = config(adm.Config, "--model", "sd3", "--lora-rank", 0, "--sample-every", 0)
    gpus = enough_gpus(cfg, 1, 30 * GB)
    assert plan_of(cfg, gpus).needed <= 30 * GB < plan_of(cfg, gpus // 2).needed
    assert enough_gpus(cfg, 1, 1 * GB) is None


def test_what_is_advised_can_be_typed(of_any_row):
    """Of one who gave --accumulate more of it; LoRA where no earlier run forbids it."""
    flags = ["--model", "sd3", "--lora-rank", 0, "--batch-size", 8, "--accumulate", 2]
    flags += ["--sample-every", 0]
    cfg = config(adm.Config, *flags)
    two = plan_of(cfg, 1).needed
    advice, smaller = cheapest(cfg, 1, two - 1 * GB)
    assert advice == "--accumulate 8 --offload" and smaller.needed <= two - 1 * GB
    assert plan_of(config(adm.Config, *flags, *advice.split()), 1).peak[0] < two
    offers = [settings for settings in remedies(cfg, 1) if "lora_rank" in settings]
    assert offers and all(settings["lr_fake"] == 1e-5 for settings in offers)
    after = replace(cfg, init="out/adp")
    assert not [settings for settings in remedies(after, 1) if "lora_rank" in settings]
    adp_offers = list(remedies(config(adp.Config, "--model", "sd3"), 1))
    assert adp_offers[-1]["pixel"] is False and typed({"pixel": False}) == "--no-pixel"


def test_numbers_of_gpus_that_do_not_divide_the_batch_are_not_advised():
    cfg = config(adm.Config, "--model", "tiny-sd3", "--batch-size", 8, "--accumulate", 4)
    assert enough_gpus(cfg, 1, 0) is None  # 2 would do it, 4 is no answer and no error


def test_groups_of_ranks_hold_what_so_many_ranks_alone_would(capsys):
    """Over all ranks a network takes less of each; what is gathered for a pass is the same."""
    flags = ["--model", "tiny-sd3", "--batch-size", 8, "--samples", 1]
    all_four, pairs = (config(adm.Config, *flags, *more) for more in ([], ["--shard-ranks", 2]))
    two, four, grouped = plan_of(all_four, 2), plan_of(all_four, 4), plan_of(pairs, 4)
    assert grouped.rows == two.rows and grouped.peak == two.peak > four.peak
    assert (grouped.each, grouped.accumulate) == (1, 2)
    copied = plan_of(replace(pairs, shard_ranks=1), 4)  # FSDP gathers all the same
    assert copied.rows == plan_of(all_four, 1).rows
    assert next(remedies(pairs, 4)) == {"shard_ranks": 4}
    assert "shard_ranks" not in next(remedies(all_four, 4))
    words = ["--model", "tiny-sd3", "--world-size", 4, "--shard-ranks", 3]
    said = refused(capsys, plan.show, plan.AdmConfig, *words)
    assert "--shard-ranks 3: does not divide the number of ranks, 4" in said


def test_latents_of_another_model_are_refused():
    cfg = config(adp.Config, "--model", "sdxl")
    with pytest.raises(BadInput, match="are not sdxl's"):
        plan_of(cfg, 1, (1, 8, 8))


def test_tiny_models_are_planned_with_the_encoder_that_they_use():
    tiny = plan_of(config(adp.Config), 1)
    assert tiny.rows["VAE, encoder"]["parameters"] < 1e6 and tiny.peak[0] < 1 * GB


def test_the_phases_are_sums_of_what_is_there(of_any_row):
    """By hand: 24 blocks, along the line from 4 and 8; with micro-batches above all gradients."""
    flags = ["--model", "sd3", "--lora-rank", 0, "--batch-size", 16, "--samples", 4]
    flags += ["--sample-every", 0]
    one, two = (plan_of(config(adm.Config, *flags, "--accumulate", n), 1) for n in (1, 2))
    held = sum(one.total[name] for name in ("weights", "moments", "ema"))
    gradients = one.total["gradients"]
    assert one.phases["updates"] == two.phases["updates"] == held + gradients
    assert one.phases["forward"] == held + (1000 + 5 * 2000) * 1e6
    assert two.phases["forward"] == held + gradients + (500 + 5 * 400) * 1e6
    assert one.peak == (one.phases["updates"], "updates")
    assert two.peak[1] == "backward, student"
    assert two.needed == pytest.approx(two.peak[0] * 1.05 + 1.5e9)
    less = plan_of(replace(config(adm.Config, *flags), offload=True), 1)
    moments = [row["moments"] for row in less.rows.values() if "moments" in row]
    assert less.phases["updates"] == held - sum(moments) + gradients + max(moments)
    # Of eight ranks gradients were there in the rehearsal as they come; four have twice as much.
    four, eight, more = (plan_of(config(adm.Config, *flags), n) for n in (4, 8, 16))
    twice = four.total["gradients"] - eight.total["gradients"]
    for some, beside in ((four, twice), (eight, 0), (more, 0)):
        always = sum(some.total[name] for name in ("weights", "moments", "ema"))
        assert some.phases["forward"] == always + beside + 11000 * 1e6


def test_passes_that_nobody_has_rehearsed_are_left_out_or_measured():
    cfg = config(adm.Config, "--model", "sd3", "--head-width", 24, "--sample-every", 0)
    asked = []
    without = plan_of(cfg, 8)
    assert not without.measured and set(without.phases) == {"updates"}
    plan = plan_of(cfg, 8, measure=lambda row: asked.append(row) or GROWS)
    (row,) = asked
    assert plan.measured and set(plan.phases) == {"updates", *GROWS}
    assert row.stage == "adm" and row.which == "--model sd3" and row.world == 8
    assert "--head-width 24" in row.how and row.how.endswith("--samples 1")
    tiny = plan_of(config(adm.Config, "--model", "tiny-sd3"), 1, measure=asked.append)
    assert not tiny.measured and len(asked) == 1  # the rehearsal knows the hub's


def test_a_rehearsal_is_of_the_depth_and_the_size_that_are_asked(tmp_path):
    """Of each kind of block as many, in proportion; ADP reads pairs of its own depth."""
    assert measure.with_blocks({"num_layers": 19, "num_single_layers": 38}, 4) == {
        "num_layers": 4,
        "num_single_layers": 8,
    }
    unet = measure.with_blocks({"transformer_layers_per_block": (1, 2, 10)}, 3)
    assert unet == {"transformer_layers_per_block": (1, 2, 3)}
    family = families.load_teacher("cogvideox-2b", random_init=True)
    assert measure.hub_name(family) == "cogvideox-2b"
    assert measure.hub_name(families.load_teacher("tiny-sdxl")) is None
    size = measure.size_of(family, (5, 16, 30, 40))
    assert size == {"resolution": "240x320", "frames": 17}
    assert family.latent_shape(**size) == (5, 16, 30, 40)
    row = measure.Row("adp", "--model sd3", "--samples 2", 8)
    pairs, own = measure.specs_of(row, 4, tmp_path / "0")
    assert pairs["blocks"] == own["blocks"] == 4 and own["world"] == 8
    made_at = pairs["words"][pairs["words"].index("--out") + 1]
    assert own["words"][own["words"].index("--pairs") + 1] == made_at
    assert own["words"][-2:] == ["--batch-size", "32"]


@pytest.mark.parametrize(
    "ends, said",
    [
        ("sys.exit('no memory')", r"the rehearsal: exit code 1 \(no memory\)"),
        ("os.kill(os.getpid(), 9)", r"the rehearsal: exit code -9 \(it said nothing\)"),
        (
            """print('{"name": "adm x", "error": "Traceback\\\\nit broke"}', flush=True)""",
            r"the rehearsal of adm x: it broke",
        ),
    ],
)
def test_a_rehearsal_that_fails_is_told_of_in_one_line(ends, said, tmp_path, monkeypatch):
    (tmp_path / "rehearse.py").write_text(f"import os, sys\n{ends}\n")
    shim = SimpleNamespace(other_torch=lambda: None, compiler=lambda: "c++", build=lambda at: at)
    monkeypatch.setitem(sys.modules, "shim", shim)
    monkeypatch.setattr(measure, "HARNESS", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(BadInput, match=f"^{said}$"):
        list(measure.measured([measure.Row("pairs", "--model sd3", "")]))


def test_what_no_gpu_is_like_is_refused(capsys):
    shown = {plan.show_pairs: plan.PairsConfig, plan.show_encoding: plan.EncodeConfig}
    for show, kind in shown.items():
        said = refused(capsys, show, kind, "--model", "sd3", "--gpu-gb", 0)
        assert "--gpu-gb 0.0: a positive number" in said
    said = refused(capsys, plan.show, plan.AdmConfig, "--gpu-gb", "inf")
    assert "--gpu-gb inf: a positive number" in said
    said = refused(capsys, plan.record, plan.RecordConfig, "--stages", "pairs", "--check")
    assert "--check: the table has no training of these models" in said
    said = refused(capsys, plan.record, plan.RecordConfig, "--stages", "adm,nosuch")
    assert "--stages nosuch: one of adm, adp, pairs, encode, decode" in said


@pytest.mark.parametrize("off, ends_with", [(0.019, None), (0.021, 1)])
def test_a_comparison_that_is_off_by_more_than_two_percent_fails(
    off, ends_with, capsys, monkeypatch
):
    """By hand: GROWS at sd3's 24 blocks, as in the test of sums, and a rehearsal of all of them."""
    most = 1000 + 5 * 2000
    row = next(row for row in plan.usual(["sd3"]) if row.stage == "adm")
    whole = {"forward": [[round(most / (1 + off))]]}
    monkeypatch.setattr(plan, "table", lambda: {str(row): GROWS})
    monkeypatch.setattr(plan, "measured", lambda rows, blocks: [(rows[0], whole)])
    words = ["--models", "sd3", "--check"]
    if ends_with is None:
        call(plan.record, plan.RecordConfig, *words)
    else:
        with pytest.raises(SystemExit) as e:
            call(plan.record, plan.RecordConfig, *words)
        assert e.value.code == ends_with
    said = capsys.readouterr()
    assert f"off by {off:+.2%}" in said.out
    assert ("1 of 1 off by more than 2%" in said.err) == bool(ends_with)


def test_dmd_step_and_regression_have_no_adversary():
    for loss in ("dmd", "step"):
        alone = plan_of(config(adm.Config, "--model", "tiny-sd3", "--loss", loss), 1)
        assert "gradients" not in alone.rows["heads"]
    mse = plan_of(config(adp.Config, "--model", "tiny-sd3", "--loss", "mse"), 1)
    assert "VAE, encoder" not in mse.rows


def test_the_tool_knows_recipes_and_both_stages(capsys):
    words = ["--no-measure", "--sample-every", 0, "--world-size"]
    call(plan.show, plan.AdmConfig, "--model", "sd3", *words, 8)
    shown = capsys.readouterr().out
    assert "1 a GPU x 8 GPUs x 4 micro-batches" in shown and "student             37.6M" in shown
    call(plan.show, plan.AdpConfig, "--model", "sd3", *words, 1, "--gpu-gb", 5)
    shown = capsys.readouterr().out
    assert "VAE, encoder" in shown and "features of the pixel discriminator" in shown
    assert re.search("of 5: it does not fit; no flag makes it fit", shown)
    assert "at least 1" in refused(capsys, plan.show, plan.AdmConfig, "--world-size", 0)
    assert "a multiple of 8" in refused(capsys, plan.show, plan.AdpConfig, "--head-width", 3)


def test_fit_finds_what_costs_least_and_says_where_nothing_does(capsys, of_any_row):
    words = ["--model", "sd3", "--lora-rank", 0, "--world-size", 8, "--sample-every", 0, "--fit"]
    call(plan.show, plan.AdmConfig, *words, "--gpu-gb", 80)
    assert "fits with: --no-gradient-checkpointing\n" in capsys.readouterr().out
    cfg = config(adm.Config, *words[:4], "--sample-every", 0)
    offloaded = plan_of(replace(cfg, offload=True), 8).needed / GB
    call(plan.show, plan.AdmConfig, *words, "--gpu-gb", offloaded + 0.1)
    shown = capsys.readouterr().out
    assert "fits with: --offload\n" in shown and "it fits" in shown.splitlines()[-1]
    said = refused(capsys, plan.show, plan.AdmConfig, *words, "--gpu-gb", 2)
    assert "no flags make it fit 2 GB" in said


def test_fit_shards_within_nodes_first_and_over_all_only_where_that_does_not_fit(of_any_row):
    words = ["--model", "sd3", "--lora-rank", 0, "--sample-every", 0]
    cfg = config(adm.Config, *words)
    free = {"gradient_checkpointing": False}
    within = plan_of(replace(cfg, **free, shard_ranks=8), 16).needed
    for own in (None, 16):
        cfg = replace(cfg, shard_ranks=own)
        assert sizing.plan.fitting(cfg, 16, within) == {**free, "shard_ranks": 8}
        assert sizing.plan.fitting(cfg, 16, within - 1) == free
    assert sizing.plan.fitting(replace(cfg, shard_ranks=4), 16, 80 * GB) == free  # as it was
    assert sizing.plan.fitting(replace(cfg, shard_ranks=None), 8, 80 * GB) == free


def test_what_nobody_has_rehearsed_neither_fits_nor_does_not(capsys):
    """Where the states alone fit, passes decide: the command that rehearses them is named."""
    words = ["--model", "sd3", "--lora-rank", 0, "--resolution", 512, "--sample-every", 0]
    words += ["--world-size", 1]
    call(plan.show, plan.AdmConfig, *words, "--no-measure")
    known = "nothing that has been rehearsed fits"
    command = "`python tools/plan.py adm --fit --world-size 1 --gpu-gb 80` with this run's flags"
    shown = capsys.readouterr().out
    assert f"needed 83.60 of 80: it does not fit; {known}: {command}" in shown
    said = refused(capsys, plan.show, plan.AdmConfig, *words, "--no-measure", "--fit")
    assert said == f"tools.plan.py: {known}: {command} rehearses the others"
    tiny = ["--model", "tiny-sd3", "--world-size", 1]
    said = refused(capsys, plan.show, plan.AdmConfig, *tiny, "--fit")
    assert "passes of tiny-sd3 cannot be: a rehearsal knows the hub's models alone" in said
    call(plan.show, plan.AdmConfig, *tiny)
    call(plan.show_encoding, plan.EncodeConfig, *tiny[:2])
    for line in capsys.readouterr().out.splitlines():
        assert "peak " not in line or line.endswith("what its passes need, nobody has rehearsed")
    # Of an ADP's pairs the size is theirs.
    of_pairs = sizing.plan.unrehearsed(config(adp.Config, *words[:2]), "--fit", (16, 32, 32))
    assert "`python tools/plan.py adp --fit --resolution 256x256`" in str(of_pairs)
    with pytest.raises(sizing.plan.Unrehearsed, match="adm --world-size 4`"):
        enough_gpus(config(adm.Config, *words[:8]), 1, 40 * GB)


def test_more_gpus_that_are_known_to_do_are_named_where_flags_are_not_known(monkeypatch):
    def unknown(*args):
        raise sizing.plan.Unrehearsed("who knows")

    monkeypatch.setattr(sizing.plan, "cheapest", unknown)
    monkeypatch.setattr(sizing.plan, "enough_gpus", lambda *args: 8)
    assert sizing.plan.advice(None, 1, 1) == "who knows; on 8 GPUs it fits"
    monkeypatch.setattr(sizing.plan, "enough_gpus", unknown)
    assert sizing.plan.advice(None, 1, 1) == "who knows"
    monkeypatch.setattr(sizing.plan, "cheapest", lambda *args: (None, None))
    assert sizing.plan.advice(None, 1, 1) == "who knows"


def test_pairs_and_encoding_are_planned(capsys):
    call(plan.show_pairs, plan.PairsConfig, "--model", "sd3", "--no-measure")
    shown = capsys.readouterr().out
    assert "pairs of 16x128x128 latents, 8 at a time" in shown and "forward of teacher" in shown
    peak = re.search(r"^peak +(\S+), forward of teacher", shown, re.M)[1]
    assert 4.1 < float(peak) < 5  # two bytes a parameter, and the passes
    call(plan.show_encoding, plan.EncodeConfig, "--model", "sdxl", "--no-measure")
    assert "encoder 2" in capsys.readouterr().out


def test_the_readmes_figures_are_what_the_tool_prints(capsys):
    """The whole output in sizing/README.md."""
    call(plan.show, plan.AdmConfig, "--model", "sd3", "--world-size", 1, "--no-measure")
    assert capsys.readouterr().out in (ROOT / "sizing" / "README.md").read_text()


ROW = re.compile(r"^\| `(\S+)` \| [^|]*\| ([\d.]+) GB \| ([^|]*) \|", re.M)
ROWS = ROW.findall((ROOT / "README.md").read_text())


def test_the_readme_has_a_row_of_every_model():
    assert [model for model, _, _ in ROWS] == list(families.HUB)


@pytest.mark.parametrize("model, checkpoint, peaks", ROWS)
def test_the_readmes_peaks_are_the_plans(model, checkpoint, peaks):
    """As "14.45; 11.60 with `--lora-rank 64`": on each of 8 GPUs, and on one."""
    for world, said in zip((8, 1), peaks.split("; "), strict=True):
        size, *flags = said.replace("`", "").replace("with ", "").split()
        if said == "too much":  # whatever is done
            small = config(adm.Config, "--model", model, "--lora-rank", 64, "--offload")
            assert plan.plan_of(small, world).needed > 80e9
            continue
        found = plan.plan_of(config(adm.Config, "--model", model, *flags), world)
        assert f"{found.peak[0] / 1e9:.2f}" == size
        assert found.needed < 80e9
    usual = plan.plan_of(config(adm.Config, "--model", model), 8)
    assert plan.checkpoint_bytes(usual) / 1e9 == pytest.approx(float(checkpoint), rel=0.01)
