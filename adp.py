"""Stage 1 of DMDX: Adversarial Distillation Pre-training (ADP).

Lu et al., ICCV 2025, arXiv 2507.18569. The student learns to jump along the teacher's ODE pairs
(x_T, x_0): first by regression on the straight line's velocity, then against two discriminators,
D_τ1 on noised latents (heads on the frozen teacher) and D_τ2 on decoded images (heads on a frozen
SAM). That gives stage 2, adm.py, a student whose samples already overlap with the teacher's.

    python data.py pairs && python adp.py     # a small teacher of digits, offline, CPU: minutes
    torchrun --nproc_per_node=8 adp.py --model sdxl --pairs out/pairs-sdxl --out out/adp-sdxl

Expect loss_mse to fall and level out in the first phase, and both accuracies between 0.5 and 1 in
the second. Whatever the teacher predicts, the student predicts a flow from here on: config.json
says so and the exported scheduler knows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F

from data import Pairs, encode_prompts, pairs_shape, read_prompts
from families import load_teacher, recipes
from families.export import export_pipeline
from models import (
    Denoiser,
    LatentDiscriminator,
    PixelDiscriminator,
    accuracy,
    frozen,
    load_pixel_backbone,
    make_roles,
)
from ode import Draw, Schedule, T, common, on_the_line
from runtime.configs import TrainingConfig, check_training
from runtime.files import tensors_sha256
from runtime.flags import option
from runtime.folder import Run, starting_point
from runtime.optimize import backward, follow, make_optimizers, step
from runtime.ranks import Ranks
from runtime.script import run
from runtime.settings import at_least, positive
from runtime.sheets import Sheets
from sizing.plan import must_fit

# --- Losses ---------------------------------------------------------------------------------------
# Logits are lists of (B,) or (N,) float32, one a discriminator, each with its λ.


def line_times(u, schedule):
    """u ~ U[0, T], (B,), to the student's times (arXiv 2507.18569, ADP's schedule).

    cubic, the paper's: t = [1 − (u/T)³]·T, biased to noise. uniform: t = u.
    """
    if schedule == "cubic":
        return (1 - (u / T) ** 3) * T
    return u


def velocity_loss(v, x_0, x_T):
    """Pre-training: E|v − (x_T − x_0)|² on the pairs' straight line, as in rectified flow."""
    return F.mse_loss(v.float(), x_T.float() - x_0.float())


def discriminator_loss(real, fake, lambdas):
    """ADP's hinge: Σ_i λ_i (E[max(0, 1 − D_i(real))] + E[max(0, 1 + D_i(fake))])."""
    hinges = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return sum(w * hinge for w, hinge in zip(lambdas, hinges, strict=True))


def generator_loss(fake, lambdas):
    """ADP's generator: −Σ_i λ_i E[D_i(fake)]."""
    return -sum(w * f.mean() for w, f in zip(lambdas, fake, strict=True))


# --- The algorithm --------------------------------------------------------------------------------


class Players(NamedTuple):
    """Who takes part, on which noise process each lives, and with which weights."""

    student: Denoiser  # G_θ
    discriminators: list  # D_τ1 on noised latents and, with --pixel, D_τ2 on images: heads train
    lambdas: list  # λ_1, λ_2
    heads: torch.nn.Module  # both discriminators'
    line: Schedule  # of the student
    schedule: Schedule  # the teacher's, on which D_τ1 lives
    decoded: Callable  # latents (B, ...) → images (N, 3, H, W) for D_τ2, differentiable


def adp_iteration(net, cfg, draw, x_0, x_T, cond, regresses, learn):
    """One iteration of ADP on B pairs, with a gradient for every network that learns.

    x_0, x_T (B, ...): the pairs. learn(loss) adds a loss's gradient to the others'. Returns what
    the log shows.
    """
    # 1. The student's input on the pair's line, its velocity, its sample x̃_0.
    t = line_times(draw.uniform(0, T), cfg.schedule)  # (B,)
    x_t = net.line.add_noise(x_0, x_T, t)  # (B, ...)
    v = net.student(x_t, net.line.shown(t), cond)[0]  # (B, ...)
    x0_hat = net.line.to_x0_eps(x_t, v, t)[0]  # (B, ...)
    loss_mse = velocity_loss(v, x_0, x_T)
    spread = x0_hat.flatten(1).std(1).mean()
    log = {"loss_mse": loss_mse, "x0_mean": x0_hat.mean(), "x0_std": spread}

    # 2. First the student learns by regression alone.
    if regresses:
        learn(loss_mse)
        return log | {"loss_generator": loss_mse}

    # 3. Then both samples are noised to the same t' ~ U[0, T], with independent noise.
    t = draw.uniform(0, net.schedule.t_noise)  # (B,)
    x_fake = net.schedule.add_noise(x0_hat, draw.normal(x_0.shape[1:]), t)  # (B, ...)
    x_real = net.schedule.add_noise(x_0, draw.normal(x_0.shape[1:]), t)  # (B, ...)

    # 4. Generator: heads are frozen; the gradient runs through the frozen teacher to the latents,
    #    through the frozen SAM and the VAE's decoder from clean images.
    with frozen(net.heads):
        maps_fake = features(net, x_fake, t, cond, x0_hat)
        loss_g = generator_loss(logits(net, maps_fake), net.lambdas)
        learn(loss_g)

    # 5. Discriminators: the heads learn, on the same features of the student's samples.
    with torch.no_grad():
        maps_real = features(net, x_real, t, cond, x_0)
    real = logits(net, maps_real)
    fake = logits(net, [[h.detach() for h in maps] for maps in maps_fake])
    loss_d = discriminator_loss(real, fake, net.lambdas)
    learn(loss_d)

    right = [accuracy(r, f) for r, f in zip(real, fake, strict=True)]
    log |= {"loss_generator": loss_g, "loss_discriminator": loss_d}
    return log | dict(zip(("d_accuracy", "d_accuracy_pixel"), right, strict=False))


def features(net, noised, t, cond, clean):
    """[D_τ1's maps of noised latents, D_τ2's of the decoded clean ones], as many as there are."""
    of_images = []
    # First: so backward comes to the decoder when D_τ1's graph is gone.
    if len(net.discriminators) == 2:
        of_images = [net.discriminators[1].features(net.decoded(clean))]
    return [net.discriminators[0].features(noised, t, cond), *of_images]


def logits(net, maps):
    """[(B,), (N,)]: each discriminator's, of its maps."""
    return [d.logits(m) for d, m in zip(net.discriminators, maps, strict=True)]


# --- Settings -------------------------------------------------------------------------------------


@dataclass
class Config(TrainingConfig):
    """ADP's settings, beside those of every training run (runtime/configs.py)."""

    pairs: str = option(
        "out/pairs", "folder made by `data.py pairs` with the same model", "what to distil"
    )
    resolution: str | None = option(
        None,
        "pixels, 1024 or 480x720: checked against the pairs; default: theirs",
        "what to distil",
    )
    frames: int | None = option(
        None, "video frames: checked against the pairs; default: theirs", "what to distil"
    )
    guidance: float | None = option(
        None,
        "CFG scale: checked against the pairs, which have it in them; default: theirs",
        "what to distil",
    )
    student_steps: int = option(
        1, "steps of the exported student's sampler; ADP is made for 1", "what to distil"
    )
    loss: Literal["adp", "mse"] = option(
        "adp", "regression, then adversaries; or regression throughout (ablation A1)", "the method"
    )
    schedule: Literal["cubic", "uniform"] = option(
        "cubic", "where on the line the student trains", "the method"
    )
    pixel: bool = option(
        True, "use the pixel discriminator, which needs the VAE decoder in memory", "the method"
    )
    pixel_backbone: str = option(
        "facebook/sam-vit-base",
        "its vision encoder: a hub id or a folder (DINOv2: ablation A2), tiny-sam or tiny-dinov2",
        "the method",
    )
    lambda_latent: float = option(0.85, "λ_1, weight of the latent discriminator", "the method")
    lambda_pixel: float = option(0.15, "λ_2, weight of the pixel discriminator", "the method")
    mse_iterations: int = option(
        25,
        "the first of them, by velocity regression (the paper does not say how many: ours)",
        "the method",
    )
    lr_mse: float | None = option(
        None,
        "the student's in regression, which bears more than adversaries do (ours); default: "
        "--lr-student",
        "training",
    )
    out: str = option("out/adp", "folder to write; must be empty, or a run to --resume", "output")
    RECIPES: ClassVar = recipes.ADP  # defaults of a model: families/recipes.py
    PAPER: ClassVar = recipes.ADP_PAPER


STAGE = 1  # of the seeds' keys: other random numbers than in adm.py (2) and data.py (0)
COLUMNS = {  # of log.csv, beside those of every run (runtime/folder.py): means over the batch
    "loss_generator": "what the student descends: regression, then −Σ λ_i E[D_i(x̃_0)]",
    "loss_discriminator": "Σ λ_i of both hinges",
    "loss_mse": "regression's loss, in both phases",
    "d_accuracy": "share of latents that D_τ1 tells apart: 0.5 is chance, 1: it has won",
    "d_accuracy_pixel": "of images, D_τ2",
    "grad_norm_student": "before clipping",
    "grad_norm_heads": "before clipping",
    "x0_mean": "of the student's latents: drift here comes before bad pictures",
    "x0_std": "within one of them",
}


def check(cfg):
    """Raises BadInput for settings without meaning, before anything is loaded or written."""
    check_training(cfg)
    at_least(0, cfg, "mse_iterations", "lambda_latent", "lambda_pixel")
    positive(cfg, "lr_mse")


# --- The loop -------------------------------------------------------------------------------------


def main(cfg):
    check(cfg)
    must_fit(cfg, pairs_shape(cfg.pairs))
    family = load_teacher(cfg.model, cfg.random_init)
    use_pixel = cfg.pixel and cfg.loss == "adp"
    if use_pixel:
        backbone = load_pixel_backbone(cfg.pixel_backbone, cfg.random_init)
    ranks = Ranks(cfg.shard_ranks)
    parts = ranks.mine(cfg.batch_size, cfg.accumulate, cfg.samples)
    pairs = Pairs(cfg.pairs, family, ranks.device, cfg.resolution, cfg.frames, cfg.guidance)
    embeddings = Path(cfg.out) / "prompts"
    texts = read_prompts(pairs.prompts, family, embeddings, ranks, cfg.embed)
    pairs.check_text(texts)
    schedule = family.schedule_at(pairs.shape)
    line = on_the_line(schedule)  # the student's process
    _, weights = starting_point(cfg.init, family, schedule, cfg.lora_rank)
    facts = {"pairs": pairs.content()}
    if use_pixel:
        facts["pixel_backbone"] = {"weights_sha256": tensors_sha256(backbone.state_dict())}
    here = Run("adp", cfg, ranks, family, line, cfg.student_steps, **facts)

    if cfg.loss == "adp" and cfg.mse_iterations >= cfg.iterations:
        here.say(f"regression in all of its {cfg.iterations} iterations (--mse-iterations)")
    prompts = encode_prompts(family, texts, embeddings, ranks, cfg.embed)

    torch.manual_seed(cfg.seed)  # initial weights of the heads, and of LoRA adapters
    teacher, student = make_roles(
        family,
        ("student",),
        cfg.lora_rank,
        ranks.device,
        ranks.frozen_dtype,
        cfg.gradient_checkpointing,
        ranks.mesh,
    )
    if weights:
        student.load(weights)
    discriminators = [LatentDiscriminator(teacher, cfg.head_width, ranks.mesh).to(ranks.device)]
    lambdas = [cfg.lambda_latent]
    vae = None
    if use_pixel:
        vae = family.vae(ranks.device, ranks.frozen_dtype)
        backbone.to(ranks.frozen_dtype)
        pixel_disc = PixelDiscriminator(backbone, cfg.head_width, ranks.mesh).to(ranks.device)
        if cfg.gradient_checkpointing:
            family.recompute(vae)
            pixel_disc.recompute()
        discriminators.append(pixel_disc)
        lambdas.append(cfg.lambda_pixel)
    heads = torch.nn.ModuleList(d.heads for d in discriminators)

    networks = {"student": student.own_parameters(), "heads": dict(heads.named_parameters())}
    rates = {"student": cfg.lr_student, "heads": cfg.lr_heads}
    optimizers = make_optimizers(networks, rates, cfg)
    if cfg.ema:
        networks["ema"] = {name: p.detach().clone() for name, p in student.own_parameters().items()}
    first = here.restore(networks, optimizers)
    made = pairs.manifest
    how = (pairs.shape, made["guidance"], made["steps"], len(parts[0]))
    sheets = Sheets(here, student, teacher, prompts, *how)

    def learn(loss):
        backward(loss, len(parts))

    for iteration in here.iterations(first):
        began, logs = time.perf_counter(), []
        regresses = cfg.loss == "mse" or iteration < cfg.mse_iterations
        for group in optimizers["student"].param_groups:
            group["lr"] = cfg.lr_mse if regresses and cfg.lr_mse else cfg.lr_student
        # Which frames of a video the pixel discriminator sees is the same on all ranks.
        u = common(cfg.seed, STAGE, iteration).random(3)
        decoded = partial(family.views, vae, u=u)
        net = Players(student, discriminators, lambdas, heads, line, schedule, decoded)
        for samples in parts:  # micro-batches: gradients add up, and only then the networks step
            draw = Draw((cfg.seed, STAGE, iteration), samples, ranks.device)
            numbers = draw.integers(len(pairs))  # (B,)
            x_T, x_0, cond = pairs.batch(numbers, prompts)  # (B, ...) each
            log = adp_iteration(net, cfg, draw, x_0, x_T, cond, regresses, learn)
            logs.append(dict.fromkeys(COLUMNS) | log)
        for name in ("student", *["heads"] * (not regresses)):
            logs[-1][f"grad_norm_{name}"] = step(optimizers[name], cfg.clip)

        if cfg.ema:
            follow(networks["ema"], networks["student"], cfg.ema)
        here.record(iteration + 1, logs, began)
        if here.due(cfg.sample_every, iteration):
            sheets.draw(iteration + 1, networks)
        if here.stop or here.due(cfg.checkpoint_every, iteration):
            here.save(iteration + 1, networks, optimizers)
        if here.stop:
            raise here.stop  # on all ranks: one line, and the exit code
    here.finish(networks, partial(export_pipeline, student, line, cfg.student_steps, pairs.shape))


if __name__ == "__main__":
    run(main, Config, description=__doc__)
