"""Stage 2 of DMDX: Adversarial Distribution Matching (ADM); DMD as its baseline.

Lu et al., ICCV 2025, arXiv 2507.18569. A student G_θ makes x̂_0 in one or a few steps. It is noised
to x_t; from that same x_t the frozen teacher F_φ (with CFG) and the fake score f_ψ (trained on the
student's samples) each take one PF-ODE step of length Δt, and a discriminator D_τ, heads on the
frozen teacher, learns to tell where they land. The student is trained to make the two
indistinguishable.

    python adm.py                           # a small teacher of digits, offline, CPU: a minute
    python adm.py --model sd3 --out out/sd3                                             # one GPU
    torchrun --nproc_per_node=8 adm.py --model sdxl --init out/adp-sdxl --out out/dmdx-sdxl

Expect d_accuracy between 0.5 and 1, neither end for long. Writes config.json, log.csv, curves.png,
samples/, checkpoints/ and pipeline/.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F

from data import PROMPTS, encode_prompts, read_prompts, teacher_steps
from families import load_teacher, recipes
from families.export import export_pipeline
from models import Denoiser, LatentDiscriminator, accuracy, frozen, make_roles
from ode import Draw, Schedule, T, common, per_sample, student_input, student_sample, with_guidance
from runtime.configs import TrainingConfig, check_training
from runtime.flags import option
from runtime.folder import Run, starting_point
from runtime.optimize import backward, follow, make_optimizers, step
from runtime.ranks import Ranks
from runtime.script import run
from runtime.settings import at_least, positive, require
from runtime.sheets import Sheets
from sizing.plan import must_fit

# --- Losses ---------------------------------------------------------------------------------------
# Logits and weights are (B,), latents (B, ...), all float32. Each loss is a scalar.


def discriminator_loss(real, fake):
    """ADM's hinge: E[max(0, 1 − D(x_real, t−Δt))] + E[max(0, 1 + D(x_fake, t−Δt))].

    arXiv 2507.18569. The best D leaves 2 (1 − TV) of it, TV the total variation between the two
    distributions.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake, weight=None):
    """ADM's generator: −E[D(x_fake, t−Δt)] (arXiv 2507.18569). The weight is ours."""
    if weight is not None:
        fake = weight * fake
    return -fake.mean()


def fake_score_loss(out, target):
    """The teacher's own diffusion loss in its own prediction type, on the student's samples."""
    return F.mse_loss(out.float(), target)


# --- The algorithm --------------------------------------------------------------------------------


class Players(NamedTuple):
    """Who takes part, on which noise process each lives, and with which settings."""

    teacher: Denoiser  # F_φ, frozen
    student: Denoiser  # G_θ
    fake: Denoiser  # f_ψ
    discriminator: LatentDiscriminator  # D_τ: heads that train, on the frozen teacher
    schedule: Schedule  # of teacher, fake score and discriminator
    student_schedule: Schedule  # the same, or after ADP the straight line
    times: torch.Tensor  # (steps,) of the student, from noise to data
    shape: tuple  # of one latent
    guidance: float  # w of the teacher's CFG


def adm_round(net, cfg, draw, cond, uncond, k, learn):
    """One round of ADM on B samples, with a gradient for every network that is not frozen.

    k is the student's step that trains; learn(loss) adds a loss's gradient to the others', and no
    network steps before the round ends (ours). Returns what the log shows, latents for pictures.
    """
    schedule, discriminator = net.schedule, net.discriminator

    # 1. Sample: x̂_0 = G_θ(x_t', t').
    x0_hat, eps_hat = sample(net, draw, cond, k)  # (B, ...) each

    # 2. Re-diffuse it to t ~ U[t_min + Δt, t_max]; s = t − Δt is where both branches land.
    t, s = step_times(cfg, draw)  # (B,) each
    x_t = schedule.add_noise(x0_hat, draw.normal(net.shape), t)  # (B, ...)

    # 3. One PF-ODE step from that same x_t: by the teacher with CFG, without gradient ...
    with torch.no_grad():
        out_real = with_guidance(net.teacher, cond, uncond, net.guidance)(x_t, t)
        x_real = schedule.pf_ode_step(x_t, out_real, t, s)

    # ... and by the fake score. Fake and heads are frozen, their activations carry the gradient.
    with frozen(net.fake, discriminator.heads):
        if cfg.fake_gradient == "exact":
            out_fake = net.fake(x_t, t, cond)[0]
            x_fake = schedule.pf_ode_step(x_t, out_fake, t, s)
        else:
            out_fake, x_fake = around_fake(net, x_t, t, s, x0_hat, cond)  # ours

        # 4. Generator: the student learns to land where the teacher would.
        maps_fake = discriminator.features(x_fake, s, cond)
        latents = clean(net, x_t, t, x0_hat, out_real, out_fake)
        weight = generator_weight(cfg, schedule, s, latents)  # None, or with --gen-weight: ours
        loss_g = generator_loss(discriminator.logits(maps_fake), weight)
        learn(loss_g)

    # 5. Discriminator: the heads learn to tell the two, on the same features of x_fake.
    with torch.no_grad():
        maps_real = discriminator.features(x_real, s, cond)
    logits_real = discriminator.logits(maps_real)  # (B,)
    logits_fake = discriminator.logits([h.detach() for h in maps_fake])  # (B,)
    loss_d = discriminator_loss(logits_real, logits_fake)
    judged = ((x_real, logits_real), (x_fake.detach(), logits_fake))
    learn(loss_d + damping(discriminator, cfg, draw, cond, s, judged))

    # 6. Fake score: f_ψ learns the student's samples by its diffusion loss.
    x0 = sampled_on(net, cfg, draw, cond, k, x0_hat, eps_hat)  # x̂_0, or with --fake-samples: ours
    loss_f = learn_fake(net, draw, cond, x0, learn)

    losses = {"loss_generator": loss_g, "loss_discriminator": loss_d, "loss_fake": loss_f}
    right = {"d_accuracy": accuracy(logits_real, logits_fake)}
    return losses | right | figures(latents), latents


def step_times(cfg, draw):
    """t ~ U[t_min + Δt, t_max] and s = t − Δt, (B,) each: a PF-ODE step stays in [t_min, t_max]."""
    t = draw.uniform((cfg.t_min + cfg.dt) * T, cfg.t_max * T)  # (B,)
    return t, t - cfg.dt * T


def sample(net, draw, cond, k):
    """(x̂_0, ε̂) of the student's step k, (B, ...) each; its steps before run without gradient."""
    predict, fresh = walker(net, draw, cond)
    with torch.no_grad():
        x_in = student_input(predict, net.student_schedule, fresh(), net.times, k, fresh)
    t_in = net.times[k].expand(len(x_in))  # (B,)
    out = predict(x_in, net.student_schedule.shown(t_in))
    return net.student_schedule.to_x0_eps(x_in, out, t_in)


def walker(net, draw, cond):
    """What ode.py's samplers walk with: predict(x, t) of the student, and fresh() noise."""

    def predict(x, t):
        return net.student(x, t, cond)[0]

    return predict, lambda: draw.normal(net.shape)


def learn_fake(net, draw, cond, x0, learn):
    """f_ψ's diffusion loss on samples x0 (B, ...), t ~ U[0, T], without CFG: its gradient."""
    t = draw.uniform(0, net.schedule.t_noise)  # (B,)
    eps = draw.normal(net.shape)  # (B, ...)
    out = net.fake(net.schedule.add_noise(x0, eps, t), t, cond)[0]
    loss = fake_score_loss(out, net.schedule.to_out(x0, eps, t))
    learn(loss)
    return loss


def clean(net, x_t, t, x0_hat, out_real, out_fake):
    """x̂_0, what teacher and fake score made of x_t, (B, ...) each, and t (B,): {name: tensor}."""
    x0_real = net.schedule.to_x0_eps(x_t, out_real, t)[0].detach()
    x0_fake = net.schedule.to_x0_eps(x_t, out_fake, t)[0].detach()
    return {"student": x0_hat, "teacher's x_0": x0_real, "fake score's x_0": x0_fake, "t": t}


def figures(latents):
    """What the log shows of them, beside the losses that are descended."""
    x0_hat, x0_real, x0_fake, _ = latents.values()
    spread = x0_hat.flatten(1).std(1).mean()
    loss = dmd_loss(x0_hat, x0_real, x0_fake)
    return {"dmd_loss": loss.detach(), "x0_mean": x0_hat.mean(), "x0_std": spread}


# --- Without an adversary: DMD, and a plain step (ours) -------------------------------------------


def dmd_loss(x0_hat, x0_real, x0_fake):
    """DMD (arXiv 2311.18828): its gradient in x̂_0 is the normalised score difference g / numel.

    g = (x0_fake − x0_real) / mean|x̂_0 − x0_real|, per sample. Its value is ½ mean g²; ADM's log
    shows it, and the paper's claim is that it falls though nobody descends it.
    """
    g = (x0_fake - x0_real) / per_sample(mean_distance(x0_hat, x0_real), x0_hat)  # (B, ...)
    return 0.5 * F.mse_loss(x0_hat, (x0_hat - g).detach())


def mean_distance(x0_hat, x0_real):
    """mean|x̂_0 − x0_real| of each sample, (B,): a constant, and never 0."""
    return (x0_hat.detach() - x0_real).abs().flatten(1).mean(1).clamp(min=1e-5)


def dmd_round(net, cfg, draw, cond, uncond, k, learn):
    """One round of DMD, as adm_round: the score difference itself, in place of an adversary's."""
    x0_hat, eps_hat = sample(net, draw, cond, k)  # (B, ...) each
    t = draw.uniform(cfg.t_min * T, cfg.t_max * T)  # (B,)
    x_t, out_real, out_fake = both_scores(net, draw, cond, uncond, x0_hat, t)  # (B, ...) each
    latents = clean(net, x_t, t, x0_hat, out_real, out_fake)
    _, x0_real, x0_fake, _ = latents.values()
    loss_g = dmd_loss(x0_hat, x0_real, x0_fake)
    learn(loss_g)
    x0 = sampled_on(net, cfg, draw, cond, k, x0_hat, eps_hat)
    loss_f = learn_fake(net, draw, cond, x0, learn)
    return {"loss_generator": loss_g, "loss_fake": loss_f} | figures(latents), latents


def step_loss(x_fake, x_real, weight=None):
    """½ mean|x_fake − x_real|², x_real a constant (ours)."""
    apart = (x_fake - x_real).square().flatten(1).mean(1)  # (B,)
    if weight is not None:
        apart = weight * apart
    return 0.5 * apart.mean()


def step_round(net, cfg, draw, cond, uncond, k, learn):
    """One round of --loss step (ours), as dmd_round and at its cost: both PF-ODE steps in L2.

    Where D is at its optimum in the hinge's linear part (small Δt, damping), ∇D is proportional to
    x_real − x_fake: ADM's adversary then stands for this loss, and should at least match it. The
    paper does not compare with it.
    """
    schedule = net.schedule
    x0_hat, eps_hat = sample(net, draw, cond, k)  # (B, ...) each
    t, s = step_times(cfg, draw)  # (B,) each
    x_t, out_real, out_fake = both_scores(net, draw, cond, uncond, x0_hat, t)  # (B, ...) each
    latents = clean(net, x_t, t, x0_hat, out_real, out_fake)
    x_real = schedule.pf_ode_step(x_t, out_real, t, s)
    x_fake = schedule.pf_ode_step(x_t, out_fake, t, s)
    x_fake = straight_through(x_fake, x0_hat, schedule.alpha_sigma(s)[0])
    loss_g = step_loss(x_fake, x_real, generator_weight(cfg, schedule, s, latents))
    learn(loss_g)
    x0 = sampled_on(net, cfg, draw, cond, k, x0_hat, eps_hat)
    loss_f = learn_fake(net, draw, cond, x0, learn)
    return {"loss_generator": loss_g, "loss_fake": loss_f} | figures(latents), latents


@torch.no_grad()
def both_scores(net, draw, cond, uncond, x0_hat, t):
    """x_t of x̂_0, and what teacher (with CFG) and fake score say there: (B, ...) each."""
    x_t = net.schedule.add_noise(x0_hat, draw.normal(net.shape), t)
    out_real = with_guidance(net.teacher, cond, uncond, net.guidance)(x_t, t)
    return x_t, out_real, net.fake(x_t, t, cond)[0]


def fake_round(net, cfg, draw, cond, uncond, k, learn):
    """A further round of DMD or step under TTUR: f_ψ alone learns, on new samples."""
    x0_hat, eps_hat = sample(net, draw, cond, k)  # (B, ...) each
    x0 = sampled_on(net, cfg, draw, cond, k, x0_hat, eps_hat)
    return {"loss_fake": learn_fake(net, draw, cond, x0, learn)}, {"student": x0_hat}


def round_of(loss, r):
    """(the function of round r of TTUR, the networks that learn in it beside the student)."""
    if loss == "adm":
        return adm_round, ("heads", "fake")
    if r > 0:
        return fake_round, ("fake",)
    return (dmd_round if loss == "dmd" else step_round), ("fake",)


# --- What the paper has not (ours): off, but where a recipe or a flag says so ---------------------


def around_fake(net, x_t, t, s, x0_hat, cond):
    """--fake-gradient straight-through: (f_ψ's output at x_t, x_fake), (B, ...) each.

    The gradient runs around f_ψ, as if f_ψ were at its optimum, where the flow carries x_t to
    α_s x̂_0 + σ_s ε: no backward through that network.
    """
    with torch.no_grad():
        out = net.fake(x_t, t, cond)[0]
        x_fake = net.schedule.pf_ode_step(x_t, out, t, s)
    return out, straight_through(x_fake, x0_hat, net.schedule.alpha_sigma(s)[0])


def straight_through(x_fake, x0_hat, alpha_s):
    """x_fake's value, with the gradient α_s dx̂_0."""
    return x_fake.detach() + per_sample(alpha_s, x0_hat) * (x0_hat - x0_hat.detach())


def generator_weight(cfg, schedule, s, latents):
    """(B,) of --gen-weight, or None, from where the branches land and what they say is clean.

    "1/alpha" takes out the factor α_t of dx_t/dx̂_0. "dmd" takes out all in which --loss step
    differs from DMD. From one x_t a branch that says x_0 lands at

        α_s x_0 + σ_s ε,  ε = (x_t − α_t x_0) / σ_t

    and so x_real − x_fake = κ (x0_real − x0_fake), κ = α_s − σ_s α_t / σ_t. The student's gradient
    is that times dx_fake/dx̂_0 = α_s, where DMD's has 1 / mean|x̂_0 − x0_real|.
    """
    x0_hat, x0_real, _, t = latents.values()
    if cfg.gen_weight == "none":
        return None
    alpha_t, sigma_t = schedule.alpha_sigma(t)  # (B,) each
    if cfg.gen_weight == "1/alpha":
        return 1 / alpha_t.clamp(min=1e-3)
    alpha_s, sigma_s = schedule.alpha_sigma(s)  # (B,) each
    kappa = alpha_s - sigma_s * alpha_t / sigma_t  # (B,)
    return 1 / ((alpha_s * kappa).clamp(min=1e-6) * mean_distance(x0_hat, x0_real))


def damping(discriminator, cfg, draw, cond, s, judged):
    """--damping: the penalty's weighted sum over `judged`, (x, D's logits at x); 0 without."""
    loss = 0
    if cfg.damping:
        for x, logits in judged:
            with torch.no_grad():
                nearby = x + cfg.damping_sigma * draw.normal(x.shape[1:])  # (B, ...)
                maps = discriminator.features(nearby, s, cond)
            moved = discriminator.logits(maps)  # (B,)
            loss = loss + cfg.damping * damping_loss(logits, moved, cfg.damping_sigma)
    return loss


def damping_loss(logits, moved, sigma):
    """½ E[((D(x) − D(x + σε)) / σ)²] ≈ ½ E|∇D|², by one more pass of D (ours, after APT's R1)."""
    return 0.5 * ((logits - moved) / sigma).square().mean()


def sampled_on(net, cfg, draw, cond, k, x0_hat, eps_hat):
    """--fake-samples: what the fake score learns after the student's step k, (B, ...), a constant.

    f_ψ does not know the student's step: fed "each", it learns the steps' mixture; fed the "last",
    what the sampler goes on to emit.
    """
    x0 = x0_hat.detach()
    if cfg.fake_samples == "each" or k + 1 == len(net.times):
        return x0
    predict, fresh = walker(net, draw, cond)
    with torch.no_grad():
        x_next = net.student_schedule.renoised(x0, eps_hat, net.times[k + 1], fresh)  # (B, ...)
        return student_sample(predict, net.student_schedule, x_next, net.times[k + 1 :], fresh)


# --- Settings -------------------------------------------------------------------------------------


@dataclass
class Config(TrainingConfig):
    """ADM's settings, beside those of every training run (runtime/configs.py)."""

    prompts: str = option(
        PROMPTS,
        "UTF-8 text file, one prompt a line, or a folder made by `data.py encode`",
        "what to distil",
    )
    loss: Literal["adm", "dmd", "step"] = option(
        "adm",
        "how the student learns: the paper's adversary, DMD's reverse KL, or the L2 distance of "
        "the two PF-ODE steps (ours)",
        "the method",
    )
    ttur: int = option(
        1, "discriminator and fake-score updates for each generator update", "the method"
    )
    warmup: int = option(
        0,
        "the first iterations, in which the student rests and fake score and discriminator learn "
        "it (ours)",
        "the method",
    )
    dt: float = option(
        1 / 64, "adm, step: length of the PF-ODE step, as a fraction of T", "the method"
    )
    t_min: float = option(
        0.02,
        "least time that a PF-ODE step lands on, DMD's least t, as a fraction of T (ours)",
        "the method",
    )
    t_max: float = option(
        0.98,
        "greatest t, where a PF-ODE step starts, as a fraction of T (ours)",
        "the method",
    )
    fake_gradient: Literal["exact", "straight-through"] = option(
        "exact", "adm: through the frozen fake network, or around it (ours: cheaper)", "the method"
    )
    fake_samples: Literal["each", "last"] = option(
        "each",
        "several steps: fake learns x̂_0 of the step that trains, or the last's (ours)",
        "the method",
    )
    gen_weight: Literal["none", "1/alpha", "dmd"] = option(
        "none",
        "adm, step: weight of a sample in the generator's loss: 1/α_t, or as DMD weighs (ours)",
        "the method",
    )
    damping: float = option(
        0.0,
        "weight of a zero-centred gradient penalty on D, by finite differences (ours)",
        "the method",
    )
    damping_sigma: float = option(
        0.01, "length of that finite difference, in units of x_t (ours)", "the method"
    )
    lr_student: float = option(
        1e-6, "learning rate of the student (ours: well below the heads')", "training"
    )
    lr_fake: float = option(2e-6, "learning rate of the fake score (ours)", "training")
    out: str = option("out/adm", "folder to write; must be empty, or a run to --resume", "output")
    RECIPES: ClassVar = recipes.ADM  # defaults of a model: families/recipes.py
    PAPER: ClassVar = recipes.ADM_PAPER


STAGE = 2  # of the seeds' keys: other random numbers than in adp.py (1) and data.py (0)
OF_GENERATOR = ("loss_generator", "dmd_loss", "x0_mean", "x0_std")
COLUMNS = {  # of log.csv, beside those of every run (runtime/folder.py): means over the batch
    "loss_generator": "hinge: −E[D(x_fake)]; dmd, step: their own loss",
    "loss_discriminator": "hinge: 2 (1 − total variation) at D's optimum; 2 where it knows nothing",
    "loss_fake": "diffusion loss of the fake score on the student's samples",
    "dmd_loss": "what DMD would minimise, from the same passes: the paper's claim is that it falls",
    "d_accuracy": "share of x_real and x_fake that D tells apart: 0.5 is chance, 1: D has won",
    "grad_norm_student": "before clipping",
    "grad_norm_fake": "before clipping",
    "grad_norm_heads": "before clipping",
    "x0_mean": "of the student's latents: drift here comes before bad pictures",
    "x0_std": "within one of them",
}


def check(cfg):
    """Raises BadInput for settings without meaning, before anything is loaded or written."""
    check_training(cfg)
    at_least(1, cfg, "ttur")
    at_least(0, cfg, "warmup", "damping")
    positive(cfg, "lr_fake", "damping_sigma")
    times = f"--t-min {cfg.t_min} --t-max {cfg.t_max}"
    require(0 <= cfg.t_min < cfg.t_max <= 1, f"{times}: 0 <= t_min < t_max <= 1")
    most = cfg.t_max - cfg.t_min
    if cfg.loss != "dmd":
        require(0 < cfg.dt < most, f"--dt {cfg.dt}: between 0 and t_max - t_min = {most:g}")


# --- The loop -------------------------------------------------------------------------------------


def main(cfg):
    check(cfg)
    must_fit(cfg)
    family = load_teacher(cfg.model, cfg.random_init)
    ranks = Ranks(cfg.shard_ranks)
    embeddings = Path(cfg.out) / "prompts"
    texts = read_prompts(cfg.prompts, family, embeddings, ranks, cfg.embed)
    shape = family.latent_shape(cfg.resolution, cfg.frames)
    parts = ranks.mine(cfg.batch_size, cfg.accumulate, cfg.samples)
    steps = cfg.student_steps or family.student_steps
    guidance = family.guidance if cfg.guidance is None else cfg.guidance
    schedule = family.schedule_at(shape)
    student_schedule, weights = starting_point(cfg.init, family, schedule, cfg.lora_rank)
    text = {"text_sha256": texts.sha256}
    facts = {"guidance": guidance, "latent_shape": shape, "prompts": text}
    here = Run("adm", cfg, ranks, family, student_schedule, steps, **facts)
    if cfg.warmup >= cfg.iterations:
        here.say(f"the student rests in all of its {cfg.iterations} iterations (--warmup)")
    prompts = encode_prompts(family, texts, embeddings, ranks, cfg.embed)

    torch.manual_seed(cfg.seed)  # initial weights of the heads, and of LoRA adapters
    teacher, student, fake = make_roles(
        family,
        ("student", "fake"),
        cfg.lora_rank,
        ranks.device,
        ranks.frozen_dtype,
        cfg.gradient_checkpointing,
        ranks.mesh,
    )
    if weights:
        student.load(weights)
    discriminator = LatentDiscriminator(teacher, cfg.head_width, ranks.mesh).to(ranks.device)
    times = student_schedule.timesteps(steps)[:-1].to(ranks.device)  # (steps,)
    schedules = (schedule, student_schedule)
    net = Players(teacher, student, fake, discriminator, *schedules, times, shape, guidance)

    networks = {
        "student": student.own_parameters(),
        "fake": fake.own_parameters(),
        "heads": dict(discriminator.heads.named_parameters()),
    }
    rates = {"student": cfg.lr_student, "fake": cfg.lr_fake, "heads": cfg.lr_heads}
    optimizers = make_optimizers(networks, rates, cfg)
    if cfg.ema:
        networks["ema"] = {name: p.detach().clone() for name, p in student.own_parameters().items()}
    first = here.restore(networks, optimizers)
    how = (shape, guidance, teacher_steps(cfg.model), len(parts[0]))
    sheets = Sheets(here, student, teacher, prompts, *how)

    def learn(loss):
        if loss.requires_grad:  # not so where the student rests
            backward(loss, len(parts))

    for iteration in here.iterations(first):
        began, logs, shown = time.perf_counter(), [], []
        # The student learns in round 0; TTUR's further rounds are new samples for the others. In a
        # round, gradients add up over the micro-batches `parts`, and only then every network steps:
        # none is trained on what another's step has changed.
        for r in range(cfg.ttur):
            learns = r == 0 and iteration >= cfg.warmup  # the student
            algorithm, trained = round_of(cfg.loss, r)
            # The student's step that trains is the same on all ranks.
            k = int(common(cfg.seed, STAGE, iteration, r).integers(steps))
            for samples in parts:
                draw = Draw((cfg.seed, STAGE, iteration, r), samples, ranks.device)
                cond = prompts[draw.integers(len(prompts))]
                uncond = prompts.unconditional(len(samples))
                with frozen(*([] if learns else [student])):
                    log, latents = algorithm(net, cfg, draw, cond, uncond, k, learn)
                if r:
                    log = {name: log[name] for name in log if name not in OF_GENERATOR}
                else:
                    shown.append(latents)
                    label = f"student, step {k + 1} of {steps}"
                logs.append(dict.fromkeys(COLUMNS) | log)
            for name in (*["student"] * learns, *trained):
                logs[-1][f"grad_norm_{name}"] = step(optimizers[name], cfg.clip)

        if cfg.ema:
            follow(networks["ema"], networks["student"], cfg.ema)
        here.record(iteration + 1, logs, began)
        if here.due(cfg.sample_every, iteration):
            sheets.draw(iteration + 1, networks)
            rows = {name: torch.cat([one[name] for one in shown]) for name in shown[0]}  # (B, ...)
            sheets.batch(iteration + 1, {label: rows.pop("student")} | rows)
        if here.stop or here.due(cfg.checkpoint_every, iteration):
            here.save(iteration + 1, networks, optimizers)
        if here.stop:
            raise here.stop  # on all ranks: one line, and the exit code
    here.finish(networks, partial(export_pipeline, student, student_schedule, steps, shape))


if __name__ == "__main__":
    run(main, Config, description=__doc__)
