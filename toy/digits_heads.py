"""Discriminators that adm.py has no flag for: what could make D follow, tried in the levers."""

from contextlib import contextmanager

import torch

import adm
from models import Discriminator, Head2d, LatentDiscriminator
from ode import T

ORDINARY = ""
FREQUENCIES = (1, 2, 4, 8)  # of a time's sines and cosines


class TimedDiscriminator(LatentDiscriminator):
    """The heads are told t, as further channels of each map: sines and cosines of πkt/T."""

    def __init__(self, teacher, width=256, mesh=None):
        _, _, channels = teacher.family.taps(teacher.net)
        told = 2 * len(FREQUENCIES)
        heads = [Head2d(c + told, width) for c in channels]
        Discriminator.__init__(self, teacher, heads, mesh)

    def features(self, x_t, t, cond):
        angles = t[:, None] / T * torch.pi * torch.tensor(FREQUENCIES)  # (B, 4)
        time = torch.cat([angles.sin(), angles.cos()], 1)[:, :, None, None]  # (B, 8, 1, 1)
        maps = super().features(x_t, t, cond)
        return [torch.cat([h, time.expand(-1, -1, *h.shape[2:])], 1) for h in maps]


class NormalisedDiscriminator(LatentDiscriminator):
    """A map's channels are scaled to mean square 1, position by position, before the heads."""

    def features(self, x_t, t, cond):
        maps = super().features(x_t, t, cond)
        return [h / h.square().mean(1, keepdim=True).add(1e-6).sqrt() for h in maps]


DISCRIMINATORS = {
    ORDINARY: LatentDiscriminator,
    "heads that are told t": TimedDiscriminator,
    "features normalised": NormalisedDiscriminator,
}


@contextmanager
def discriminator_is(name):
    """Inside, adm.py trains this one of DISCRIMINATORS."""
    adm.LatentDiscriminator = DISCRIMINATORS[name]
    try:
        yield
    finally:
        adm.LatentDiscriminator = LatentDiscriminator
