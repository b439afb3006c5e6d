"""What an iteration of ADM costs: the passes that it makes through whole networks, counted by hooks, and the tool that times them."""

import json
from collections import Counter

import pytest
from torch.utils.flop_counter import FlopCounterMode

import runtime.files
import runtime.folder
import runtime.optimize
import runtime.ranks
import runtime.script
import runtime.settings
import adm
import models
from tools import bench
import data
from conftest import call

B = 2


def blocks_of(net):
    return net.transformer_blocks if hasattr(net, "transformer_blocks") else [*net.down_blocks, net.mid_block, *net.up_blocks]


@pytest.fixture
def passes_of(teachers, few_prompts, tmp_path, monkeypatch):
    """passes_of(model, *flags): the passes of one iteration of adm.py, a one-step student, B samples.

    Counter of (direction, network, batch, is there a graph, do weights train, through which blocks).
    """
    visits = Counter()  # the same, of single blocks
    make_roles = adm.make_roles

    def watch(name, net):
        for i, block in enumerate(blocks_of(net)):

            def forward(block, args, output, i=i):
                outputs = output if isinstance(output, tuple) else [output]
                out = next(o for o in outputs[::-1] if hasattr(o, "requires_grad"))
                trains = any(p.requires_grad for p in block.parameters())
                visits["forward", name, len(out), out.requires_grad, trains, i] += 1
                if out.requires_grad:
                    backward = ("backward", name, len(out), True, trains, i)
                    out.register_hook(lambda g: visits.update([backward]))

            block.register_forward_hook(forward)

    def spy_roles(*args, **kwargs):
        roles = make_roles(*args, **kwargs)
        for name, role in zip(("teacher", "student", "fake"), roles, strict=True):
            watch(name, role.net)
        return roles

    def run(model, *flags):
        monkeypatch.setattr(adm, "make_roles", spy_roles)
        args = ["--model", model, "--prompts", few_prompts, "--out", tmp_path / "out"]
        args += ["--iterations", 1, "--batch-size", B, "--student-steps", 1, "--head-width", 8]
        call(adm.main, adm.Config, *args, "--sample-every", 0, *flags)
        family = teachers[model]
        net = models.load_denoiser(family).net
        last = [*blocks_of(net)].index(family.taps(net)[0][-1])  # the backbone's pass ends with it
        assert last + 1 < len(blocks_of(net))
        whole, tapped = range(len(blocks_of(net))), range(last + 1)
        passes = Counter()
        for *kind, i in visits:
            n = visits[(*kind, i)]
            whole_ones = visits[(*kind, whole[-1])]
            assert n == visits[(*kind, 0)] if i in tapped else n == whole_ones, "half a pass"
            passes[(*kind, "all")] = whole_ones
            passes[(*kind, "tapped")] = visits[(*kind, 0)] - whole_ones
        return +passes

    return run


@pytest.mark.parametrize("fake_gradient", ["exact", "straight-through"])
@pytest.mark.parametrize("model", ["tiny-sd3", "tiny-sdxl"])
def test_passes_of_one_iteration(model, fake_gradient, passes_of):
    """CFG on, TTUR 1: none is made twice."""
    exact = fake_gradient == "exact"
    expected = Counter({
        ("forward", "student", B, True, True, "all"): 1,
        ("backward", "student", B, True, True, "all"): 1,
        ("forward", "teacher", 2 * B, False, False, "all"): 1,  # both halves of CFG
        ("forward", "fake", B, exact, False, "all"): 1,
        ("backward", "fake", B, True, False, "all"): int(exact),
        ("forward", "teacher", B, True, False, "tapped"): 1,  # D on x_fake
        ("backward", "teacher", B, True, False, "tapped"): 1,
        ("forward", "teacher", B, False, False, "tapped"): 1,  # D on x_real
        ("forward", "fake", B, True, True, "all"): 1,
        ("backward", "fake", B, True, True, "all"): 1,
    })
    assert passes_of(model, "--fake-gradient", fake_gradient) == +expected


def test_dmd_runs_teacher_and_fake_branch_where_the_student_learns_alone(passes_of):
    """In TTUR's further rounds the fake score trains on new samples, and nothing else runs."""
    assert passes_of("tiny-sd3", "--loss", "dmd", "--ttur", 3) == Counter({
        ("forward", "student", B, True, True, "all"): 1,
        ("backward", "student", B, True, True, "all"): 1,
        ("forward", "student", B, False, False, "all"): 2,
        ("forward", "teacher", 2 * B, False, False, "all"): 1,
        ("forward", "fake", B, False, True, "all"): 1,
        ("forward", "fake", B, True, True, "all"): 3,
        ("backward", "fake", B, True, True, "all"): 3,
    })


def test_bench_step(few_prompts, tmp_path, capsys):
    """Its parts are there, they add up, and they are the work that an iteration does, up to the heads'."""
    args = ["--model", "tiny-sd3", "--prompts", str(few_prompts), "--batch-size", "1", "--head-width", "8"]
    results, before = [], (dict(vars(adm)), dict(vars(runtime.folder.Run)))
    measure = bench.measure

    def spy(*args):
        results.append(measure(*args))
        return results[-1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bench, "measure", spy)
        bench.main([*args, "--json", "--repeats", "2", "--warm-up", "1"])
    line = json.loads(capsys.readouterr().out)
    parts = ["ms_student", "ms_teacher", "ms_fake_step", "ms_backbone_fake", "ms_backbone_real", "ms_fake_own"]
    assert list(line) == ["model", "batch_size", "ratio", "ms_iteration", "ms_passes", *parts, "ms_dmd", "ms_finetune"]
    assert all(line[p] > 0 for p in list(line)[2:]) and line["ms_passes"] == pytest.approx(sum(line[p] for p in parts))
    assert line["ratio"] == pytest.approx(line["ms_iteration"] / line["ms_passes"])
    assert (dict(vars(adm)), dict(vars(runtime.folder.Run))) == before  # it leaves what it patches as it was

    call(data.encode, data.EncodeConfig, "--model", "tiny-sd3", "--prompts", few_prompts, "--out", tmp_path / "prompts")
    args[3] = tmp_path / "prompts"
    for loss, result in zip(("adm", "dmd"), results, strict=True):
        with FlopCounterMode(display=False) as counter:
            call(adm.main, adm.Config, *args, "--student-steps", 1, "--iterations", 1, "--sample-every", 0, "--loss", loss, "--out", tmp_path / loss)
        assert 0.97 * counter.get_total_flops() < result["flops"] <= counter.get_total_flops()
