"""What images are scored by, on features of theirs: functions of tensors, and no more.

N images of P prompts; which prompt an image is of is a number in `prompts`, (N,) int64. An image's
own score is averaged over the images of its prompt first, (P,): what is resampled are prompts.
"""

import numpy as np
import torch
import torch.nn.functional as F

RESAMPLES = 1000  # of an interval's prompts (ours)
FRECHET_RESAMPLES = 100  # the same, where each costs an eigendecomposition (ours)


def unit(x):
    """Features (N, D) scaled to length 1."""
    return F.normalize(x, dim=-1)


def by_prompt(values, prompts):
    """(P,) means over each prompt's images of values (N,)."""
    return torch.stack([values[prompts == p].mean() for p in prompts.unique()])


def alignment(images, texts):
    """(N,) cosines of image features (N, D) of length 1, or means of such, and texts' (N, D)."""
    return (images * unit(texts)).sum(-1)


def pairwise(features, prompts):
    """(P',) mean 1 − cosine over the pairs of images of a prompt, for those that have a pair."""
    found = []
    for p in prompts.unique():
        x = unit(features[prompts == p])  # (n, D)
        n = len(x)
        if n > 1:
            total = (1 - x @ x.T).sum()  # an image's distance to itself is 0
            found.append(total / (n * (n - 1)))
    return torch.stack(found) if found else torch.empty(0)


def apart(a, b):
    """(N,) 1 − cosine of each image's features (N, D) and those of its partner, (N, D)."""
    return 1 - (unit(a) * unit(b)).sum(-1)


def frechet(x, y):
    """Fréchet distance of the Gaussians fitted to features (N, D) and (M, D), squared, as in FID.

    |μ − μ'|² + tr(C + C' − 2 (C C')^½). It falls with the number of images by its bias: compare
    like with like.
    """
    return distance_to(y)(x)


def distance_to(y):
    """The function x (N, D) → `frechet`(x, y), which takes y's (M, D) covariance apart once."""
    mean, cov = moments(y)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # (D, D), C'^½

    def distance(x):
        mean_x, cov_x = moments(x)
        # The eigenvalues of C C' are those of C'^½ C C'^½, which is symmetric.
        product = torch.linalg.eigvalsh(root @ cov_x @ root)  # (D,)
        roots = product.clamp(min=0).sqrt().sum()
        shift = (mean - mean_x).square().sum()
        return (shift + cov.trace() + cov_x.trace() - 2 * roots).item()

    return distance


def moments(x):
    """(mean (D,), covariance (D, D)) of features (N, D), in float64."""
    x = x.double()
    return x.mean(0), torch.cov(x.T)


def mean_interval(values):
    """(2.5th, 97.5th percentile) of the mean of values (P,), resampled; None of fewer than two."""
    if len(values) < 2:
        return None
    values = values.double().numpy()
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = values[picks].mean(1)  # (RESAMPLES,)
    return percentiles(means)


def frechet_interval(x, y, prompts, partners):
    """The interval of frechet(x, y) with x's prompts resampled; None of fewer than two prompts.

    partners: y (N, D) is of the same prompts, image by image, and resampled with x. Images drawn
    twice make a sample narrower than it is, and the distance greater: what is reported is the
    resampled distances' spread around the distance itself (ours).
    """
    numbers = prompts.unique().tolist()
    if len(numbers) < 2:
        return None
    distance = distance_to(y)
    images = [torch.nonzero(prompts == p).flatten() for p in numbers]
    random = np.random.default_rng(0)
    found = []
    for _ in range(FRECHET_RESAMPLES):
        picks = random.integers(len(numbers), size=len(numbers))
        rows = torch.cat([images[p] for p in picks])
        found.append(frechet(x[rows], y[rows]) if partners else distance(x[rows]))
    low, high = percentiles(np.array(found) - np.mean(found))
    value = distance(x)
    return max(value + low, 0.0), value + high


def percentiles(values):
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
