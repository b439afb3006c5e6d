"""The 2-D experiment: closed forms, metrics, methods, and what its claims rest on.

Closed forms are compared with Monte Carlo and finite differences, metrics with known answers. The
methods' training is that of adp.py and adm.py. And two results must not break: DMDX covers all
modes of a small mixture, and DMD's gradient is the score difference.
"""

import json
import os
import sys
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from torch.testing import assert_close

import adm
import adp
import toy.run as toy
from ode import Draw, T
from runtime.script import in_one_line, run
from runtime.settings import BadInput
from toy import claims, digits_experiment, gmm, plot, why
from toy.gmm import LINE, Mixture
from toy.run import Config, World, train

torch.set_num_threads(1)  # matrices are small: more threads only wait for each other


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[2, 5])
def mixture(request):
    """Three overlapping modes of unequal weight and width, in 2-D and 5-D."""
    means = 2 * torch.randn(3, request.param, generator=generator(0))
    return Mixture(means, [1, 2, 3], [0.3, 0.6, 1.0])


@pytest.fixture
def points(mixture):
    """(x_t (64, d), t (64,)) where the mixture is, all over the line."""
    g = generator(1)
    t = torch.rand(64, generator=g) * 0.9 * T + 0.05 * T
    x0 = mixture.sample(64, g)
    return LINE.add_noise(x0, torch.randn(x0.shape, generator=g), t), t


def world_of(cfg, teacher_iterations):
    """A World whose teacher MLP is fitted in fewer iterations than a real run's."""
    with mock.patch.object(toy, "TEACHER", teacher_iterations):
        return World(cfg)


# --- Closed forms ---------------------------------------------------------------------------------


def test_velocity_is_that_of_the_density(mixture, points):
    """Tweedie: E[ε | x_t] = −σ ∇ log p_t(x_t), here by torch.distributions, and it is x_t + α v."""
    D = torch.distributions
    for x, t in zip(*points, strict=True):
        alpha, sigma = (float(c) for c in LINE.alpha_sigma(t[None]))
        std = ((alpha * mixture.std) ** 2 + sigma**2).sqrt()[:, None].expand_as(mixture.means)
        modes = D.Independent(D.Normal(alpha * mixture.means, std), 1)
        density = D.MixtureSameFamily(D.Categorical(mixture.weights), modes)
        score = torch.func.grad(density.log_prob)(x)  # (d,)
        eps = x + alpha * mixture.velocity(x[None], t[None])[0]  # (d,)
        assert_close(eps, -sigma * score, rtol=1e-3, atol=1e-3)


def test_velocity_against_monte_carlo(mixture, points):
    """A mean over 400,000 draws of x_0, weighted by how well they explain x_t.

    Where it is noisy, so that many do.
    """
    g = generator(2)
    k = torch.multinomial(mixture.weights, 400_000, replacement=True, generator=g)
    noise = torch.randn(len(k), mixture.means.shape[1], generator=g)
    x0 = mixture.means[k] + mixture.std[k, None] * noise
    noisy = [(x, t) for x, t in zip(*points, strict=True) if t > 0.6 * T]
    for x, t in noisy[:8]:
        alpha, sigma = LINE.alpha_sigma(t[None])
        eps = (x - alpha * x0) / sigma
        w = (-0.5 * eps.square().sum(1)).softmax(0)  # (n,)
        v = mixture.velocity(x[None], t[None])[0]  # (d,)
        assert_close(v, w @ (eps - x0), rtol=0, atol=0.15)


def test_samples_have_the_moments_of_the_mixture(mixture):
    x = mixture.sample(200_000, generator(3))
    assert_close(x.mean(0), mixture.weights @ mixture.means, rtol=0, atol=0.02)
    assert_close(float((x.square().mean()) ** 0.5), mixture.spread, rtol=0.01, atol=0)


def test_the_exact_teacher_carries_noise_to_the_mixture():
    world = world_of(Config(mixture="ring4-rare", seeds=1), 1)
    assert gmm.mode_tv(world.mixture, world.x_0[0]) < 0.02


def test_separation_scales_radius_over_sigma():
    mixture = gmm.load_mixture("ring8-rare", 12)
    assert mixture.separation == pytest.approx(12)
    assert mixture.std[0] == pytest.approx(0.3)
    assert gmm.load_mixture("ring8-rare").separation == pytest.approx(8 / 0.3)


# --- Metrics --------------------------------------------------------------------------------------

TWO = Mixture([[-4.0, 0.0], [4.0, 0.0]], [3, 1], 0.5)


def test_mode_metrics_against_a_known_answer():
    """10 samples: 6 in the heavy mode, 1 in the light one, 1 at just under and 2 beyond 4σ."""
    x = torch.tensor([[-4.0, 0]] * 6 + [[4.0, 0], [4.0, 1.99], [4.0, 2.01], [0.0, 0.0]])
    assert_close(gmm.shares(TWO, x), torch.tensor([0.6, 0.2, 0.2]))
    assert gmm.in_mode(TWO, x) == pytest.approx(0.8)
    assert gmm.mode_tv(TWO, x) == pytest.approx(0.5 * (0.15 + 0.05 + 0.2))
    assert gmm.modes_covered(TWO, x) == 2
    # 0.06 is less than a quarter of 0.25, 0.07 is more.
    barely = torch.tensor([[-4.0, 0]] * 94 + [[4.0, 0]] * 6)
    assert gmm.modes_covered(TWO, barely) == 1
    barely[0] = torch.tensor([4.0, 0])
    assert gmm.modes_covered(TWO, barely) == 2


def test_density_tv_against_known_answers():
    draws = TWO.sample(100_000, generator(0))
    assert gmm.density_tv(TWO, draws) < 0.02
    outside = torch.full((100, 2), 99.0)
    assert gmm.density_tv(TWO, outside) == pytest.approx(1, abs=1e-3)
    without_the_light_mode = draws[draws[:, 0] < 0]
    assert gmm.density_tv(TWO, without_the_light_mode) == pytest.approx(0.25, abs=0.02)
    # Moved by one σ, which is one cell: the cells' masses along x rise and fall once, so
    # ½ Σ |difference| is the greatest of them, Φ(1) − Φ(0).
    moved = draws + torch.tensor([0.5, 0])
    assert gmm.density_tv(TWO, moved) == pytest.approx(0.3413, abs=0.01)


# --- Networks and methods -------------------------------------------------------------------------

TINY = {
    "mixture": "ring4-rare",
    "seeds": 2,
    "iterations": 6,
    "width": 16,
    "head_width": 8,
    "warmup": 2,
    "pairs": 500,
}


def samples_of(cfg, method, world):
    """(S, SAMPLES, d) of the students that `train` measures."""
    net, curves = toy.trained(cfg, method, world)
    return toy.sample(world, net.student, curves.times)


@pytest.fixture(scope="module")
def tiny():
    cfg = Config(**TINY)
    return cfg, world_of(cfg, 5)


@pytest.mark.parametrize("method", toy.METHODS)
def test_every_method_runs_and_trains_only_the_student(tiny, method):
    cfg, world = tiny
    before = [p.clone() for p in world.mlp.parameters()]
    runs = train(cfg, method, world)
    assert [r["seed"] for r in runs] == [0, 1]
    points = np.array(runs[0]["points"])
    assert points.shape == (1000, 2) and np.isfinite(points).all() and runs[1]["points"] == []
    for r in runs:
        assert set(toy.COLUMNS.values()) <= r.keys()
        assert [p["iteration"] for p in r["history"]] == [1, 2, 3, 4, 5, 6]
        assert all(np.isfinite(p["grad_norm"]) for p in r["history"])
    for p, q in zip(world.mlp.parameters(), before, strict=True):
        assert p.grad is None and torch.equal(p, q)


@pytest.mark.parametrize("method", toy.FEW_STEPS)
def test_a_student_of_two_steps_trains_and_samples_in_both(tiny, method):
    """One step on its own would be shown T alone."""
    cfg, world = tiny
    shown = set()
    forward = toy.MLP.forward

    def spy(self, x_t, t, *args, **kwargs):
        if self.training and t.unique().numel() == 1:  # fake score and D see many times
            shown.add((float(t[0]), torch.is_grad_enabled() and x_t.requires_grad is False))
        return forward(self, x_t, t, *args, **kwargs)

    with mock.patch.object(toy.MLP, "forward", spy), mock.patch.object(toy, "SAMPLES", 1000):
        train(replace(cfg, student_steps=2), method, world)
    assert {t for t, trains in shown if trains} == {1000.0, 750.0}


def test_a_seed_does_not_depend_on_its_neighbours(tiny):
    cfg, world = tiny
    alone = Config(**{**TINY, "seeds": 1, "first_seed": 1})
    x = samples_of(cfg, "adp+adm-recipe", world)
    y = samples_of(alone, "adp+adm-recipe", world_of(alone, 5))
    assert_close(x[1], y[0], rtol=1e-3, atol=1e-3)


def test_gradients_of_a_seed_are_those_of_its_own_mean(tiny):
    cfg, world = tiny
    student = deepcopy(world.mlp).requires_grad_(True)

    def emitted(network):
        noise = toy.Noise((0,), world.seeds, 16)
        return toy.emitted(network, toy.ONE_STEP, noise)  # (2·16, 2)

    toy.add_gradient(cfg.seeds, emitted(student).square().mean())
    half = deepcopy(world.mlp).requires_grad_(True)
    emitted(half)[:16].square().mean().backward()  # the first seed's mean alone
    for p, q in zip(student.parameters(), half.parameters(), strict=True):
        assert_close(p.grad[0], q.grad[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "file, name, method",
    [
        (adp, "adp_iteration", "mse"),
        (adm, "adm_round", "adm-paper"),
        (adm, "dmd_round", "dmd"),
        (adm, "dmd_round", "dmd2"),
        (adm, "step_round", "step"),
    ],
)
def test_students_learn_from_what_trains_the_big_models(tiny, file, name, method):
    """Where that function teaches nothing, the toy's student stays as it was."""
    _, world = tiny
    cfg = Config(**{**TINY, "iterations": 2})  # the first at a rate of 0
    taught = getattr(file, name)

    def teaches_nothing(*args):
        *others, learn = args
        return taught(*others, lambda loss: learn(0 * loss))

    with mock.patch.object(toy, "SAMPLES", 1000), mock.patch.object(toy, "GAN_WEIGHT", 0):
        start = toy.sample(world, world.mlp)
        moved = samples_of(cfg, method, world)
        with mock.patch.object(file, name, teaches_nothing):
            rested = samples_of(cfg, method, world)
    assert not torch.equal(moved, start)
    assert torch.equal(rested, start)


def test_methods_have_their_own_settings_and_flags_go_before_them(tiny):
    cfg, _ = tiny
    paper, recipe = (toy.settled(Config(), name) for name in ("adm-paper", "adp+adm-recipe"))
    assert (paper.dt, paper.damping, paper.ttur, paper.warmup) == (1 / 64, 0, 1, 0)
    assert (recipe.dt, recipe.damping, recipe.ttur, recipe.warmup) == (1 / 4, 0.1, 1, 100)
    assert toy.settled(Config(dt=0.5, ttur=4), "adm-recipe").dt == 0.5
    assert (toy.settled(cfg, "dmd2").ttur, toy.settled(cfg, "dmd2").warmup) == (5, 2)


def test_the_student_rests_while_discriminator_and_fake_score_warm_up(tiny):
    """One update, at a rate of 0, after many in which the fake score learns."""
    cfg, world = tiny
    cfg = toy.settled(replace(cfg, warmup=5), "adm-recipe")
    student = deepcopy(world.start).requires_grad_(True)
    curves = toy.Curves(world, 1)
    net = toy.distil(cfg, "adm", world, student, 1, 1e-2, curves)
    for p, q in zip(student.parameters(), world.start.parameters(), strict=True):
        assert torch.equal(p, q)
    moved = [not torch.equal(p, q) for p, q in zip(*both(net.fake, world.mlp), strict=True)]
    assert all(moved) and curves.done == 1


def both(*networks):
    return [list(network.parameters()) for network in networks]


def test_pairs_lack_the_modes_that_are_missing():
    cfg = Config(**{**TINY, "missing": "1,3"})
    world = world_of(cfg, 5)
    for x_0, x_T in zip(world.x_0, world.x_T, strict=True):
        share = gmm.shares(world.plane, x_0)
        assert share[1] == share[3] == 0 and share[0] + share[2] > 0.95
        assert_close(world.solved(x_T), x_0, rtol=1e-4, atol=1e-4)  # still each other's ends


def test_more_dimensions_are_normal_and_measured_in_the_first_two():
    cfg = Config(**{**TINY, "dim": 5, "seeds": 1, "pairs": 4000})
    world = world_of(cfg, 5)
    assert world.plane.means.shape == (4, 2) and world.mixture.means.shape == (4, 5)
    assert gmm.mode_tv(world.plane, world.x_0[0, :, :2]) < 0.05
    assert_close(world.x_0[0, :, 2:].std(0), torch.full((3,), 0.3), rtol=0.05, atol=0)
    runs, x = train(cfg, "adp+step", world), samples_of(cfg, "adp+step", world)
    assert x.shape == (1, toy.SAMPLES, 5)
    assert runs[0]["tv"] == pytest.approx(gmm.mode_tv(world.plane, x[0, :, :2]))


def test_a_student_may_be_smaller_than_all_others():
    cfg = Config(**{**TINY, "student_width": 8})
    world = world_of(cfg, 5)
    student = deepcopy(world.start).requires_grad_(True)
    curves = toy.Curves(world, 6)
    net = toy.distil(toy.settled(cfg, "adm-recipe"), "adm", world, student, 6, 1e-3, curves)
    widths = [network.hidden[0].weight.shape[2] for network in (net.student, net.fake)]
    assert widths == [8, 16] and net.discriminator.backbone is world.mlp


def test_stage_2_takes_the_gradient_of_adm_round(tiny):
    """Of one seed alone, with what it starts from made by hand."""
    cfg, world = tiny
    cfg = toy.settled(replace(cfg, warmup=0), "adm-recipe")
    runs = train(cfg, "adm-recipe", world)
    student = deepcopy(world.mlp).requires_grad_(True)
    fake = deepcopy(student)
    D = toy.NoisyDiscriminator(Draw((5,), world.seeds), world.mlp, cfg.head_width)
    times = torch.tensor([T])
    net = adm.Players(world.teacher, student, fake, D, LINE, LINE, times, (2,), 1)
    draw = toy.Noise((6, 0, 0), world.seeds, cfg.batch_size)
    adm.adm_round(net, cfg, draw, {}, {}, 0, lambda loss: (2 * loss).backward())
    for i, r in enumerate(runs):
        norm = sum(p.grad[i].square().sum() for p in student.parameters()).sqrt()
        assert r["history"][0]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, word",
    [
        ("not json", "JSON"),
        ({"means": [[0, 0], [1, 1]], "weights": [1, -1], "std": 0.3}, "positive"),
        ({"means": [[0, 0], [1, 1]], "weights": [1], "std": 0.3}, "weights"),
        ({"means": [[0, 0]], "weights": [1]}, "'std'"),
        ({"means": [[0, 0, 0]], "weights": [1], "std": 1}, "two-dimensional"),
        ({"means": "x", "weights": [1], "std": 1}, "numbers"),
        ({"means": [[0, 0], [1, 1]], "weights": [1, 1], "std": [1, 1, 1]}, "std"),
    ],
)
def test_bad_mixture_files(tmp_path, capsys, fields, word):
    path = tmp_path / "mixture.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    refused(capsys, word, "--mixture", str(path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, word",
    [
        (("--methods", "adm,gan"), "gan"),
        (("--seeds", "0"), "seeds"),
        (("--student-steps", "0"), "student-steps"),
        (("--mixture", "nowhere.json"), "nowhere"),
        (("--separation", "-1"), "separation"),
        (("--separation", "5,far"), "far"),
        (("--dt", "0"), "dt"),
        (("--dim", "1"), "dim"),
        (("--warmup", "-1"), "warmup"),
        (("--missing", "9"), "missing"),
        (("--missing", "one"), "missing"),
        (("--beta1", "1"), "beta1"),
        (("--schedule", "best"), "best"),
        (("--no-such", "1"), "--no-such"),
    ],
)
def test_bad_flags(tmp_path, capsys, argv, word):
    refused(capsys, word, *argv, "--out", str(tmp_path / "out"))


def refused(capsys, word, *argv):
    with pytest.raises(SystemExit) as e:
        run(toy.main, Config, list(argv))
    assert e.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and word in message


@pytest.mark.parametrize("helps", [False, True])
@pytest.mark.parametrize("text", ["short", "longer than a buffer " * 10_000])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(monkeypatch, capsys, text, helps):
    """As `| head` does. At its exit Python closes stdout, which must not fail any more."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    with pytest.raises(SystemExit) as e, in_one_line("claims.py"):
        print(text)
        if helps:
            sys.exit(0)
    assert e.value.code == 1
    sys.stdout.close()
    assert capsys.readouterr().err == ""


def test_results_that_are_there_are_not_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "train", lambda *_: [])
    monkeypatch.setattr(toy, "World", lambda cfg: None)
    there = tmp_path / "results.json"
    there.write_text("an hour's")
    refused(capsys, "not empty", "--out", str(tmp_path))
    assert there.read_text() == "an hour's" and list(tmp_path.iterdir()) == [there]


def test_the_command_itself_refuses_with_one_line(tmp_path):
    result = script(tmp_path, "toy/run.py", "--seeds", "0")
    assert result.returncode == 2
    assert "--seeds 0" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_the_command_writes_results_and_they_can_be_drawn(tmp_path, capsys):
    argv = ["--methods=mse,dmd", "--separation=5,9", f"--out={tmp_path}"]
    for name, value in TINY.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    with mock.patch.object(toy, "TEACHER", 5):
        run(toy.main, Config, argv)
    assert "±" in capsys.readouterr().out
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(runs) == 8
    first = [(r["method"], r["seed"]) for r in runs[:4]]
    assert first == [("mse", 0), ("mse", 1), ("dmd", 0), ("dmd", 1)]
    assert runs[0]["separation"] == pytest.approx(5)
    measured = {"modes", "modes_covered", "in_mode", "tv", "density_tv"}
    assert measured | {"iterations", "history"} <= runs[0].keys()

    plot.main([str(tmp_path / "results.json"), "--out", str(tmp_path)])
    written = {f.name for f in tmp_path.iterdir()}
    assert {"results.png", "results-curves.png", "phase.png"} <= written


def test_every_method_has_a_name_and_a_colour():
    assert plot.LOOK.keys() == toy.METHODS.keys()


@pytest.mark.parametrize("results", ["[]", '{"runs": {"DMD": {"rate": 1}}}'])
def test_plot_refuses_what_is_no_results_file(tmp_path, capsys, results):
    (tmp_path / "x.json").write_text(results)
    with pytest.raises(SystemExit) as e:
        plot.main([str(tmp_path / "x.json")])
    assert e.value.code == 2 and "x.json" in capsys.readouterr().err


# --- Claims ---------------------------------------------------------------------------------------


def test_dmdx_covers_every_mode_of_a_small_mixture(monkeypatch):
    """Weights 1:2:1:4 at radius 4, three seeds.

    At a student rate at which a wrong gradient would have undone ADP's work.
    """
    monkeypatch.setattr(Config, "adp_share", 0.5)
    cfg = Config(mixture="ring4-rare", seeds=3, iterations=500, width=64)
    world = world_of(cfg, 1000)
    start = toy.sample(world, world.mlp)[0]  # the teacher in one step: where DMD starts
    assert gmm.modes_covered(world.mixture, start) < 4
    runs = train(cfg, "adp+adm-paper", world, toy.RATES | {"adp+adm-paper": 3e-4})
    assert [r["modes_covered"] for r in runs] == [4, 4, 4]
    assert max(r["tv"] for r in runs) < 0.3


def test_dmd_gradient_is_the_score_difference():
    """With a fake score that knows the student's own density.

    DMD's gradient at x̂_0 is −(score_real − score_fake) up to a positive factor a sample, and it is
    not zero.
    """
    real, fake = Mixture([[0.0, 0.0]], [1], 1.0), Mixture([[2.0, 0.0]], [1], 1.0)
    draw = Draw((0,), range(64))
    x0_hat = (draw.normal((2,)) + torch.tensor([2.0, 0])).requires_grad_()
    t = draw.uniform(0.1 * T, 0.9 * T)
    x_t = LINE.add_noise(x0_hat.detach(), draw.normal((2,)), t)
    x0_real, x0_fake = (LINE.to_x0_eps(x_t, m.velocity(x_t, t), t)[0] for m in (real, fake))
    adm.dmd_loss(x0_hat, x0_real, x0_fake).backward()
    wanted = fake.means - real.means  # (1, 2): of unit Gaussians, but for a factor
    cosine = torch.cosine_similarity(x0_hat.grad, wanted)
    assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-3)


def test_dmd_moves_the_student():
    """From the teacher's weights DMD must leave the mean for the modes.

    A gradient mistakenly zero would not.
    """
    cfg = Config(mixture="ring4-rare", seeds=1, iterations=150, width=64)
    world = world_of(cfg, 1000)
    runs = train(cfg, "dmd", world)
    assert min(p["grad_norm"] for p in runs[0]["history"]) > 0
    start = gmm.in_mode(world.mixture, toy.sample(world, world.mlp)[0])
    assert runs[0]["in_mode"] > start + 0.2


def test_verdicts_are_paired_and_a_tie_is_a_tie():
    base, noise = np.arange(5.0), np.array([1, -1, 1, -1, 0.5])
    assert claims.less(base, base + 1 + 0.1 * noise) == "holds"
    assert claims.less(base + 1 + 0.1 * noise, base) == "does not hold"
    assert claims.less(base, base + noise) == "tie"
    assert claims.less(base, base) == "tie"


def test_other_thresholds():
    ones = np.ones(5)
    assert claims.more(ones + 1, ones + 0.1 * np.arange(5)) == "holds"
    assert claims.alike(ones, ones + 0.01, ones - 0.02) == "holds"
    assert claims.alike(ones, ones + 0.03) == "does not hold"
    assert claims.half(0.5 * ones) == "holds"
    assert claims.half(np.array([0.9, 0.9, 0.4])) == "does not hold"
    history = [{"tv": 1}] + [{"dmd_loss": x} for x in (3, 3, 1, 1, 0.5, 0.5)]
    assert claims.thirds({"history": history}) == (3, 0.5)
    row = {"mixture": "ring4-rare", "shares": [0.1, 0.25, 0.1, 0.5, 0.05]}
    assert claims.least_share(row) == pytest.approx(0.8)  # of weights 1/8, 1/4, 1/8, 1/2


def test_every_claim_is_about_runs_that_there_are():
    for claim in claims.CLAIMS:
        for name in claim.runs:
            regime, _, label = name.rpartition("/")
            regime = regime or claim.regime
            if regime == "digits":
                known = digits_experiment.METHODS
            elif regime == "digits-levers":
                known = [" ".join(filter(None, what)) for what in digits_experiment.LEVERS]
            else:
                known = (*claims.REGIMES[regime].methods, *claims.REGIMES[regime].runs)
            assert label in known, claim
        assert set(claim.measures) <= claims.MEASURES.keys()


def test_a_regime_is_searched_run_judged_and_goes_on_where_it_was(tmp_path, capsys):
    settings = {name: value for name, value in TINY.items() if name not in ("seeds", "mixture")}
    regime = claims.Regime("tiny", settings, ("dmd", "step"), runs=("dmd, TTUR 4",))
    claim = claims.Claim("step wins", "small", ("step", "dmd"))
    tiny = mock.patch.multiple(claims, REGIMES={"small": regime}, CLAIMS=[claim])
    argv = ["--mixture=ring8-rare", f"--results={tmp_path}"]
    with tiny, mock.patch.multiple(toy, TEACHER=5, SAMPLES=1000):
        claims.main(["run", "small", *argv])
        first = (tmp_path / "small.json").read_text()
        with mock.patch.object(toy, "train", side_effect=AssertionError("nothing is missing")):
            claims.main(["run", "small", *argv])
        capsys.readouterr()
        claims.main(["judge", *argv])
    results = json.loads(first)
    assert (tmp_path / "small.json").read_text() == first
    assert set(results["rates"]) == {"dmd", "step"} and len(results["search"]["dmd"]) >= 2
    names = [(row["name"], row["seed"]) for row in results["runs"]]
    assert names == [
        (name, seed) for name in ("dmd", "step", "dmd, TTUR 4") for seed in range(20, 25)
    ]
    said = capsys.readouterr().out
    verdict = claims.less(
        *(np.array([r["tv"] for r in results["runs"] if r["name"] == n]) for n in claim.runs)
    )
    assert f"| first < second, paired | {verdict} |" in said


@pytest.mark.parametrize(
    "argv, word",
    [
        (("run", "nowhere"), "nowhere"),
        (("run", "small", "--mixture", "ring8"), "--results"),
        (("run", "--mixture=ring8", f"--results={ROOT}/toy/../toy/results"), "--results"),
        (("run", "long", "--results", "empty"), "headline"),
        (("judge", "--results", "empty"), "no runs"),
        (("judge", "headline"), "no regimes"),
        (("judge", "--mixture=ring8", f"--results={ROOT}/toy/results/digits-teacher"), "no runs"),
        # Regime `missing` leaves out modes that ring4-rare has not got.
        (("run", "--mixture=ring4-rare", "--results=mine"), "of modes 0 to 3"),
    ],
)
def test_claims_refuses_with_one_line(tmp_path, monkeypatch, capsys, argv, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        claims.main(list(argv))
    assert e.value.code == 2
    assert word in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["run", "judge", "readme"])
def test_results_of_another_mixture_are_not_taken_for_ones_own(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.setattr(claims, "run", lambda *_: None)  # which would train for minutes
    results = tmp_path / "two-steps.json"
    results.write_bytes((claims.RESULTS / results.name).read_bytes())
    with pytest.raises(SystemExit) as e:
        claims.main([command, "--mixture=ring8", f"--results={tmp_path}"])
    assert e.value.code == 2
    assert "runs of ring8-rare, not of ring8" in capsys.readouterr().err


def test_the_page_is_what_judge_makes_of_the_results():
    page = claims.PAGE.read_text()
    assert page.partition(claims.TABLES)[2]
    assert page.endswith(claims.page(claims.RESULTS) + "\n")


def test_rates_are_those_of_the_search():
    """And but for the few that CLAIMS.md names, none ended at an end of what was tried."""
    ends = {("small", "mse"), ("four-steps", "adm-paper"), ("pairs-128", "adp"), ("small", "adp")}
    assert claims.opened(claims.RESULTS, "headline")["rates"] == toy.RATES
    for regime in claims.REGIMES:
        results = claims.opened(claims.RESULTS, regime)
        for method, trials in results["search"].items():
            best = min(trials, key=lambda rate: np.mean(trials[rate]))
            assert float(best) == results["rates"][method]
            rates = sorted(map(float, trials))
            at_an_end = float(best) in (rates[0], rates[-1])
            assert at_an_end == ((regime, method) in ends)


# --- Why ------------------------------------------------------------------------------------------


def test_the_pages_tables_are_what_the_command_prints(tmp_path):
    page = (ROOT / "toy" / "WHY.md").read_text()
    done = script(tmp_path, "toy/why.py", "readme")
    tables = done.stdout.strip().split("\n\n")
    assert done.returncode == 0 and len(tables) == 3, done.stderr
    for table in tables:
        assert len(table.splitlines()) > 4 and table in page, table


@pytest.mark.parametrize(
    "part, one", [("runs", "DMD; 4 steps; T/64"), ("finer", "DMD; 1 step; T/64")]
)
def test_no_table_of_a_part_of_the_runs(tmp_path, monkeypatch, part, one):
    results = json.loads(why.FILE.read_text())
    del results[part][one]
    monkeypatch.setattr(why, "FILE", tmp_path / "why.json")
    why.FILE.write_text(json.dumps(results))
    with pytest.raises(BadInput, match="lacks runs: python toy/why.py run"):
        why.readme()


def test_the_curves_of_weight_are_the_steps_own():
    """α_s κ is what DMD's weight of the generator's loss divides by, beside the distance."""
    t = torch.linspace(300, 900, 5)  # (5,)
    x0_hat, x0_real = torch.zeros(5, 2), torch.full((5, 2), 3.0)
    latents = {"student": x0_hat, "real": x0_real, "fake": x0_real, "t": t}
    cfg = SimpleNamespace(gen_weight="dmd")
    weight = adm.generator_weight(cfg, LINE, t - 250, latents)  # (5,)
    assert_close(why.line_weight(t / T, 0.25), 1 / (3 * weight), rtol=1e-4, atol=0)


def test_how_a_discriminator_follows_is_measured(tiny):
    """Of one that is linear and climbs along the gap, which is the same everywhere here."""
    cfg, world = tiny
    cfg = toy.settled(cfg, "adm-recipe")
    gap = torch.tensor([0.2, -0.1])  # x_real − x_fake = (v_fake − v_real) Δt / T
    net = adm.Players(
        lambda x, t, cond: (torch.zeros_like(x), []),
        world.mlp,
        lambda x, t, cond: (gap.expand_as(x) / cfg.dt, []),
        SimpleNamespace(features=lambda x, t, cond: x, logits=lambda x: 0.01 * x @ (3 * gap)),
        LINE,
        LINE,
        toy.ONE_STEP,
        (2,),
        1,
    )
    seen = why.followed(net, cfg, world)
    assert seen["cosine"] == pytest.approx(1, abs=1e-3)
    assert seen["length"] == pytest.approx(0.03, rel=1e-2)
    assert seen["linear"] == 1 and 0.5 < seen["accuracy"] < 0.6


@pytest.mark.parametrize(
    "tvs, best",
    [
        ([0.9, 0.8, 0.3, 0.2, 0.4, 0.1, 0.6, 0.7, 0.9], 3e-4),  # down first, and no further
        ([0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.55, 0.9], 1e-2),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.0], 1e-5),  # not round the end
    ],
)
def test_a_rate_is_searched_until_it_gets_worse(tvs, best):
    trials = {f"{rate:g}": [tv, tv] for rate, tv in zip(why.RATES, tvs, strict=True)}
    what = why.key("ADM", 4, 16)
    assert why.searched({what: trials}, None, what) == best
