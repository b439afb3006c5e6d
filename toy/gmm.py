"""Gaussian mixtures under the straight line x_t = (1 − t/T) x_0 + (t/T) ε: everything about them in closed form.

If x_0 ~ Σ_k w_k N(μ_k, s_k² I), then x_t ~ Σ_k w_k N(α μ_k, v_k I) with v_k = α² s_k² + σ², and given x_t and the mode k,
x_0 and ε are jointly Gaussian. So an exact teacher costs no network, and how far a student is from it is known, not estimated.

Shapes: x (B, d) float32; t (B,) in [0, T], as everywhere in this project.
"""

import json

import torch

from ode import FlowSchedule
from runtime.settings import BadInput, require

LINE = FlowSchedule()  # of teacher, fake score, discriminator and student alike
STD = 0.3  # of a mode in the named mixtures


def ring(radius, weights):
    angle = torch.arange(len(weights)) * (2 * torch.pi / len(weights))
    return radius * torch.stack([angle.cos(), angle.sin()], 1), weights


def grid(side, spacing):
    line = (torch.arange(side) - (side - 1) / 2) * spacing
    return torch.cartesian_prod(line, line), [1] * side ** 2


NAMED = {  # (means, weights); all ours but for the weights of ring8-rare, which are the first trial's
    "ring8": ring(8.0, [1] * 8),
    "ring8-rare": ring(8.0, [1, 2, 1, 4, 1, 2, 1, 4]),
    "ring4-rare": ring(4.0, [1, 2, 1, 4]),
    "grid25": grid(5, 4.0),
    "two-far": (torch.tensor([[-8.0, 0.0], [8.0, 0.0]]), [1, 3]),
}


class Mixture:
    """Σ_k w_k N(μ_k, s_k² I): means (K, d), weights (K,) that need not sum to one, std a number or (K,).

    Raises BadInput for anything else.
    """

    def __init__(self, means, weights, std):
        try:
            self.means = torch.as_tensor(means, dtype=torch.float32)  # (K, d)
            self.weights = torch.as_tensor(weights, dtype=torch.float32)  # (K,)
            self.std = torch.as_tensor(std, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise BadInput("a mixture is numbers: means (K, d), weights (K,), std one or (K,)") from None
        require(self.means.ndim == 2 and self.means.numel(), f"means must be (K, d), not {tuple(self.means.shape)}")
        K = len(self.means)
        require(self.weights.shape == (K,), f"{K} means, but weights of shape {tuple(self.weights.shape)}")
        require(self.std.shape in ((), (K,)), f"{K} means, but std of shape {tuple(self.std.shape)}")
        require(all(x.isfinite().all() for x in (self.means, self.weights, self.std)), "a mixture's numbers must be finite")
        require((self.weights > 0).all(), "weights must be positive")
        require((self.std > 0).all(), "std must be positive")
        self.std, self.weights = self.std.expand(K), self.weights / self.weights.sum()

    @property
    def separation(self):
        """Largest distance of a mode from the origin, over the mean σ."""
        return float(self.means.norm(dim=1).max() / self.std.mean())

    @property
    def spread(self):
        """Root mean square of a coordinate of x_0: the scale that networks divide by."""
        return float((self.weights @ (self.means.square().mean(1) + self.std.square())).sqrt())

    def sample(self, shape, generator=None):
        """Independent draws (*shape, d)."""
        n = torch.Size(shape).numel()
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)  # (n,)
        x = self.means[k] + self.std[k, None] * torch.randn(n, self.means.shape[1], generator=generator)
        return x.view(*shape, -1)

    def _components(self, x_t, t):
        """α, σ (B, 1), v_k (B, K), x_t − α μ_k (B, K, d) and log w_k N(x_t; α μ_k, v_k I) (B, K)."""
        alpha, sigma = (c[:, None] for c in LINE.alpha_sigma(t))
        v = (alpha * self.std) ** 2 + sigma ** 2
        off = x_t[:, None] - alpha[:, None] * self.means
        d = x_t.shape[1]
        log_p = self.weights.log() - 0.5 * (off.square().sum(2) / v + d * (2 * torch.pi * v).log())
        return alpha, sigma, v, off, log_p

    def log_density(self, x_t, t):
        """log p_t(x_t), (B,)."""
        return self._components(x_t, t)[-1].logsumexp(1)

    def posterior(self, x_t, t):
        """P(mode k | x_t), (B, K)."""
        return self._components(x_t, t)[-1].softmax(1)

    def score(self, x_t, t):
        """∇ log p_t(x_t), (B, d)."""
        _, _, v, off, log_p = self._components(x_t, t)
        return -torch.einsum("bk,bkd->bd", log_p.softmax(1) / v, off)

    def x0(self, x_t, t):
        """E[x_0 | x_t], (B, d)."""
        alpha, _, v, off, log_p = self._components(x_t, t)
        p = log_p.softmax(1)
        return p @ self.means + torch.einsum("bk,bkd->bd", p * alpha * self.std ** 2 / v, off)

    def velocity(self, x_t, t):
        """E[ε − x_0 | x_t], (B, d): what a flow network would predict. Never divides by α or σ, so finite at both ends."""
        alpha, sigma, v, off, log_p = self._components(x_t, t)
        p = log_p.softmax(1)
        return torch.einsum("bk,bkd->bd", p * (sigma - alpha * self.std ** 2) / v, off) - p @ self.means


def load_mixture(name, separation=None):
    """A named mixture or a JSON file {"means": [[x, y], …], "weights": […], "std": 0.3}, as a Mixture.

    separation  moves the modes along their rays, at the same σ, until the farthest is that many σ from the origin
    Raises BadInput for a file that is missing, no JSON, or no mixture.
    """
    if name in NAMED:
        mixture = Mixture(*NAMED[name], STD)
    else:
        try:
            with open(name, encoding="utf-8") as f:
                fields = json.load(f)
        except (OSError, ValueError) as e:
            reason = " ".join(str(e).split())
            raise BadInput(f"--mixture {name}: neither one of {', '.join(NAMED)} nor a JSON file ({reason})") from None
        require(isinstance(fields, dict) and fields.keys() == {"means", "weights", "std"},
                f'--mixture {name}: expected {{"means": [[x, y], …], "weights": […], "std": 0.3}}')
        try:
            mixture = Mixture(**fields)
        except BadInput as e:
            raise BadInput(f"--mixture {name}: {e}") from None
    if separation is not None:
        require(0 < separation < float("inf") and mixture.separation > 0, f"--separation {separation}: a positive number")
        mixture.means = mixture.means * (separation / mixture.separation)
    return mixture


# --- Metrics ---------------------------------------------------------------------------------------------------------
# Of samples x (n, d) against a mixture. Each is a float or an int.


def shares(mixture, x):
    """(K + 1,): the share of samples within 4σ of each mode (of the nearest, in units of its σ), and elsewhere."""
    z = torch.cdist(x, mixture.means) / mixture.std  # (n, K)
    near, k = z.min(1)
    k = torch.where(near <= 4, k, len(mixture.means))
    return torch.bincount(k, minlength=len(mixture.means) + 1) / len(x)


def modes_covered(mixture, x):
    """Modes whose share is at least a quarter of their weight."""
    return int((shares(mixture, x)[:-1] >= mixture.weights / 4).sum())


def in_mode(mixture, x):
    """Share of samples within 4σ of a mode."""
    return float(1 - shares(mixture, x)[-1])


def mode_tv(mixture, x):
    """½ Σ |share − weight| over modes plus "elsewhere", whose weight is taken as 0 (it is 3e-4 in 2-D). In [0, 1]."""
    share = shares(mixture, x)
    return float(0.5 * ((share[:-1] - mixture.weights).abs().sum() + share[-1]))


def density_tv(mixture, x):
    """½ Σ |share − mass| over square cells of the least σ that span all modes ± 5σ, plus the outside. 2-D only.

    Cell masses are exact; the samples' own noise remains: about 0.02 for 100,000 on ring8.
    """
    margin, cell = 5 * mixture.std.max(), mixture.std.min()
    low, high = mixture.means.amin(0) - margin, mixture.means.amax(0) + margin
    edges = [torch.arange(float(a), float(b + cell), float(cell)) for a, b in zip(low, high)]
    cdf = [torch.special.ndtr((e - mixture.means[:, [i]]) / mixture.std[:, None]) for i, e in enumerate(edges)]  # (K, edges)
    mass = torch.einsum("k,ki,kj->ij", mixture.weights, cdf[0].diff(), cdf[1].diff())
    share = torch.histogramdd(x, edges).hist / len(x)
    return float(0.5 * ((share - mass).abs().sum() + (share.sum() - mass.sum()).abs()))


def energy(x, y):
    """Energy distance 2 E|X − Y| − E|X − X'| − E|Y − Y'| between samples (n, d), (m, d); unbiased, so it may be below 0."""
    def mean_apart(a):
        return torch.cdist(a, a).sum() / (len(a) * (len(a) - 1))
    return float(2 * torch.cdist(x, y).mean() - mean_apart(x) - mean_apart(y))


def metrics(mixture, x, fresh):
    """All of them for samples x (n, 2), by name; `fresh` (m, 2) are draws from the mixture, for `energy`."""
    return {"modes": len(mixture.means), "modes_covered": modes_covered(mixture, x), "in_mode": in_mode(mixture, x),
            "tv": mode_tv(mixture, x), "density_tv": density_tv(mixture, x), "energy": energy(x[:len(fresh)], fresh)}


def divergences(p, q, x):
    """(KL(q ‖ p), TV(p, q)) of one-dimensional mixtures by quadrature over the even grid x (n, 1), which must span both.

    With p the target and q a student, the first is the reverse KL that DMD descends, the second what the hinge game does.
    """
    t, dx = torch.zeros(len(x), dtype=torch.float64), float(x[1] - x[0])
    log_p, log_q = p.log_density(x.double(), t), q.log_density(x.double(), t)
    kl = (log_q.exp() * (log_q - log_p)).sum() * dx
    return float(kl), float(0.5 * (log_p.exp() - log_q.exp()).abs().sum() * dx)
