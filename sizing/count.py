"""Counts what networks hold and what autograd keeps, on networks without storage.

Weights, gradients, moments and the average are exact. Activations are those that autograd saves in
the passes of adm.py and adp.py, in bf16 with memory-efficient attention. Kernels' workspace and
fragmentation come on top.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from families import tiny
from models import Denoiser, LatentDiscriminator, PixelDiscriminator, frozen, make_roles
from ode import with_guidance

BF16 = 2  # bytes
ADVERSARIAL = ("adm", "adp")  # losses under which the heads learn


class Parts(NamedTuple):
    """The networks of a stage, on the meta device."""

    teacher: Denoiser
    student: Denoiser
    fake: Denoiser | None  # of ADM
    latent: LatentDiscriminator
    pixel: PixelDiscriminator | None  # of ADP
    vae: torch.nn.Module | None  # decodes for it

    def networks(self):
        """The denoisers that train, by name."""
        if self.fake is None:
            return {"student": self.student}
        return {"student": self.student, "fake": self.fake}

    def discriminators(self):
        return [d for d in (self.latent, self.pixel) if d is not None]

    def resting(self):
        """What takes no gradient in the generator's phase."""
        heads = [d.heads for d in self.discriminators()]
        return [*heads, self.fake] if self.fake else heads


def build(family, cfg, frozen_dtype=torch.bfloat16):
    """The Parts that a run of adm.py or adp.py with the settings `cfg` makes, by its own code."""
    checkpointing = cfg.gradient_checkpointing
    is_adm = hasattr(cfg, "fake_gradient")
    names = ("student", "fake") if is_adm else ("student",)
    roles = make_roles(family, names, cfg.lora_rank, "meta", frozen_dtype, checkpointing)
    teacher, student, fake = roles if is_adm else (*roles, None)
    pixel = vae = None
    with torch.device("meta"):
        latent = LatentDiscriminator(teacher, cfg.head_width)
    if not is_adm and cfg.pixel and cfg.loss == "adp":
        encoder = vision_encoder(cfg.pixel_backbone).to(frozen_dtype).eval().requires_grad_(False)
        with torch.device("meta"):
            pixel = PixelDiscriminator(encoder, cfg.head_width)
            vae = family.vae_class.from_config(vars(family.vae_config))
        vae = vae.to(frozen_dtype).eval().requires_grad_(False)
        if checkpointing:
            family.recompute(vae)
    return Parts(teacher, student, fake, latent, pixel, vae)


def vision_encoder(name):
    """The network of --pixel-backbone on the meta device; any of the hub is taken for SAM-B."""
    folder = tiny.build(name) if name in ("tiny-sam", "tiny-dinov2") else Path(name)
    config = transformers.SamVisionConfig()
    if folder.is_dir():
        config = transformers.AutoConfig.from_pretrained(folder)
        config = getattr(config, "vision_config", config)
    with torch.device("meta"):
        if config.model_type == "sam_vision_model":
            return transformers.SamVisionModel(config)
        return transformers.AutoModel.from_config(config)


# --- Weights and their companions -----------------------------------------------------------------

COLUMNS = ("weights", "gradients", "moments", "ema")


def part(parameters, sharing):
    """Bytes of one rank's part: FSDP cuts the first dimension, and pads the last rank's."""
    total = 0
    for p in parameters:
        rows = -(-len(p) // sharing)  # rounded up
        total += rows * p[0].numel() * p.element_size()
    return total


def states(parts, cfg, sharing, encoders=()):
    """{role: {"parameters": their number; "weights", "gradients", "moments", "ema": bytes}}.

    Bytes are a rank's, of `sharing` that hold a network together. What a role has none of is
    absent. encoders: of text, of --embed live.
    """
    trained = {name: list(net.own_parameters().values()) for name, net in parts.networks().items()}
    trained["heads"] = [p for d in parts.discriminators() for p in d.heads.parameters()]
    adapters = {id(p) for parameters in trained.values() for p in parameters}
    base = [p for p in parts.teacher.net.parameters() if id(p) not in adapters]
    rows = {"teacher": {"parameters": sum(p.numel() for p in base), "weights": part(base, sharing)}}
    for name, parameters in trained.items():
        size = part(parameters, sharing)
        rows[name] = {"parameters": sum(p.numel() for p in parameters), "weights": size}
        if name != "heads" or cfg.loss in ADVERSARIAL:
            rows[name]["gradients"] = size
            rows[name]["moments"] = 2 * size  # AdamW's two
    if cfg.ema:
        rows["student"]["ema"] = rows["student"]["weights"]
    # Every rank has the whole of these.
    if parts.pixel:
        whole = [*parts.vae.parameters(), *parts.pixel.backbone.parameters()]
        size = sum(p.numel() for p in whole)
        rows["VAE, encoder"] = {"parameters": size, "weights": part(whole, 1)}
    if encoders:
        live = [p for encoder in encoders for p in encoder.parameters()]
        size = sum(p.numel() for p in live)
        rows["text encoders"] = {"parameters": size, "weights": part(live, sharing)}
    nets = [parts.teacher, *parts.networks().values()]
    buffers = {id(b): b.nbytes for role in nets for b in role.net.buffers()}
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
        sizes.append(BF16 * sum(own.values()))
    return 2 * max(sizes)


def copies(row, world, lora_rank):
    """Bytes of autocast's copies of a network's float32 weights, which its graph keeps."""
    if world > 1 or lora_rank:
        return 0
    return BF16 * row["parameters"]


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
        self.told = 0  # of them, by `taken`
        self.keep = []  # so that no id comes twice

    def pack(self, x):
        key = x.untyped_storage()._cdata
        if key not in self.seen:
            self.seen.add(key)
            self.keep.append(x)
            self.bytes += x.untyped_storage().nbytes()
        return x

    def taken(self):
        """Bytes since the last call."""
        new = self.bytes - self.told
        self.told = self.bytes
        return new

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class Blocks:
    """Inside, what each of these modules keeps, and what it is given: {module: bytes}."""

    def __init__(self, blocks, saved):
        self.blocks = blocks
        self.saved = saved
        self.kept = {}
        self.given = {}

    def enters(self, block, args):
        self.given[block] = sum(x.nbytes for x in args if isinstance(x, torch.Tensor))
        self.kept[block] = -self.saved.bytes

    def leaves(self, block, args, output):
        self.kept[block] += self.saved.bytes

    def __enter__(self):
        self.hooks = [b.register_forward_pre_hook(self.enters) for b in self.blocks]
        self.hooks += [b.register_forward_hook(self.leaves) for b in self.blocks]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def made_again(blocks, parts):
    """Bytes that backward makes again at a time of Blocks, of which it makes the `parts` singly.

    What enters each part of a block, what lies between them, and one part.
    """
    needs = [0]
    for block in blocks.kept:
        inside = [m for m in block.modules() if m in parts.kept]
        one = max((parts.kept[m] for m in inside), default=0)
        entering = sum(parts.given[m] for m in inside)
        between = blocks.kept[block] - sum(parts.kept[m] for m in inside)
        needs.append(between + entering + one)
    return max(needs)


def innermost(units):
    """Those of the units in which there is no other."""
    return [u for u in units if not any(v is not u and v in units for v in u.modules())]


def decoder_blocks(family, vae):
    """What checkpointing recomputes at a time of a VAE's decoder: a block, or of video a part."""
    if not vae._supports_gradient_checkpointing:  # then see Family.recompute
        return family.parts_of(vae)
    blocks = []
    for block in (vae.decoder.mid_block, *vae.decoder.up_blocks):
        # A video's block checkpoints its resnets one by one.
        parts = block.resnets if hasattr(block, "gradient_checkpointing") else [block]
        blocks += parts
    return blocks


def inputs(family, parts, shape, batch):
    """(x (B, ...) bf16, t (B,), conditioning {name: (B, ...)}), for networks that become bf16."""
    for role in (parts.teacher, *parts.networks().values()):
        role.net.bfloat16()
    like = {"dtype": torch.bfloat16, "device": "meta"}
    shapes = family.cond_shapes()
    cond = {name: torch.empty(batch, *shapes[name], **like) for name in shapes}
    return torch.empty(batch, *shape, **like), torch.empty(batch, device="meta"), cond


def generator_pass(family, parts, cfg, x, t, cond):
    """The generator's forward, network by network: yields (its name, what it ends in)."""
    x0_hat = parts.student(x, t, cond)[0]  # (B, ...) float32
    yield "student", x0_hat
    x_fake = x0_hat.bfloat16()  # (B, ...)
    if parts.fake:
        through = cfg.loss == "adm" and cfg.fake_gradient == "exact"
        with torch.set_grad_enabled(through):
            x_fake = x_fake + parts.fake(x_fake, t, cond)[0].bfloat16()
        yield "fake", x_fake
    if parts.pixel:
        images = family.views(parts.vae, x0_hat, (0.0, 0.0, 0.5))  # (N, 3, H, W) float32
        yield "VAE", images
        yield "encoder", parts.pixel.logits(parts.pixel.features(images))
    if cfg.loss in ADVERSARIAL:
        yield "discriminator", parts.latent.logits(parts.latent.features(x_fake, t, cond))


def activations(family, parts, cfg, shape, batch):
    """({phase: {network: bytes that wait for its backward}}, {network: the most of one block}).

    shape: of one latent; batch: samples at a time. In the order of forward.
    """
    x, t, cond = inputs(family, parts, shape, batch)
    modules = [module for module in parts if module is not None]
    saved = Saved(*modules)
    waiting = {}  # of the generator's phase
    of_student = Blocks(innermost(family.units(parts.student.net)), saved)
    of_vae = Blocks(decoder_blocks(family, parts.vae) if parts.vae else [], saved)
    of_parts = Blocks(family.parts_of(parts.vae) if parts.vae else [], saved)
    with FlashAttention(), of_student, of_vae, of_parts, saved:
        with frozen(*parts.resting()):
            for network, _ in generator_pass(family, parts, cfg, x, t, cond):
                waiting[network] = saved.taken()
        phases = {"generator": waiting}
        if parts.fake:
            parts.fake(x, t, cond)
            phases["fake score"] = {"fake": saved.taken()}
    block = max(of_student.kept.values())  # the others' are like it
    blocks = {
        "student": block,
        "fake": block,
        "discriminator": block,
        "VAE": made_again(of_vae, of_parts),
        "encoder": 0,
    }
    return phases, blocks


# --- Work -----------------------------------------------------------------------------------------


def flops(family, parts, cfg, shape, guided):
    """{what runs: FLOPs for one sample}, of the stage's passes, by their own backward.

    What checkpointing computes again is counted; AdamW is not. guided: the teacher runs twice. A
    "step before" is one of the student's without gradient.
    """
    x, t, cond = inputs(family, parts, shape, 1)

    def teacher():
        with torch.no_grad():
            with_guidance(parts.teacher, cond, cond, 2.0 if guided else 1.0)(x, t)

    def step_before():
        with torch.no_grad():
            parts.student(x, t, cond)

    def regression():
        parts.student(x, t, cond)[0].sum().backward()

    def generator():
        with frozen(*parts.resting()):
            ends = dict(generator_pass(family, parts, cfg, x, t, cond))
            judged = [ends[name] for name in ("discriminator", "encoder") if name in ends]
            sum(end.sum() for end in judged or [ends["student"]]).backward()

    def discriminator():
        with torch.no_grad():
            maps = [parts.latent.features(x, t, cond)]
            if parts.pixel:
                images = family.views(parts.vae, x.float(), (0.0, 0.0, 0.5))  # (N, 3, H, W)
                maps.append(parts.pixel.features(images))
        for d, m in zip(parts.discriminators(), maps, strict=True):
            (d.logits(m) + d.logits(m)).sum().backward()  # the heads run on x_fake's maps too

    def fake_score():
        parts.fake(x, t, cond)[0].sum().backward()

    running = {"teacher": teacher}
    if parts.fake:
        running |= {"step before": step_before, "fake score": fake_score}
    else:
        running["regression"] = regression
    if parts.fake or cfg.loss in ADVERSARIAL:
        running["generator"] = generator
    if cfg.loss in ADVERSARIAL:
        running["discriminator"] = discriminator
    counted = {}
    for name, work in running.items():
        with FlopCounterMode(display=False) as counter:
            work()
        counted[name] = counter.get_total_flops()
    return counted
