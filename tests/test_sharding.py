"""Two ranks, each with half of every network, are one: losses, checkpoints, export, resuming.

The runs of two ranks all happen in one torchrun (tests/two_ranks.py), those of one rank in this
process. So are four, in two groups that have a copy each. Then random weights at full size,
offload, accumulation.
"""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, ended, refused, same_log, saved, shell, start, tree
from diffusers import DiffusionPipeline
from PIL import Image
from test_reference import check_adm, check_adp
from torch.testing import assert_close

import adm
import adp
import data
import families
import families.base
import families.export
import models
from families import full
from runtime.optimize import OffloadedAdamW, make_optimizers, step
from runtime.ranks import Ranks
from runtime.rows import Rows
from runtime.settings import BadInput
from sizing import count

STAGES = {"adm": adm, "adp": adp}
CHECKS = {"adm": check_adm, "adp": check_adp}
SMALL = {
    "iterations": 2,
    "batch_size": 4,
    "head_width": 32,
    "sample_every": 0,
    "checkpoint_every": 1,
}
# adp is first: SAM loads before there are ranks.
RUNS = {
    "adp": (
        "adp",
        {
            "model": "tiny-sd3",
            "pixel_backbone": "tiny-sam",
            "mse_iterations": 1,
            "sample_every": 1,
            "ema": 0.75,
        },
    ),
    "sdxl": (
        "adm",
        {
            "model": "tiny-sdxl",
            "student_steps": 2,
            "seed": 9,  # of which iteration 1 trains the first and iteration 2 the last
            "damping": 0.1,
            "fake_samples": "last",
            "fake_gradient": "straight-through",
            "dt": 0.25,
        },
    ),
    "ema": (
        "adm",
        {
            "model": "tiny-cogvideox-5b",
            "ema": 0.75,
            "offload": True,
            "gradient_checkpointing": True,
            "dt": 0.25,
        },
    ),
    "lora": (
        "adm",
        {
            "model": "tiny-sd3",
            "lora_rank": 2,
            "gradient_checkpointing": True,
            "accumulate": 2,
            "lr_student": 1e-4,
            "lr_fake": 1e-4,
            "sample_every": 2,
        },
    ),
    "dmd": (
        "adm",
        {"model": "tiny-sd3", "loss": "dmd", "ttur": 2, "lr_student": 1e-3, "lr_fake": 1e-3},
    ),
    "step": (
        "adm",
        {
            "model": "tiny-sd3",
            "loss": "step",
            "gen_weight": "dmd",
            "dt": 0.25,
            "lr_student": 1e-3,
            "lr_fake": 1e-3,
        },
    ),
    # From adp's student.
    "after adp": ("adm", {"model": "tiny-sd3", "loss": "dmd", "lr_student": 1e-3, "lr_fake": 1e-3}),
    "wan": ("adm", {"model": "tiny-wan", "gradient_checkpointing": True, "dt": 0.25}),
    "flux": (  # at its default guidance teacher and fake score would be the same but for rounding
        "adm",
        {"model": "tiny-flux", "gradient_checkpointing": True, "dt": 0.25, "guidance": 2.0},
    ),
    # Of one rank the embeddings are cached.
    "live": ("adm", {"model": "tiny-sd3", "embed": "live", "sample_every": 2}),
}
PAIRS = {"model": "tiny-sd3", "count": 5, "steps": 2, "shard_size": 1}


def interrupted(run, copy):
    """A copy of a run without its last checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "000002")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, encoded, few_prompts):
    """Folder of the runs and pairs: one/ by one rank, two/ by two.

    Two ranks also resume, after ema's first iteration: one-two/ a run of one rank, two-two/ their
    own.
    """
    folder = tmp_path_factory.mktemp("sharding")
    one, two = folder / "one", folder / "two"

    def config(name, out, **more):
        stage, changes = RUNS[name]
        source = {"prompts": str(encoded[changes["model"]])}
        if stage == "adp":
            source = {"pairs": str(one / "pairs")}
        if name == "after adp":
            source["init"] = str(one / "adp")
        if name == "live":
            source = {"prompts": str(few_prompts)}
        return {**SMALL, **source, **changes, "out": str(out), **more}

    def pairs(out, **more):
        return {**PAIRS, "prompts": str(few_prompts), "out": str(out), **more}

    data.pairs(data.PairsConfig(**pairs(one / "pairs")))
    specs = []
    for name, (stage, _) in RUNS.items():
        module = STAGES[stage]
        module.main(module.Config(**config(name, one / name, embed="cached")))
        specs.append((stage, config(name, two / name)))
    interrupted(one / "ema", folder / "one-two")
    specs.append(("adm", config("ema", folder / "one-two", resume=True)))
    specs.append(("adm", config("ema", folder / "two-two", resume=True), str(two / "ema")))
    specs.append(("pairs", pairs(two / "pairs", embed="live")))
    (folder / "runs.json").write_text(json.dumps(specs))

    launcher = ("torchrun", "--standalone", "--nproc_per_node=2")
    done = shell(*launcher, "tests/two_ranks.py", folder / "runs.json")
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    assert done.returncode == 0, errors
    own = done.stderr.replace("UserWarning: Already found a `peft_config`", "")
    assert "Warning" not in own, done.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(runs, name):
    are_one(runs / "one" / name, runs / "two" / name, name)


def are_one(one, two, name):
    """Two runs of other numbers of ranks: the same log, moments and students, to rounding."""
    stage, changes = RUNS[name]
    same_log(one, two, atol=1e-4, rtol=1e-3)
    for network in ("student", "heads" if changes.get("loss", "adm") == "adm" else "fake"):
        a, b = saved(one, 2, network), saved(two, 2, network)
        kinds_a, kinds_b = ({key: (x.shape, x.dtype) for key, x in c.items()} for c in (a, b))
        assert kinds_a == kinds_b
        # Moments, not weights: Adam turns a rounding error in a gradient near 0 into a step of up
        # to the learning rate.
        moments = [key for key in a if key.endswith("exp_avg")]
        assert moments
        for key in moments:
            assert_close(a[key], b[key], atol=1e-5, rtol=1e-3)
    family = families.load_teacher(changes["model"])
    rate = changes.get("lr_student", STAGES[stage].Config.lr_student)
    a, b = (exported(family, folder) for folder in (one, two))
    for key in a:
        assert (a[key] - b[key]).abs().max() <= 4 * rate


@pytest.mark.parametrize("name", ["adp", "lora"])
def test_two_ranks_draw_the_same_sheets(runs, name):
    """Each rank makes half of the columns; lora's training batch is half on each rank, too."""
    one, two = (runs / ranks / name / "samples" for ranks in ("one", "two"))
    drawn = sorted(path.name for path in one.iterdir())
    assert drawn == sorted(path.name for path in two.iterdir())
    assert ("000002-batch.png" in drawn) == (name == "lora")
    for file in drawn:
        a, b = (np.asarray(Image.open(folder / file)).astype(int) for folder in (one, two))
        assert a.shape == b.shape
        assert np.abs(a - b).mean() < 0.5 and a.std() > 1


def exported(family, folder):
    """The weights in a run's pipeline."""
    return models.load_denoiser(family, folder=folder / "pipeline").net.state_dict()


def test_two_ranks_make_the_same_pairs(runs):
    family = families.load_teacher(PAIRS["model"])
    one, two = (Rows(runs / ranks / "pairs", "pairs", family) for ranks in ("one", "two"))
    every = range(PAIRS["count"])
    assert_close(one[every], two[every], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "live"])
def test_two_ranks_do_what_the_reference_does(runs, name):
    stage, _ = RUNS[name]
    CHECKS[stage](runs / "two" / name)


def test_resuming_with_as_many_ranks_is_bitwise(runs):
    straight, resumed = runs / "two" / "ema", runs / "two-two"
    same_log(straight, resumed, atol=0, rtol=0)
    files = [tree(run / "checkpoints" / "000002") for run in (straight, resumed)]
    assert files[0] == files[1] and len(files[0]) == 9  # of four networks on two ranks, state.json


def test_resuming_with_other_numbers_of_ranks_is_close(runs, encoded, tmp_path):
    one, two = runs / "one" / "ema", runs / "two" / "ema"
    same_log(one, runs / "one-two", atol=1e-4, rtol=1e-3)

    interrupted(two, tmp_path / "two-one")
    _, changes = RUNS["ema"]
    memory = {"accumulate": 2, "offload": False}  # such flags may change too
    here = {"prompts": str(encoded[changes["model"]]), "out": str(tmp_path / "two-one")}
    adm.main(adm.Config(**{**SMALL, **changes, **here, **memory}, resume=True))
    same_log(one, tmp_path / "two-one", atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def two_by_two(runs, encoded, tmp_path_factory):
    """Of four ranks, two groups of two, each with a copy: ema/, adp/, and one/, of one rank's ema.

    The latter goes on from that one's first checkpoint.
    """
    folder = tmp_path_factory.mktemp("two-by-two")
    interrupted(runs / "one" / "ema", folder / "one")
    for name, run, flags in (("ema", "ema", []), ("adp", "adp", []), ("one", "ema", ["--resume"])):
        stage, changes = RUNS[run]
        source = {"prompts": encoded[changes["model"]]}
        if stage == "adp":
            source = {"pairs": runs / "one" / "pairs"}
        settings = {**SMALL, **changes, **source, "shard_ranks": 2, "out": folder / name}
        for key, value in settings.items():
            flags += ["--" + key.replace("_", "-")] + [value] * (value is not True)
        module = STAGES[stage]
        codes, said = ended(*start(folder, module.main, module.Config, flags, 4), timeout=200)
        assert codes == [0] * 4, said
    return folder


@pytest.mark.parametrize("name", ["ema", "adp"])
def test_two_groups_of_two_ranks_are_one(runs, two_by_two, name):
    are_one(runs / "one" / name, two_by_two / name, name)
    CHECKS[RUNS[name][0]](two_by_two / name)


def test_two_groups_go_on_from_one_rank_and_one_rank_from_them(runs, two_by_two, encoded, tmp_path):
    one = runs / "one" / "ema"
    are_one(one, two_by_two / "one", "ema")
    interrupted(two_by_two / "ema", tmp_path / "out")
    _, changes = RUNS["ema"]
    here = {"prompts": str(encoded[changes["model"]]), "out": str(tmp_path / "out")}
    adm.main(adm.Config(**{**SMALL, **changes, **here}, resume=True))
    are_one(one, tmp_path / "out", "ema")


def test_a_rank_writes_its_own_rows_and_gathers_nothing(runs, two_by_two):
    """In main memory and in its files; of two groups one writes."""
    two = runs / "two" / "ema"
    for rank in (0, 1):
        held = json.loads((two / f"held-{rank}.json").read_text())
        largest = max(held[name]["weights"] + held[name]["optimizer"] for name in TRAINED)
        assert held["gathered"] == 0
        assert held["written"] == pytest.approx(largest, rel=0.01)  # of one network at a time
    whole = tree(runs / "one" / "ema" / "checkpoints" / "000002")
    halves = [tree(run / "checkpoints" / "000002") for run in (two, two_by_two / "ema")]
    assert len(whole) == 5 and len(halves[0]) == 9  # four networks, and state.json
    assert halves[0].keys() == halves[1].keys()
    for name, content in whole.items():
        if name != "state.json":
            for i in (1, 2):
                half = halves[0][name.replace(".", f"-0000{i}-of-00002.")]
                assert len(half) == pytest.approx(len(content) / 2, rel=0.2)  # headers and steps


@pytest.mark.parametrize("name, files", [("sdxl", 3), ("lora", 1), ("after adp", 4)])
def test_a_rank_reads_its_own_rows_of_the_networks_files(runs, name, files):
    """Of two ranks each half: of the teacher's for every role, then of the earlier student's."""
    net = families.load_teacher(RUNS[name][1]["model"]).network("meta")
    cut = sum(p.nbytes for p in net.parameters())
    whole = sum(x.nbytes for x in net.state_dict().values()) - cut  # buffers
    for rank in (0, 1):
        held = json.loads((runs / "two" / name / f"held-{rank}.json").read_text())
        assert held["loaded"] == pytest.approx(files * (cut / 2 + whole), rel=0.01)
        assert held["restored"] == 0


def test_a_rank_reads_its_own_rows_of_a_checkpoint(runs):
    for rank in (0, 1):
        held = json.loads((runs / "two-two" / f"held-{rank}.json").read_text())
        roles = [held[name] for name in (*TRAINED, "ema")]
        rows = sum(role["weights"] + role.get("optimizer", 0) for role in roles)
        assert held["restored"] == pytest.approx(rows, rel=0.01)


def apart(rank, folder):
    """This rank has a disk of its own."""
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))


def test_a_folder_that_only_some_ranks_see_is_refused(encoded, tmp_path):
    flags = ["--model", "tiny-sd3", "--prompts", encoded["tiny-sd3"], "--batch-size", 2]
    codes, said = ended(*start(tmp_path, adm.main, adm.Config, flags, 2, (apart, tmp_path)))
    assert codes == [2, 1] and said[1] == "", said
    assert said[0].count("\n") == 1 and "out/adm is not on a disk that all ranks share" in said[0]


@pytest.mark.parametrize("ranks", ["one", "two"])
@pytest.mark.parametrize("name", ["ema", "adp"])
def test_the_average_is_exported(runs, name, ranks):
    """ema = decay · ema + (1 − decay) · student after each update, float32.

    It begins as the student's first weights.
    """
    folder = runs / ranks / name
    first = models.load_denoiser(families.load_teacher(RUNS[name][1]["model"]))
    pipeline = exported(first.family, folder)
    student_1, student_2 = (saved(folder, i, "student") for i in (1, 2))
    ema_1, ema_2 = (saved(folder, i, "ema") for i in (1, 2))
    moved = 0
    for n, before in first.own_parameters().items():
        key = f"weight/{n}"
        assert_close(ema_1[key], 0.75 * before + 0.25 * student_1[key], atol=1e-7, rtol=1e-6)
        assert_close(ema_2[key], 0.75 * ema_1[key] + 0.25 * student_2[key], atol=1e-7, rtol=1e-6)
        assert ema_2[key].dtype == torch.float32
        assert torch.equal(pipeline[n], ema_2[key])
        moved += not torch.equal(ema_2[key], student_2[key])
    assert moved


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_adapters_alone_are_saved_and_load_into_the_stock_pipeline(runs, ranks):
    folder = runs / ranks / "lora"
    for network in ("student", "fake"):
        weights = [key for key in saved(folder, 2, network) if key.startswith("weight/")]
        assert weights
        assert all(".lora_" in key for key in weights)
    family = families.load_teacher("tiny-sd3")
    pipe = DiffusionPipeline.from_pretrained(family.folder)
    pipe.load_lora_weights(folder / "pipeline" / "lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    merged = exported(family, folder)
    for name, w in pipe.transformer.state_dict().items():
        assert_close(w, merged[name], atol=1e-6, rtol=1e-6)
    teacher = models.load_denoiser(family).net.state_dict()
    assert any(not torch.equal(w, teacher[name]) for name, w in merged.items())


# --- The plan (sizing/) ---------------------------------------------------------------------------

TRAINED = ("student", "heads", "fake")  # in the order in which their gradients are clipped


@pytest.mark.parametrize("name", ["sdxl", "ema", "lora", "live"])
def test_the_plan_is_what_ranks_hold(runs, name):
    """Every entry, summed over the parts that a rank of a real run held, to 1%."""
    _, changes = RUNS[name]
    family = families.load_teacher(changes["model"])
    cfg = adm.Config(**{**SMALL, **changes})
    parts = count.build(family, cfg, torch.float32)
    live = family.text_encoders(torch.float32) if cfg.embed == "live" else ()
    rows = count.states(parts, cfg, 2, live)
    for rank in (0, 1):
        held = json.loads((runs / "two" / name / f"held-{rank}.json").read_text())
        for role in ("teacher", *TRAINED):
            assert rows[role]["weights"] == pytest.approx(held[role]["weights"], rel=0.01)
        for role in TRAINED:
            assert rows[role]["moments"] == pytest.approx(held[role]["optimizer"], rel=0.01)
        for role, gradients in zip(2 * TRAINED, held["gradients"], strict=True):
            assert rows[role]["gradients"] == pytest.approx(gradients, rel=0.01)
        assert rows["buffers"]["weights"] == held["buffers"]
        if live:
            assert rows["text encoders"]["weights"] == held["text encoders"]
        if "ema" in changes:
            assert rows["student"]["ema"] == held["ema"]["weights"]

    alone = count.states(parts, cfg, 1)  # one rank has twice as much
    fake = saved(runs / "one" / name, 2, "fake")
    whole = sum(w.nbytes for key, w in fake.items() if key.startswith("weight/"))
    assert alone["fake"]["weights"] == whole == pytest.approx(2 * rows["fake"]["weights"], rel=0.01)


# --- Random weights at full size ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters, shape",
    [
        ("sdxl", 2_567_463_684, (4, 128, 128)),
        ("sd3", 2_028_328_000, (16, 128, 128)),
        ("sd3.5-large", 8_056_627_520, (16, 128, 128)),
        ("cogvideox-2b", 1_693_783_872, (13, 16, 60, 90)),
        ("cogvideox-5b", 5_570_283_072, (13, 16, 60, 90)),
        ("wan-1.3b", 1_418_996_800, (21, 16, 60, 104)),
        ("wan-14b", 14_288_491_584, (21, 16, 60, 104)),
        ("wan-2.2-5b", 4_999_787_712, (31, 48, 44, 80)),
        ("flux-dev", 11_901_408_320, (16, 128, 128)),
    ],
)
def test_full_size_configs_are_the_published_ones(name, parameters, shape):
    family = families.load_teacher(name, random_init=True)
    assert sum(p.numel() for p in family.meta_net.parameters()) == parameters
    assert family.latent_shape() == shape


@pytest.mark.parametrize("name", families.TINY)
def test_random_conditioning_has_the_real_ones_shape(name, conditionings, teachers):
    noise = teachers[name].random_cond(["a red fox", "two dogs"])
    shapes = {part: c.shape for part, c in noise.items()}
    assert shapes == {part: c.shape for part, c in conditionings[name].items()}


def test_random_conditioning_depends_on_the_prompt_alone(teachers):
    family = teachers["tiny-sd3"]
    fox, dogs = family.random_cond(["a red fox", "two dogs"])["prompt_embeds"]
    (alone,) = family.random_cond(["two dogs"])["prompt_embeds"]
    assert torch.equal(alone, dogs)
    assert not torch.equal(fox, dogs)


@pytest.fixture
def narrow_sd3(monkeypatch):
    """sd3's config with two narrow layers."""
    kind, config = full.DENOISERS["sd3"]
    narrow = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
    monkeypatch.setitem(full.DENOISERS, "sd3", (kind, {**config, **narrow}))
    full.skeleton.cache_clear()
    yield
    full.skeleton.cache_clear()


def test_random_init_goes_through_every_script(narrow_sd3, tmp_path, few_prompts):
    """encode, pairs, adp, and adm from its student."""
    prompts, pairs = tmp_path / "prompts", tmp_path / "pairs"
    common = ["--model", "sd3", "--random-init"]
    small = ["--resolution", 128]
    training = [*common, "--head-width", 32, "--batch-size", 2, "--iterations", 1]
    training += ["--sample-every", 0]

    call(data.encode, data.EncodeConfig, *common, "--prompts", few_prompts, "--out", prompts)
    flags = [*common, *small, "--prompts", prompts, "--count", 2, "--steps", 1]
    call(data.pairs, data.PairsConfig, *flags, "--out", pairs)
    flags = [*training, "--pairs", pairs, "--no-pixel", "--mse-iterations", 0]
    call(adp.main, adp.Config, *flags, "--out", tmp_path / "adp")
    flags = [*training, *small, "--prompts", prompts, "--init", tmp_path / "adp"]
    call(adm.main, adm.Config, *flags, "--out", tmp_path / "adm")
    assert (tmp_path / "adm" / "pipeline").is_dir()


def test_random_init_is_the_same_network_every_time(narrow_sd3):
    built = [families.load_teacher("sd3", random_init=True).network() for _ in range(2)]
    one, two = (net.state_dict() for net in built)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name])


def test_random_init_is_refused_for_tiny_models():
    with pytest.raises(BadInput, match="--random-init is for sdxl"):
        families.load_teacher("tiny-sd3", random_init=True)


# --- From a loss to a step ------------------------------------------------------------------------


def test_offloaded_moments_are_the_same_moments():
    """On a CPU nothing moves, bit for bit; state_dict and load_state_dict too."""
    torch.manual_seed(0)
    weights = torch.randn(5, 3)
    found = []
    for kind in (torch.optim.AdamW, OffloadedAdamW):
        p = torch.nn.Parameter(weights.clone())
        optimizer = kind([p], 0.1)
        for i in range(4):
            p.grad = torch.full_like(p, 0.1 * i) * weights
            optimizer.step()
            other = kind([p], 0.1)
            other.load_state_dict(optimizer.state_dict())
            optimizer = other
        found.append((p.detach(), optimizer.state[p]))
    (plain, its_moments), (offloaded, moments) = found
    assert torch.equal(plain, offloaded)
    assert its_moments.keys() == moments.keys()
    for name, moment in its_moments.items():
        assert torch.equal(moment, moments[name])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_is_not_taken_on_a_gradient_that_is_not_finite(bad):
    """One number is enough, and an infinite one too, which clipping would turn into NaN."""
    p = torch.nn.Parameter(torch.ones(3))
    cfg = SimpleNamespace(offload=False, beta1=0.9)
    optimizer = make_optimizers({"student": {"p": p}}, {"student": 0.1}, cfg)["student"]
    optimizer.skipped = []
    p.grad = torch.tensor([1.0, bad, 0.0])
    step(optimizer, 1.0)
    assert p.tolist() == [1, 1, 1]
    assert p.grad is None
    p.grad = torch.ones(3)
    step(optimizer, 1.0)
    assert (p < 1).all()
    assert [int(skipped) for skipped in optimizer.skipped] == [1, 0]


def test_a_batch_is_split_evenly_over_ranks_and_micro_batches_or_refused():
    ranks = Ranks()
    assert ranks.mine(6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
    said = "--batch-size 6: no multiple of 1 ranks x --accumulate 4"
    with pytest.raises(BadInput, match=said):
        ranks.mine(6, 4)
    ranks.rank, ranks.world = 1, 2
    assert ranks.mine(8, 2) == [range(4, 6), range(6, 8)]


def test_ranks_that_do_not_come_out_even_in_groups_are_refused(monkeypatch, capsys, few_prompts):
    said = "--shard-ranks 3: does not divide the number of ranks, 4"
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(BadInput, match=said):
        Ranks(3)
    flags = ["--prompts", few_prompts, "--shard-ranks", 0]
    assert "--shard-ranks 0" in refused(capsys, adm.main, adm.Config, *flags)
