"""What an iteration of ADM costs: its passes through networks, and the tool that times them."""

import contextlib
import io
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import call
from torch.utils.flop_counter import FlopCounterMode

import adm
import models
from runtime.folder import Run
from tools import bench

B = 2


def blocks_of(net):
    if hasattr(net, "transformer_blocks"):
        return list(net.transformer_blocks)
    return [*net.down_blocks, net.mid_block, *net.up_blocks]


def watch(name, net, visits):
    """Count in `visits` every pass through a block of `net`, and of its gradient.

    Keys: (direction, network, batch, is there a graph, do weights train, number of the block).
    """

    def count(i):
        def forward(block, args, output):
            outputs = output if isinstance(output, tuple) else [output]
            out = next(o for o in outputs[::-1] if hasattr(o, "requires_grad"))
            trains = any(p.requires_grad for p in block.parameters())
            visits["forward", name, len(out), out.requires_grad, trains, i] += 1
            if out.requires_grad:
                backward = ("backward", name, len(out), True, trains, i)
                out.register_hook(lambda gradient: visits.update([backward]))

        return forward

    for i, block in enumerate(blocks_of(net)):
        block.register_forward_hook(count(i))


def whole_passes(visits, last, tapped):
    """`visits` to blocks 0 to `last` as passes, each through all of them or through those tapped.

    Keys: (direction, network, batch, is there a graph, do weights train, "all" or "tapped").
    """
    passes = Counter()
    for *kind, i in visits:
        through_all = visits[(*kind, last)]
        begun = visits[(*kind, 0)]
        expected = begun if i <= tapped else through_all
        assert visits[(*kind, i)] == expected, "half a pass"
        passes[(*kind, "all")] = through_all
        passes[(*kind, "tapped")] = begun - through_all
    return +passes


@pytest.fixture
def passes_of(teachers, encoded, tmp_path, monkeypatch):
    """passes_of(model, *flags): the passes of one iteration of adm.py, a one-step student."""
    visits = Counter()
    make_roles = adm.make_roles

    def spy_roles(*args, **kwargs):
        roles = make_roles(*args, **kwargs)
        for name, role in zip(("teacher", "student", "fake"), roles, strict=True):
            watch(name, role.net, visits)
        return roles

    def run(model, *flags):
        monkeypatch.setattr(adm, "make_roles", spy_roles)
        args = ["--model", model, "--prompts", encoded[model], "--out", tmp_path / "out"]
        args += ["--iterations", 1, "--batch-size", B, "--student-steps", 1, "--head-width", 8]
        call(adm.main, adm.Config, *args, "--sample-every", 0, *flags)

        net = models.load_denoiser(teachers[model], "meta").net
        blocks = blocks_of(net)
        tapped, _, _ = teachers[model].taps(net)
        last_tapped = blocks.index(tapped[-1])  # the backbone's pass ends with it
        assert last_tapped + 1 < len(blocks)
        return whole_passes(visits, len(blocks) - 1, last_tapped)

    return run


@pytest.mark.parametrize("fake_gradient", ["exact", "straight-through"])
@pytest.mark.parametrize("model", ["tiny-sd3", "tiny-sdxl"])
def test_an_iteration_makes_no_pass_twice(model, fake_gradient, passes_of):
    """CFG on, TTUR 1."""
    exact = fake_gradient == "exact"
    expected = Counter(
        {
            ("forward", "student", B, True, True, "all"): 1,
            ("backward", "student", B, True, True, "all"): 1,
            ("forward", "teacher", 2 * B, False, False, "all"): 1,  # both halves of CFG
            ("forward", "fake", B, exact, False, "all"): 1,
            ("forward", "teacher", B, True, False, "tapped"): 1,  # D on x_fake
            ("backward", "teacher", B, True, False, "tapped"): 1,
            ("forward", "teacher", B, False, False, "tapped"): 1,  # D on x_real
            ("forward", "fake", B, True, True, "all"): 1,
            ("backward", "fake", B, True, True, "all"): 1,
        }
    )
    if exact:
        expected["backward", "fake", B, True, False, "all"] = 1
    assert passes_of(model, "--fake-gradient", fake_gradient) == expected


@pytest.mark.parametrize("loss", ["dmd", "step"])
def test_without_a_discriminator_both_branches_run_where_the_student_learns(loss, passes_of):
    """In TTUR's further rounds the fake score trains on new samples, and nothing else runs."""
    assert passes_of("tiny-sd3", "--loss", loss, "--ttur", 3) == Counter(
        {
            ("forward", "student", B, True, True, "all"): 1,
            ("backward", "student", B, True, True, "all"): 1,
            ("forward", "student", B, False, False, "all"): 2,
            ("forward", "teacher", 2 * B, False, False, "all"): 1,
            ("forward", "fake", B, False, True, "all"): 1,
            ("forward", "fake", B, True, True, "all"): 3,
            ("backward", "fake", B, True, True, "all"): 3,
        }
    )


# --- tools/bench.py -------------------------------------------------------------------------------

PARTS = ("student", "teacher", "fake_step", "backbone_fake", "backbone_real", "fake_own")


def what_it_patches():
    return dict(vars(adm)), dict(vars(Run))


@pytest.fixture(scope="module")
def benched(encoded):
    """One run of the tool: its line, each loss's FLOPs, and whether it left all as it was.

    Its `args` are adm.py's too.
    """
    args = ["--model", "tiny-sd3", "--prompts", str(encoded["tiny-sd3"])]
    args += ["--batch-size", "1", "--head-width", "8"]
    flops = []
    measure = bench.measure

    def spy(*args):
        result = measure(*args)
        flops.append(result["flops"])
        return result

    before = what_it_patches()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(bench, "measure", spy)
        bench.main([*args, "--json", "--repeats", "2", "--warm-up", "1"])
    return SimpleNamespace(
        args=args,
        line=json.loads(said.getvalue()),
        flops=dict(zip(("adm", "dmd"), flops, strict=True)),
        left_as_it_was=what_it_patches() == before,
    )


def test_bench_times_parts_that_add_up(benched):
    line = benched.line
    assert list(line) == [
        *("model", "batch_size", "ratio", "ms_iteration", "ms_passes"),
        *(f"ms_{part}" for part in PARTS),
        *("ms_dmd", "ms_finetune"),
    ]
    assert all(line[name] > 0 for name in line if name != "model")
    assert line["ms_passes"] == pytest.approx(sum(line[f"ms_{part}"] for part in PARTS))
    assert line["ratio"] == pytest.approx(line["ms_iteration"] / line["ms_passes"])


def test_bench_leaves_the_scripts_as_they_were(benched):
    assert benched.left_as_it_was


@pytest.mark.parametrize("loss", ["adm", "dmd"])
def test_bench_makes_the_passes_of_an_iteration(loss, benched, tmp_path):
    """The heads' work, of an iteration alone, is the rest."""
    args = [*benched.args, "--student-steps", 1, "--iterations", 1, "--sample-every", 0]
    with FlopCounterMode(display=False) as counter:
        call(adm.main, adm.Config, *args, "--loss", loss, "--out", tmp_path / loss)
    whole = counter.get_total_flops()
    assert 0.97 * whole < benched.flops[loss] <= whole
