"""Stage 2 of DMDX: Adversarial Distribution Matching (Lu et al., ICCV 2025, arXiv 2507.18569), and DMD as its baseline.

A student G_θ makes x̂_0 in one or a few steps. It is noised to x_t; from that same x_t the frozen teacher F_φ (with CFG) and
the fake score f_ψ (trained on the student's samples) each take one PF-ODE step of length Δt, and a discriminator D_τ, heads
on the frozen teacher, learns to tell where they land. The student is trained to make the two indistinguishable.

    python adm.py                                                          # a small teacher of digits, offline, CPU: a minute
    python adm.py --model sd3 --out out/sd3 --iterations 8000              # one GPU
    torchrun --nproc_per_node=8 adm.py --model sdxl --init out/adp-sdxl --batch-size 32 --out out/dmdx-sdxl

Expect d_accuracy between 0.5 and 1, neither end for long. Writes config.json, log.csv, samples/, checkpoints/ and pipeline/.
"""

import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch, torch.nn.functional as F
from tqdm import tqdm

from data import DIGITS_PROMPTS, PROMPTS, OffloadedAdamW, Ranks, Run, at_least, encode_prompts
from data import option, run, starting_point, text_sha256
from models import LatentDiscriminator, backward, follow, frozen, load_teacher, make_roles
from models import require, step
from ode import Draw, T, common, student_input, student_sample, with_guidance


@dataclass
class Config:
    model: str = option("digits", "teacher: digits, sdxl, sd3, sd3.5-large, cogvideox-2b, cogvideox-5b, tiny-… or a pipeline folder")
    random_init: bool = option(False, "random weights instead of the hub's, at full size, and noise for text embeddings")
    prompts: str = option(PROMPTS, "UTF-8 text file, one prompt a line, or a folder made by `data.py encode`")
    out: str = option("out/adm", "folder to write; must be empty, or a run to --resume")
    init: str = option("teacher", "where the student starts: teacher, or the folder of an adp.py (or adm.py) run")
    iterations: int = option(50, "generator updates; paper: 8000 to 16000 for CogVideoX")
    batch_size: int = option(4, "global, whatever the number of ranks (ours)")
    seed: int = option(0, "of everything random")
    resolution: str | None = option(None, "pixels, 1024 or 480x720 (height x width); default: the model's own")
    frames: int | None = option(None, "video frames; default: the model's own")
    loss: Literal["adm", "dmd"] = option("adm", "how the student learns: the paper's adversary, or DMD's reverse KL")
    student_steps: int | None = option(None, "student's steps; default: the paper's for the model, SDXL 1, others 4")
    guidance: float | None = option(None, "teacher's CFG scale w in u + w (c - u); default: the stock pipeline's for the model")
    ttur: int = option(1, "discriminator and fake-score updates for each generator update (paper: 1)")
    warmup: int = option(0, "the first iterations, in which the student rests and fake score and discriminator learn it (ours)")
    dt: float = option(1 / 64, "length of the PF-ODE step, as a fraction of T (paper: 1/64)")
    t_min: float = option(0.02, "least time that a PF-ODE step lands on, as a fraction of T (ours)")
    t_max: float = option(0.98, "greatest time that a PF-ODE step starts from, as a fraction of T (ours)")
    fake_gradient: Literal["exact", "straight-through"] = option(
        "exact", "through the frozen fake network, as in the paper, or around it (ours: cheaper, see README)")
    fake_samples: Literal["each", "last"] = option("each", "several steps: fake learns x̂_0 of the step that trains, or the last's (ours)")
    t_weight: Literal["none", "1/alpha"] = option("none", "weight of the generator loss in t (ours; the paper has none)")
    damping: float = option(0.0, "weight of a zero-centred gradient penalty on D, by finite differences (ours; paper: none)")
    damping_sigma: float = option(0.01, "length of that finite difference, in units of x_t")
    head_width: int = option(256, "channels of the discriminator's heads (paper: 256)")
    lora_rank: int = option(0, "train LoRA adapters of this rank on one shared base; 0: full networks")
    lr_student: float = option(1e-6, "learning rate of the student (ours: well below the heads')")
    lr_fake: float = option(2e-6, "learning rate of the fake score (ours)")
    lr_heads: float = option(1e-4, "learning rate of the discriminator's heads (ours)")
    beta1: float = option(0.9, "AdamW's β1 (ours; peers use 0 or 0.9, and heads learnt too little at 0)")
    ema: float = option(0.0, "decay of an average of the student's weights, which is what is exported; 0: none (ours; paper: none)")
    clip: float = option(1.0, "gradient norm at which each network's update is clipped (ours)")
    accumulate: int = option(1, "micro-batches that the batch is split into: less memory, the same updates")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, more time")
    offload: bool = option(False, "keep AdamW's moments in main memory between steps: less GPU memory, more time")
    checkpoint_every: int = option(25, "iterations between checkpoints")
    keep_checkpoints: int = option(2, "how many of the last checkpoints stay")
    sample_every: int = option(25, "iterations between picture grids; 0: none")
    resume: bool = option(False, "continue the run in --out")
    DIGITS: ClassVar = {  # defaults with --model digits: see the README, what we learnt
        "prompts": DIGITS_PROMPTS, "iterations": 250, "batch_size": 16, "guidance": 1.0, "warmup": 60, "dt": 1 / 4,
        "fake_gradient": "straight-through", "fake_samples": "last", "damping": 0.1, "damping_sigma": 0.05, "head_width": 64,
        "lr_student": 3e-6, "lr_fake": 3e-4, "lr_heads": 2e-4, "ema": 0.99, "checkpoint_every": 125, "sample_every": 125}


STAGE = 2  # of the seeds' keys: other random numbers than in adp.py (1) and data.py (0)
COLUMNS = ("loss_generator", "loss_discriminator", "loss_fake", "dmd_loss", "d_accuracy", "grad_norm_student",
           "grad_norm_fake", "grad_norm_heads", "x0_mean", "x0_std")


# --- Losses ----------------------------------------------------------------------------------------------------------
# Logits, weights: (B,) float32. Latents: (B, ...) float32. Each returns a scalar.


def discriminator_loss(real, fake):
    """ADM's hinge (arXiv 2507.18569, Eq. 8 as one reader counts): E[max(0, 1 − D(x_real, t−Δt))] + E[max(0, 1 + D(x_fake, t−Δt))].

    The best D leaves 2 (1 − TV), TV the total variation between the two distributions.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake, weight=None):
    """ADM's generator (arXiv 2507.18569, with the hinge above): −E[D(x_fake, t−Δt)]; `weight` (B,) in t is ours."""
    return -(fake if weight is None else weight * fake).mean()


def fake_score_loss(out, target):
    """The teacher's own diffusion loss, on student samples, in its own prediction type (arXiv 2507.18569; DMD's too)."""
    return F.mse_loss(out.float(), target)


def dmd_loss(x0_hat, x0_real, x0_fake):
    """DMD (arXiv 2311.18828): a loss whose gradient in x̂_0 is the normalised score difference g / numel.

    g = (x0_fake − x0_real) / mean|x̂_0 − x0_real|, per sample; its value, ½ mean g², is what ADM's log shows.
    """
    distance = (x0_hat.detach() - x0_real).abs().flatten(1).mean(1).clamp(min=1e-5)  # (B,)
    g = (x0_fake - x0_real) / distance.view(-1, *[1] * (x0_hat.ndim - 1))
    return 0.5 * F.mse_loss(x0_hat, (x0_hat - g).detach())


def damping_loss(logits, moved, sigma):
    """Zero-centred penalty ½ E[((D(x) − D(x + σε)) / σ)²] ≈ ½ E|∇D|², without a double backward (ours, after APT's R1)."""
    return 0.5 * ((logits - moved) / sigma).square().mean()


def straight_through(x_fake, x0_hat, alpha_s):
    """x_fake's value with the gradient α_s dx̂_0 that the step has at f_ψ's optimum (ours; the paper's is exact)."""
    return x_fake.detach() + alpha_s.view(-1, *[1] * (x0_hat.ndim - 1)) * (x0_hat - x0_hat.detach())


# --- Training --------------------------------------------------------------------------------------------------------


def check(cfg):
    """Raises BadInput for settings without meaning, before anything is loaded or written."""
    at_least(1, cfg, "iterations", "batch_size", "ttur", "student_steps", "accumulate")
    at_least(1, cfg, "checkpoint_every", "keep_checkpoints")
    at_least(0, cfg, "seed", "warmup", "lora_rank", "guidance", "damping", "sample_every")
    for name in ("lr_student", "lr_fake", "lr_heads", "clip", "damping_sigma"):
        require(0 < getattr(cfg, name) < float("inf"), f"--{name.replace('_', '-')} {getattr(cfg, name)}: a positive number")
    require(0 <= cfg.t_min < cfg.t_max <= 1, f"--t-min {cfg.t_min} --t-max {cfg.t_max}: 0 <= t_min < t_max <= 1")
    require(0 < cfg.dt < cfg.t_max - cfg.t_min, f"--dt {cfg.dt}: between 0 and t_max - t_min = {cfg.t_max - cfg.t_min:g}")
    for name in ("beta1", "ema"):
        require(0 <= getattr(cfg, name) < 1, f"--{name} {getattr(cfg, name)}: in [0, 1)")
    require(cfg.head_width >= 8 and cfg.head_width % 8 == 0, f"--head-width {cfg.head_width}: a multiple of 8")


def main(cfg):
    check(cfg)
    family, ranks = load_teacher(cfg.model, cfg.random_init), Ranks()
    text = text_sha256(cfg.prompts, family)
    shape, device, parts = family.latent_shape(cfg.resolution, cfg.frames), ranks.device, ranks.mine(cfg.batch_size, cfg.accumulate)
    steps, guidance = cfg.student_steps or family.student_steps, family.guidance if cfg.guidance is None else cfg.guidance
    schedule = family.schedule  # of teacher, fake and discriminator, always
    student_schedule, weights = starting_point(cfg.init, family, cfg.lora_rank)  # the same, or after ADP the straight line
    here = Run("adm", cfg, ranks, family, student_schedule, steps,
               guidance=guidance, prompts={"text_sha256": text})

    prompts = encode_prompts(family, cfg.prompts, here.folder / "prompts", ranks)
    torch.manual_seed(cfg.seed)  # initial weights of the heads, and of LoRA adapters
    teacher, student, fake = make_roles(
        family, ("student", "fake"), cfg.lora_rank, device, ranks.frozen_dtype, cfg.gradient_checkpointing, ranks.mesh)
    if weights:
        student.load(weights)
    times = student_schedule.timesteps(steps)[:-1].to(device)  # (steps,)
    discriminator = LatentDiscriminator(teacher, cfg.head_width, ranks.mesh).to(device)

    networks = {"student": student.own_parameters(), "fake": fake.own_parameters(),
                "heads": dict(discriminator.heads.named_parameters())}  # what trains, each with its own rate; β2, decay as peers
    rates = {"student": cfg.lr_student, "fake": cfg.lr_fake, "heads": cfg.lr_heads}
    adamw = OffloadedAdamW if cfg.offload else torch.optim.AdamW
    optimizers = {n: adamw(networks[n].values(), rates[n], (cfg.beta1, 0.999), weight_decay=0.01, fused=True) for n in networks}
    if cfg.ema:
        networks["ema"] = {name: p.detach().clone() for name, p in networks["student"].items()}
    first = here.restore(networks, optimizers)

    for iteration in tqdm(range(first, cfg.iterations), cfg.loss, cfg.iterations, initial=first, disable=ranks.no_bar):
        began, logs = time.perf_counter(), []
        # The generator trains in round 0; TTUR's further rounds draw fresh samples for the others. In each round gradients add up
        # over the micro-batches `parts`, and only then every network steps: none is trained on what another's step has changed.
        for r in range(cfg.ttur):
            learns = r == 0 and iteration >= cfg.warmup  # the student
            compares = r == 0 or cfg.loss == "adm"  # teacher with fake; in DMD's further rounds the fake score trains alone
            k = int(common(cfg.seed, STAGE, iteration, r).integers(steps))  # the student's step that trains, the same on all ranks
            for samples in parts:
                logs.append(log := dict.fromkeys(COLUMNS))
                draw = Draw((cfg.seed, STAGE, iteration, r), samples, device)
                cond, uncond = prompts[draw.integers(len(prompts))], prompts.unconditional(len(samples))

                # 1. Sample: x̂_0 = G_θ(x_t', t'). The steps before k run without gradient.
                def predict(x, t, cond=cond):
                    return student(x, t, cond)[0]

                t_in = times[k].expand(len(samples))  # (B,)
                with torch.no_grad():
                    x_in = student_input(predict, student_schedule, draw.normal(shape), times, k, lambda: draw.normal(shape))
                with torch.set_grad_enabled(learns):
                    out = predict(x_in, student_schedule.shown(t_in))
                    x0_hat, eps_hat = student_schedule.to_x0_eps(x_in, out, t_in)  # (B, ...)

                if compares:
                    # 2. Re-diffuse to t ~ U[t_min + Δt, t_max], for DMD U[t_min, t_max]; s = t − Δt is where both branches land.
                    least = cfg.t_min + cfg.dt if cfg.loss == "adm" else cfg.t_min
                    t = draw.uniform(least * T, cfg.t_max * T)  # (B,)
                    s = t - cfg.dt * T
                    x_t = schedule.add_noise(x0_hat, draw.normal(shape), t)

                    # Fake and heads are frozen up to the generator's loss; their activations carry the gradient from D to x̂_0.
                    with frozen(fake, discriminator.heads), torch.set_grad_enabled(learns):
                        # 3. Both branches from the same x_t: the teacher with CFG, without gradient; the fake score, with.
                        with torch.no_grad():
                            out_real = with_guidance(teacher, cond, uncond, guidance)(x_t, t)
                        with torch.set_grad_enabled(learns and cfg.loss == "adm" and cfg.fake_gradient == "exact"):
                            out_fake = fake(x_t, t, cond)[0]
                            x_fake = schedule.pf_ode_step(x_t, out_fake, t, s)

                        # 4. Generator: the student trains. The DMD loss comes from the same passes; ADM logs it without using it.
                        if cfg.loss == "adm":
                            if cfg.fake_gradient == "straight-through":
                                x_fake = straight_through(x_fake, x0_hat, schedule.alpha_sigma(s)[0])
                            maps_fake = discriminator.features(x_fake, s, cond)
                        if r == 0:
                            x0_real, x0_fake = (schedule.to_x0_eps(x_t, o, t)[0].detach() for o in (out_real, out_fake))
                            log["dmd_loss"] = loss = dmd_loss(x0_hat, x0_real, x0_fake)
                            if cfg.loss == "adm":
                                weight = 1 / schedule.alpha_sigma(t)[0].clamp(min=1e-3) if cfg.t_weight == "1/alpha" else None  # (B,)
                                loss = generator_loss(discriminator.logits(maps_fake), weight)
                            log |= {"loss_generator": loss, "x0_mean": x0_hat.mean(), "x0_std": x0_hat.flatten(1).std(1).mean()}
                            if learns:
                                backward(loss, cfg.accumulate)
                            shown = {f"student, step {k + 1} of {steps}": x0_hat, "teacher x0": x0_real, "fake x0": x0_fake}

                # 5. Discriminator: the heads train, on the features that step 4 made of x_fake.
                if cfg.loss == "adm":
                    with torch.no_grad():
                        x_real = schedule.pf_ode_step(x_t, out_real, t, s)
                        maps_real = discriminator.features(x_real, s, cond)
                    logits_real = discriminator.logits(maps_real)  # (B,)
                    logits_fake = discriminator.logits([h.detach() for h in maps_fake])  # (B,)
                    loss_d = log["loss_discriminator"] = discriminator_loss(logits_real, logits_fake)
                    log["d_accuracy"] = ((logits_real > 0).float() + (logits_fake < 0).float()).mean() / 2
                    if cfg.damping:
                        for x, logits in ((x_real, logits_real), (x_fake, logits_fake)):
                            with torch.no_grad():
                                moved = discriminator.features(x + cfg.damping_sigma * draw.normal(shape), s, cond)
                            loss_d = loss_d + cfg.damping * damping_loss(logits, discriminator.logits(moved), cfg.damping_sigma)
                    backward(loss_d, cfg.accumulate)

                # 6. Fake score: f_ψ trains by its diffusion loss on the student's samples, t ~ U[0, T], without CFG.
                # It does not know the student's step: fed "each", it learns the steps' mixture; fed the "last", what the sampler emits.
                x0 = x0_hat.detach()
                if cfg.fake_samples == "last" and k + 1 < steps:
                    with torch.no_grad():
                        x_next = student_schedule.renoised(x0, eps_hat, times[k + 1], lambda: draw.normal(shape))  # (B, ...)
                        x0 = student_sample(predict, student_schedule, x_next, times[k + 1:], lambda: draw.normal(shape))
                t_fake, eps = draw.uniform(0, schedule.t_noise), draw.normal(shape)
                out = fake(schedule.add_noise(x0, eps, t_fake), t_fake, cond)[0]
                log["loss_fake"] = fake_score_loss(out, schedule.to_out(x0, eps, t_fake))
                backward(log["loss_fake"], cfg.accumulate)

            trained = {"student": learns, "heads": cfg.loss == "adm", "fake": True}
            for name in [name for name, trains in trained.items() if trains]:
                log[f"grad_norm_{name}"] = step(optimizers[name], cfg.clip)

        if cfg.ema:
            follow(networks["ema"], networks["student"], cfg.ema)
        here.record(iteration + 1, logs, began)
        if here.due(cfg.sample_every, iteration):
            here.picture(iteration + 1, shown)  # no network runs for it, only the VAE
        if here.stop or here.due(cfg.checkpoint_every, iteration):
            here.save(iteration + 1, networks, optimizers)
        if here.stop:
            raise here.stop  # on all ranks: one line, and the exit code
    here.finish(student, networks, shape)


if __name__ == "__main__":
    run(main, Config, description=__doc__)
