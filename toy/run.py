"""A 2-D experiment that could refute the paper: one-step students of a Gaussian mixture.

Methods; letters are rows of the paper's ablation table (Lu et al., ICCV 2025, arXiv 2507.18569):

    mse (A1)   adp (A5)   dmd (B2)   adp+dmd (B3)
    adm-paper (B1)    adp+adm-paper (B4, DMDX)      ADM as published
    adm-recipe        adp+adm-recipe                as our recipe for digits has it: see RECIPE
    step              adp+step     adm.py --loss step: its two branches in L2, without a D (ours)
    dmd2              DMD and a GAN on the teacher's samples

What trains the big models trains these: an iteration is adp.py's adp_iteration or adm.py's
adm_round, dmd_round, step_round or fake_round, the noise process ode.py's. Networks are MLPs; every
seed is one slice of a batched network, trained beside the others and independent of them.

    python toy/run.py --iterations 600                            # a quick look, 2 seeds: 2 minutes
    python toy/run.py --mixture ring8 --methods dmd,adm-recipe,adp+dmd,adp+adm-recipe

Prints a table, mean ± sd over seeds, whose words toy/gmm.py defines; writes results.json, which
toy/plot.py reads. All numbers are ours unless a comment says otherwise: the paper has no toy.
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# So that `python toy/run.py` finds the project.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import adm
import adp
from models import Discriminator, frozen
from ode import Draw, FlowSchedule, T, common, student_sample, teacher_sample, with_guidance
from runtime.files import claim, write_json
from runtime.flags import option
from runtime.script import run
from runtime.settings import BadInput, at_least, flag, positive, require
from toy.gmm import LINE, NAMED, load_mixture, metrics, mode_tv, modes_covered, shares

# Where no flag says otherwise: ADM as published, and what this project makes of it (ours). Warm-up
# is what our recipes give to DMD and step as well.
PUBLISHED = {"dt": 1 / 64, "damping": 0.0, "ttur": 1, "warmup": 0}
WARM = {"warmup": 100}
LONG_STEP = {**WARM, "dt": 1 / 4}
RECIPE = {**LONG_STEP, "damping": 0.1}
METHODS = {
    # name: (the loss of its last stage, the student's rate there, what differs from PUBLISHED)
    # Rates: `python toy/claims.py run headline` chose them.
    "mse": ("mse", 0.03, {}),
    "adp": ("adp", 1e-5, {}),
    "dmd": ("dmd", 1e-3, WARM),
    "step": ("step", 1e-3, LONG_STEP),
    "adm-paper": ("adm", 1e-4, {}),
    "adm-recipe": ("adm", 3e-4, RECIPE),
    "dmd2": ("dmd2", 0.01, {"ttur": 5, "damping": 0.1}),
    "adp+dmd": ("dmd", 3e-4, WARM),
    "adp+step": ("step", 3e-4, LONG_STEP),
    "adp+adm-paper": ("adm", 1e-5, {}),
    "adp+adm-recipe": ("adm", 1e-5, RECIPE),
}
RATES = {name: rate for name, (_, rate, _) in METHODS.items()}
FEW_STEPS = ("dmd", "step", "adm-paper", "adm-recipe")  # these may take several (--student-steps)
SAMPLES = 100_000  # of each student, for its metrics
TEACHER = 3000  # iterations of the teacher MLP's fit, batch 512
POOL = 20_000  # ODE pairs of each seed
HISTORY = 40  # points of a training curve
GAN_WEIGHT = 0.1  # of dmd2's adversary beside DMD

OWN = "; default: the method's own"


@dataclass
class Config:
    mixture: str = option(
        "ring8-rare", f"{', '.join(NAMED)}, or a JSON file: see toy/gmm.py", "the target"
    )
    separation: str | None = option(
        None,
        "radius of the farthest mode over σ: one, or several as 5,10; default: the mixture's own",
        "the target",
    )
    dim: int = option(2, "dimensions; beyond the first two it is N(0, σ²)", "the target")
    pairs: int = option(POOL, "ODE pairs of each seed", "the target")
    missing: str | None = option(
        None, "modes without pairs, by number from 0, comma-separated; default: none", "the target"
    )
    methods: str = option(",".join(METHODS), "comma-separated; adp+… is ADP first", "what to train")
    seeds: int = option(2, "students of each method, all else alike", "what to train")
    first_seed: int = option(0, "their numbers start here", "what to train")
    iterations: int = option(
        1000, "student updates of each method, ADP's included", "what to train"
    )
    schedule: Literal["cubic", "uniform"] = option(
        "cubic", "where on the line ADP's student trains (paper: cubic)", "the method"
    )
    student_steps: int = option(
        1, f"of {', '.join(FEW_STEPS)}; all others take one step", "the method"
    )
    ttur: int | None = option(
        None, f"updates of D and fake score for each of the student's{OWN}", "the method"
    )
    warmup: int | None = option(
        None, f"first updates of D and fake score: the student rests (ours){OWN}", "the method"
    )
    dt: float | None = option(
        None, f"adm, step: length of the PF-ODE step, as a fraction of T{OWN}", "the method"
    )
    gen_weight: Literal["none", "1/alpha", "dmd"] = option(
        "none",
        "adm, step: weight of a sample in the generator's loss: 1/α_t, or as DMD weighs (ours)",
        "the method",
    )
    damping: float | None = option(
        None, f"weight of a gradient penalty on stage 2's D (ours){OWN}", "the method"
    )
    width: int = option(128, "of every hidden layer", "networks and rates")
    student_width: int | None = option(
        None, "of the student's; default: the same", "networks and rates"
    )
    head_width: int = option(32, "of the discriminator's heads", "networks and rates")
    lr_heads: float = option(
        1e-3, "learning rate of the discriminator's heads", "networks and rates"
    )
    beta1: float = option(0.9, "Adam's β1 in stage 2, of all that learns", "networks and rates")
    out: str = option("out/toy", "new folder to write", "output")

    # What nobody varies here. From t_min to fake_gradient they are adm.py's defaults.
    batch_size: ClassVar = 256  # samples of each seed in an update
    adp_share: ClassVar = 0.75  # of the iterations of adp+… that are ADP's
    mse_share: ClassVar = 0.9  # of ADP's iterations that are regression, before its adversary
    lr_fake: ClassVar = 1e-3
    t_min: ClassVar = 0.02
    t_max: ClassVar = 0.98
    damping_sigma: ClassVar = 0.01
    fake_gradient: ClassVar = "exact"
    fake_samples: ClassVar = "last"  # as in our recipes; adm.py's --fake-samples


# --- Networks -------------------------------------------------------------------------------------
# S seeds side by side: weights (S, in, out), and a batch is the seeds' batches one after the other,
# (S·B, ...). Denoisers and discriminators are called as the big ones are; `cond` is {}.


class Linear(nn.Module):
    """(S·B, n_in) → (S·B, n_out), each seed by its own matrix.

    draw: ode.Draw, one generator a seed.
    """

    def __init__(self, draw, n_in, n_out):
        super().__init__()
        weight = draw.normal((n_in, n_out)) / (3 * n_in) ** 0.5  # variance as in nn.Linear
        self.weight = nn.Parameter(weight)  # (S, n_in, n_out)
        self.bias = nn.Parameter(torch.zeros(len(weight), 1, n_out))

    def forward(self, h):
        of_seeds = h.unflatten(0, (len(self.weight), -1))  # (S, B, n_in)
        return torch.baddbmm(self.bias, of_seeds, self.weight).flatten(0, 1)


FREQUENCIES = torch.pi * torch.arange(8)  # of σ, as networks are shown it


class MLP(nn.Module):
    """A denoiser as models.Denoiser is; its prediction is a velocity ε − x_0.

    shape: of a sample, (d,).
    """

    def __init__(self, draw, width, spread, dim):
        super().__init__()
        self.shape = (dim,)
        # Of x_0: the network sees x_t, and returns a velocity, in units of their own size.
        self.spread = spread
        inputs = dim + len(FREQUENCIES)
        self.hidden = nn.ModuleList(Linear(draw, n, width) for n in (inputs, width, width))
        self.out = Linear(draw, width, dim)

    def forward(self, x_t, t, cond=None):
        """x_t (S·B, d), t (S·B,) → (v (S·B, d), hidden layers, each (S·B, width))."""
        alpha, sigma = (c[:, None] for c in LINE.alpha_sigma(t))  # (S·B, 1) each
        size = ((alpha * self.spread) ** 2 + sigma**2).sqrt()  # (S·B, 1)
        h = torch.cat([x_t / size, (sigma * FREQUENCIES).cos()], 1)  # (S·B, d + 8)
        maps = []
        for layer in self.hidden:
            h = F.silu(layer(h))
            maps.append(h)
        return self.out(h) * (1 + self.spread**2) ** 0.5, maps


class NoisyDiscriminator(Discriminator):
    """D_τ: heads on all hidden layers of the frozen teacher MLP, as models.LatentDiscriminator.

    A head: (S·B, width of the layer) → logits (S·B,).
    """

    def __init__(self, draw, backbone, width):
        heads = []
        for layer in backbone.hidden:
            n_in = layer.weight.shape[2]
            body, to_logit = Linear(draw, n_in, width), Linear(draw, width, 1)
            heads.append(nn.Sequential(body, nn.SiLU(), to_logit, nn.Flatten(0)))
        super().__init__(backbone, heads)

    def features(self, x_t, t, cond):
        return self.backbone(x_t, t, cond)[1]


# --- Optimizer steps, random numbers, and what is written down ------------------------------------


def add_gradient(seeds, loss):
    """learn(loss) of adp.py and adm.py, for a loss that is a mean over S·B samples.

    S times it is the sum of the seeds' own means. Nothing happens where nobody trains.
    """
    if loss.requires_grad:
        (seeds * loss).backward()


class Optimizer:
    """Adam, elementwise, so each seed's slice is stepped as if alone.

    updates: how many there will be: the rate rises over the first tenth and falls by a cosine
    (ours; None: it stays).
    """

    def __init__(self, module, rate, updates=None, clip=None, beta1=0.9):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.rate = rate
        self.updates = updates
        self.done = 0
        self.clip = clip
        self.adam = torch.optim.Adam(self.parameters, rate, (beta1, 0.999), fused=True)
        self.last = []  # the last step's gradients

    def step(self):
        """One update by the gradients that there are; leaves none behind."""
        if self.updates:
            progress = self.done / self.updates  # in [0, 1)
            shape = min(1, 10 * progress) * (1 + math.cos(math.pi * progress)) / 2
            self.adam.param_groups[0]["lr"] = self.rate * shape
            self.done += 1
        self.last = [p.grad for p in self.parameters]
        if self.clip:
            scale = (self.clip / self.grad_norms()).clamp(max=1).view(-1, 1, 1)  # (S, 1, 1)
            for gradient in self.last:
                gradient.mul_(scale)
        self.adam.step()
        self.adam.zero_grad()

    def grad_norms(self):
        """Of the last update, (S,)."""
        return sum(gradient.flatten(1).square().sum(1) for gradient in self.last).sqrt()


class Noise(Draw):
    """Random numbers of one iteration, as ode.Draw has them, but for S·B samples.

    There is one generator a seed, so numbers depend on (key, seed) alone: the same for every method
    and however many seeds run side by side.
    """

    def __init__(self, key, seeds, batch):
        super().__init__(key, seeds)
        self.batch = batch

    def normal(self, shape):
        """(S·B, *shape)."""
        return super().normal((self.batch, *shape)).flatten(0, 1)

    def uniform(self, low, high):
        """(S·B,): the normal distribution function of a normal number is uniform."""
        return low + (high - low) * torch.special.ndtr(self.normal(()))

    def pick(self, *pools):
        """The same random rows of each pool (S, P, d), as (S·B, d)."""
        n = pools[0].shape[1]
        rows = self.uniform(0, n).long().clamp(max=n - 1).view(-1, self.batch, 1)  # (S, B, 1)
        return [torch.take_along_dim(pool, rows, 1).flatten(0, 1) for pool in pools]


def times_of(steps):
    """Times of a student's steps, (steps,), spaced as SD3's: 1000, 900, 750, 500 of four."""
    return FlowSchedule(shift=3).timesteps(steps)[:-1]


ONE_STEP = times_of(1)


def emitted(student, times, draw):
    """What the student makes of noise in its steps, at times (n,) from T on: (S·B, d)."""
    fresh = partial(draw.normal, student.shape)  # () → (S·B, d)
    return student_sample(with_guidance(student, {}, {}, 1), LINE, fresh(), times, fresh)


class Curves:
    """Training curves, a list of points for each seed.

    wanted      the iterations after which there is one, HISTORY of a run's `total` or so
    times       (n,) of the student's steps
    """

    def __init__(self, world, total, times=ONE_STEP):
        self.plane = world.plane
        self.seeds = world.seeds
        every = max(1, total // HISTORY)
        self.wanted = range(every, total + 1, every)
        self.times = times
        self.points = [[] for _ in world.seeds]
        self.done = 0

    def due(self):
        """Counts one iteration; True where a point is wanted."""
        self.done += 1
        return self.done in self.wanted

    @torch.no_grad()
    def add(self, student, **more):
        """One point: how the student does, and more={name: S numbers}."""
        noise = Noise((9,), self.seeds, 4096)  # the same for each point
        samples = emitted(student, self.times, noise)[:, :2]  # (S·4096, 2)
        for i, x in enumerate(samples.chunk(len(self.seeds))):
            tv, covered = round(mode_tv(self.plane, x), 4), modes_covered(self.plane, x)
            others = {name: float(f"{values[i]:.4g}") for name, values in more.items()}
            point = {"iteration": self.done, "tv": tv, "modes_covered": covered, **others}
            self.points[i].append(point)


# --- The teacher ----------------------------------------------------------------------------------


class World:
    """What all methods share: the mixture, its teacher, and for each seed ODE pairs and MLPs.

    plane     the mixture's first two dimensions, in which it lies and is measured
    mlp       an MLP a seed, frozen, fitted to the exact velocity: where the fake score starts, and
              D's backbone
    start     where the student starts: mlp, or one of --student-width
    x_T, x_0  (S, pairs, d): the ends of the teacher's PF-ODE, in 64 steps
    """

    def __init__(self, cfg):
        (separation,) = numbers(float, "separation", cfg) or [None]
        self.plane = load_mixture(cfg.mixture, separation)
        self.mixture = load_mixture(cfg.mixture, separation, cfg.dim)
        self.seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
        self.mlp = self.fit(cfg.width)
        self.start = self.fit(cfg.student_width) if cfg.student_width else self.mlp
        self.x_T = Draw((2,), self.seeds).normal((cfg.pairs, cfg.dim))
        self.x_0 = self.solved(self.x_T.flatten(0, 1)).view_as(self.x_T)
        self.leave_out(numbers(int, "missing", cfg))
        self.adp = {}  # see after_adp

    def leave_out(self, modes):
        """In place of the pairs that end in one of these modes, others come again."""
        for x_T, x_0 in zip(self.x_T, self.x_0, strict=True):  # (pairs, d) each
            near = torch.cdist(x_0[:, :2], self.plane.means).argmin(1)  # (pairs,)
            kept = torch.isin(near, torch.tensor(modes), invert=True).nonzero()[:, 0]
            rows = kept[torch.arange(len(x_0)) % len(kept)]  # (pairs,)
            for ends in (x_T, x_0):
                ends.copy_(ends[rows])

    def teacher(self, x_t, t, cond):
        """F_φ, the exact velocity in closed form: a denoiser without features."""
        return self.mixture.velocity(x_t, t), []

    @torch.no_grad()
    def solved(self, x_T):
        """Where the teacher's PF-ODE carries noises x_T (n, d): x_0 (n, d)."""
        return teacher_sample(self.mixture.velocity, LINE, x_T, 64)

    def fit(self, width):
        """An MLP of this width for each seed, the same one, frozen."""
        dim = self.mixture.means.shape[1]
        data = self.mixture.sample(POOL, torch.Generator().manual_seed(0))  # (POOL, d)
        mlp = MLP(Draw((0,), [0]), width, self.mixture.spread, dim)
        optimizer = Optimizer(mlp, 0.02, TEACHER)
        for iteration in tqdm(range(TEACHER), "teacher", leave=False, disable=None):
            draw = Noise((1, iteration), [0], 512)
            t = draw.uniform(0, T)  # (B,)
            (x_0,) = draw.pick(data[None])  # (B, d)
            x_t = LINE.add_noise(x_0, draw.normal((dim,)), t)  # (B, d)
            adm.fake_score_loss(mlp(x_t, t)[0], self.mixture.velocity(x_t, t)).backward()
            optimizer.step()
        for p in mlp.parameters():
            p.data = p.data.repeat(len(self.seeds), 1, 1)
        return mlp.requires_grad_(False)


# --- The two stages -------------------------------------------------------------------------------


def pretrain(cfg, loss, world, student, iterations, rates, curves):
    """Stage 1, by adp.py: velocity regression on ODE pairs, then ("adp", not "mse") the adversary.

    Returns its Players, with one discriminator, D_τ1: two dimensions have no pixels for D_τ2 (so λ
    is 1).
    """
    mse_iterations = iterations if loss == "mse" else round(cfg.mse_share * iterations)
    discriminator = NoisyDiscriminator(Draw((3,), world.seeds), world.mlp, cfg.head_width)
    net = adp.Players(
        student,
        discriminators=[discriminator],
        lambdas=[1],
        heads=discriminator.heads,
        line=LINE,
        schedule=LINE,
        decoded=None,
    )
    # Clipped as in adp.py: at regression's high rate a rare spike would undo a seed's run (2 of 5,
    # at 0.04 without).
    optimizer_mse = Optimizer(student, rates["mse"], mse_iterations, clip=1)
    optimizer = Optimizer(student, rates[loss], iterations - mse_iterations)
    optimizer_heads = Optimizer(discriminator.heads, cfg.lr_heads)
    for iteration in tqdm(range(iterations), "stage 1", leave=False, disable=None):
        draw = Noise((4, iteration), world.seeds, cfg.batch_size)
        x_T, x_0 = draw.pick(world.x_T, world.x_0)  # (S·B, d) each
        regresses = iteration < mse_iterations
        adp.adp_iteration(net, cfg, draw, x_0, x_T, {}, regresses, partial(add_gradient, cfg.seeds))
        used = optimizer_mse if regresses else optimizer
        used.step()
        optimizer_heads.step()  # regression gives them no gradient
        if curves.due():
            curves.add(student, grad_norm=used.grad_norms())
    return net


def distil(cfg, loss, world, student, iterations, rate, curves):
    """Stage 2, by adm.py, of a student of curves.times; returns its Players.

    loss: "adm", "dmd", "step" or "dmd2".
    """
    fake = deepcopy(world.mlp).requires_grad_(True)
    discriminator = NoisyDiscriminator(Draw((5,), world.seeds), world.mlp, cfg.head_width)
    net = adm.Players(
        world.teacher,
        student,
        fake,
        discriminator,
        schedule=LINE,
        student_schedule=LINE,
        times=curves.times,
        shape=student.shape,
        guidance=1,
    )
    optimizer = Optimizer(student, rate, iterations, beta1=cfg.beta1)
    others = [Optimizer(fake, cfg.lr_fake, beta1=cfg.beta1)]
    if loss in ("adm", "dmd2"):
        others.append(Optimizer(discriminator.heads, cfg.lr_heads, beta1=cfg.beta1))
    learn = partial(add_gradient, cfg.seeds)
    for iteration in tqdm(range(cfg.warmup + iterations), loss, leave=False, disable=None):
        for r in range(cfg.ttur):  # the student learns in round 0
            learns = r == 0 and iteration >= cfg.warmup
            draw = Noise((6, iteration, r), world.seeds, cfg.batch_size)
            k = int(common(6, iteration, r).integers(len(net.times)))  # the step that trains
            with frozen(*([] if learns else [student])):
                if loss == "dmd2":
                    latents = dmd2_round(net, cfg, draw, r, world.x_0, learn)
                else:
                    algorithm, _ = adm.round_of(loss, r)
                    _, latents = algorithm(net, cfg, draw, {}, {}, k, learn)
            if learns:
                optimizer.step()
            for other in others:
                other.step()
            if learns and curves.due():
                of_seeds = zip(*(x.chunk(cfg.seeds) for x in latents.values()), strict=True)
                dmd_losses = [adm.dmd_loss(*x_0s) for *x_0s, _ in of_seeds]  # also where unused
                curves.add(student, grad_norm=optimizer.grad_norms(), dmd_loss=dmd_losses)
    return net


def dmd2_round(net, cfg, draw, r, pool, learn):
    """One of DMD2's five rounds (Yin et al., arXiv 2405.14867): DMD and a GAN on teacher samples.

    Samples of the student and of the pool (S, P, d) are told apart at diffused samples. The student
    learns both in round 0, fake score and discriminator in each. Returns DMD's latents.
    """
    algorithm, _ = adm.round_of("dmd", r)
    losses = []
    _, latents = algorithm(net, cfg, draw, {}, {}, 0, losses.append)

    t = draw.uniform(0, T)  # (S·B,)
    (x_0,) = draw.pick(pool)  # (S·B, d)
    x_fake = LINE.add_noise(latents["student"], draw.normal(net.shape), t)  # (S·B, d)
    x_real = LINE.add_noise(x_0, draw.normal(net.shape), t)  # (S·B, d)
    discriminator = net.discriminator
    with frozen(discriminator.heads):
        maps_fake = discriminator.features(x_fake, t, {})
        if r == 0:
            adversary = adm.generator_loss(discriminator.logits(maps_fake))
            losses[0] = losses[0] + GAN_WEIGHT * adversary
    for loss in losses:
        learn(loss)

    real = discriminator.logits(discriminator.features(x_real, t, {}))  # (S·B,)
    fake = discriminator.logits([h.detach() for h in maps_fake])  # (S·B,)
    loss_d = adm.discriminator_loss(real, fake)
    pairs = ((x_real, real), (x_fake.detach(), fake))
    learn(loss_d + adm.damping(discriminator, cfg, draw, {}, t, pairs))
    return latents


def slope_and_gap(net, cfg, draw, x0_hat, cond, uncond, learn=False):
    """What a trained D makes of new samples x0_hat (n, ...) of the student, each at a random t.

    (D at x_real (n,), at x_fake (n,), ∇D at x_fake (n, d), x_real − x_fake (n, d)): D's optimum has
    its gradient along that gap, 1/2γ as long where the hinge is linear, γ being --damping.
    learn: ∇D has a gradient in D's heads.
    """
    schedule, discriminator = net.schedule, net.discriminator
    t, s = adm.step_times(cfg, draw)  # (n,) each
    x_t, out_real, out_fake = adm.both_scores(net, draw, cond, uncond, x0_hat, t)  # (n, ...) each
    x_real = schedule.pf_ode_step(x_t, out_real, t, s)
    x_fake = schedule.pf_ode_step(x_t, out_fake, t, s).requires_grad_()
    with torch.no_grad():
        real = discriminator.logits(discriminator.features(x_real, s, cond))  # (n,)
    fake = discriminator.logits(discriminator.features(x_fake, s, cond))  # (n,)
    (slope,) = torch.autograd.grad(fake.sum(), x_fake, create_graph=learn)  # (n, ...)
    gap = x_real - x_fake.detach()  # (n, ...)
    return real, fake.detach(), slope.flatten(1), gap.flatten(1)


# --- Running --------------------------------------------------------------------------------------


def settled(cfg, method):
    """cfg with the method's own settings where no flag says otherwise."""
    _, _, changes = METHODS[method]
    own = PUBLISHED | changes
    return replace(cfg, **{name: own[name] for name in own if getattr(cfg, name) is None})


def trained(cfg, method, world, rates=RATES, kind=Curves):
    """One method, all seeds: (Players of its last stage, its curves).

    rates: of the student, by method; those of mse and adp are also those of the ADP that adp+…
    begins with. kind: of the curves, a class.
    """
    cfg = settled(cfg, method)
    loss, _, _ = METHODS[method]
    if method.startswith("adp+"):
        student, curves = after_adp(cfg, world, rates, kind)
    else:
        student = deepcopy(world.start).requires_grad_(True)
        times = times_of(cfg.student_steps if method in FEW_STEPS else 1)
        curves = kind(world, cfg.iterations, times)
    iterations = cfg.iterations - curves.done
    if loss in ("mse", "adp"):
        net = pretrain(cfg, loss, world, student, iterations, rates, curves)
    else:
        net = distil(cfg, loss, world, student, iterations, rates[method], curves)
    return net, curves


def after_adp(cfg, world, rates, kind):
    """(student, its curves) after ADP as the first part of adp+…: made once, then copied."""
    first_stage = str(replace(cfg, **PUBLISHED))  # what PUBLISHED names is stage 2's
    key = kind, rates["mse"], rates["adp"], first_stage
    if key not in world.adp:
        student = deepcopy(world.start).requires_grad_(True)
        curves = kind(world, cfg.iterations)
        iterations = round(cfg.adp_share * cfg.iterations)
        pretrain(cfg, "adp", world, student, iterations, rates, curves)
        world.adp[key] = student, curves
    return deepcopy(world.adp[key])


def train(cfg, method, world, rates=RATES):
    """One method, all seeds: a result for each. rates: as `trained` has them."""
    net, curves = trained(cfg, method, world, rates)
    samples = sample(world, net.student, curves.times)[..., :2]  # (S, SAMPLES, 2)
    results = []
    for seed, x, history in zip(world.seeds, samples, curves.points, strict=True):
        shown = 0 if results else 1000  # points, in a picture: of the first seed
        result = {
            "method": method,
            "mixture": cfg.mixture,
            "separation": world.plane.separation,
            "seed": seed,
            **metrics(world.plane, x),
            "iterations": cfg.iterations,
            "shares": shares(world.plane, x).double().numpy().round(4).tolist(),
            "history": history,
            "points": x[:shown].double().numpy().round(2).tolist(),
        }
        results.append(result)
    return results


def sample(world, student, times=ONE_STEP):
    """(S, SAMPLES, d), in chunks."""
    return torch.cat([drawn(world, student, times, SAMPLES // 10, i) for i in range(10)], 1)


@torch.no_grad()
def drawn(world, student, times, samples, i=0):
    """(S, samples, d): what the student makes of noise, which is another for another i."""
    x = emitted(student, times, Noise((10, i), world.seeds, samples))  # (S·samples, d)
    return x.unflatten(0, (len(world.seeds), samples))


def by(runs, *fields):
    """{value (or values) of the fields: runs}, in the order of appearance."""
    groups = {}
    for r in runs:
        groups.setdefault(itemgetter(*fields)(r), []).append(r)
    return groups


COLUMNS = {  # what a table calls a metric of toy/gmm.py: its name among the results
    "modes covered": "modes_covered",
    "in mode": "in_mode",
    "TV": "tv",
    "density TV": "density_tv",
}


def pm(values):
    """Mean ± sd of values (n,), as text; the sd of one is 0."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=len(values) > 1):.3f}"


def metrics_of(runs):
    """Mean ± sd of each of COLUMNS, as text."""
    return [pm([r[name] for r in runs]) for name in COLUMNS.values()]


def table(runs):
    """Text: one line a method (and mixture and separation), mean ± sd over its seeds."""
    lines = [("", "seeds", *COLUMNS)]
    for (method, mixture, separation), group in by(runs, "method", "mixture", "separation").items():
        what = f"{method:14} {mixture:>10} {separation:>4.1f}"
        lines.append((what, len(group), *metrics_of(group)))
    form = "{:30}{:>6}" + "{:>18}" * len(COLUMNS)
    return "\n".join(form.format(*cells) for cells in lines)


def check(cfg):
    """Raises BadInput for settings without meaning, before anything is computed or written."""
    unknown = ", ".join(repr(m) for m in cfg.methods.split(",") if m not in METHODS)
    require(not unknown, f"--methods: unknown {unknown}; there are {', '.join(METHODS)}")
    at_least(1, cfg, "seeds", "iterations", "student_steps", "pairs", "ttur")
    at_least(0, cfg, "first_seed", "warmup", "damping")
    at_least(2, cfg, "dim")
    at_least(8, cfg, "width", "head_width", "student_width")
    positive(cfg, "lr_heads")
    require(0 <= cfg.beta1 < 1, f"--beta1 {cfg.beta1}: in [0, 1)")
    require(cfg.dt is None or 0 < cfg.dt < 0.96, f"--dt {cfg.dt}: between 0 and 0.96")
    for separation in numbers(float, "separation", cfg) or [None]:
        mixture = load_mixture(cfg.mixture, separation)
    flat = mixture.means.shape[1] == 2
    require(flat, f"--mixture {cfg.mixture}: two-dimensional means")
    modes = numbers(int, "missing", cfg)
    K = len(mixture.means)
    some = set(modes) < set(range(K))
    require(some, f"--missing {cfg.missing}: some of modes 0 to {K - 1}, not all")


def numbers(kind, name, cfg):
    """The numbers, float or int, of a setting that has them comma-separated. Raises BadInput."""
    text = getattr(cfg, name)
    try:
        return [kind(x) for x in text.split(",")] if text else []
    except ValueError:
        raise BadInput(f"{flag(name)} {text}: numbers, comma-separated") from None


def main(cfg):
    check(cfg)
    folder = Path(cfg.out)
    claim(folder)
    runs = []
    for separation in cfg.separation.split(",") if cfg.separation else [None]:
        world = World(replace(cfg, separation=separation))
        for method in cfg.methods.split(","):
            runs += train(cfg, method, world)
            write_json(folder / "results.json", {"runs": runs, "config": vars(cfg)})
    print(table(runs))


if __name__ == "__main__":
    run(main, Config, description=__doc__)
