"""What images of digits are measured by, against the held-out scans and the teacher's own samples.

Images here are (N, 64) float64 in pixel units of 0 to 16. Distances between them are taken in the
first 30 principal components of the training scans, (N, 30), written z.
"""

from functools import cache

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from tools.metrics import frechet
from toy.digits_teacher import ANY_DIGIT, scans

METRICS = (
    *("fd_teacher", "fd_real", "coverage", "density", "precision", "diversity", "class_tv"),
    "accuracy",
)
# Of the samples that are measured: 600 with the class prompts, then 600 with "a handwritten digit".
LABELS = np.arange(600) % 10  # (600,) of the first
NUMBERS = [*LABELS.tolist(), *[ANY_DIGIT] * 600]  # of their prompts, among PROMPTS


def pixels(images):
    """(N, 3, 8, 8) in [−1, 1] → (N, 64) in [0, 16], as a picture of 8 bits would have it."""
    bytes_ = images.clamp(-1, 1).add(1).mul(127.5).round()  # (N, 3, 8, 8)
    grey = bytes_.double().mean(1).flatten(1)  # (N, 64)
    return (grey / 255 * 16).numpy()


@cache
def features():
    """(the principal components, a classifier), scikit-learn's, fitted to the training scans."""
    (images, labels), _ = scans()
    x = pixels(images)  # (1497, 64)
    return PCA(30).fit(x), SVC(gamma=0.001, C=10).fit(x, labels.numpy())


def measure(x, labels, teacher, unprompted=None):
    """{name in METRICS: float} of images x (N, 64), drawn with the class prompts labels (N,).

    N is a multiple of 300. unprompted: images (M, 64) drawn with "a handwritten digit"; without
    them class_tv is None. teacher: the teacher's samples (1200, 64) of NUMBERS.

    Each metric is defined by the function of its name, precision by `coverage_density_precision`.
    fd_teacher and fd_real are `frechet` of tools/metrics.py: all images against as many of the
    teacher's, and x against the held-out scans. A distance falls with the number of images, by its
    bias: compare like with like.
    """
    pca, _ = features()
    images, real_labels = scans()[1]
    z = pca.transform(x)  # (N, 30)
    z_real = pca.transform(pixels(images))  # (300, 30)
    everything, shift = x, None
    if unprompted is not None:
        everything = np.concatenate([x, unprompted])  # (N + M, 64)
        shift = class_tv(unprompted, teacher[len(LABELS) :])
    z_everything = torch.from_numpy(pca.transform(everything))  # (N + M, 30)
    z_teacher = torch.from_numpy(pca.transform(teacher[: len(everything)]))  # (N + M, 30)
    coverage, density, precision = coverage_density_precision(z_real, z)
    return {
        "fd_teacher": frechet(z_everything, z_teacher),
        "fd_real": frechet(torch.from_numpy(z), torch.from_numpy(z_real)),
        "coverage": coverage,
        "density": density,
        "precision": precision,
        "diversity": diversity(z, labels, z_real, real_labels.numpy()),
        "class_tv": shift,
        "accuracy": accuracy(x, labels),
    }


def judge(x, teacher):
    """`measure` of images x (1200, 64) of NUMBERS; teacher: {"reference": (1200, 64)}."""
    n = len(LABELS)
    return measure(x[:n], LABELS, teacher["reference"], x[n:])


def coverage_density_precision(real, fake, k=5):
    """Three shares, by balls around each real point (N, D) to its k-th real neighbour.

    coverage   the share of balls that hold a fake point (Naeem et al. 2020)
    density    in how many balls a fake point lies, on average, divided by k (the same)
    precision  the share of fake points (M, D) that lie in a ball (Kynkäänniemi et al. 2019)

    They depend on the number of points: each is a mean over blocks of N fake ones, M being a
    multiple of N.
    """
    real = torch.as_tensor(real)
    # (N,); the nearest neighbour of a point is the point itself.
    radius = torch.cdist(real, real).kthvalue(k + 1).values
    blocks = []
    for block in np.split(fake, len(fake) // len(real)):
        inside = torch.cdist(torch.as_tensor(block), real) < radius  # (N fake, N real)
        coverage = inside.any(0).double().mean().item()
        density = inside.sum(1).double().mean().item() / k
        precision = inside.any(1).double().mean().item()
        blocks.append((coverage, density, precision))
    return np.mean(blocks, 0).tolist()


def diversity(z, labels, z_real, real_labels):
    """How far images of a class lie apart, as a share of how far real ones do: 1 is as diverse.

    z, z_real: (N, D), (M, D); labels (N,), (M,).
    """
    return spread(z, labels) / spread(z_real, real_labels)


def spread(z, labels):
    """Mean distance between two points (N, D) of the same label, averaged over the labels."""
    classes = [torch.as_tensor(z[labels == label]) for label in np.unique(labels)]
    return float(np.mean([torch.pdist(points).mean() for points in classes]))


def class_tv(x, teacher):
    """Total variation between the digits' shares among images and among the teacher's.

    Both (N, 64), (M, 64), drawn with "a handwritten digit"; the classifier says what they show.
    """
    return float(np.abs(shares(x) - shares(teacher)).sum() / 2)


def shares(x):
    """(10,) shares of the digits among images (N, 64), by the classifier."""
    _, classifier = features()
    return np.bincount(classifier.predict(x), minlength=10) / len(x)


def accuracy(x, labels):
    """The share of images (N, 64) that the classifier takes for the digit of their prompt (N,)."""
    _, classifier = features()
    return float((classifier.predict(x) == labels).mean())
