"""The losses of adm.py and adp.py against hand values and finite differences."""

from types import SimpleNamespace

import pytest
import torch
from test_ode import ALL
from torch.testing import assert_close

import adm
import adp
import ode


def vp(prediction, last=0.01):
    """A VP schedule whose ᾱ falls evenly to `last`."""
    return ode.VPSchedule(torch.linspace(0.999, last, 1000), prediction)


# --- Hinges ---------------------------------------------------------------------------------------


def test_adms_hinges_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert adm.discriminator_loss(real, fake) == 0.25 + 0.75  # (0 + ½)/2 and (0 + 1½)/2
    assert adm.generator_loss(fake) == 0.75
    weight = torch.tensor([1.0, 4.0])
    assert adm.generator_loss(fake, weight) == 0.0  # −(−2 + 2)/2


def test_adps_hinges_are_weighted_sums_over_discriminators():
    real, fake, pixel = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5]), torch.tensor([3.0])
    lambdas = (0.85, 0.15)
    loss_d = adp.discriminator_loss([real, pixel], [fake, -pixel], lambdas)
    assert_close(loss_d, torch.tensor(0.85 * 1.0 + 0.15 * 0.0))
    loss_g = adp.generator_loss([fake, pixel], lambdas)
    assert_close(loss_g, torch.tensor(0.85 * 0.75 - 0.15 * 3))
    with pytest.raises(ValueError):
        adp.generator_loss([fake], lambdas)


def test_hinge_measures_total_variation():
    """The best discriminator between two histograms leaves a loss of 2 (1 − TV)."""
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.3, 0.2, 0.4])  # (4,) each
    real, fake = (torch.repeat_interleave((10 * h).round().long()) for h in (p, q))  # (10,) each
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], 0.01)
    for _ in range(400):
        optimizer.zero_grad()
        loss = adm.discriminator_loss(logits[real], logits[fake])
        loss.backward()
        optimizer.step()
    variation = 0.5 * (p - q).abs().sum()
    assert_close(loss.detach(), 2 * (1 - variation), atol=1e-3, rtol=0)


# --- DMD ------------------------------------------------------------------------------------------


def test_dmd_gradient_is_the_normalised_score_difference():
    generator = torch.Generator().manual_seed(0)
    x0_hat, x0_real, x0_fake = torch.randn(3, 3, 4, 2, 2, generator=generator)  # (3, 4, 2, 2) each
    x0_hat.requires_grad_()
    loss = adm.dmd_loss(x0_hat, x0_real, x0_fake)
    loss.backward()
    gradient = x0_hat.grad * x0_hat.numel()  # (3, 4, 2, 2)
    for i in range(3):  # each sample has its own normaliser
        distance = (x0_hat[i] - x0_real[i]).abs().mean().detach()
        by_hand = (x0_fake[i] - x0_real[i]) / distance
        assert_close(gradient[i], by_hand, atol=1e-5, rtol=1e-4)
    assert_close(loss, 0.5 * gradient.square().mean(), atol=1e-5, rtol=1e-4)


def test_dmd_of_a_perfect_student_is_0():
    x0 = torch.randn(3, 4)
    assert adm.dmd_loss(x0.clone().requires_grad_(), x0, x0) == 0  # not 0/0


def test_dmd_descends_towards_the_real_score():
    x0_hat = torch.zeros(1, 1, requires_grad=True)
    adm.dmd_loss(
        x0_hat, torch.ones(1, 1), -torch.ones(1, 1)
    ).backward()  # real says 1, fake says −1
    assert x0_hat.grad.item() < 0  # a step against the gradient moves up, to what the teacher wants


# --- The step -------------------------------------------------------------------------------------


def test_step_loss_by_hand():
    x_fake, x_real = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [0.0, 4.0]])
    assert adm.step_loss(x_fake, x_real) == 2.5  # ½ (2 + 8)/2
    assert adm.step_loss(x_fake, x_real, torch.tensor([1.0, 0.5])) == 1.5  # ½ (2 + 4)/2


@pytest.mark.parametrize("dt", [1 / 64, 1 / 8, 1 / 2])
@pytest.mark.parametrize("name", ALL)  # SDXL, also with v, CogVideoX (no signal at T) and SD3
def test_with_dmds_weight_the_steps_gradient_is_dmds(name, dt):
    """In x̂_0, of whole rounds, whatever the networks say: each sample has its own t."""
    schedule = ALL[name]
    draw = ode.Draw((0,), range(64))
    weights = draw.normal((3, 5))[:5]  # (5, 3, 5)
    says = [lambda x, t, cond, A=A: (torch.tanh(x @ A), None) for A in weights.unbind(1)]
    student, teacher, fake = says
    free = torch.zeros(64, 5, requires_grad=True)  # what trains
    net = adm.Players(
        teacher,
        lambda x, t, cond: (student(x, t, cond)[0] + free, None),
        fake,
        discriminator=None,
        schedule=schedule,
        student_schedule=ode.StudentLine(),
        times=torch.tensor([999.0]),
        shape=(5,),
        guidance=1,
    )
    cfg = SimpleNamespace(t_min=0.02, t_max=0.98, dt=dt, gen_weight="dmd", fake_samples="each")
    losses = []
    _, latents = adm.step_round(net, cfg, draw, {}, {}, 0, losses.append)
    x0_hat, x0_real, x0_fake, _ = latents.values()
    (ours,) = torch.autograd.grad(losses[0], x0_hat, retain_graph=True)  # (64, 5)
    (dmds,) = torch.autograd.grad(adm.dmd_loss(x0_hat, x0_real, x0_fake), x0_hat)
    # x_real − x_fake is a small difference of float32 numbers where Δt is small.
    assert_close(ours, dmds, rtol=1e-3, atol=1e-3 * float(dmds.abs().max()))


def test_a_step_teaches_student_and_fake_score_alone():
    """The teacher's parameters get no gradient, nor does the fake score by the student's loss."""
    teacher, student, fake = (torch.nn.Linear(5, 5) for _ in range(3))
    says = [lambda x, t, cond, net=net: (net(x), None) for net in (teacher, student, fake)]
    line = ode.FlowSchedule()
    net = adm.Players(*says, None, line, line, torch.tensor([1000.0]), (5,), 1)
    cfg = SimpleNamespace(t_min=0.02, t_max=0.98, dt=0.1, gen_weight="none", fake_samples="each")
    learnt = []  # after each loss, who has a gradient

    def learn(loss):
        loss.backward()
        learnt.append([role.weight.grad is not None for role in (teacher, student, fake)])
        student.zero_grad()

    adm.step_round(net, cfg, ode.Draw((0,), range(4)), {}, {}, 0, learn)
    assert learnt == [[False, True, False], [False, False, True]]


# --- What the paper has not -----------------------------------------------------------------------


def test_damping_is_half_the_squared_gradient_norm():
    """Of a linear discriminator, whose gradient is w everywhere."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(8, generator=generator), torch.randn(1, 8, generator=generator)
    n, sigma = 200_000, 0.01
    moved = (x + sigma * torch.randn(n, 8, generator=generator)) @ w  # (n,)
    loss = adm.damping_loss((x @ w).expand(n), moved, sigma)
    assert_close(loss, 0.5 * w.square().sum(), rtol=0.02, atol=0)


def test_straight_through_keeps_the_value_and_takes_alpha_s():
    x0_hat = torch.randn(2, 3, requires_grad=True)
    value = torch.randn(2, 3)
    alpha_s = torch.tensor([0.25, 0.5])
    x_fake = adm.straight_through(value, x0_hat, alpha_s)
    assert_close(x_fake.detach(), value)
    x_fake.sum().backward()
    assert_close(x0_hat.grad, alpha_s[:, None].expand(2, 3))


# --- The fake score -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [ode.FlowSchedule(), vp("v_prediction", last=0.0)])
def test_generator_gradient_through_the_fake_step_by_finite_differences(schedule):
    """d/dx̂_0 of −D(step(x_t(x̂_0), fake(x_t))) with a nonlinear fake and discriminator."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, A, w = (
        torch.randn(shape, generator=generator) for shape in ((2, 5), (2, 5), (5, 5), (5,))
    )
    t, s = torch.tensor([700.0, 300.0]), torch.tensor([600.0, 100.0])  # (2,) each

    def loss(x0):
        x_t = schedule.add_noise(x0, eps, t)
        x_fake = schedule.pf_ode_step(x_t, torch.tanh(x_t @ A), t, s)
        return adm.generator_loss(torch.sin(x_fake @ w))

    leaf = x0.clone().requires_grad_()
    loss(leaf).backward()
    for i, j in ((0, 0), (0, 3), (1, 1), (1, 4)):
        h = torch.zeros(2, 5)
        h[i, j] = 1e-2
        difference = (loss(x0 + h) - loss(x0 - h)) / 2e-2
        assert_close(leaf.grad[i, j], difference, atol=2e-4, rtol=2e-3)


def test_fake_score_loss_is_the_mean_squared_error_in_float32():
    out, target = torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 2.0]])
    loss = adm.fake_score_loss(out.bfloat16(), target)
    assert loss == 4.5  # (0 + 9)/2
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    "schedule, target",
    [
        (vp("epsilon"), [[3.0, 5.0]]),
        (ode.VPSchedule(torch.full((1000,), 0.64), "v_prediction"), [[1.8, 2.8]]),  # α .8, σ .6
        (ode.FlowSchedule(), [[2.0, 3.0]]),
    ],
)
def test_fake_score_learns_the_teachers_own_prediction(schedule, target):
    x0, eps = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    out = schedule.to_out(x0, eps, torch.tensor([500.0]))
    assert_close(out, torch.tensor(target))


# --- ADP's line -----------------------------------------------------------------------------------


def test_cubic_times_are_biased_to_noise_and_uniform_ones_are_not():
    u = torch.tensor([0.0, 500.0, 1000.0])
    assert adp.line_times(u, "cubic").tolist() == [1000.0, 875.0, 0.0]
    assert adp.line_times(u, "uniform").tolist() == u.tolist()
    many = adp.line_times(torch.linspace(0, 1000, 100_001), "cubic")
    share = (many > 500).float().mean()
    assert_close(share, torch.tensor(0.5 ** (1 / 3)), atol=1e-3, rtol=0)


def test_velocity_loss_by_hand_and_its_minimum():
    x_0, x_T = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    assert adp.velocity_loss(torch.tensor([[2.0, 3.0]]), x_0, x_T) == 0
    assert adp.velocity_loss(torch.tensor([[2.0, 5.0]]), x_0, x_T) == 2.0
    t, line = torch.tensor([400.0]), ode.FlowSchedule()
    x_t = line.add_noise(x_0, x_T, t)
    landed, _ = line.to_x0_eps(x_t, x_T - x_0, t)
    assert_close(landed, x_0)  # the right velocity lands on x_0
