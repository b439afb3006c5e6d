"""Precision on a GPU, as far as a CPU can tell: bf16 by CUDA's rules, beside float32.

python -m pytest tests/test_bf16.py -s -k "guided or gradients"    # prints the figures
"""

import shutil
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from conftest import call, read_log
from numerics import RanksOfGpus, autocast_as_on_cuda, float32_on_cuda
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cosine_similarity, layer_norm

import adm
import families
import families.base
import models
from ode import Draw, with_guidance
from runtime.script import quiet

PERTURBED = (*families.TINY, "tiny-sd3.5")
MODELS = (*PERTURBED, "digits")
ULP = 2**-8  # relative, of bf16
DIGITS = ["a handwritten zero", "a handwritten one", "a handwritten two", "a handwritten three"]


@contextmanager
def arithmetic_of_a_gpu():
    """Inside, networks compute in bf16 as CUDA would; what is never trained is held in it."""
    load_denoiser = models.load_denoiser

    def in_bf16(*args, **kwargs):
        made = load_denoiser(*args, **kwargs)
        made.bf16 = True
        return made

    with pytest.MonkeyPatch.context() as patch, autocast_as_on_cuda():
        patch.setattr(models, "load_denoiser", in_bf16)
        patch.setattr(adm, "Ranks", RanksOfGpus)
        yield


@pytest.fixture
def as_on_a_gpu():
    with arithmetic_of_a_gpu():
        yield


def test_autocast_keeps_float32_where_cuda_does():
    """By torch's header; and after that as on a CPU again."""
    assert {"layer_norm", "group_norm", "softmax.int", "norm.Scalar"} <= set(float32_on_cuda())
    x = torch.randn(2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        with autocast_as_on_cuda():
            assert layer_norm(x, (8,)).dtype == x.softmax(-1).dtype == torch.float32
            assert (x @ x.T).dtype == torch.bfloat16
        assert layer_norm(x, (8,)).dtype == x.softmax(-1).dtype == torch.bfloat16


# --- The start ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{model: Family}, of tiny models too with weights that bf16 cannot hold, as after training."""
    folder = tmp_path_factory.mktemp("trained")
    opened = {name: perturbed(name, folder / name) for name in PERTURBED}
    opened["digits"] = families.load_teacher("digits")
    return opened


def perturbed(name, folder):
    """The Family of a tiny model's copy in `folder`, with other weights."""
    shutil.copytree(families.load_teacher(name.removesuffix(".5")).folder, folder)
    family = families.load_teacher(folder)
    config = dict(family.config)
    if name == "tiny-sd3.5":  # its difference from SD3: attention normalises queries and keys
        config["qk_norm"] = "rms_norm"
    net = family.made(family.net_class, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            scale = 0.1 if p.ndim == 1 else 0.02
            p += scale * torch.randn(p.shape, generator=generator)
    net.save_pretrained(folder / family.net_name)
    return families.load_teacher(folder)


@pytest.fixture
def mesh(tmp_path):
    """Of this process alone: FSDP casts and gathers as among many."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_all_roles_start_as_the_teacher_bit_by_bit(
    name, lora_rank, sharded, trained, mesh, as_on_a_gpu
):
    """As on a GPU: frozen weights held in bf16, masters in float32, all computing in bf16."""
    family = trained[name]
    options = {"frozen_dtype": torch.bfloat16, "mesh": mesh if sharded else None}
    teacher, *copies = models.make_roles(family, ("student", "fake"), lora_rank, **options)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, *family.latent_shape(), generator=generator)  # (3, ...)
    t = torch.tensor([999.0, 437.5, 20.25])  # (3,)
    cond = family.random_cond(["a", "red fox", "two dogs"])
    with torch.no_grad():
        out, _ = teacher(x, t, cond)
        maps = teacher(x, t, cond, want="features")[1]  # the discriminator's
        for role in copies:
            assert torch.equal(role(x, t, cond)[0], out)
            its_maps = role(x, t, cond, want="features")[1]
            for its_map, teachers in zip(its_maps, maps, strict=True):
                assert torch.equal(its_map, teachers)
        exact = models.Denoiser(family, family.network())(x, t, cond)[0]
    error = (out - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1  # it was bf16


@pytest.mark.parametrize("name", MODELS)
def test_frozen_matrices_are_held_in_half_the_memory(name, trained):
    """In bf16, on "meta" too, and nothing but them: the rest is the float32 of the files."""
    teacher = models.load_denoiser(trained[name], dtype=torch.bfloat16).net
    exact = models.load_denoiser(trained[name]).net
    planned = models.load_denoiser(trained[name], "meta", torch.bfloat16).net
    for n, p in teacher.named_parameters():
        matrix = p.ndim > 1 and n != "scale_shift_table" and not n.endswith(".scale_shift_table")
        dtype = torch.bfloat16 if matrix else torch.float32
        assert p.dtype == planned.get_parameter(n).dtype == dtype
        assert torch.equal(p, exact.get_parameter(n).to(dtype))
    for n, b in teacher.named_buffers():
        assert b.dtype == planned.get_buffer(n).dtype == torch.float32
        assert torch.equal(b, exact.get_buffer(n))


# --- Scores ---------------------------------------------------------------------------------------


def relative(x, exact):
    return ((x - exact).norm() / exact.norm()).item()


def conditioning(family, texts):
    """{name: (n, ...)} of these prompts and of no prompt, by the real text encoders."""
    quiet()
    pipe = family.text_pipeline()
    with torch.no_grad():
        cond = family.encode(pipe, texts)
        none = family.unconditional(pipe)
    return cond, {name: c.expand(len(texts), *c.shape[1:]) for name, c in none.items()}


def in_bf16(cond):
    return {name: c.bfloat16() for name, c in cond.items()}


@pytest.mark.parametrize("name", (*families.TINY, "digits"))
def test_guided_scores_are_bf16s_and_no_time_is(name):
    """Guidance multiplies rounding, by up to 2w − 1. Times in bf16 would cost more than that."""
    family = families.load_teacher(name)
    conds = conditioning(family, DIGITS)
    rounded = [in_bf16(cond) for cond in conds]
    exact = models.load_denoiser(family)
    held = models.load_denoiser(family, dtype=torch.bfloat16)
    held.bf16 = True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *family.latent_shape(), generator=generator)  # (4, ...)
    t = torch.tensor([998.0, 750.0, 514.0, 385.0])  # (4,) of which bf16 has none

    own = 2.0 if name == "digits" else family.guidance
    errors = {}
    with torch.no_grad():
        for w in (1.0, 2.0, own):
            score = with_guidance(exact, *conds, w)(x, t)  # (4, ...)
            with autocast_as_on_cuda():
                errors[w] = relative(with_guidance(held, *rounded, w)(x, t), score)
        plain = exact(x, t, conds[0])[0]  # (4, ...)
        of_times = relative(exact(x, t.bfloat16().float(), conds[0])[0], plain)
    said = ", ".join(f"CFG {w:g}: {error:.2%}" for w, error in errors.items())
    print(f"\n{name:18} {said}; rounded times alone: {of_times:.2%}")
    assert errors[1.0] < 4 * ULP
    assert errors[own] < 0.06
    if name != "digits":  # which hardly hears the time
        assert errors[1.0] < of_times / 2


# --- Gradients ------------------------------------------------------------------------------------


def gradients(family, dt, conds, held):
    """{role: the gradient of one round of ADM, flat}, of networks a little off the teacher."""
    torch.manual_seed(0)
    teacher, student, fake = models.make_roles(family, ("student", "fake"), frozen_dtype=held)
    discriminator = models.LatentDiscriminator(teacher, 16)
    roles = {"student": student.net, "fake": fake.net, "heads": discriminator.heads}
    for module in roles.values():
        for p in module.parameters():
            p.data *= 1 + 0.02 * torch.randn(p.shape)
    cfg = adm.Config(model=family.name, dt=dt)
    schedule, shape = family.schedule, family.latent_shape()
    times = schedule.timesteps(1)[:-1]  # (1,)
    schedules = (schedule, schedule)
    net = adm.Players(teacher, student, fake, discriminator, *schedules, times, shape, 2.0)
    draw = Draw((0,), range(len(DIGITS)), torch.device("cpu"))
    adm.adm_round(net, cfg, draw, *conds, 0, lambda loss: loss.backward())
    found = {}
    for role, module in roles.items():
        parts = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        found[role] = torch.cat(parts)
    return found


@pytest.fixture(scope="module")
def exact_gradients():
    """(Family, conditionings, {Δt: gradients in float32})"""
    family = families.load_teacher("digits")
    conds = conditioning(family, DIGITS)
    exact = {dt: gradients(family, dt, conds, torch.float32) for dt in (1 / 64, 1 / 16, 1 / 4)}
    return family, conds, exact


def test_gradients_keep_their_direction(exact_gradients, as_on_a_gpu):
    """Student's and fake score's do. D's is a difference of two landings, near for a small Δt."""
    family, conds, exact = exact_gradients
    rounded = [in_bf16(cond) for cond in conds]
    heads = []
    for dt, expected in exact.items():
        found = gradients(family, dt, rounded, torch.bfloat16)
        cosine = {role: cosine_similarity(found[role], g, 0).item() for role, g in expected.items()}
        said = ", ".join(f"{role} {c:.3f}" for role, c in cosine.items())
        print(f"\ndigits, CFG 2, Δt = {dt:g} T: cosine to float32's gradient: {said}")
        assert min(cosine["student"], cosine["fake"]) > 0.999
        heads.append(cosine["heads"])
    assert heads[-1] > 0.9


# --- Training -------------------------------------------------------------------------------------

STEADY = ["loss_discriminator", "loss_fake", "x0_std", "grad_norm_fake"]


@pytest.mark.parametrize(
    "name", ["tiny-sdxl", "tiny-sd3", "tiny-cogvideox-5b", "tiny-wan", "tiny-flux"]
)
def test_twenty_iterations_stay_close_to_float32s(name, tmp_path):
    """And no update is skipped. What is a difference of nearly equal scores is not compared."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\ntwo dogs\n")
    flags = ["--model", name, "--prompts", prompts, "--iterations", 20, "--batch-size", 2]
    flags += ["--head-width", 8, "--lr-fake", 3e-4, "--sample-every", 0]
    if name == "tiny-flux":
        flags += ["--guidance", 2]  # at its default the fake score is the teacher, and D says 0
    call(adm.main, adm.Config, *flags, "--out", tmp_path / "float32")
    with arithmetic_of_a_gpu():
        call(adm.main, adm.Config, *flags, "--out", tmp_path / "bf16")
    exact, found = read_log(tmp_path / "float32"), read_log(tmp_path / "bf16")
    assert found["skipped"] == [0] * 20
    for column in STEADY:
        assert found[column] == pytest.approx(exact[column], rel=4 * ULP), column
    assert found["grad_norm_student"][0] == pytest.approx(
        exact["grad_norm_student"][0], rel=4 * ULP
    )
    for column in (*STEADY, "loss_generator", "dmd_loss", "grad_norm_student", "grad_norm_heads"):
        values = torch.tensor(found[column], dtype=torch.float64)  # (20,)
        assert not (values == values.bfloat16()).any(), f"{column} was in bf16"
