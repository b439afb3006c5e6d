"""ode.py against diffusers' own schedulers, exact flows and hand values."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.testing import assert_close

import ode

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sdxl_ddim(**options):
    return DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, **options)


def cog_ddim(shift):
    return CogVideoXDDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=shift,
    )


def vp(prediction="epsilon", zero_snr=False):
    scheduler = cog_ddim(3.0) if zero_snr else sdxl_ddim()
    return ode.VPSchedule(scheduler.alphas_cumprod, prediction)


ALL = {
    "epsilon": vp(),
    "v": vp("v_prediction"),
    "v zero-SNR": vp("v_prediction", zero_snr=True),
    "flow": ode.FlowSchedule(3.0),
}


def batch(*shape, seed=0):
    """Two tensors of this shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


# --- Steps and noise of the stock schedulers ------------------------------------------------------

DDIM_TIMES = torch.tensor([999, 701, 500, 301, 21, 1])  # (6,)


def stepped(scheduler, x, out):
    """Each sample (6, ...) a step of a stock DDIM on, from DDIM_TIMES."""
    rows = []
    for i, t in enumerate(DDIM_TIMES):
        row = slice(i, i + 1)
        rows.append(scheduler.step(out[row], int(t), x[row], eta=0.0)[0])
    return torch.cat(rows)


@pytest.mark.parametrize("steps", [50, 64])
@pytest.mark.parametrize("to_one", [True, False])
def test_vp_step_is_ddims(steps, to_one):
    scheduler = sdxl_ddim(set_alpha_to_one=to_one)
    scheduler.set_timesteps(steps)
    last = scheduler.final_alpha_cumprod
    schedule = ode.VPSchedule(scheduler.alphas_cumprod, "epsilon", last)
    x, out = batch(6, 4, 8, 8)
    ours = schedule.pf_ode_step(x, out, DDIM_TIMES, DDIM_TIMES - 1000 // steps)
    assert_close(ours, stepped(scheduler, x, out), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [50, 64])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_vp_step_is_cogvideox_ddims_also_at_zero_snr(steps, shift):
    scheduler = cog_ddim(shift)
    scheduler.set_timesteps(steps)
    schedule = ode.VPSchedule(scheduler.alphas_cumprod, "v_prediction")
    x, out = batch(6, 3, 16, 8, 8)
    ours = schedule.pf_ode_step(x, out, DDIM_TIMES, DDIM_TIMES - 1000 // steps)
    assert_close(ours, stepped(scheduler, x, out).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_step_is_eulers(shift):
    x, out = batch(6, 16, 8, 8)
    t, s, theirs = [], [], []
    for i, k in enumerate((0, 5, 20, 40, 62, 63)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(64)
        scheduler.set_begin_index(k)
        row = slice(i, i + 1)
        theirs.append(scheduler.step(out[row], scheduler.timesteps[k], x[row])[0])
        t.append(scheduler.timesteps[k])
        s.append(scheduler.sigmas[k + 1] * 1000)
    ours = ode.FlowSchedule(shift).pf_ode_step(x, out, torch.stack(t), torch.stack(s))
    assert_close(ours, torch.cat(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_step_is_a_first_one_of_unipc(shift):
    """Wan's stock scheduler, where no earlier step makes it of second order; and its times."""
    x, out = batch(6, 3, 16, 8, 8)
    t, s, theirs = [], [], []
    schedule = ode.FlowSchedule(shift)
    how = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    for i, k in enumerate((0, 5, 20, 40, 62, 63)):
        scheduler = UniPCMultistepScheduler(**how)
        scheduler.set_timesteps(64)
        scheduler.set_begin_index(k)
        row = slice(i, i + 1)
        theirs.append(scheduler.step(out[row], scheduler.timesteps[k], x[row])[0])
        t.append(scheduler.sigmas[k] * 1000)
        s.append(scheduler.sigmas[k + 1] * 1000)
    ours = schedule.pf_ode_step(x, out, torch.stack(t), torch.stack(s))
    assert_close(ours, torch.cat(theirs), atol=1e-5, rtol=1e-5)
    ends = 0.001 * 1000 * shift  # its σ spread from 1 to 0.001, not to 0, before the warp
    assert_close(schedule.timesteps(64), scheduler.sigmas * 1000, atol=ends, rtol=0)


def test_vp_step_is_sdxls_own_eulers():
    """The stock SDXL scheduler is the same ODE in σ/α space."""
    euler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    euler.set_timesteps(50)
    x, out = batch(6, 4, 8, 8)
    t, s = euler.timesteps[10], euler.timesteps[11]
    scale_t = (1 + euler.sigmas[10] ** 2).sqrt()  # 1/α_t
    scale_s = (1 + euler.sigmas[11] ** 2).sqrt()
    theirs = euler.step(out, t, x * scale_t)[0] / scale_s
    schedule = ode.VPSchedule(euler.alphas_cumprod, "epsilon")
    ours = schedule.pf_ode_step(x, out, t.expand(6).float(), s.expand(6).float())
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_add_noise_is_ddpms():
    ddpm = DDPMScheduler(**BETAS)
    x0, eps = batch(3, 4, 8, 8)
    t = torch.tensor([999, 437, 12])
    ours = ode.VPSchedule(ddpm.alphas_cumprod, "epsilon").add_noise(x0, eps, t)
    assert_close(ours, ddpm.add_noise(x0, eps, t), atol=1e-6, rtol=0)


# --- The processes --------------------------------------------------------------------------------


def test_alpha_bar_is_linear_between_integer_times():
    schedule = vp()
    table = schedule.alphas_cumprod  # (1000,)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([437.25]))  # (1,) each
    expected = 0.75 * table[437] + 0.25 * table[438]
    assert_close(alpha.double() ** 2, expected[None], atol=1e-6, rtol=0)
    assert_close(alpha**2 + sigma**2, torch.ones(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_network_output_round_trip(name):
    """x_0, ε → x_t, the right output → x_0, ε again; and a step there and back."""
    schedule = ALL[name]
    x0, eps = batch(5, 4, 8, 8)
    t = torch.tensor([940.0, 700.5, 333.3, 100.0, 20.0])
    s = torch.tensor([900.0, 20.0, 340.0, 800.25, 35.6])
    x_t = schedule.add_noise(x0, eps, t)
    out = schedule.to_out(x0, eps, t)
    x0_back, eps_back = schedule.to_x0_eps(x_t, out, t)
    assert_close(x0_back, x0, atol=1e-4, rtol=1e-4)
    assert_close(eps_back, eps, atol=1e-4, rtol=1e-4)
    x_s = schedule.pf_ode_step(x_t, out, t, s)
    assert_close(x_s, schedule.add_noise(x0, eps, s), atol=1e-4, rtol=1e-4)
    x_t_back = schedule.pf_ode_step(x_s, schedule.to_out(x0, eps, s), s, t)
    assert_close(x_t_back, x_t, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["v zero-SNR", "flow"])
def test_finite_at_pure_noise(name):
    schedule = ALL[name]
    x, out = batch(3, 4, 8, 8)
    t = torch.full((3,), schedule.t_noise)
    assert schedule.alpha_sigma(t)[0].tolist() == [0, 0, 0]
    assert all(y.isfinite().all() for y in schedule.to_x0_eps(x, out, t))
    assert schedule.pf_ode_step(x, out, t, t - 15.625).isfinite().all()


def test_predictions_that_say_nothing_about_x_0_are_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        vp("epsilon", zero_snr=True)
    with pytest.raises(ValueError, match="predicts epsilon or v"):
        vp("sample")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_float32_whatever_comes_in(name, whole):
    schedule = ALL[name]
    x, out = (tensor.bfloat16() for tensor in batch(3, 4, 8, 8))
    t = torch.tensor([900, 500, 20]) if whole else torch.tensor([900.5, 500.0, 20.0])
    half = schedule.pf_ode_step(x, out, t, t - 10)
    assert half.dtype == torch.float32
    exact = schedule.pf_ode_step(x.float(), out.float(), t, t - 10)
    assert_close(half, exact, atol=0, rtol=0)


def test_times_in_half_precision_are_refused():
    x0, eps = batch(3, 4, 8, 8)
    for schedule in ALL.values():
        for dtype in (torch.bfloat16, torch.float16):
            with pytest.raises(TypeError, match=str(dtype)):
                schedule.add_noise(x0, eps, torch.tensor([900, 500, 20]).to(dtype))


def test_times_are_per_sample_even_where_the_batch_is_as_wide_as_the_data():
    """(B,) against (B, B): silent broadcasting would multiply columns, not samples."""
    schedule = ode.FlowSchedule()
    x0, eps = batch(4, 4)
    t = torch.tensor([100.0, 300.0, 600.0, 900.0])
    rows = [slice(i, i + 1) for i in range(4)]
    one_by_one = torch.cat([schedule.add_noise(x0[row], eps[row], t[row]) for row in rows])
    assert_close(schedule.add_noise(x0, eps, t), one_by_one, atol=0, rtol=0)
    for wrong in (t[:, None], t[:1]):
        with pytest.raises(ValueError, match="one time per sample"):
            schedule.add_noise(x0, eps, wrong)


def test_sampling_times():
    assert vp().timesteps(4).tolist() == [999, 749, 499, 249, -1]
    assert vp().timesteps(1).tolist() == [999, -1]
    assert ode.FlowSchedule(1.0).timesteps(4).tolist() == [1000, 750, 500, 250, 0]
    assert ode.FlowSchedule(3.0).timesteps(4).tolist() == [1000, 900, 750, 500, 0]


def test_students_after_adp_walk_on_the_line():
    assert ode.on_the_line(ALL["flow"]) is ALL["flow"]
    for name in ("epsilon", "v", "v zero-SNR"):
        line = ode.on_the_line(ALL[name])
        assert line.prediction == "flow"
        assert line.timesteps(1).tolist() == [999, 0]
        times = line.timesteps(2)
        assert times.tolist() == [999, 499.5, 0]
        assert line.shown(times).tolist() == [999, 499, 0]


@pytest.mark.parametrize("t", [1000.0, 999.99994, 999.0])
def test_a_network_of_1000_time_steps_is_never_shown_another(t):
    """Cubic times close to T round to it in float32; a VP teacher's last index is 999."""
    times = torch.tensor([t])
    assert ode.StudentLine().shown(times).tolist() == [999.0]
    # Where T is a time like any other:
    assert ode.FlowSchedule().shown(times).tolist() == times.tolist()


# --- Exact flows ----------------------------------------------------------------------------------

MEAN, STD = 0.7, 0.4  # of one-dimensional Gaussian data, whose posterior means are linear


def gaussian_network(schedule):
    """predict(x, t) of a network that is exact on such data."""

    def predict(x, t):
        alpha, sigma = (ode.per_sample(c, x) for c in schedule.alpha_sigma(t))
        total = alpha**2 * STD**2 + sigma**2  # variance of x
        x0 = MEAN + alpha * STD**2 / total * (x - alpha * MEAN)
        eps = sigma / total * (x - alpha * MEAN)
        return schedule.to_out(x0, eps, t)

    return predict


def spread(schedule, t):
    """(α_t μ, √(α_t² s² + σ_t²)): mean and deviation of x_t, float64, for a number t."""
    alpha, sigma = (c.double() for c in schedule.alpha_sigma(torch.tensor([t])))
    return alpha * MEAN, (alpha**2 * STD**2 + sigma**2).sqrt()


@pytest.mark.parametrize("name", ALL)
def test_pf_ode_of_a_gaussian_converges_at_first_order(name):
    """The PF-ODE of Gaussian data is known: it keeps (x − α_t μ) / √(α_t² s² + σ_t²)."""
    schedule = ALL[name]
    predict = gaussian_network(schedule)
    x = torch.linspace(-2, 2, 41)[:, None]  # (B, 1)
    mean_from, std_from = spread(schedule, 900.0)
    mean_to, std_to = spread(schedule, 100.0)
    exact = mean_to + (x - mean_from) * std_to / std_from  # (B, 1)
    errors = []
    for n in (20, 40, 80):
        y = x
        for t, s in pairwise(torch.linspace(900, 100, n + 1)):
            t, s = t.expand(41), s.expand(41)  # (B,) each
            y = schedule.pf_ode_step(y, predict(y, t), t, s)
        errors.append(float((y - exact).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert errors[-1] < 0.02, errors
    assert all(0.8 < order < 1.2 for order in orders), orders


def test_teacher_sample_reaches_the_data():
    schedule = ALL["flow"]
    x_T = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    x_0 = ode.teacher_sample(gaussian_network(schedule), schedule, x_T, 500)
    exact = MEAN + STD * x_T  # the map from N(0, 1) to N(μ, s²)
    assert_close(x_0, exact, atol=0.02, rtol=0)


# --- Guidance, walks, draws -----------------------------------------------------------------------


def test_guidance_convention():
    cond, uncond = batch(2, 3)
    assert_close(ode.guide(cond, uncond, 1.0), cond)
    assert_close(ode.guide(cond, uncond, 0.0), uncond)
    assert_close(ode.guide(cond, uncond, 4.0), uncond + 4 * (cond - uncond))
    assert ode.guide(cond.bfloat16(), uncond.bfloat16(), 4.0).dtype == torch.float32


def test_guidance_is_one_pass_of_both_halves_and_without_guidance_of_one():
    batches = []

    def denoiser(x_t, t, cond):
        batches.append(len(x_t))
        return x_t * cond["c"], []

    x, t = torch.ones(2, 1), torch.ones(2)
    cond, uncond = {"c": torch.full((2, 1), 3.0)}, {"c": torch.full((2, 1), 1.0)}
    guided = ode.with_guidance(denoiser, cond, uncond, 2.0)(x, t)
    assert_close(guided, torch.full((2, 1), 5.0))  # 1 + 2 (3 − 1)
    plain = ode.with_guidance(denoiser, cond, None, 1)(x, t)
    assert_close(plain, torch.full((2, 1), 3.0))
    assert batches == [4, 2]


@pytest.mark.parametrize("renoise", [True, False])
def test_student_walk_by_hand(renoise):
    schedule = ode.FlowSchedule(1.0)
    schedule.renoise = renoise
    times = schedule.timesteps(2)[:-1]  # (2,)
    x_T = torch.tensor([[1.0], [2.0]])
    seen = []

    def predict(x, t):
        seen.append((x.clone(), t.clone()))
        return 0.5 * x

    def fresh():
        return torch.full((2, 1), 10.0)

    x0 = x_T - 1.0 * 0.5 * x_T  # at t = 1000: x_0 = x − v; ε = x
    x_next = 0.5 * x0 + 0.5 * (fresh() if renoise else x_T)
    x0_next = x_next - 0.5 * 0.5 * x_next  # at t = 500
    result = ode.student_sample(predict, schedule, x_T, times, fresh)
    (_, first_t), (second_x, second_t) = seen
    assert first_t.tolist() == [1000, 1000]
    assert second_t.tolist() == [500, 500]
    assert_close(second_x, x_next)
    assert_close(result, x0_next)
    assert_close(ode.student_input(predict, schedule, x_T, times, 1, fresh), x_next)
    assert_close(ode.student_input(predict, schedule, x_T, times, 0, None), x_T)


def test_draws_depend_on_key_and_sample_alone():
    whole = ode.Draw((7, 3), range(4))
    low, high = ode.Draw((7, 3), range(2)), ode.Draw((7, 3), range(2, 4))
    noise = whole.normal((2, 3))  # (4, 2, 3)
    assert torch.equal(noise, torch.cat([low.normal((2, 3)), high.normal((2, 3))]))
    uniform = whole.uniform(5, 6)  # (4,)
    assert torch.equal(uniform, torch.cat([low.uniform(5, 6), high.uniform(5, 6)]))
    assert ((uniform >= 5) & (uniform < 6)).all()
    numbers = whole.integers(10)
    assert numbers == low.integers(10) + high.integers(10)
    assert all(0 <= n < 10 for n in numbers)

    assert len(noise.flatten(1).unique(dim=0)) == 4  # no two samples share noise
    assert not torch.equal(noise, ode.Draw((7, 4), range(4)).normal((2, 3)))


def test_what_ranks_share_depends_on_the_key_alone():
    numbers = [int(ode.common(*key).integers(10**9)) for key in ((1, 2), (1, 2), (1, 3))]
    assert numbers[0] == numbers[1]
    assert numbers[1] != numbers[2]
