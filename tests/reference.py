"""ADM, DMD and ADP on a blackboard: a second implementation, which adm.py and adp.py must equal.

From the formulas of the paper (Lu et al., ICCV 2025, arXiv 2507.18569) and of DMD (2311.18828)
alone; nothing of this project is imported. Slow, in float64, the whole batch at once, one process.

    x_t = α_t x_0 + σ_t ε             t = T is noise, t = 0 is data
    G_θ, F_φ, f_ψ: model(weights, x_t, t, prompt) → like x_t        student, teacher, fake score
    D_τ:           critic(τ, x, t, prompt) → logits (B,)

Weights are {name: tensor}, latents (B, ...), times (B,), prompts {name: (B, ...)}. `draws` are the
random numbers of a round: normal ones (B, ...), and each u (B,) uniform in [0, 1). `c` are the
settings, named as the flags are. Lines that say `ours` are not in the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

T = 1000.0


@dataclass
class Process:
    """A noise process, and what its network predicts: a x_0 + b ε, (a, b) by `prediction`."""

    alpha_sigma: Callable  # t (B,) → (α_t, σ_t), (B,) each
    prediction: str
    t_noise: float = T  # the time of pure noise
    shown: Callable = lambda t: t  # the time that the network is told
    fresh: bool = True  # between a student's steps: new noise, or else the ε that it predicted

    def coefficients(self, t, x):
        """(α, σ, a, b) of x = α x_0 + σ ε and the network's a x_0 + b ε."""
        alpha, sigma = (like(c, x) for c in self.alpha_sigma(t))
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        meaning = {"epsilon": (zero, one), "v_prediction": (-sigma, alpha), "flow": (-one, one)}
        return alpha, sigma, *meaning[self.prediction]

    def mixed(self, x_0, eps, t):
        alpha, sigma, _, _ = self.coefficients(t, x_0)
        return alpha * x_0 + sigma * eps

    def target(self, x_0, eps, t):
        _, _, a, b = self.coefficients(t, x_0)
        return a * x_0 + b * eps

    def solved(self, x, said, t):
        """The (x_0, ε) of x = α x_0 + σ ε and said = a x_0 + b ε, by Cramer's rule."""
        alpha, sigma, a, b = self.coefficients(t, x)
        determinant = alpha * b - sigma * a
        return (b * x - sigma * said) / determinant, (alpha * said - a * x) / determinant

    def pf_ode_step(self, x, said, t, s):
        """From t to s along the probability flow, the network taken at its word."""
        return self.mixed(*self.solved(x, said, t), s)


def like(c, x):
    """c (B,) as (B, 1, ..., 1)."""
    return c.reshape(-1, *[1] * (x.ndim - 1))


def straight_line(t):
    return 1 - t / T, t / T


def variance_preserving(alphas_cumprod):
    """α² = ᾱ, σ² = 1 − ᾱ; ᾱ is a table at whole times, and straight lines between them."""

    def alpha_sigma(t):
        below = t.long()
        above = (below + 1).clamp(max=len(alphas_cumprod) - 1)
        a_bar = torch.lerp(alphas_cumprod[below], alphas_cumprod[above], t - below)
        return a_bar.sqrt(), (1 - a_bar).sqrt()

    return alpha_sigma


def adm(model, critic, theta, phi, psi, tau, process, student_process, c, draws, k, first):
    """One round: {what is logged or descended: scalar}. k is the student's step that trains.

    Of TTUR's rounds the student learns in the `first`; without D the others need f_ψ's loss alone.
    """
    B, prompt = len(draws.x_T), draws.prompt

    def student(x, i):  # (x_0, ε) at its step i, of time c.times[i]
        t = c.times[i].expand(B)
        said = model(theta, x, student_process.shown(t), prompt)
        return student_process.solved(x, said, t)

    def input_after(x_0, eps, i):  # of step i + 1
        noise = draws.renoise[i] if student_process.fresh else eps
        return student_process.mixed(x_0, noise, c.times[i + 1].expand(B))

    # Sample x̂_0. The gradient stays on step k.
    x = draws.x_T
    for i in range(k):
        x = input_after(*student(x, i), i).detach()
    x0_hat, eps_hat = student(x, k)

    # Fake score: the teacher's diffusion loss, on what the student made.
    x_0, eps = x0_hat.detach(), eps_hat.detach()
    if c.fake_samples == "last":  # ours: or on what its sampler would go on to emit
        for i in range(k, c.student_steps - 1):
            x_0, eps = (z.detach() for z in student(input_after(x_0, eps, i), i + 1))
    t, eps = process.t_noise * draws.u_fake, draws.eps_fake
    said = model(psi, process.mixed(x_0, eps, t), t, prompt)
    out = {"loss_fake": (said - process.target(x_0, eps, t)).square().mean()}
    if c.loss != "adm" and not first:
        return out

    # Re-diffuse, to where a step of length Δt stays within [t_min, t_max]; DMD takes none.
    least = c.t_min + (c.dt if c.loss != "dmd" else 0)
    t = T * (least + draws.u * (c.t_max - least))
    s = t - T * c.dt
    x_t = process.mixed(x0_hat, draws.eps, t)

    # Both branches, from the same x_t.
    with_prompt, without = (model(phi, x_t, t, p) for p in (prompt, draws.no_prompt))
    said_real = (without + c.guidance * (with_prompt - without)).detach()
    said_fake = model(psi, x_t, t, prompt)
    x0_real, x0_fake = (process.solved(x_t, y, t)[0].detach() for y in (said_real, said_fake))

    # DMD: each sample's gradient is (x0_fake − x0_real) / mean|x̂_0 − x0_real|.
    scale = torch.stack([(x0_hat[i] - x0_real[i]).abs().mean() for i in range(B)]).detach()
    g = (x0_fake - x0_real) / like(scale, x0_hat)
    out["dmd_loss"] = (x0_hat - (x0_hat - g).detach()).square().mean() / 2
    out |= {"x0_mean": x0_hat.mean(), "x0_std": x0_hat.flatten(1).std(1).mean()}
    if c.loss == "dmd":
        return out | {"loss_generator": out["dmd_loss"]}

    # The weight of a sample in the generator's loss (ours). "dmd": DMD's over the step's own, for
    # a branch that says another x_0 lands `moves` times as far away, and dx_fake/dx̂_0 is α_s.
    alpha_s, weight = process.alpha_sigma(s)[0], 1
    if c.gen_weight == "1/alpha":
        weight = 1 / process.alpha_sigma(t)[0]
    elif c.gen_weight == "dmd":
        alpha_t, sigma_t = process.alpha_sigma(t)
        moves = alpha_s - process.alpha_sigma(s)[1] * alpha_t / sigma_t
        weight = 1 / scale / moves / alpha_s

    # ADM: both take a step of Δt, and D_τ tells where they land, at s.
    x_real = process.pf_ode_step(x_t, said_real, t, s).detach()
    x_fake = process.pf_ode_step(x_t, said_fake, t, s)
    if c.fake_gradient == "straight-through" or c.loss == "step":  # ours: dx_fake/dx̂_0 = α_s
        x_fake = x_fake.detach() + like(alpha_s, x_fake) * (x0_hat - x0_hat.detach())
    if c.loss == "step":  # ours: no D_τ, half the squared distance of where they land
        halves = torch.stack([(x_fake[i] - x_real[i]).square().mean() / 2 for i in range(B)])
        return out | {"loss_generator": (weight * halves).mean()}
    real, fake = (critic(tau, x, s, prompt) for x in (x_real, x_fake))
    out["loss_generator"] = -(weight * fake).mean()
    out["loss_discriminator"] = out["descended_by_heads"] = hinge(real, fake)
    out["d_accuracy"] = accuracy(real, fake)
    if c.damping:  # ours: ½ E|∇D|² by finite differences, on real and on fake
        h = c.damping_sigma
        moved_real = critic(tau, x_real + h * draws.damping_real, s, prompt)
        moved_fake = critic(tau, x_fake + h * draws.damping_fake, s, prompt)
        slopes = ((real - moved_real) / h).square() + ((fake - moved_fake) / h).square()
        out["descended_by_heads"] = out["loss_discriminator"] + c.damping * slopes.mean() / 2
    return out


def hinge(real, fake):
    return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()


def accuracy(real, fake):
    return ((real > 0).double().mean() + (fake < 0).double().mean()) / 2


def adp(model, critics, theta, tau, process, student_process, c, draws, regresses):
    """One iteration. critics: (λ, its critic, whether it sees noised samples, name of its log)."""
    t = T * (1 - draws.u**3) if c.schedule == "cubic" else T * draws.u
    x_t = student_process.mixed(draws.x_0, draws.x_T, t)
    v = model(theta, x_t, student_process.shown(t), draws.prompt)
    x0_hat = x_t - like(t / T, x_t) * v
    out = {"loss_mse": (v - (draws.x_T - draws.x_0)).square().mean()}
    out |= {"x0_mean": x0_hat.mean(), "x0_std": x0_hat.flatten(1).std(1).mean()}
    if regresses:
        return out | {"loss_generator": out["loss_mse"]}

    t = process.t_noise * draws.u_noise
    x_real = process.mixed(draws.x_0, draws.eps_real, t)
    x_fake = process.mixed(x0_hat, draws.eps_fake, t)
    out["loss_generator"] = out["loss_discriminator"] = 0
    for weight, critic, sees_noise, name in critics:
        pair = (x_real, x_fake) if sees_noise else (draws.x_0, x0_hat)
        real, fake = (critic(tau, x, t, draws.prompt) for x in pair)
        out["loss_generator"] = out["loss_generator"] - weight * fake.mean()
        out["loss_discriminator"] = out["loss_discriminator"] + weight * hinge(real, fake)
        out[name] = accuracy(real, fake)
    return out | {"descended_by_heads": out["loss_discriminator"]}


def descend(network, loss, lr, c):
    """Clip the gradient and let AdamW step. network: {name: [w, m, v, n]}. The norm before that."""
    weights = [w for w, *_ in network.values()]
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    met = {name: g for name, g in zip(network, gradients, strict=True) if g is not None}
    norm = sum(g.square().sum() for g in met.values()).sqrt()
    for name, g in met.items():
        w, m, v, n = network[name]
        g, n = g * (c.clip / (norm + 1e-6)).clamp(max=1), n + 1
        m, v = c.beta1 * m + (1 - c.beta1) * g, 0.999 * v + 0.001 * g.square()
        direction = (m / (1 - c.beta1**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
        w = w - lr * 0.01 * w - lr * direction
        network[name] = [w.detach().requires_grad_(), m, v, n]
    return norm
