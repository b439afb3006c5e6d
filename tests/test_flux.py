"""FLUX: one pass at an embedded guidance, and the embedding at which each role runs.

python -m pytest tests/test_flux.py -s -k law    # prints what the fake score's choice costs
"""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import call, refused
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from test_models import INDEX, edited, latents

import adm
import data
import families
import models
from families.flux import Flux
from ode import Draw, per_sample

MODEL = ["--model", "tiny-flux"]


@pytest.fixture(scope="module")
def family():
    return families.load_teacher("tiny-flux")


@pytest.fixture(scope="module")
def flux_dev():
    return families.load_teacher("flux-dev", random_init=True)


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
@pytest.mark.parametrize("resolution", ["256", "512", "768x1360", "1024", "2048"])
def test_times_are_the_stock_pipelines_at_every_size(flux_dev, resolution, steps):
    """What its call tells the scheduler: even sigmas, and μ of the number of tokens."""
    shape = flux_dev.latent_shape(resolution)
    of_folder = FlowMatchEulerDiscreteScheduler.from_pretrained
    scheduler = of_folder(flux_dev.folder, subfolder="scheduler")
    mu = calculate_shift((shape[1] // 2) * (shape[2] // 2))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    ours = flux_dev.schedule_at(shape).timesteps(steps)  # (steps + 1,)
    torch.testing.assert_close(ours, 1000 * scheduler.sigmas, atol=1e-3, rtol=1e-5)
    known = {"256": 0.5, "1024": 1.15}  # published: of 256 and of 4,096 tokens
    if resolution in known:
        assert flux_dev.schedule_at(shape).shift == pytest.approx(np.exp(known[resolution]))


@pytest.mark.parametrize("kind", ["FluxControlPipeline", "FluxFillPipeline", "FluxKontextPipeline"])
def test_other_pipelines_are_one_line(kind, tmp_path, capsys):
    folder = edited(tmp_path, "tiny-flux", INDEX, _class_name=kind)
    flags = ["--model", folder, "--out", tmp_path / "out"]
    assert f"is a {kind}; the families here are" in refused(capsys, adm.main, adm.Config, *flags)


def test_schnell_is_one_line(tmp_path, capsys):
    folder = edited(tmp_path, "tiny-flux", "transformer/config.json", guidance_embeds=False)
    flags = ["--model", folder, "--out", tmp_path / "out"]
    assert "FLUX.1-schnell has few steps" in refused(capsys, adm.main, adm.Config, *flags)


# --- Passes ---------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """[(samples, the guidance that the network is told, or None)] of every pass from here on."""
    seen = []
    plain = Flux.call

    def spy(self, net, x_t, t, cond):
        told = cond["guidance"].tolist() if "guidance" in cond else None
        seen.append((len(x_t), told))
        return plain(self, net, x_t, t, cond)

    monkeypatch.setattr(Flux, "call", spy)
    return seen


def test_the_teacher_alone_is_told_a_guidance_in_one_pass(passes, encoded, tmp_path):
    """--guidance is the teacher's; student, fake score and D run at the stock call's 3.5."""
    prompts = ["--prompts", encoded["tiny-flux"]]
    flags = ["--count", 2, "--steps", 3, "--guidance", 2, "--out", tmp_path / "pairs"]
    call(data.pairs, data.PairsConfig, *MODEL, *prompts, *flags)
    assert passes == [(2, [2.0, 2.0])] * 3
    passes.clear()
    flags = ["--iterations", 1, "--batch-size", 2, "--student-steps", 1, "--guidance", 2]
    flags += ["--head-width", 8, "--sample-every", 0, "--out", tmp_path / "adm"]
    call(adm.main, adm.Config, *MODEL, *prompts, *flags)
    student, teacher, *others = passes  # then fake, D at x_fake, D at x_real, fake again
    assert teacher == (2, [2.0, 2.0])
    assert [student, *others] == [(2, None)] * 5
    how = json.loads((tmp_path / "adm" / "pipeline" / INDEX).read_text())["_sampling"]
    assert how["guidance_scale"] == 3.5


def test_what_is_told_nothing_runs_at_the_stock_calls_default(family, conditionings):
    denoiser = models.load_denoiser(family)
    x, t = latents(family), torch.tensor([900.0, 300.0])  # (2, ...), (2,)
    cond = conditionings["tiny-flux"]
    with torch.no_grad():
        out, at_stock, at_one = (
            denoiser(x, t, cond | told)[0]
            for told in ({}, {"guidance": torch.full((2,), 3.5)}, {"guidance": torch.ones(2)})
        )
    assert torch.equal(out, at_stock)
    assert (out - at_one).abs().max() > 1e-2


# --- The start ------------------------------------------------------------------------------------


def told(denoiser, w):
    """The denoiser, from here on at an embedded guidance of w."""
    forward = denoiser.forward

    def at_w(x_t, t, cond, *more):
        return forward(x_t, t, {**cond, "guidance": torch.full_like(t, w)}, *more)

    denoiser.forward = at_w
    return denoiser


@pytest.mark.parametrize("loss", ["dmd", "step"])
@pytest.mark.parametrize("of_teacher, of_fake", [(3.5, 3.5), (3.5, 1.0), (2.0, 3.5), (2.0, 2.0)])
def test_at_the_start_only_one_embedding_of_the_fake_score_has_no_gradient(
    family, conditionings, loss, of_teacher, of_fake
):
    """That of the teacher. Ours is the student's: at the default guidance they are the same."""
    teacher, student, fake = models.make_roles(family, ("student", "fake"))
    cfg = adm.Config(model="tiny-flux", loss=loss)
    schedule, shape = family.schedule, family.latent_shape()
    players = (teacher, student, told(fake, of_fake), None, schedule, schedule)
    net = adm.Players(*players, schedule.timesteps(1)[:-1], shape, of_teacher)
    draw = Draw((0,), range(2))
    algorithm, _ = adm.round_of(loss, 0)
    learned = []
    algorithm(net, cfg, draw, conditionings["tiny-flux"], None, 0, learned.append)
    learned[0].backward()
    largest = max(p.grad.abs().max().item() for p in trained(student) if p.grad is not None)
    assert (largest == 0) == (of_teacher == of_fake)


def trained(role):
    return role.own_parameters().values()


# --- A law that the teacher knows -----------------------------------------------------------------

SHAPE = (4, 4, 4)  # of latents: four tokens
WIDTH = 0.5  # of each law around its mean
TEACHER, FAKE = 120, 40  # updates
BATCH = 32
W = 3.5


class Law:
    """x_0 ~ N(g·μ, WIDTH²): what a distilled teacher says at an embedded guidance g, exactly."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.mean = 0.2 * torch.randn(SHAPE).sign()  # μ, of g = 1
        self.texts = {"prompt_embeds": torch.randn(4, 32), "pooled": torch.randn(16)}

    def cond(self, g):
        """The conditioning of one prompt at guidances g (B,)."""
        same = {name: c.expand(len(g), *c.shape) for name, c in self.texts.items()}
        return {**same, "guidance": g}

    def noised(self, g, t):
        """(x_t, x_0, ε), (B, ...) each, at g and t, (B,) each."""
        mean = g.view(-1, 1, 1, 1) * self.mean  # (B, ...)
        x_0 = mean + WIDTH * torch.randn(mean.shape)  # (B, ...)
        eps = torch.randn(x_0.shape)
        return self.schedule.add_noise(x_0, eps, t), x_0, eps

    def velocity(self, x_t, g, t):
        """E[ε − x_0 | x_t], in closed form: (B, ...)."""
        alpha, sigma = (per_sample(c, x_t) for c in self.schedule.alpha_sigma(t))
        mean = per_sample(g, x_t) * self.mean  # (B, ...)
        off = (x_t - alpha * mean) / (alpha**2 * WIDTH**2 + sigma**2)  # (B, ...)
        return sigma * off - mean - alpha * WIDTH**2 * off


def regress(net, updates, rate, batch):
    """Adam on the mean square of out − target; batch() → (x_t, t, cond, target)."""
    optimizer = torch.optim.Adam(net.parameters(), rate)
    annealed = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        x_t, t, cond, target = batch()
        loss = (net(x_t, t, cond)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        annealed.step()


def test_a_fake_score_fits_the_teachers_law_at_any_embedding_but_starts_there_at_one(family):
    """Of a student that samples the teacher's law at W: where its gradient would push it.

    A network is trained to know the law at every guidance; fake scores are its copies and learn
    that student's samples, at W or at 1. Apart: |x0_fake − x0_real|² over that between the law at 1
    and at W. Push: along μ, so in units of guidance.
    """
    torch.manual_seed(0)
    law = Law(family.schedule)
    small = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1}
    net = family.net_class.from_config({**family.config, **small})
    teacher = models.Denoiser(family, net)

    def of_any_guidance():
        g, t = 1 + 4 * torch.rand(BATCH), 20 + 960 * torch.rand(BATCH)  # (B,) each
        x_t, _, _ = law.noised(g, t)
        return x_t, t, law.cond(g), law.velocity(x_t, g, t)

    regress(teacher, TEACHER, 3e-3, of_any_guidance)

    g, t = torch.full((512,), W), 20 + 960 * torch.rand(512)
    x_t, _, _ = law.noised(g, t)

    @torch.no_grad()
    def clean(role, w):
        out = role(x_t, t, law.cond(torch.full_like(t, w)))[0]
        return law.schedule.to_x0_eps(x_t, out, t)[0]

    real = clean(teacher, W)
    scale = (clean(teacher, 1.0) - real).square().mean()

    def compared(fake, w):
        """(apart, push)"""
        gap = clean(fake, w) - real  # DMD's gradient in x̂_0, which the student descends
        push = -(gap * law.mean).sum((1, 2, 3)).mean() / law.mean.square().sum()
        return (gap.square().mean() / scale).item(), push.item()

    start, end = {}, {}
    for w in (W, 1.0):
        torch.manual_seed(1)
        fake = copy.deepcopy(teacher)
        start[w] = compared(fake, w)

        def of_the_student(w=w):
            t = 1000 * torch.rand(BATCH)  # (B,)
            x_t, x_0, eps = law.noised(torch.full_like(t, W), t)
            return x_t, t, law.cond(torch.full_like(t, w)), eps - x_0

        regress(fake, FAKE, 3e-4, of_the_student)
        end[w] = compared(fake, w)
        said = [f"apart {apart:.3f}, push {push:+.2f}" for apart, push in (start[w], end[w])]
        print(f"\nfake at {w:g}: {said[0]}; after {FAKE} updates {said[1]}")
    assert start[W][0] < 1e-9 and end[W][0] < 0.1  # it is there, and stays
    assert start[1.0][1] > 1  # towards more guidance than the teacher's
    assert end[1.0][0] < 0.1
