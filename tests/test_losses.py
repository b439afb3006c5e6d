"""The losses of adm.py and adp.py against hand values, finite differences and an independent calculation."""

import pytest
import torch
from torch.testing import assert_close

import adm
import adp
import ode


def test_hinges_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert adm.discriminator_loss(real, fake) == 0.25 + 0.75  # (0 + ½)/2 and (0 + 1½)/2
    assert adm.generator_loss(fake) == 0.75
    assert adm.generator_loss(fake, torch.tensor([1.0, 4.0])) == 0.0  # −(−2 + 2)/2
    lambdas, pixel = (0.85, 0.15), torch.tensor([3.0])
    assert_close(adp.discriminator_loss([real, pixel], [fake, -pixel], lambdas), torch.tensor(0.85))
    assert_close(adp.generator_loss([fake, pixel], lambdas), torch.tensor(0.85 * 0.75 - 0.15 * 3))
    with pytest.raises(ValueError):
        adp.generator_loss([fake], lambdas)


def test_hinge_measures_total_variation():
    """The best discriminator between two histograms leaves a loss of 2 (1 − TV)."""
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.3, 0.2, 0.4])
    counts = [torch.repeat_interleave(torch.arange(4), (h * 1000).round().long()) for h in (p, q)]
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], 0.01)
    for _ in range(2000):
        optimizer.zero_grad()
        loss = adm.discriminator_loss(logits[counts[0]], logits[counts[1]])
        loss.backward()
        optimizer.step()
    assert_close(loss.detach(), 2 * (1 - 0.5 * (p - q).abs().sum()), atol=1e-3, rtol=0)


def test_dmd_gradient_is_the_normalised_score_difference():
    g = torch.Generator().manual_seed(0)
    x0_hat, x0_real, x0_fake = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(3))
    x0_hat.requires_grad_()
    loss = adm.dmd_loss(x0_hat, x0_real, x0_fake)
    loss.backward()
    for i in range(3):  # each sample has its own normaliser
        by_hand = (x0_fake[i] - x0_real[i]) / (x0_hat[i] - x0_real[i]).abs().mean()
        assert_close(x0_hat.grad[i] * x0_hat.numel(), by_hand.detach(), atol=1e-5, rtol=1e-4)
    assert_close(loss, 0.5 * (x0_hat.grad * x0_hat.numel()).square().mean(), atol=1e-5, rtol=1e-4)
    perfect = adm.dmd_loss(x0_real.clone().requires_grad_(), x0_real, x0_real)  # 0/0 otherwise
    assert perfect == 0


def test_dmd_descends_towards_the_real_score():
    x0_hat = torch.zeros(1, 1, requires_grad=True)
    adm.dmd_loss(x0_hat, torch.ones(1, 1), -torch.ones(1, 1)).backward()  # real says 1, fake says −1
    assert x0_hat.grad.item() < 0  # a step against the gradient moves up, to what the teacher wants


def test_damping_is_half_the_squared_gradient_norm():
    g = torch.Generator().manual_seed(0)
    w, x, sigma = torch.randn(8, generator=g), torch.randn(1, 8, generator=g), 0.01
    moved = (x + sigma * torch.randn(200_000, 8, generator=g)) @ w
    assert_close(adm.damping_loss((x @ w).expand(200_000), moved, sigma), 0.5 * w.square().sum(), rtol=0.02, atol=0)


def test_straight_through_keeps_the_value_and_takes_alpha_s():
    x0_hat, alpha_s = torch.randn(2, 3, requires_grad=True), torch.tensor([0.25, 0.5])
    value = torch.randn(2, 3)
    x_fake = adm.straight_through(value, x0_hat, alpha_s)
    assert_close(x_fake.detach(), value)
    x_fake.sum().backward()
    assert_close(x0_hat.grad, alpha_s[:, None].expand(2, 3))


@pytest.mark.parametrize("schedule", [ode.FlowSchedule(), ode.VPSchedule(torch.linspace(0.999, 0.0, 1000), "v_prediction")])
def test_generator_gradient_through_the_fake_step_by_finite_differences(schedule):
    """d/dx̂_0 of −D(step(x_t(x̂_0), fake(x_t))) with a nonlinear fake and discriminator."""
    g = torch.Generator().manual_seed(0)
    x0, eps, A, w = (torch.randn(s, generator=g) for s in ((2, 5), (2, 5), (5, 5), (5,)))
    t, s = torch.tensor([700.0, 300.0]), torch.tensor([600.0, 100.0])

    def loss(x0):
        x_t = schedule.add_noise(x0, eps, t)
        x_fake = schedule.pf_ode_step(x_t, torch.tanh(x_t @ A), t, s)
        return adm.generator_loss(torch.sin(x_fake @ w))
    leaf = x0.clone().requires_grad_()
    loss(leaf).backward()
    for i, j in ((0, 0), (0, 3), (1, 1), (1, 4)):
        h = torch.zeros(2, 5)
        h[i, j] = 1e-2
        assert_close(leaf.grad[i, j], (loss(x0 + h) - loss(x0 - h)) / 2e-2, atol=2e-4, rtol=2e-3)


def test_fake_score_loss_is_the_diffusion_loss():
    schedule, (x0, eps) = ode.VPSchedule(torch.linspace(0.999, 0.01, 1000), "epsilon"), (torch.randn(2, 3), torch.randn(2, 3))
    assert adm.fake_score_loss(eps, schedule.to_out(x0, eps, torch.tensor([5.0, 900.0]))) == 0
    assert_close(adm.fake_score_loss(torch.ones(2, 3), torch.full((2, 3), 3.0)), torch.tensor(4.0))


def test_line_times():
    u = torch.tensor([0.0, 500.0, 1000.0])
    assert adp.line_times(u, "cubic").tolist() == [1000.0, 875.0, 0.0]
    assert adp.line_times(u, "uniform").tolist() == u.tolist()
    many = adp.line_times(torch.linspace(0, 1000, 100_001), "cubic")
    assert_close((many > 500).float().mean(), torch.tensor(0.5 ** (1 / 3)), atol=1e-3, rtol=0)  # biased to noise


def test_velocity_loss_by_hand_and_its_minimum():
    x_0, x_T = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    assert adp.velocity_loss(torch.tensor([[2.0, 3.0]]), x_0, x_T) == 0
    assert adp.velocity_loss(torch.tensor([[2.0, 5.0]]), x_0, x_T) == 2.0
    t, line = torch.tensor([400.0]), ode.FlowSchedule()
    assert_close(line.to_x0_eps(line.add_noise(x_0, x_T, t), x_T - x_0, t)[0], x_0)  # the right velocity lands on x_0
