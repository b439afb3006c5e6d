"""What images of digits are measured by, against the teacher's own and the held-out ones.

Images are seen as digits_clip.py's CLIP sees them, by the features that tools/score.py has of it,
(N, 32), written z. All metrics are of z. Those of a sample depend on its size: compare like with
like, here 500 images with the prompts of one digit, and then 500 with "a handwritten digit".
"""

from functools import cache

import torch
from transformers import AutoTokenizer, CLIPModel

from tools.metrics import frechet, pairwise, unit
from toy.digits_clip import CLIP
from toy.digits_teacher import ANY_DIGIT, NAMES, PROMPTS, held_out

LABELS = torch.arange(500) % 10  # (500,) digits that the first half is asked for
NUMBERS = [*LABELS.tolist(), *[ANY_DIGIT] * 500]  # of the prompts, among PROMPTS


@cache
def judge_of_digits():
    """(the CLIP, features (10, 32) of length 1 of the prompts of one digit)."""
    model = CLIPModel.from_pretrained(CLIP).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    tokens = tokenizer(list(PROMPTS[: len(NAMES)]), padding=True, return_tensors="pt")
    texts = model.text_projection(model.text_model(**tokens).pooler_output)
    return model, unit(texts)


def look(images):
    """z (N, 32) of images (N, 3, 32, 32) in [−1, 1], as a picture of 8 bits would have them."""
    model, _ = judge_of_digits()
    bytes_ = images.clamp(-1, 1).add(1).mul(127.5).round()  # (N, 3, 32, 32)
    seen = []
    for some in (bytes_ / 127.5 - 1).split(250):
        pooled = model.vision_model(pixel_values=some).pooler_output
        seen.append(model.visual_projection(pooled))
    return torch.cat(seen)


def read(z):
    """(N,) the digits that images of features z (N, 32) show: the nearest of ten prompts."""
    _, texts = judge_of_digits()
    return (unit(z) @ texts.T).argmax(1)


@cache
def real():
    """(z (500, 32), digits (500,)) of the held-out images."""
    images, labels = held_out()
    return look(images), labels


def measure(z, teacher):
    """{metric: float} of images z (1000, 32), drawn with the prompts of NUMBERS.

    fd, fd_named, fd_any  `frechet` of tools/metrics.py to the teacher's, (1000, 32) of NUMBERS: of
                          all, of those asked for one digit, of those asked for "a handwritten
                          digit"
    fd_real               the named ones' to the held-out images
    coverage, density, precision   of the named ones: see `coverage_density_precision`
    diversity             how far apart images of one digit lie, mean 1 − cosine, as a share of how
                          far held-out ones do
    class_tv              total variation between the digits' shares under "a handwritten digit",
                          here and among the teacher's
    accuracy              the share of the named ones that show what was asked for
    """
    named, unnamed = z.chunk(2)  # (500, 32) each
    teacher_named, teacher_unnamed = teacher.chunk(2)  # (500, 32) each
    z_real, digits = real()
    coverage, density, precision = coverage_density_precision(z_real, named)
    apart = pairwise(named, LABELS).mean() / pairwise(z_real, digits).mean()
    return {
        "fd": frechet(z, teacher),
        "fd_named": frechet(named, teacher_named),
        "fd_any": frechet(unnamed, teacher_unnamed),
        "fd_real": frechet(named, z_real),
        "coverage": coverage,
        "density": density,
        "precision": precision,
        "diversity": apart.item(),
        "class_tv": (shares(unnamed) - shares(teacher_unnamed)).abs().sum().item() / 2,
        "accuracy": (read(named) == LABELS).double().mean().item(),
    }


def coverage_density_precision(real, fake, k=5):
    """Three shares, by balls around each real point (N, D) to its k-th real neighbour.

    coverage   the share of balls that hold a fake point (Naeem et al. 2020)
    density    in how many balls a fake point lies, on average, divided by k (the same)
    precision  the share of fake points (M, D) that lie in a ball (Kynkäänniemi et al. 2019)
    """
    # (N,); the nearest neighbour of a point is the point itself.
    radius = torch.cdist(real, real).kthvalue(k + 1).values
    inside = torch.cdist(fake, real) < radius  # (M, N)
    coverage = inside.any(0).double().mean().item()
    density = inside.sum(1).double().mean().item() / k
    precision = inside.any(1).double().mean().item()
    return coverage, density, precision


def shares(z):
    """(10,) shares of the digits among images z (N, 32)."""
    return read(z).bincount(minlength=len(NAMES)) / len(z)
