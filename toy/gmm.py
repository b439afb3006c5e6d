"""Gaussian mixtures under the straight line x_t = (1 − t/T) x_0 + (t/T) ε, all in closed form.

If x_0 ~ Σ_k w_k N(μ_k, s_k² I), then x_t ~ Σ_k w_k N(α μ_k, v_k I) with v_k = α² s_k² + σ², and
given x_t and the mode k, x_0 and ε are jointly Gaussian. So an exact teacher costs no network, and
how far a student is from it is known, not estimated.

Shapes: x (B, d) float32; t (B,) in [0, T], as everywhere in this project.
"""

import json

import torch
import torch.nn.functional as F

from ode import FlowSchedule
from runtime.settings import BadInput, require

LINE = FlowSchedule()  # of teacher, fake score, discriminator and student alike
STD = 0.3  # of a mode in the named mixtures


def ring(radius, weights):
    """(means (K, 2), weights): modes at even angles."""
    angle = torch.arange(len(weights)) * (2 * torch.pi / len(weights))  # (K,)
    return radius * torch.stack([angle.cos(), angle.sin()], 1), weights


# (means, weights); all ours but for the weights of ring8-rare, which are the first trial's.
NAMED = {
    "ring8": ring(8.0, [1] * 8),
    "ring8-rare": ring(8.0, [1, 2, 1, 4, 1, 2, 1, 4]),
    "ring4-rare": ring(4.0, [1, 2, 1, 4]),
}


class Mixture:
    """Σ_k w_k N(μ_k, s_k² I): means (K, d), weights (K,) of any sum, std a number or (K,).

    Raises BadInput for anything else.
    """

    def __init__(self, means, weights, std):
        form = "a mixture is numbers: means (K, d), weights (K,), std one or (K,)"
        try:
            self.means = torch.as_tensor(means, dtype=torch.float32)
            K, d = self.means.shape
            self.weights = torch.as_tensor(weights, dtype=torch.float32).view(K)
            self.std = torch.as_tensor(std, dtype=torch.float32).expand(K)
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(form) from None
        require(d, form)
        finite = all(x.isfinite().all() for x in (self.means, self.weights, self.std))
        require(finite, "a mixture's numbers must be finite")
        require((self.weights > 0).all(), "weights must be positive")
        require((self.std > 0).all(), "std must be positive")
        self.weights = self.weights / self.weights.sum()

    @property
    def separation(self):
        """Largest distance of a mode from the origin, over the mean σ."""
        return float(self.means.norm(dim=1).max() / self.std.mean())

    @property
    def spread(self):
        """Root mean square of a coordinate of x_0: the scale that networks divide by."""
        of_modes = self.means.square().mean(1) + self.std.square()  # (K,)
        return float((self.weights @ of_modes).sqrt())

    def sample(self, n, generator=None):
        """Independent draws (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)  # (n,)
        noise = torch.randn(n, self.means.shape[1], generator=generator)  # (n, d)
        return self.means[k] + self.std[k, None] * noise

    def velocity(self, x_t, t):
        """E[ε − x_0 | x_t], (B, d): what a flow network would predict.

        It never divides by α or σ, so it is finite at both ends.
        """
        alpha, sigma = (c[:, None] for c in LINE.alpha_sigma(t))  # (B, 1) each
        v = (alpha * self.std) ** 2 + sigma**2  # (B, K)
        off = x_t[:, None] - alpha[:, None] * self.means  # (B, K, d)
        d = x_t.shape[1]
        exponent = off.square().sum(2) / v + d * (2 * torch.pi * v).log()  # (B, K), times −2
        p = (self.weights.log() - 0.5 * exponent).softmax(1)  # (B, K): of the modes, given x_t
        slope = p * (sigma - alpha * self.std**2) / v  # (B, K)
        return torch.einsum("bk,bkd->bd", slope, off) - p @ self.means


def load_mixture(name, separation=None, dim=2):
    """A named mixture, or a JSON file {"means": [[x, y], …], "weights": […], "std": 0.3}.

    separation moves the modes along their rays, at the same σ, until the farthest is that many σ
    from the origin. Beyond its own dimensions and up to dim it is N(0, σ²). Raises BadInput for a
    file that is missing, no JSON, or no mixture.
    """
    mixture = Mixture(*NAMED[name], STD) if name in NAMED else mixture_of_file(name)
    if separation is not None:
        possible = 0 < separation < float("inf") and mixture.separation > 0
        require(possible, f"--separation {separation}: a positive number")
        mixture.means = mixture.means * (separation / mixture.separation)
    more = max(0, dim - mixture.means.shape[1])
    mixture.means = F.pad(mixture.means, (0, more))  # (K, dim)
    return mixture


def mixture_of_file(name):
    """As load_mixture, for a file."""
    try:
        with open(name, encoding="utf-8") as f:
            return Mixture(**json.load(f))
    except (OSError, TypeError, ValueError) as e:  # BadInput, too
        named = ", ".join(NAMED)
        form = '{"means": [[x, y], …], "weights": […], "std": 0.3}'
        reason = " ".join(str(e).split())
        neither = f"neither one of {named} nor a JSON file {form}"
        raise BadInput(f"--mixture {name}: {neither}: {reason}") from None


# --- Metrics --------------------------------------------------------------------------------------
# Of samples x (n, d) against a mixture. Each is a float or an int. These docstrings define the
# words that tables, pictures and claims use.


def shares(mixture, x):
    """(K + 1,): the share of samples in each mode, and elsewhere.

    A sample is in its nearest mode, in units of that mode's σ, if it is within 4σ of it.
    """
    z = torch.cdist(x, mixture.means) / mixture.std  # (n, K)
    near, k = z.min(1)  # (n,) each
    k = torch.where(near <= 4, k, len(mixture.means))  # (n,)
    return torch.bincount(k, minlength=len(mixture.means) + 1) / len(x)


def modes_covered(mixture, x):
    """Modes covered: how many modes have a share of at least a quarter of their weight."""
    return int((shares(mixture, x)[:-1] >= mixture.weights / 4).sum())


def in_mode(mixture, x):
    """In mode: the share of samples within 4σ of some mode (of exact samples 0.9997 in 2-D)."""
    return float(1 - shares(mixture, x)[-1])


def mode_tv(mixture, x):
    """TV: total variation over modes, ½ Σ |share − weight|, in [0, 1]; 0 is perfect.

    "Elsewhere" counts as one more mode, whose weight is taken as 0 (it is 3e-4 in 2-D). How the
    samples lie within a mode it does not see.
    """
    share = shares(mixture, x)
    wrong = (share[:-1] - mixture.weights).abs().sum() + share[-1]
    return float(0.5 * wrong)


def density_tv(mixture, x):
    """Density TV: total variation over small cells, ½ Σ |share − mass|; 2-D only.

    Unlike TV, it sees a mode's width. The cells are squares of side the least σ that span all
    modes ± 5σ; all that is outside counts as one more. Cell masses are exact; the samples' own
    noise remains: about 0.02 for 100,000 on ring8.
    """
    margin, cell = 5 * mixture.std.max(), mixture.std.min()
    low = mixture.means.amin(0) - margin  # (2,)
    high = mixture.means.amax(0) + margin + cell  # (2,)
    edges, masses = [], []  # of x, of y
    for ends, means in zip(torch.stack([low, high], 1).tolist(), mixture.means.T, strict=True):
        edge = torch.arange(*ends, float(cell))  # (edges,)
        z = (edge - means[:, None]) / mixture.std[:, None]  # (K, edges)
        edges.append(edge)
        masses.append(torch.special.ndtr(z).diff())  # (K, cells)
    mass = torch.einsum("k,ki,kj->ij", mixture.weights, *masses)
    share = torch.histogramdd(x, edges).hist / len(x)  # as mass
    outside = (share.sum() - mass.sum()).abs()
    return float(0.5 * ((share - mass).abs().sum() + outside))


def metrics(mixture, x):
    """All of them for samples x (n, 2), by name."""
    return {
        "modes": len(mixture.means),
        "modes_covered": modes_covered(mixture, x),
        "in_mode": in_mode(mixture, x),
        "tv": mode_tv(mixture, x),
        "density_tv": density_tv(mixture, x),
    }
