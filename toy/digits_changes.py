"""What could make D follow, and adm.py has no flag for: changes of its code, among the levers."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import adm
from families import recipes
from models import Head2d, LatentDiscriminator
from ode import T

NONE = ""
EXACT = "damping by ∇D itself"
FREQUENCIES = (1, 2, 4, 8)  # of a time's sines and cosines
UPDATES = 4  # of the heads, on one set of maps


class TimedHead(Head2d):
    """The head of a map with further channels, as TimedDiscriminator makes it."""

    def __init__(self, channels, width):
        super().__init__(channels + 2 * len(FREQUENCIES), width)


class TimedDiscriminator(LatentDiscriminator):
    """The heads are told t, as further channels of each map: sines and cosines of πkt/T."""

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


class LateHead(Head2d):
    """Its convolutions have no stride: every position of the map is there until the pooling."""

    smallest = 1
    strided = (3, 1, 1)


class RememberingDiscriminator(LatentDiscriminator):
    """Keeps the last maps of x_fake, x_real, and what is near x_real and x_fake, in this order."""

    last = None  # the one that was called last
    seen = ()

    def features(self, x_t, t, cond):
        maps = super().features(x_t, t, cond)
        self.seen = (*self.seen[-3:], [h.detach() for h in maps])
        RememberingDiscriminator.last = self
        return maps


def step_repeated(optimizer, clip, once=adm.step):
    """adm.py's step; of the heads UPDATES of them, on one set of maps: no pass of the networks."""
    norm = once(optimizer, clip)
    discriminator = RememberingDiscriminator.last
    if optimizer.param_groups[0]["params"][0] is next(discriminator.heads.parameters()):
        for _ in range(UPDATES - 1):
            repeated_loss(discriminator).backward()
            once(optimizer, clip)
    return norm


def repeated_loss(discriminator):
    """adm_round's loss of D by the recipe for digits, on the maps that were seen last."""
    recipe = recipes.ADM["digits"]
    fake, real, near_real, near_fake = (discriminator.logits(maps) for maps in discriminator.seen)
    loss = adm.discriminator_loss(real, fake)
    for logits, moved in ((real, near_real), (fake, near_fake)):
        penalty = adm.damping_loss(logits, moved, recipe["damping_sigma"])
        loss = loss + recipe["damping"] * penalty
    return loss


def damping_exact(discriminator, cfg, draw, cond, s, judged):
    """adm.py's damping by ∇D itself, ½ E|∇D|², where adm.py has a difference in one direction."""
    loss = 0
    for x, _ in judged:
        x = x.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # attention whose gradient has a gradient
            logits = discriminator.logits(discriminator.features(x, s, cond))  # (B,)
            (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)  # (B, ...)
        loss = loss + cfg.damping * 0.5 * slope.flatten(1).square().sum(1).mean()
    return loss


# {name: {what: what that is inside `changed`}}
CHANGES = {
    NONE: {},
    "heads that are told t": {
        "models.Head2d": TimedHead,
        "adm.LatentDiscriminator": TimedDiscriminator,
    },
    "features normalised": {"adm.LatentDiscriminator": NormalisedDiscriminator},
    "heads that pool later": {"models.Head2d": LateHead},
    f"{UPDATES} updates of the heads on one set": {
        "adm.LatentDiscriminator": RememberingDiscriminator,
        "adm.step": step_repeated,
    },
    EXACT: {"adm.damping": damping_exact},
}


@contextmanager
def changed(name):
    """Inside, adm.py trains with this one of CHANGES."""
    with ExitStack() as stack:
        for what, other in CHANGES[name].items():
            stack.enter_context(patch(what, other))
        yield
