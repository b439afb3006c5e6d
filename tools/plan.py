"""What an ADM run needs of each GPU, counted on networks without storage: nothing is loaded or fetched.

    python tools/plan.py --model sd3.5-large --world-size 8 --gpu-gb 80

Weights, gradients, moments and the average are exact. Activations are those that autograd saves in the generator's step, from
its own passes in bf16 with memory-efficient attention; kernels' workspace and fragmentation come on top.
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
    model: str = option("sd3", "sdxl, sd3, sd3.5-large, cogvideox-2b, cogvideox-5b, tiny-… or a pipeline folder")
    world_size: int = option(8, "GPUs")
    gpu_gb: float = option(80.0, "memory of each, in GB of 1e9 bytes")
    batch_size: int | None = option(None, "global; default: one sample a GPU and micro-batch")
    resolution: str | None = option(None, "pixels, 1024 or 480x720 (height x width); default: the model's own")
    frames: int | None = option(None, "video frames; default: the model's own")
    fake_gradient: Literal["exact", "straight-through"] = option("exact", "as in adm.py")
    head_width: int = option(256, "channels of the discriminator's heads")
    lora_rank: int = option(0, "LoRA adapters of this rank on one shared base; 0: full networks")
    ema: float = option(0.0, "decay of the student's average; 0: none")
    accumulate: int = option(1, "micro-batches that the batch is split into")
    gradient_checkpointing: bool = option(False, "recompute activations in backward")
    offload: bool = option(False, "AdamW's moments in main memory between steps")


def part(parameters, world):
    """Bytes of one rank's part: FSDP cuts the first dimension, and pads the last rank's."""
    return sum(-(-len(p) // world) * p[0].numel() * p.element_size() for p in parameters)


def build(family, lora_rank=0, head_width=256, frozen_dtype=torch.bfloat16, gradient_checkpointing=False):
    """(teacher, student, fake, discriminator), by the code that training builds them with, on the meta device."""
    roles = make_roles(family, ("student", "fake"), lora_rank, "meta", frozen_dtype, gradient_checkpointing)
    with torch.device("meta"):
        return *roles, LatentDiscriminator(roles[0], head_width)


def states(roles, world, ema=0.0):
    """{role: {"parameters": their number, and in bytes a rank "weights", "gradients", "optimizer", "ema"}}."""
    teacher, student, fake, discriminator = roles
    trained = {"student": student.own_parameters().values(), "fake": fake.own_parameters().values(),
               "heads": discriminator.heads.parameters()}
    trained = {name: list(parameters) for name, parameters in trained.items()}
    adapters = {id(p) for parameters in trained.values() for p in parameters}
    rows = {"teacher": {"weights": [p for p in teacher.net.parameters() if id(p) not in adapters]}}
    for name, ps in trained.items():
        rows[name] = {"weights": ps, "gradients": ps, "optimizer": ps + ps, "ema": ps if name == "student" and ema else []}
    counted = {name: {"parameters": sum(p.numel() for p in row["weights"]), **{k: part(ps, world) for k, ps in row.items()}}
               for name, row in rows.items()}
    buffers = {id(b): b.nbytes for role in roles[:3] for b in role.net.buffers()}
    return {**counted, "buffers": {"parameters": 0, "weights": sum(buffers.values())}}  # FSDP leaves these whole on every rank


class Attention(torch.autograd.Function):
    """What flash attention leaves for backward: its inputs, its output, one number a query and head."""
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v, out := torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class FlashAttention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k, v = [*args, *(kwargs[n] for n in ("query", "key", "value") if n in (kwargs or {}))][:3]
            return Attention.apply(q, k, v)
        return func(*args, **(kwargs or {}))


class Saved:
    """Inside, counts what autograd keeps for backward, each storage once, the modules' own not."""
    def __init__(self, *modules):
        self.seen, self.bytes = {x.untyped_storage()._cdata for m in modules for x in (*m.parameters(), *m.buffers())}, 0
        self.keep = []  # so that no id comes twice

    def pack(self, x):
        key = x.untyped_storage()._cdata
        if key not in self.seen:
            self.seen.add(key), self.keep.append(x)
            self.bytes += x.untyped_storage().nbytes()
        return x

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def activations(family, roles, shape, batch, fake_gradient="exact", checkpointing=False):
    """({"student", "fake", "discriminator": bytes that wait for the generator's backward}, the most of one block), for a batch."""
    teacher, student, fake, discriminator = roles
    for role in (teacher, student, fake):
        role.net.bfloat16()
    cond = {name: torch.empty(batch, *s, dtype=torch.bfloat16, device="meta") for name, s in family.cond_shapes().items()}
    x, t = torch.empty(batch, *shape, dtype=torch.bfloat16, device="meta"), torch.empty(batch, device="meta")
    counted, before, blocks = {}, {}, [0]
    units = family.units(student.net)
    units = [u for u in units if not any(v is not u and v in units for v in u.modules())]  # innermost: what is checkpointed
    hooks = [u.register_forward_pre_hook(lambda u, args: before.update({u: saved.bytes})) for u in units]
    hooks += [u.register_forward_hook(lambda u, args, out: blocks.append(saved.bytes - before[u])) for u in units]
    with FlashAttention(), Saved(*roles) as saved, frozen(fake, discriminator.heads):
        x_t = student(x, t, cond)[0].bfloat16()
        counted["student"] = saved.bytes
        with torch.set_grad_enabled(fake_gradient == "exact"):
            out = fake(x_t, t, cond)[0].bfloat16()
        counted["fake"] = saved.bytes - sum(counted.values())
        discriminator.logits(discriminator.features(x_t + out, t, cond))
        counted["discriminator"] = saved.bytes - sum(counted.values())
    for hook in hooks:
        hook.remove()
    return counted, max(blocks)


def gathered(family, net, world):
    """Bytes of the bf16 weights that a pass holds: the largest unit and, on its way, the next; on one GPU nothing is gathered."""
    sizes, counted = [], set()
    for unit in (*family.units(net), net):  # inner ones first: each has what they leave
        own = {id(p): p.numel() for p in unit.parameters() if id(p) not in counted}
        counted |= own.keys()
        sizes.append(2 * sum(own.values()))
    return 2 * max(sizes) if world > 1 else 0


def plan(cfg):
    at_least(1, cfg, "world_size", "accumulate", "batch_size", "head_width")
    at_least(0, cfg, "lora_rank")
    require(0 <= cfg.ema < 1, f"--ema {cfg.ema}: in [0, 1)")
    require(cfg.gpu_gb > 0, f"--gpu-gb {cfg.gpu_gb}: a positive number")
    family = load_teacher(cfg.model, random_init=cfg.model in HUB)
    shape, parts = family.latent_shape(cfg.resolution, cfg.frames), cfg.world_size * cfg.accumulate
    each = (cfg.batch_size or parts) // parts
    require(each >= 1 and each * parts == (cfg.batch_size or parts), f"--batch-size {cfg.batch_size}: no multiple of {parts}")
    roles = build(family, cfg.lora_rank, cfg.head_width)
    rows = states(roles, cfg.world_size, cfg.ema)
    columns = ["weights", "gradients", "optimizer", "ema"]
    sums = {c: sum(row.get(c, 0) for row in rows.values()) for c in columns}
    passing, what = gathered(family, roles[1].net, cfg.world_size), "gathered"
    if cfg.world_size == 1 and not cfg.lora_rank:  # autocast's bf16 copies of float32 weights, as long as the graph is there
        passing, what = 2 * sum(rows[name]["parameters"] for name in ("student", "fake")), "bf16 copies"
    full, block = activations(family, roles, shape, each, cfg.fake_gradient)
    if cfg.gradient_checkpointing:
        roles = build(family, cfg.lora_rank, cfg.head_width, gradient_checkpointing=True)
        full = {**activations(family, roles, shape, each, cfg.fake_gradient)[0], "one block, made again": block}
    waiting = sum(full.values())
    gradients = sums["gradients"]  # all are there before the first network steps
    step = gradients + max(row.get("optimizer", 0) for row in rows.values())
    peak = sums["weights"] + sums["ema"] + (max(gradients + waiting + passing, step) if cfg.offload
                                            else sums["optimizer"] + gradients + waiting + passing)
    largest = max(full, key=full.get)
    print(f"{cfg.model}, {'x'.join(map(str, shape))} latents, {each} a GPU x {cfg.world_size} GPUs"
          + f" x {cfg.accumulate} micro-batches" * (cfg.accumulate > 1) + f"; GB (1e9 bytes) on each:")
    print(f"{'':14}{'parameters':>11}" + "".join(f"{c:>11}" for c in columns))
    for name, row in [*rows.items(), ("sum", {"parameters": sum(r["parameters"] for r in rows.values()), **sums})]:
        count = f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else ""
        print((f"{name:14}{count:>11}" + "".join(f"{row[c] / 1e9:11.2f}" if row.get(c) else f"{'':11}" for c in columns)).rstrip())
    print(f"{'activations':14}{waiting / 1e9:.2f} in the generator's step, most of it {largest} ({full[largest] / 1e9:.2f})")
    print(f"{what:14}{passing / 1e9:.2f} of weights, for a pass" + "; moments are in main memory between steps" * cfg.offload)
    if cfg.world_size > 1:  # see Family.network
        whole = 4 * cfg.world_size * max(row["parameters"] for row in rows.values())
        print(f"{'loading':14}{whole / 1e9:.0f} of main memory, if all ranks are on one node")
    print(f"{'peak':14}{peak / 1e9:.2f} of {cfg.gpu_gb:g}: {'it fits' if peak <= cfg.gpu_gb * 1e9 else 'it does not fit'}")


def main():
    run(plan, Config, prog="plan.py", description=__doc__)


if __name__ == "__main__":
    main()
