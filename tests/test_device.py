"""What matters on a GPU alone, as far as a CPU can tell: precision, and waiting for the device."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import script
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import families
import families.base
import families.export
import models

# --- Precision ------------------------------------------------------------------------------------

# What autocast runs in float32 on CUDA and in bf16 on a CPU, by torch's documentation.
FLOAT32_ON_CUDA = {
    *("__pow__", "__rpow__", "__rtruediv__", "cosine_similarity", "cumprod", "cumsum", "exp"),
    *("expm1", "group_norm", "layer_norm", "log", "log1p", "log_softmax", "mse_loss", "norm"),
    *("normalize", "pow", "prod", "reciprocal", "rsqrt", "softmax", "softplus", "sum"),
}
PERTURBED = (*families.TINY, "tiny-sd3.5")
MODELS = (*PERTURBED, "digits")


class CudaAutocast(TorchFunctionMode):
    """Inside, a CPU's bf16 autocast keeps float32 where CUDA's does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu") and function.__name__ in FLOAT32_ON_CUDA:
            args, kwargs = tree_map_only(torch.Tensor, in_float32, (args, kwargs))
        return function(*args, **kwargs)


def in_float32(x):
    return x.float() if x.dtype == torch.bfloat16 else x


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Networks compute in bf16 as CUDA would."""
    load_denoiser = models.load_denoiser

    def in_bf16(*args, **kwargs):
        made = load_denoiser(*args, **kwargs)
        made.bf16 = True
        return made

    monkeypatch.setattr(models, "load_denoiser", in_bf16)
    with CudaAutocast():
        yield


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
        dtype = torch.bfloat16 if p.ndim > 1 else torch.float32
        assert p.dtype == planned.get_parameter(n).dtype == dtype
        assert torch.equal(p, exact.get_parameter(n).to(dtype))
    for n, b in teacher.named_buffers():
        assert b.dtype == planned.get_buffer(n).dtype == torch.float32
        assert torch.equal(b, exact.get_buffer(n))


# --- Waiting --------------------------------------------------------------------------------------

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
        assert len(iteration["copies"]) == tensors, iteration["copies"]
