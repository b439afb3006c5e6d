"""What an ADM run needs of each GPU, counted on networks without storage.

    python tools/plan.py --model sd3.5-large --world-size 8 --gpu-gb 80

Nothing is loaded or fetched. Weights, gradients, moments and the average are exact. Activations are
those that autograd saves in the generator's step, from its own passes in bf16 with memory-efficient
attention; kernels' workspace and fragmentation come on top.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from families import HUB, load_teacher
from models import LatentDiscriminator, frozen, make_roles
from runtime.flags import option
from runtime.script import run
from runtime.settings import at_least, require


@dataclass
class Config:
    model: str = option(
        "sd3", "sdxl, sd3, sd3.5-large, cogvideox-2b, cogvideox-5b, tiny-… or a pipeline folder"
    )
    world_size: int = option(8, "GPUs")
    gpu_gb: float = option(80.0, "memory of each, in GB of 1e9 bytes")
    batch_size: int | None = option(None, "global; default: one sample a GPU and micro-batch")
    resolution: str | None = option(
        None, "pixels, 1024 or 480x720 (height x width); default: the model's own"
    )
    frames: int | None = option(None, "video frames; default: the model's own")
    fake_gradient: Literal["exact", "straight-through"] = option("exact", "as in adm.py")
    head_width: int = option(256, "channels of the discriminator's heads")
    lora_rank: int = option(0, "LoRA adapters of this rank on one shared base; 0: full networks")
    ema: float = option(0.0, "decay of the student's average; 0: none")
    accumulate: int = option(1, "micro-batches that the batch is split into")
    gradient_checkpointing: bool = option(False, "recompute activations in backward")
    offload: bool = option(False, "AdamW's moments in main memory between steps")


# --- Weights and their companions -----------------------------------------------------------------

COLUMNS = ("weights", "gradients", "optimizer", "ema")


def part(parameters, world):
    """Bytes of one rank's part: FSDP cuts the first dimension, and pads the last rank's."""
    total = 0
    for p in parameters:
        rows = -(-len(p) // world)  # rounded up
        total += rows * p[0].numel() * p.element_size()
    return total


def build(
    family,
    lora_rank=0,
    head_width=256,
    frozen_dtype=torch.bfloat16,
    gradient_checkpointing=False,
):
    """(teacher, student, fake, discriminator) on the meta device, by the code of training."""
    names = ("student", "fake")
    roles = make_roles(family, names, lora_rank, "meta", frozen_dtype, gradient_checkpointing)
    with torch.device("meta"):
        return *roles, LatentDiscriminator(roles[0], head_width)


def states(roles, world, ema=0.0):
    """{role: {"parameters": their number; "weights", "gradients", "optimizer", "ema": bytes}}.

    Bytes are a rank's. What a role has none of may be absent.
    """
    teacher, student, fake, discriminator = roles
    trained = {
        "student": list(student.own_parameters().values()),
        "fake": list(fake.own_parameters().values()),
        "heads": list(discriminator.heads.parameters()),
    }
    adapters = {id(p) for parameters in trained.values() for p in parameters}
    base = [p for p in teacher.net.parameters() if id(p) not in adapters]
    rows = {"teacher": {"parameters": sum(p.numel() for p in base), "weights": part(base, world)}}
    for name, parameters in trained.items():
        size = part(parameters, world)
        rows[name] = {
            "parameters": sum(p.numel() for p in parameters),
            "weights": size,
            "gradients": size,
            "optimizer": 2 * size,  # AdamW's two moments
            "ema": size if name == "student" and ema else 0,
        }
    # FSDP leaves these whole on every rank.
    buffers = {id(b): b.nbytes for role in roles[:3] for b in role.net.buffers()}
    rows["buffers"] = {"parameters": 0, "weights": sum(buffers.values())}
    return rows


def gathered(family, net, world):
    """Bytes of the bf16 weights that a pass holds: the largest unit and, on its way, the next.

    On one GPU nothing is gathered.
    """
    if world == 1:
        return 0
    sizes, counted = [], set()
    for unit in (*family.units(net), net):  # inner ones first: each has what they leave
        own = {id(p): p.numel() for p in unit.parameters() if id(p) not in counted}
        counted |= own.keys()
        sizes.append(2 * sum(own.values()))
    return 2 * max(sizes)


# --- Activations ----------------------------------------------------------------------------------


class Attention(torch.autograd.Function):
    """What flash attention leaves for backward: inputs, output, one number a query and head."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out


class FlashAttention(TorchFunctionMode):
    """Inside, attention is Attention."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
            q, k, v = [*args, *named][:3]
            return Attention.apply(q, k, v)
        return func(*args, **kwargs)


class Saved:
    """Inside, counts what autograd keeps for backward, each storage once, the modules' own not."""

    def __init__(self, *modules):
        own = [x for module in modules for x in (*module.parameters(), *module.buffers())]
        self.seen = {x.untyped_storage()._cdata for x in own}
        self.bytes = 0
        self.keep = []  # so that no id comes twice

    def pack(self, x):
        key = x.untyped_storage()._cdata
        if key not in self.seen:
            self.seen.add(key)
            self.keep.append(x)
            self.bytes += x.untyped_storage().nbytes()
        return x

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def activations(family, roles, shape, batch, fake_gradient="exact"):
    """({"student", "fake", "discriminator": bytes}, the most of one block), for a batch.

    Bytes are those that wait for the generator's backward.
    """
    teacher, student, fake, discriminator = roles
    for role in (teacher, student, fake):
        role.net.bfloat16()
    like = {"dtype": torch.bfloat16, "device": "meta"}
    shapes = family.cond_shapes()
    cond = {name: torch.empty(batch, *shapes[name], **like) for name in shapes}  # (B, ...) each
    x = torch.empty(batch, *shape, **like)  # (B, ...)
    t = torch.empty(batch, device="meta")  # (B,)
    saved = Saved(*roles)
    before, blocks = {}, [0]

    def enters(unit, args):
        before[unit] = saved.bytes

    def leaves(unit, args, output):
        blocks.append(saved.bytes - before[unit])

    hooks = []
    for unit in innermost(family.units(student.net)):  # what is checkpointed
        hooks.append(unit.register_forward_pre_hook(enters))
        hooks.append(unit.register_forward_hook(leaves))
    with FlashAttention(), saved, frozen(fake, discriminator.heads):
        x_t = student(x, t, cond)[0].bfloat16()  # (B, ...)
        of_student = saved.bytes
        with torch.set_grad_enabled(fake_gradient == "exact"):
            out = fake(x_t, t, cond)[0].bfloat16()  # (B, ...)
        of_fake = saved.bytes - of_student
        discriminator.logits(discriminator.features(x_t + out, t, cond))
        of_discriminator = saved.bytes - of_student - of_fake
    for hook in hooks:
        hook.remove()
    counted = {"student": of_student, "fake": of_fake, "discriminator": of_discriminator}
    return counted, max(blocks)


def innermost(units):
    """Those of the units in which there is no other."""
    return [u for u in units if not any(v is not u and v in units for v in u.modules())]


# --- The plan -------------------------------------------------------------------------------------


def plan(cfg):
    """Print what a run with these settings needs. Raises BadInput for one that cannot be."""
    at_least(1, cfg, "world_size", "accumulate", "batch_size", "head_width")
    at_least(0, cfg, "lora_rank")
    require(0 <= cfg.ema < 1, f"--ema {cfg.ema}: in [0, 1)")
    require(cfg.gpu_gb > 0, f"--gpu-gb {cfg.gpu_gb}: a positive number")
    family = load_teacher(cfg.model, random_init=cfg.model in HUB)
    shape = family.latent_shape(cfg.resolution, cfg.frames)
    parts = cfg.world_size * cfg.accumulate
    batch = cfg.batch_size or parts
    whole = batch >= parts and batch % parts == 0
    require(whole, f"--batch-size {cfg.batch_size}: no multiple of {parts}")
    each = batch // parts  # samples at a time on each GPU

    roles = build(family, cfg.lora_rank, cfg.head_width)
    rows = states(roles, cfg.world_size, cfg.ema)
    columns = ("parameters", *COLUMNS)
    total = {column: sum(row.get(column, 0) for row in rows.values()) for column in columns}
    if cfg.world_size == 1 and not cfg.lora_rank:
        # Autocast's copies of float32 weights stay as long as the graph is there.
        what = "bf16 copies"
        passing = 2 * (rows["student"]["parameters"] + rows["fake"]["parameters"])
    else:
        what = "gathered"
        passing = gathered(family, roles[1].net, cfg.world_size)

    waiting, block = activations(family, roles, shape, each, cfg.fake_gradient)
    if cfg.gradient_checkpointing:
        roles = build(family, cfg.lora_rank, cfg.head_width, gradient_checkpointing=True)
        waiting, _ = activations(family, roles, shape, each, cfg.fake_gradient)
        waiting["one block, made again"] = block
    peak = peak_bytes(rows, total, sum(waiting.values()), passing, cfg.offload)

    latent = "x".join(str(n) for n in shape)
    title = f"{cfg.model}, {latent} latents, {each} a GPU x {cfg.world_size} GPUs"
    if cfg.accumulate > 1:
        title += f" x {cfg.accumulate} micro-batches"
    print(f"{title}; GB (1e9 bytes) on each:")
    print_table({**rows, "sum": total})
    largest = max(waiting, key=waiting.get)
    mostly = f"most of it {largest} ({gb(waiting[largest])})"
    print_line("activations", f"{gb(sum(waiting.values()))} in the generator's step, {mostly}")
    where = "; moments are in main memory between steps" if cfg.offload else ""
    print_line(what, f"{gb(passing)} of weights, for a pass{where}")
    if cfg.world_size > 1:  # see Family.network
        loading = 4 * cfg.world_size * max(row["parameters"] for row in rows.values())
        print_line("loading", f"{loading / 1e9:.0f} of main memory, if all ranks are on one node")
    verdict = "it fits" if peak <= cfg.gpu_gb * 1e9 else "it does not fit"
    print_line("peak", f"{gb(peak)} of {cfg.gpu_gb:g}: {verdict}")


def peak_bytes(rows, total, waiting, passing, offload):
    """The most that is on a GPU at once: in the generator's backward, or when a network steps.

    rows: of `states`; total: their sum. All gradients are there before the first network steps.
    """
    always = total["weights"] + total["ema"]
    backward = total["gradients"] + waiting + passing
    if not offload:
        return always + total["optimizer"] + backward
    one_step = total["gradients"] + max(row.get("optimizer", 0) for row in rows.values())
    return always + max(backward, one_step)


def print_table(rows):
    print(f"{'':14}{'parameters':>11}" + "".join(f"{column:>11}" for column in COLUMNS))
    for name, row in rows.items():
        count = f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else ""
        cells = [gb(row[column]) if row.get(column) else "" for column in COLUMNS]
        line = f"{name:14}{count:>11}" + "".join(f"{cell:>11}" for cell in cells)
        print(line.rstrip())


def print_line(name, said):
    print(f"{name:14}{said}")


def gb(size):
    return f"{size / 1e9:.2f}"


def main():
    run(plan, Config, prog="plan.py", description=__doc__)


if __name__ == "__main__":
    main()
