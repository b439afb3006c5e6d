"""Noise processes, their probability-flow ODEs and the two samplers, in closed form and in float32.

    x_t = α_t x_0 + σ_t ε,        t = T is noise, t = 0 is data, T = 1000

Two processes cover every model here: variance preserving (SDXL, CogVideoX; ᾱ from the model's own
scheduler) and the straight line (Stable Diffusion 3, Wan, FLUX; every student after ADP). Networks
may run in bf16: what enters these formulas is cast to float32 first, and a time is never rounded to
half precision (bf16 turns t = 999 into 1000).

Shapes: x, ε and network outputs are (B, ...); every time is (B,), one per sample, float32 or int64.
"""

import numpy as np
import torch

T = 1000.0  # training time steps of every model family


def per_sample(t, x):
    """`t` (B,) as (B, 1, ..., 1), so that it multiplies `x` (B, ...) sample by sample.

    Raises ValueError for another shape (broadcasting would pair samples with wrong times),
    TypeError for a 16-bit time.
    """
    if t.shape != x.shape[:1]:
        raise ValueError(f"one time per sample: t is {tuple(t.shape)}, x is {tuple(x.shape)}")
    if t.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(f"times must be float32 or int64, not {t.dtype}")
    return t.view(-1, *[1] * (x.ndim - 1))


class Schedule:
    """One noise process together with what the network predicts on it.

    prediction  "epsilon" (ε), "v_prediction" (α ε − σ x_0) or "flow" (ε − x_0, the straight line's
                velocity)
    t_noise     the time of pure noise that a network is shown: T on the line, T − 1 (the last
                index) for VP
    t_data      the time at which sampling has arrived
    renoise     how a few-step student goes from one time to the next: fresh noise (True) or its
                own ε (False)
    """

    prediction: str
    t_noise: float
    t_data: float
    renoise = True

    def alpha_sigma(self, t):
        """(α_t, σ_t), each (B,) float32, for t (B,)."""
        raise NotImplementedError

    def timesteps(self, n):
        """Times that a sampler of n steps visits, from noise on, and its end: float32 (n+1,)."""
        raise NotImplementedError

    def shown(self, t):
        """The time that the network is given at t, (B,)."""
        return t

    def _alpha_sigma_like(self, t, x):
        per_sample(t, x)  # refuses a t that alpha_sigma would take
        alpha, sigma = self.alpha_sigma(t)  # (B,) each
        return per_sample(alpha, x), per_sample(sigma, x)

    def add_noise(self, x0, eps, t):
        """x_t = α_t x_0 + σ_t ε, float32 (B, ...)."""
        alpha, sigma = self._alpha_sigma_like(t, x0)
        return alpha * x0.float() + sigma * eps.float()

    def renoised(self, x0, eps, s, randn):
        """A few-step student's next input, x_s (B, ...), after it predicted (x_0, ε).

        s is one time, () float32; randn() draws noise, (B, ...).
        """
        if self.renoise:
            eps = randn()
        return self.add_noise(x0, eps, s.expand(len(x0)))

    def to_x0_eps(self, x_t, out, t):
        """The (x_0, ε) that the network's output at (x_t, t) stands for, each float32 (B, ...).

        v- and flow-prediction never divide, so they are finite where α_t = 0 (zero terminal SNR).
        """
        alpha, sigma = self._alpha_sigma_like(t, x_t)
        x_t, out = x_t.float(), out.float()
        if self.prediction == "epsilon":
            return (x_t - sigma * out) / alpha, out
        if self.prediction == "v_prediction":
            return alpha * x_t - sigma * out, sigma * x_t + alpha * out
        return x_t - sigma * out, x_t + alpha * out  # flow: α + σ = 1

    def to_out(self, x0, eps, t):
        """What the network should output at add_noise(x0, eps, t), float32 (B, ...).

        It is the target of its diffusion loss.
        """
        alpha, sigma = self._alpha_sigma_like(t, x0)
        if self.prediction == "epsilon":
            return eps.float()
        if self.prediction == "v_prediction":
            return alpha * eps.float() - sigma * x0.float()
        return eps.float() - x0.float()

    def pf_ode_step(self, x_t, out, t, s):
        """One first-order step of the probability-flow ODE from t to s, both (B,): x_s (B, ...).

        The network is taken to be right about (x_0, ε) at t, and the pair is re-mixed at s: DDIM
        for VP, Euler on the line.
        """
        x0, eps = self.to_x0_eps(x_t, out, t)  # (B, ...) each
        return self.add_noise(x0, eps, s)


class VPSchedule(Schedule):
    """Variance preserving: α = √ᾱ, σ = √(1 − ᾱ), ᾱ linear between the scheduler's integer times.

    alphas_cumprod        (1000,) of the *loaded* scheduler, where SNR shift and zero-SNR rescaling
                          have already been applied
    prediction            "epsilon" or "v_prediction"
    final_alpha_cumprod   ᾱ at any time below 0, where the last step of a sampler lands

    ᾱ and not log-SNR is interpolated (ours): CogVideoX's ends at exactly 0. Raises ValueError where
    ᾱ and prediction do not go together.
    """

    t_data = -1.0

    def __init__(self, alphas_cumprod, prediction, final_alpha_cumprod=1.0):
        if prediction not in ("epsilon", "v_prediction"):
            need = "a variance-preserving network predicts epsilon or v"
            raise ValueError(f"{need}, not {prediction!r}")
        if prediction == "epsilon" and alphas_cumprod[-1] == 0:
            why = "pure noise says nothing about x_0"
            raise ValueError(f"epsilon-prediction is undefined at zero terminal SNR: {why}")
        self.alphas_cumprod = torch.as_tensor(alphas_cumprod).double().cpu()  # (1000,)
        self.final_alpha_cumprod = float(final_alpha_cumprod)
        self.prediction = prediction
        self.t_noise = float(len(alphas_cumprod) - 1)

    def alpha_sigma(self, t):
        self.alphas_cumprod = self.alphas_cumprod.to(t.device)  # moved once
        table = self.alphas_cumprod
        t = t.double().clamp(max=self.t_noise)
        below = t.floor().clamp(min=0).long()  # (B,) the integer time under t
        above = (below + 1).clamp(max=len(table) - 1)  # (B,)
        a_bar = torch.lerp(table[below], table[above], t - below)  # (B,)
        a_bar = torch.where(t < 0, self.final_alpha_cumprod, a_bar)
        return a_bar.sqrt().float(), (1 - a_bar).sqrt().float()

    def timesteps(self, n):
        """999, then evenly down: [999, 749, 499, 249] for n = 4, and then t_data.

        Integers, on which the teacher was trained.
        """
        steps = self.t_noise - torch.arange(n).mul(self.t_noise + 1).div(n).floor()  # (n,)
        return torch.cat([steps, torch.tensor([self.t_data])])


class FlowSchedule(Schedule):
    """The straight line x_t = (1 − t/T) x_0 + (t/T) ε, whose velocity ε − x_0 the network predicts.

    shift warps the sampler's times towards noise: σ = shift·u / (1 + (shift − 1)·u), u even. SD3's
    and Wan's is 3, FLUX's depends on the size.
    """

    prediction = "flow"
    t_noise = T
    t_data = 0.0

    def __init__(self, shift=1.0):
        self.shift = float(shift)

    def alpha_sigma(self, t):
        sigma = (t.double() / T).float()  # (B,)
        return 1 - sigma, sigma

    def timesteps(self, n):
        """Even in the unshifted time: [1000, 900, 750, 500] for n = 4 and shift 3, and then 0."""
        u = 1 - torch.arange(n + 1).double() / n  # (n+1,)
        times = self.t_noise * self.shift * u / (1 + (self.shift - 1) * u)  # (n+1,)
        return times.float()


class StudentLine(FlowSchedule):
    """The line as a VP teacher's student walks it after ADP (ours).

    It starts from t = 999, shows whole times and keeps its own ε. This is what
    DPMSolverMultistepScheduler with flow sigmas does, the stock scheduler for a flow in the SDXL
    and CogVideoX pipelines, so that an exported student needs no code of this project.
    """

    t_noise = T - 1
    renoise = False

    def timesteps(self, n):
        # By that scheduler's own arithmetic: 665.99…, not 666, for n = 3. In float32 it is rounded
        # down, so that 665 is shown, as there.
        exact = T * (1 - np.linspace(1, 1 / T, n + 1))[::-1]  # (n+1,) float64
        t = exact.astype(np.float32)  # (n+1,)
        below = np.nextafter(t, np.float32(0))  # (n+1,)
        return torch.from_numpy(np.where(t > exact, below, t))

    def shown(self, t):
        # Cubic times can round to T, for which the network has no index.
        return t.floor().clamp(max=self.t_noise)


def on_the_line(teacher_schedule):
    """The process of a flow-parameterised student, as every student is after ADP.

    SD3's, Wan's and FLUX's is their own, on the line already; the others' is StudentLine.
    """
    if teacher_schedule.prediction == "flow":
        return teacher_schedule
    return StudentLine()


def guide(cond, uncond, w):
    """Classifier-free guidance u + w (c − u), float32 (B, ...): w = 1 is plainly conditional."""
    return uncond.float() + w * (cond.float() - uncond.float())


def with_guidance(denoiser, cond, uncond, w):
    """predict(x_t, t) → (B, ...): the denoiser under CFG of scale w.

    Both halves are one pass of batch 2B; at w = 1 it is plain, of batch B. A network into which
    guidance is distilled is told w, as cond's guidance (B,), in one pass of batch B.
    """
    is_told = getattr(denoiser, "embeds_guidance", False)

    def predict(x_t, t):
        if is_told:
            told = torch.full((len(x_t),), float(w), device=x_t.device)  # (B,)
            return denoiser(x_t, t, {**cond, "guidance": told})[0]
        if w == 1:
            return denoiser(x_t, t, cond)[0]
        both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}  # (2B, ...) each
        out = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)[0]  # (2B, ...)
        out_cond, out_uncond = out.chunk(2)
        return guide(out_cond, out_uncond, w)

    return predict


def teacher_sample(predict, schedule, x_T, steps):
    """The teacher's PF-ODE from x_T (B, ...) to x_0 (B, ...) in `steps` steps, float32.

    predict(x_t, t) is the (guided) network, t (B,) float32. One call of it a step.
    """
    x = x_T.float()
    times = schedule.timesteps(steps).to(x.device)  # (steps+1,)
    for t, s in zip(times[:-1], times[1:], strict=True):
        t, s = t.expand(len(x)), s.expand(len(x))  # (B,) each
        x = schedule.pf_ode_step(x, predict(x, t), t, s)
    return x


def student_input(predict, schedule, x_T, times, k, randn):
    """The student's input at its step k: x_T itself, or what its own first k steps lead to.

    Backward simulation (ours, after DMD2): training sees what sampling will see. times (n,) are the
    student's; k calls of predict(x_t, t). float32 (B, ...).
    """
    x = x_T.float()
    for t, s in zip(times[:k], times[1 : k + 1], strict=True):
        t = t.expand(len(x))  # (B,)
        out = predict(x, schedule.shown(t))
        x0, eps = schedule.to_x0_eps(x, out, t)  # (B, ...) each
        x = schedule.renoised(x0, eps, s, randn)
    return x


def student_sample(predict, schedule, x_T, times, randn):
    """The few-step sampler: walk to the last step, return its x_0, float32 (B, ...).

    times (n,) are the student's; n calls of predict(x_t, t).
    """
    x = student_input(predict, schedule, x_T, times, len(times) - 1, randn)
    t = times[-1].expand(len(x))  # (B,)
    out = predict(x, schedule.shown(t))
    return schedule.to_x0_eps(x, out, t)[0]


class Draw:
    """Random numbers that depend on (key, sample number) alone.

    Two ranks draw what one would, and a run resumes exactly without a stored generator. key: ints
    ≥ 0. Trailing zeros of a key do not count, so keys in use together begin differently.
    """

    def __init__(self, key, samples, device="cpu"):
        sequences = [np.random.SeedSequence((*key, i)) for i in samples]
        seeds = [int(sequence.generate_state(1, np.uint64)[0]) for sequence in sequences]
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.on_host = self.generators
        if torch.device(device).type != "cpu":  # where the host would have to wait for each integer
            self.on_host = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(self, shape):
        """(B, *shape), float32."""
        draws = [torch.randn(shape, generator=g, device=self.device) for g in self.generators]
        return torch.stack(draws)

    def uniform(self, low, high):
        """(B,), float32 in [low, high)."""
        draws = [torch.rand((), generator=g, device=self.device) for g in self.generators]
        return low + (high - low) * torch.stack(draws)

    def integers(self, n):
        """B ints in [0, n), for the host; drawn first, they are the same on every device."""
        return [int(torch.randint(n, (), generator=g)) for g in self.on_host]


def common(*key):
    """A NumPy generator on which all ranks agree, for what a whole batch shares."""
    return np.random.default_rng(key)
