"""Counts what networks hold, and the FLOPs of passes, on networks without storage.

Weights, gradients, moments and the average are exact.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from families import tiny
from models import Denoiser, LatentDiscriminator, PixelDiscriminator, frozen, make_roles
from ode import with_guidance

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
            pixel.recompute()
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


# --- Work -----------------------------------------------------------------------------------------


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
