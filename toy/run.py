"""A two-dimensional experiment that could refute the paper: one-step students of a Gaussian mixture, by seven methods.

    mse (A1)   adp (A5)   dmd (B2)   adm (B1)   adp+dmd (B3)   adp+adm (B4, DMDX)   dmd2 (DMD and a GAN on teacher samples)

Letters are rows of the paper's ablation table (Lu et al., ICCV 2025, arXiv 2507.18569). Losses come from adp.py and adm.py, the
noise process and the PF-ODE step from ode.py, and the two stages are their loops without files, prompts and ranks. Networks are
MLPs; every seed is one slice of a batched network, trained beside the others and independent of them.

    python toy/run.py --iterations 600                                            # a quick look, 2 seeds: 2 minutes
    python toy/run.py --mixture ring8-rare --methods dmd,adm,adp+dmd,adp+adm --seeds 5 --out out/toy

Prints a table, mean ± sd over seeds; writes results.json (read by toy/plot.py) and samples.npz. All numbers are ours unless a
comment says otherwise: the paper has no toy.
"""

import json
import math
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python toy/run.py` finds the project

import adm
import adp
from models import Discriminator, frozen
from ode import Draw, T, student_sample, teacher_sample
from runtime.script import run
from runtime.flags import option
from runtime.settings import BadInput, at_least, require
from toy.gmm import LINE, load_mixture, metrics, mode_tv, modes_covered, shares

METHODS = ("mse", "adp", "dmd", "adm", "adp+dmd", "adp+adm", "dmd2")
SAMPLES = 100_000  # of each student, for its metrics
TEACHER = 3000  # iterations of the teacher MLP's fit, batch 512
POOL = 20_000  # ODE pairs of each seed
HISTORY = 40  # points of a training curve
DAMPING_SIGMA = 0.01  # length of the gradient penalty's finite difference, as adm.py's default
GAN_WEIGHT = 0.1  # of dmd2's adversary beside DMD


@dataclass
class Config:
    mixture: str = option("ring8-rare", "ring8, ring8-rare, ring4-rare, grid25, two-far, or a JSON file: means, weights, std")
    separation: str | None = option(None, "radius of the farthest mode over sigma; one, or several as 5,10; default: as is")
    methods: str = option("mse,adp,dmd,adm,adp+dmd,adp+adm,dmd2", "comma-separated")
    teacher: Literal["exact", "mlp"] = option("exact", "the closed-form velocity, or an MLP fitted to it")
    seeds: int = option(2, "students of each method")
    first_seed: int = option(0, "their numbers start here")
    iterations: int = option(3000, "student updates of each method, ADP's included")
    adp_share: float = option(0.75, "of them, how many adp+dmd and adp+adm spend on ADP")
    mse_share: float = option(0.9, "of ADP's iterations, how many are regression")
    batch_size: int = option(256, "of each seed")
    width: int = option(128, "of every hidden layer")
    head_width: int = option(32, "of the discriminator's heads")
    out: str = option("out/toy", "folder to write")
    schedule: Literal["cubic", "uniform"] = option("cubic", "where on the line ADP's student trains (paper: cubic)")
    ttur: int = option(1, "discriminator and fake-score updates for each student update (paper: 1; dmd2: always 5)")
    dt: float = option(1 / 64, "length of the PF-ODE step, as a fraction of T (paper: 1/64)")
    fake_gradient: Literal["exact", "straight-through"] = option("exact", "through the frozen fake network, or around it")
    t_weight: Literal["none", "1/alpha"] = option("none", "weight of ADM's generator loss in t (paper: none)")
    damping: float = option(0.1, "weight of the zero-centred gradient penalty on D (paper: none)")
    lr_student: float | None = option(None, "learning rate of the student; default: the method's own, from the search")
    lr_fake: float = option(1e-3, "learning rate of the fake score")
    lr_heads: float = option(1e-3, "learning rate of the discriminator's heads")


# --- Networks --------------------------------------------------------------------------------------------------------
# S seeds side by side: weights (S, in, out), and a batch is the seeds' batches one after the other, (S·B, ...).


class Linear(nn.Module):
    """(S·B, n_in) → (S·B, n_out), each seed by its own matrix. draw: ode.Draw, one generator a seed."""

    def __init__(self, draw, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(draw.normal((n_in, n_out)) / (3 * n_in) ** 0.5)  # variance as in nn.Linear
        self.bias = nn.Parameter(torch.zeros(len(self.weight), 1, n_out))

    def forward(self, h):
        return torch.baddbmm(self.bias, h.unflatten(0, (len(self.weight), -1)), self.weight).flatten(0, 1)


class MLP(nn.Module):
    """A denoiser as the big ones are: (x_t, t) → (prediction, features), the prediction a velocity ε − x_0."""

    def __init__(self, draw, width, spread):
        super().__init__()
        self.spread = spread  # of x_0: the network sees x_t, and returns a velocity, in units of their own size
        self.register_buffer("frequencies", torch.arange(8) * torch.pi)
        sizes = [2 + len(self.frequencies), width, width, width]
        self.hidden = nn.ModuleList(Linear(draw, a, b) for a, b in zip(sizes, sizes[1:]))
        self.out = Linear(draw, width, 2)

    def forward(self, x_t, t, want="prediction"):
        """x_t (S·B, 2), t (S·B,) → (v (S·B, 2), or None; hidden layers, each (S·B, width)).

        want: "prediction" or "features", which stops before the output layer.
        """
        alpha, sigma = (c[:, None] for c in LINE.alpha_sigma(t))
        size = ((alpha * self.spread) ** 2 + sigma ** 2).sqrt()
        h, maps = torch.cat([x_t / size, (sigma * self.frequencies).cos()], 1), []
        for layer in self.hidden:
            h = F.silu(layer(h))
            maps.append(h)
        return None if want == "features" else self.out(h) * (1 + self.spread ** 2) ** 0.5, maps


class Head(nn.Module):
    """Hidden layer (S·B, width) → logits (S·B,)."""

    def __init__(self, draw, n_in, width):
        super().__init__()
        self.body, self.to_logit = Linear(draw, n_in, width), Linear(draw, width, 1)

    def forward(self, h):
        return self.to_logit(F.silu(self.body(h)))[:, 0]


class NoisyDiscriminator(Discriminator):
    """D_τ: heads on all hidden layers of the frozen teacher MLP; logits (S·B,) of x_t (S·B, 2), t (S·B,)."""

    def __init__(self, draw, backbone, width):
        super().__init__(backbone, [Head(draw, layer.weight.shape[2], width) for layer in backbone.hidden])

    def features(self, x_t, t):
        return self.backbone(x_t, t, want="features")[1]

    def forward(self, x_t, t):
        return self.logits(self.features(x_t, t))


# --- One optimizer step, random numbers, and what is written down ------------------------------------------------------


class Optimizer:
    """Adam, elementwise, so each seed's slice is stepped as if alone."""

    def __init__(self, module, rate, seeds, clip=None):
        self.parameters, self.seeds = [p for p in module.parameters() if p.requires_grad], seeds
        self.rate, self.clip = rate, clip
        self.adam = torch.optim.Adam(self.parameters, rate, fused=True)

    def step(self, loss, progress=None):
        """One update. `loss` is a mean over S·B samples: S times it is the sum of the seeds' own means.

        progress  in [0, 1): the rate rises over the first tenth and falls by a cosine (ours; None: it stays)
        """
        if progress is not None:
            self.adam.param_groups[0]["lr"] = self.rate * min(1, 10 * progress) * (1 + math.cos(math.pi * progress)) / 2
        self.adam.zero_grad()
        (self.seeds * loss).backward()
        if self.clip:
            scale = (self.clip / self.grad_norms()).clamp(max=1).view(-1, 1, 1)
            for p in self.parameters:
                p.grad.mul_(scale)
        self.adam.step()

    def grad_norms(self):
        """Of the last update, (S,)."""
        return sum(p.grad.flatten(1).square().sum(1) for p in self.parameters).sqrt()


class Noise:
    """Random numbers of one iteration: ode.Draw with one generator a seed, so that they depend on (key, seed) alone, the same
    for every method and however many seeds run side by side."""

    def __init__(self, key, seeds, batch):
        self.draw, self.batch = Draw(key, seeds), batch

    def normal(self):
        """(S·B, 2)."""
        return self.draw.normal((self.batch, 2)).flatten(0, 1)

    def uniform(self, low, high):
        """(S·B,): the normal distribution function of a normal number is uniform."""
        return low + (high - low) * torch.special.ndtr(self.draw.normal((self.batch,))).flatten()

    def pick(self, *pools):
        """The same random rows of each pool (S, P, 2), as (S·B, 2)."""
        rows = (self.uniform(0, pools[0].shape[1]).long().clamp(max=pools[0].shape[1] - 1)).view(-1, self.batch, 1)
        return [pool.gather(1, rows.expand(-1, -1, 2)).flatten(0, 1) for pool in pools]


def one_step(student, x_T):
    """The student's x̂_0 = G_θ(x_T, T), (S·B, 2)."""
    return student_sample(lambda x, t: student(x, t)[0], LINE, x_T, torch.tensor([T]), None)


class Curves:
    """Training curves, a list of points for each seed, and the progress bar.

    total       iterations of the whole run, of which there will be HISTORY points
    here        how many of them this object counts
    """

    def __init__(self, world, name, total, here):
        self.mixture, self.seeds, self.points = world.mixture, world.seeds, [[] for _ in world.seeds]
        self.done, self.every, self.bar = 0, max(1, total // HISTORY), tqdm(total=here, desc=name, leave=False, disable=None)
        self.x_T = Noise((9,), self.seeds, 4096).normal()  # (S·4096, 2)

    def due(self):
        """Counts one iteration; True where a point is wanted."""
        self.done += 1
        self.bar.update()
        return self.done % self.every == 0

    @torch.no_grad()
    def add(self, student, **more):
        """One point: how the student does, and more={name: S numbers}."""
        for i, x in enumerate(one_step(student, self.x_T).chunk(len(self.seeds))):
            point = {"iteration": self.done, "tv": round(mode_tv(self.mixture, x), 4)}
            point["modes_covered"] = modes_covered(self.mixture, x)
            self.points[i].append(point | {name: float(f"{values[i]:.4g}") for name, values in more.items()})


# --- The teacher -------------------------------------------------------------------------------------------------------


class World:
    """What all methods share: the mixture, its teacher F_φ, the teacher MLPs and the teacher's ODE pairs, for each seed.

    teacher   predict(x_t, t): the exact velocity or the MLP
    mlp       an MLP a seed, frozen, fitted to the exact velocity: where student and fake score start, and D's backbone
    x_T, x_0  (S, POOL, 2): the ends of the teacher's PF-ODE, in 64 steps
    """

    def __init__(self, cfg, separation=None):
        self.mixture = load_mixture(cfg.mixture, separation)
        self.seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
        self.mlp = self.fit(cfg)
        for p in self.mlp.parameters():
            p.data = p.data.repeat(cfg.seeds, 1, 1)
        self.teacher = self.mixture.velocity if cfg.teacher == "exact" else lambda x, t: self.mlp(x, t)[0]
        with torch.no_grad():
            x_T = Noise((2,), self.seeds, POOL).normal()
            x_0 = teacher_sample(self.teacher, LINE, x_T, 64)
        self.x_T, self.x_0 = (x.unflatten(0, (cfg.seeds, POOL)) for x in (x_T, x_0))
        self.adp = {}  # see after_adp

    def fresh(self, seed):
        """(4000, 2) draws that nothing was trained on."""
        return self.mixture.sample((4000,), torch.Generator().manual_seed(10 ** 6 + seed))

    def after_adp(self, cfg):
        """(student, its curves' points, iterations, seconds) after ADP as the first part of adp+…: made once, then copied."""
        key = tuple(getattr(cfg, name) for name in STAGE_1)
        if key not in self.adp:
            student, began = deepcopy(self.mlp).requires_grad_(True), time.perf_counter()
            iterations = round(cfg.adp_share * cfg.iterations)
            curves = Curves(self, "adp first", cfg.iterations, iterations)
            pretrain(cfg, self, student, iterations, round(cfg.mse_share * iterations), RATES["mse"], RATES["adp"], curves)
            self.adp[key] = student, curves.points, iterations, time.perf_counter() - began
        return deepcopy(self.adp[key])

    def fit(self, cfg):
        """The MLP, S = 1."""
        data = self.mixture.sample((1, POOL), torch.Generator().manual_seed(0))  # (1, POOL, 2)
        mlp = MLP(Draw((0,), [0]), cfg.width, self.mixture.spread)
        optimizer = Optimizer(mlp, 0.02, 1)
        for iteration in tqdm(range(TEACHER), "teacher", leave=False, disable=None):
            noise, progress = Noise((1, iteration), [0], 512), iteration / TEACHER
            t = noise.uniform(0, T)
            x_t = LINE.add_noise(*noise.pick(data), noise.normal(), t)
            optimizer.step(adm.fake_score_loss(mlp(x_t, t)[0], self.mixture.velocity(x_t, t)), progress)
        mlp.zero_grad()
        return mlp.requires_grad_(False)


# --- The two stages ----------------------------------------------------------------------------------------------------


def pretrain(cfg, world, student, iterations, mse_iterations, rate_mse, rate, curves):
    """Stage 1, as adp.py: velocity regression on ODE pairs, then the adversary at diffused samples.

    One discriminator, D_τ1: two dimensions have no pixels for D_τ2 (so λ is 1).
    """
    discriminator = NoisyDiscriminator(Draw((3,), world.seeds), world.mlp, cfg.head_width)
    # Clipped as in adp.py: at regression's high rate a rare spike would undo a seed's run (2 of 5, at 0.04 without).
    optimizer_mse, optimizer = Optimizer(student, rate_mse, cfg.seeds, clip=1), Optimizer(student, rate, cfg.seeds)
    optimizer_heads = Optimizer(discriminator.heads, cfg.lr_heads, cfg.seeds)
    for iteration in range(iterations):
        noise = Noise((4, iteration), world.seeds, cfg.batch_size)
        x_T, x_0 = noise.pick(world.x_T, world.x_0)  # (S·B, 2)

        # The student's input on the pair's line, its velocity, its sample.
        t = adp.line_times(noise.uniform(0, T), cfg.schedule)  # (S·B,)
        x_t = LINE.add_noise(x_0, x_T, t)
        v = student(x_t, t)[0]
        if iteration < mse_iterations:
            # Regression: the student trains.
            optimizer_mse.step(adp.velocity_loss(v, x_0, x_T), iteration / mse_iterations)
        else:
            # What D sees: both samples noised to the same t' with independent noise.
            x0_hat, t = LINE.to_x0_eps(x_t, v, t)[0], noise.uniform(0, T)
            x_fake, x_real = (LINE.add_noise(x, noise.normal(), t) for x in (x0_hat, x_0))
            with frozen(discriminator.heads):
                # Generator: the student trains.
                maps_fake = discriminator.features(x_fake, t)
                optimizer.step(adp.generator_loss([discriminator.logits(maps_fake)], [1]),
                               (iteration - mse_iterations) / (iterations - mse_iterations))
            # Discriminator: the heads train.
            real = discriminator(x_real, t)
            fake = discriminator.logits([h.detach() for h in maps_fake])
            loss = adp.discriminator_loss([real], [fake], [1])
            optimizer_heads.step(loss + damping(cfg, discriminator, noise, t, (x_real, real), (x_fake, fake)))
        if curves.due():
            curves.add(student, grad_norm=optimizer.grad_norms())


def distil(cfg, loss, world, student, iterations, rate, curves):
    """Stage 2, as adm.py, from x_T in one step. loss: "adm", "dmd", or "dmd2": DMD plus a GAN on the teacher's samples at
    diffused samples, five updates of fake score and discriminator a student's (Yin et al., arXiv 2405.14867)."""
    discriminator = NoisyDiscriminator(Draw((5,), world.seeds), world.mlp, cfg.head_width)
    fake = deepcopy(world.mlp).requires_grad_(True)
    optimizer, optimizer_fake = Optimizer(student, rate, cfg.seeds), Optimizer(fake, cfg.lr_fake, cfg.seeds)
    optimizer_heads = Optimizer(discriminator.heads, cfg.lr_heads, cfg.seeds)
    for iteration in range(iterations):
        for r in range(5 if loss == "dmd2" else cfg.ttur):  # the student trains in round 0
            noise = Noise((6, iteration, r), world.seeds, cfg.batch_size)
            # 1. Sample.
            with torch.set_grad_enabled(r == 0):
                x0_hat = one_step(student, noise.normal())  # (S·B, 2)
            if r == 0 or loss == "adm":
                # 2. Re-diffuse; s = t − Δt is where both branches land.
                t = noise.uniform((0.02 + cfg.dt) * T, 0.98 * T)  # (S·B,)
                s = t - cfg.dt * T
                x_t = LINE.add_noise(x0_hat, noise.normal(), t)
                with frozen(fake, discriminator.heads), torch.set_grad_enabled(r == 0):
                    # 3. One PF-ODE step from the same x_t.
                    with torch.no_grad():
                        out_real = world.teacher(x_t, t)
                        x_real = LINE.pf_ode_step(x_t, out_real, t, s)
                    with torch.set_grad_enabled(r == 0 and loss == "adm" and cfg.fake_gradient == "exact"):
                        out_fake = fake(x_t, t)[0]
                        x_fake = LINE.pf_ode_step(x_t, out_fake, t, s)
                    if cfg.fake_gradient == "straight-through":
                        x_fake = adm.straight_through(x_fake, x0_hat, LINE.alpha_sigma(s)[0])
                    # 4. Generator: the student trains. ADM logs the DMD loss without using it.
                    x0_real, x0_fake = (LINE.to_x0_eps(x_t, out, t)[0].detach() for out in (out_real, out_fake))
                    if r == 0:
                        logged = [x.detach().chunk(cfg.seeds) for x in (x0_hat, x0_real, x0_fake)]
                    if loss == "adm":
                        maps_fake = discriminator.features(x_fake, s)
                        weight = 1 / LINE.alpha_sigma(t)[0] if cfg.t_weight == "1/alpha" else None  # (S·B,)
                        objective = adm.generator_loss(discriminator.logits(maps_fake), weight)
                    else:
                        objective = adm.dmd_loss(x0_hat, x0_real, x0_fake)
            if loss == "dmd2":
                t = noise.uniform(0, T)
                x_fake, x_real = (LINE.add_noise(x, noise.normal(), t) for x in (x0_hat, *noise.pick(world.x_0)))
                s = t
                with frozen(discriminator.heads), torch.set_grad_enabled(r == 0):
                    maps_fake = discriminator.features(x_fake, t)
                    if r == 0:
                        objective = objective + GAN_WEIGHT * adp.generator_loss([discriminator.logits(maps_fake)], [1])
            if r == 0:
                optimizer.step(objective, iteration / iterations)
            # 5. Discriminator: the heads train.
            if loss != "dmd":
                real = discriminator(x_real, s)
                fake_logits = discriminator.logits([h.detach() for h in maps_fake])
                optimizer_heads.step(adm.discriminator_loss(real, fake_logits)
                                     + damping(cfg, discriminator, noise, s, (x_real, real), (x_fake, fake_logits)))
            # 6. Fake score: trains by its diffusion loss on the student's samples.
            x0, t, eps = x0_hat.detach(), noise.uniform(0, T), noise.normal()
            optimizer_fake.step(adm.fake_score_loss(fake(LINE.add_noise(x0, eps, t), t)[0], LINE.to_out(x0, eps, t)))
        if curves.due():
            curves.add(student, grad_norm=optimizer.grad_norms(), dmd_loss=[adm.dmd_loss(*seed) for seed in zip(*logged)])


def damping(cfg, discriminator, noise, t, *points):
    """cfg.damping times adm.damping_loss at each (x, D's logits there)."""
    if not cfg.damping:
        return 0
    total = 0
    for x, logits in points:
        with torch.no_grad():
            maps = discriminator.features(x + DAMPING_SIGMA * noise.normal(), t)
        total = total + adm.damping_loss(logits, discriminator.logits(maps), DAMPING_SIGMA)
    return cfg.damping * total


# --- Running ---------------------------------------------------------------------------------------------------------

RATES = {  # of the student, by method (in adp+…: of the second stage): `python toy/claims.py search` chose them
    "mse": 0.04, "adp": 1e-05, "dmd": 0.001, "adm": 0.0003, "adp+dmd": 0.0003, "adp+adm": 3e-05, "dmd2": 0.003}
STAGE_1 = ("iterations", "adp_share", "mse_share", "batch_size", "head_width", "schedule", "damping", "lr_heads")


def train(cfg, method, world):
    """One method, all seeds: ([a result for each seed], samples (S, 100,000, 2)). Stage 1 is shared where it is the same."""
    began, iterations = time.perf_counter(), cfg.iterations
    first, _, last = method.rpartition("+")
    if first:
        student, points, done, seconds = world.after_adp(cfg)
        began, iterations = time.perf_counter() - seconds, cfg.iterations - done
    else:
        student, points, done = deepcopy(world.mlp).requires_grad_(True), [[] for _ in world.seeds], 0
    curves = Curves(world, method, cfg.iterations, iterations)
    curves.points, curves.done = points, done
    rate = RATES[method] if cfg.lr_student is None else cfg.lr_student
    if last == "mse":
        pretrain(cfg, world, student, iterations, iterations, rate, 0.0, curves)
    elif last == "adp":
        pretrain(cfg, world, student, iterations, round(cfg.mse_share * iterations), RATES["mse"], rate, curves)
    else:
        distil(cfg, last, world, student, iterations, rate, curves)
    curves.bar.close()
    seconds, x = time.perf_counter() - began, sample(world, student)  # (S, SAMPLES, 2)
    return [{"method": method, "mixture": cfg.mixture, "separation": world.mixture.separation, "seed": seed,
             **metrics(world.mixture, x[i], world.fresh(seed)), "iterations": cfg.iterations, "seconds": seconds,
             "shares": [round(float(share), 4) for share in shares(world.mixture, x[i])],
             "history": curves.points[i], "points": rounded(x[i, :1000]) if i == 0 else []}
            for i, seed in enumerate(world.seeds)], x


def rounded(x):
    """Points (n, 2) for a picture, as short JSON."""
    return [[round(c, 2) for c in point] for point in x.tolist()]


@torch.no_grad()
def sample(world, student):
    """(S, SAMPLES, 2), in chunks."""
    chunks = [one_step(student, Noise((10, i), world.seeds, SAMPLES // 10).normal()) for i in range(10)]
    return torch.cat([x.unflatten(0, (len(world.seeds), -1)) for x in chunks], 1)


def table(runs):
    """Text: one line a method (and mixture and separation), mean ± sd over its seeds."""
    lines = [f"{'':24}{'seeds':>6}" + "".join(f"{name:>18}" for name in COLUMNS)]
    groups = {}
    for r in runs:
        groups.setdefault((r["method"], r["mixture"], f"{r['separation']:.1f}"), []).append(r)
    for (method, mixture, separation), group in groups.items():
        cells = [[r[name] for r in group] for name in COLUMNS]
        lines.append(f"{method:8} {mixture:>10} {separation:>4}{len(group):>6}"
                     + "".join(f"{np.mean(c):>9.3f} ± {np.std(c, ddof=len(c) > 1):<6.3f}" for c in cells))
    return "\n".join(lines)


COLUMNS = ("modes_covered", "in_mode", "tv", "density_tv", "energy", "seconds")


def check(cfg):
    """Raises BadInput for settings without meaning, before anything is computed or written."""
    unknown = [m for m in cfg.methods.split(",") if m not in METHODS]
    require(not unknown, f"--methods: unknown {', '.join(map(repr, unknown))}; there are {', '.join(METHODS)}")
    at_least(1, cfg, "seeds", "iterations", "batch_size", "ttur")
    at_least(0, cfg, "first_seed", "damping")
    at_least(8, cfg, "width", "head_width")
    for name in ("adp_share", "mse_share"):
        require(0 <= getattr(cfg, name) <= 1, f"--{name.replace('_', '-')} {getattr(cfg, name)}: in [0, 1]")
    require(0 < cfg.dt < 0.96, f"--dt {cfg.dt}: between 0 and 0.96")
    for name in ("lr_student", "lr_fake", "lr_heads"):
        rate = getattr(cfg, name)
        require(rate is None or 0 < rate < float("inf"), f"--{name.replace('_', '-')} {rate}: a positive number")
    for separation in separations(cfg):
        mixture = load_mixture(cfg.mixture, separation)
    require(mixture.means.shape[1] == 2, f"--mixture {cfg.mixture}: two-dimensional means")


def separations(cfg):
    """--separation as numbers, [None] for the mixture's own. Raises BadInput."""
    try:
        return [float(x) for x in cfg.separation.split(",")] if cfg.separation else [None]
    except ValueError:
        raise BadInput(f"--separation {cfg.separation}: numbers, comma-separated") from None


def main(cfg):
    check(cfg)
    folder = Path(cfg.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {cfg.out}: {e.strerror}") from None
    runs, samples, target = [], {}, None
    for separation in separations(cfg):
        world = World(cfg, separation)
        target = target or rounded(world.fresh(cfg.first_seed)[:1000])  # of the first separation, which the headline draws
        for method in cfg.methods.split(","):
            results, x = train(cfg, method, world)
            runs += results
            samples[f"{method}@{world.mixture.separation:.1f}"] = x.numpy()
            (folder / "results.json").write_text(json.dumps({"runs": runs, "config": asdict(cfg), "target": target}) + "\n")
            np.savez_compressed(folder / "samples.npz", **samples)
    print(table(runs))


if __name__ == "__main__":
    run(main, Config, description=__doc__)
