"""ode.py against diffusers' own schedulers, exact flows and hand values."""

import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

import ode

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sdxl_ddim(**kwargs):
    return DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, **kwargs)


def cog_ddim(shift):
    return CogVideoXDDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True,
                                  timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=shift)


def vp(prediction="epsilon", zero_snr=False):
    scheduler = cog_ddim(3.0) if zero_snr else sdxl_ddim()
    return ode.VPSchedule(scheduler.alphas_cumprod, prediction)


ALL = {"epsilon": vp(), "v": vp("v_prediction"), "v zero-SNR": vp("v_prediction", zero_snr=True), "flow": ode.FlowSchedule(3.0)}


def batch(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(2)]


@pytest.mark.parametrize("steps", [50, 64])
@pytest.mark.parametrize("to_one", [True, False])
def test_vp_step_is_ddims(steps, to_one):
    scheduler = sdxl_ddim(set_alpha_to_one=to_one)
    scheduler.set_timesteps(steps)
    schedule = ode.VPSchedule(scheduler.alphas_cumprod, "epsilon", scheduler.final_alpha_cumprod)
    t = torch.tensor([999, 701, 500, 301, 21, 1])
    x, out = batch(6, 4, 8, 8)
    theirs = torch.cat([scheduler.step(out[i:i + 1], int(t[i]), x[i:i + 1], eta=0.0)[0] for i in range(6)])
    assert_close(schedule.pf_ode_step(x, out, t, t - 1000 // steps), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [50, 64])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_vp_step_is_cogvideox_ddims_also_at_zero_snr(steps, shift):
    scheduler = cog_ddim(shift)
    scheduler.set_timesteps(steps)
    schedule = ode.VPSchedule(scheduler.alphas_cumprod, "v_prediction")
    t = torch.tensor([999, 701, 500, 301, 21, 1])
    x, out = batch(6, 3, 16, 8, 8)
    theirs = torch.cat([scheduler.step(out[i:i + 1], int(t[i]), x[i:i + 1], eta=0.0)[0] for i in range(6)])
    assert_close(schedule.pf_ode_step(x, out, t, t - 1000 // steps), theirs.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_step_is_eulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(64)
    at = [0, 5, 20, 40, 62, 63]
    x, out = batch(6, 16, 8, 8)
    theirs = []
    for i, k in enumerate(at):
        scheduler._step_index = None
        theirs.append(scheduler.step(out[i:i + 1], scheduler.timesteps[k], x[i:i + 1])[0])
    t, s = scheduler.timesteps[at], scheduler.sigmas[[k + 1 for k in at]] * 1000
    assert_close(ode.FlowSchedule(shift).pf_ode_step(x, out, t, s), torch.cat(theirs), atol=1e-5, rtol=1e-5)


def test_vp_step_is_sdxls_own_eulers():
    """The stock SDXL scheduler is the same ODE in σ/α space."""
    euler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    euler.set_timesteps(50)
    x, out = batch(6, 4, 8, 8)
    t, s, sigma_t, sigma_s = euler.timesteps[10], euler.timesteps[11], euler.sigmas[10], euler.sigmas[11]
    theirs = euler.step(out, t, x * (1 + sigma_t ** 2).sqrt())[0] / (1 + sigma_s ** 2).sqrt()
    ours = ode.VPSchedule(euler.alphas_cumprod, "epsilon").pf_ode_step(x, out, t.expand(6).float(), s.expand(6).float())
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_add_noise_is_ddpms():
    ddpm, (x0, eps) = DDPMScheduler(**BETAS), batch(3, 4, 8, 8)
    t = torch.tensor([999, 437, 12])
    assert_close(ode.VPSchedule(ddpm.alphas_cumprod, "epsilon").add_noise(x0, eps, t), ddpm.add_noise(x0, eps, t), atol=1e-6, rtol=0)


def test_alpha_bar_is_linear_between_integer_times():
    schedule = vp()
    table = schedule.alphas_cumprod
    alpha, sigma = schedule.alpha_sigma(torch.tensor([437.25]))
    expected = 0.75 * table[437] + 0.25 * table[438]
    assert_close(alpha.double() ** 2, expected[None], atol=1e-6, rtol=0)
    assert_close(alpha ** 2 + sigma ** 2, torch.ones(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_network_output_round_trip(name):
    """x_0, ε → x_t, the right output → x_0, ε again; and a step there and back."""
    schedule, (x0, eps) = ALL[name], batch(5, 4, 8, 8)
    t, s = torch.tensor([940.0, 700.5, 333.3, 100.0, 20.0]), torch.tensor([900.0, 20.0, 340.0, 800.25, 35.6])
    x_t, out = schedule.add_noise(x0, eps, t), schedule.to_out(x0, eps, t)
    x0_back, eps_back = schedule.to_x0_eps(x_t, out, t)
    assert_close(x0_back, x0, atol=1e-4, rtol=1e-4)
    assert_close(eps_back, eps, atol=1e-4, rtol=1e-4)
    x_s = schedule.pf_ode_step(x_t, out, t, s)
    assert_close(x_s, schedule.add_noise(x0, eps, s), atol=1e-4, rtol=1e-4)
    assert_close(schedule.pf_ode_step(x_s, schedule.to_out(x0, eps, s), s, t), x_t, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["v zero-SNR", "flow"])
def test_finite_at_pure_noise(name):
    schedule, (x, out) = ALL[name], batch(3, 4, 8, 8)
    t = torch.full((3,), schedule.t_noise)
    assert schedule.alpha_sigma(t)[0].tolist() == [0, 0, 0]
    for y in (*schedule.to_x0_eps(x, out, t), schedule.pf_ode_step(x, out, t, t - 15.625)):
        assert y.isfinite().all()


def test_epsilon_prediction_at_zero_snr_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        vp("epsilon", zero_snr=True)
    with pytest.raises(ValueError, match="predicts epsilon or v"):
        vp("sample")


@pytest.mark.parametrize("name", ALL)
def test_float32_whatever_comes_in(name):
    schedule, (x, out) = ALL[name], batch(3, 4, 8, 8)
    for t in (torch.tensor([900.5, 500.0, 20.0]), torch.tensor([900, 500, 20])):
        half = schedule.pf_ode_step(x.bfloat16(), out.bfloat16(), t, t - 10)
        assert half.dtype == torch.float32
        assert_close(half, schedule.pf_ode_step(x.bfloat16().float(), out.bfloat16().float(), t, t - 10), atol=0, rtol=0)
    with pytest.raises(TypeError, match="bfloat16"):
        schedule.add_noise(x, out, t.bfloat16())


def test_times_are_per_sample_even_where_the_batch_is_as_wide_as_the_data():
    """(B,) against (B, B): silent broadcasting would multiply columns, not samples."""
    schedule, (x0, eps) = ode.FlowSchedule(), batch(4, 4)
    t = torch.tensor([100.0, 300.0, 600.0, 900.0])
    one_by_one = torch.cat([schedule.add_noise(x0[i:i + 1], eps[i:i + 1], t[i:i + 1]) for i in range(4)])
    assert_close(schedule.add_noise(x0, eps, t), one_by_one, atol=0, rtol=0)
    with pytest.raises(ValueError, match="one time per sample"):
        schedule.add_noise(x0, eps, t[:, None])
    with pytest.raises(ValueError, match="one time per sample"):
        schedule.add_noise(x0, eps, t[:1])


def test_sampling_times():
    assert vp().timesteps(4).tolist() == [999, 749, 499, 249, -1]
    assert vp().timesteps(1).tolist() == [999, -1]
    assert ode.FlowSchedule(1.0).timesteps(4).tolist() == [1000, 750, 500, 250, 0]
    assert ode.FlowSchedule(3.0).timesteps(4).tolist() == [1000, 900, 750, 500, 0]
    assert ode.on_the_line(vp()).timesteps(1).tolist() == [999, 0]
    assert ode.on_the_line(ALL["flow"]) is ALL["flow"]
    line = ode.on_the_line(vp())
    assert line.timesteps(2).tolist() == [999, 499.5, 0] and line.shown(line.timesteps(2)).tolist() == [999, 499, 0]


MEAN, STD = 0.7, 0.4  # of one-dimensional Gaussian data, whose posterior means are linear


def gaussian_network(schedule):
    def predict(x, t):
        alpha, sigma = (ode.per_sample(c, x) for c in schedule.alpha_sigma(t))
        total = alpha ** 2 * STD ** 2 + sigma ** 2
        x0 = MEAN + alpha * STD ** 2 / total * (x - alpha * MEAN)
        eps = sigma / total * (x - alpha * MEAN)
        return schedule.to_out(x0, eps, t)
    return predict


@pytest.mark.parametrize("name", ALL)
def test_pf_ode_of_a_gaussian_converges_at_first_order(name):
    """The PF-ODE of Gaussian data is known: it keeps (x − α_t μ) / √(α_t² s² + σ_t²)."""
    schedule = ALL[name]
    x = torch.linspace(-2, 2, 41)[:, None]  # (B, 1)
    start, end = torch.full((41,), 900.0), torch.full((41,), 100.0)
    (a, s), (b, r) = ([c[0].double() for c in schedule.alpha_sigma(t)] for t in (start, end))
    exact = b * MEAN + (x - a * MEAN) * ((b ** 2 * STD ** 2 + r ** 2) / (a ** 2 * STD ** 2 + s ** 2)).sqrt()
    errors = []
    for n in (20, 40, 80):
        y, times = x, torch.linspace(900, 100, n + 1)
        for t, u in zip(times[:-1], times[1:]):
            y = schedule.pf_ode_step(y, gaussian_network(schedule)(y, t.expand(41)), t.expand(41), u.expand(41))
        errors.append(float((y - exact).abs().max()))
    orders = [math.log2(e / f) for e, f in zip(errors, errors[1:])]
    assert errors[-1] < 0.02 and all(0.8 < order < 1.2 for order in orders), (errors, orders)


def test_teacher_sample_reaches_the_data():
    schedule = ALL["flow"]
    x_T = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    x_0 = ode.teacher_sample(gaussian_network(schedule), schedule, x_T, 500)
    assert_close(x_0, MEAN + STD * x_T, atol=0.02, rtol=0)  # the exact map from N(0, 1) to N(μ, s²)


def test_guidance_convention():
    cond, uncond = batch(2, 3)
    assert_close(ode.guide(cond, uncond, 1.0), cond)
    assert_close(ode.guide(cond, uncond, 0.0), uncond)
    assert_close(ode.guide(cond, uncond, 4.0), uncond + 4 * (cond - uncond))
    assert ode.guide(cond.bfloat16(), uncond.bfloat16(), 4.0).dtype == torch.float32


def test_guidance_is_one_pass_of_both_halves():
    calls = []

    def denoiser(x_t, t, cond):
        calls.append(len(x_t))
        return x_t * cond["c"], []
    predict = ode.with_guidance(denoiser, {"c": torch.full((2, 1), 3.0)}, {"c": torch.full((2, 1), 1.0)}, 2.0)
    assert_close(predict(torch.ones(2, 1), torch.ones(2)), torch.full((2, 1), 5.0))  # 1 + 2 (3 − 1)
    ode.with_guidance(denoiser, {"c": torch.ones(2, 1)}, None, 1)(torch.ones(2, 1), torch.ones(2))
    assert calls == [4, 2]


@pytest.mark.parametrize("renoise", [True, False])
def test_student_walk_by_hand(renoise):
    schedule = ode.FlowSchedule(1.0)
    schedule.renoise = renoise
    times, x_T = schedule.timesteps(2)[:-1], torch.tensor([[1.0], [2.0]])
    seen = []

    def predict(x, t):
        seen.append((x.clone(), t.clone()))
        return 0.5 * x
    result = ode.student_sample(predict, schedule, x_T, times, lambda: torch.full((2, 1), 10.0))
    x0 = x_T - 1.0 * 0.5 * x_T  # at t = 1000: x_0 = x − v; ε = x
    x_next = 0.5 * x0 + 0.5 * (10.0 if renoise else x_T)
    assert_close(seen[1][0], x_next)
    assert seen[0][1].tolist() == [1000, 1000] and seen[1][1].tolist() == [500, 500]
    assert_close(result, x_next - 0.5 * 0.5 * x_next)
    assert_close(ode.student_input(predict, schedule, x_T, times, 1, lambda: torch.full((2, 1), 10.0)), x_next)
    assert_close(ode.student_input(predict, schedule, x_T, times, 0, None), x_T)


def test_draws_depend_on_key_and_sample_alone():
    one = ode.Draw((7, 3), range(4))
    a, u, n = one.normal((2, 3)), one.uniform(5, 6), one.integers(10)
    low, high = ode.Draw((7, 3), range(2)), ode.Draw((7, 3), range(2, 4))
    assert torch.equal(a, torch.cat([low.normal((2, 3)), high.normal((2, 3))]))
    assert torch.equal(u, torch.cat([low.uniform(5, 6), high.uniform(5, 6)])) and n == low.integers(10) + high.integers(10)
    assert ((5 <= u) & (u < 6)).all() and all(0 <= i < 10 for i in n)
    assert not torch.equal(a, ode.Draw((7, 4), range(4)).normal((2, 3)))
    assert a.flatten(1).unique(dim=0).shape[0] == 4  # no two samples share noise
    assert ode.common(1, 2).integers(1000) == ode.common(1, 2).integers(1000)


@pytest.mark.parametrize("t", [1000.0, 999.99994, 999.0])
def test_a_network_of_1000_time_steps_is_never_shown_another(t):
    """Cubic times close to T round to it in float32; the last index of a variance-preserving teacher is 999."""
    assert ode.StudentLine().shown(torch.tensor([t])).tolist() == [999.0]
    assert ode.FlowSchedule().shown(torch.tensor([t])).tolist() == torch.tensor([t]).tolist()  # where T is a time like any other
