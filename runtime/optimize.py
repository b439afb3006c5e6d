"""From a loss to a step: gradients that add up, clipping, AdamW, the average."""

from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from runtime.ranks import in_parts, own


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments are in main memory except while it steps.

    A network's moments are then not beside another's, nor beside activations (ours). That memory is
    pinned, and the host never waits: what comes later on the device's stream finds each copy done.
    CUDA rounds pinned tensors up to powers of two, so that they take up to twice their size.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.homes = {}  # {(parameter, "exp_avg" or "exp_avg_sq"): this rank's rows}

    def fetch(self):
        for p, slots in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                slots[name] = in_parts(p, slots[name])

    def put_away(self):
        for p, slots in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moment = own(slots[name])
                if (p, name) not in self.homes:
                    home = torch.empty_like(moment, device="cpu")
                    on_device = moment.device.type != "cpu"
                    self.homes[p, name] = home.pin_memory() if on_device else home
                slots[name] = self.homes[p, name]
                slots[name].copy_(moment, non_blocking=True)

    def step(self, closure=None):
        self.fetch()
        super().step(closure)
        self.put_away()

    def state_dict(self):
        self.fetch()
        state = super().state_dict()
        # The copies' moments stay on the device, while they are in use.
        state["state"] = {i: dict(slots) for i, slots in state["state"].items()}
        self.put_away()
        return state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.put_away()


def make_optimizers(networks, rates, cfg):
    """{name: AdamW} of {name: {parameter's name: parameter}}, each with its own rate.

    β2 and decay as peers have them (ours).
    """
    kind = OffloadedAdamW if cfg.offload else torch.optim.AdamW
    betas = (cfg.beta1, 0.999)
    optimizers = {}
    for name, rate in rates.items():
        parameters = networks[name].values()
        optimizers[name] = kind(parameters, rate, betas, weight_decay=0.01, fused=True)
    return optimizers


def backward(loss, accumulate=1):
    """Add the gradient of a micro-batch's `loss`, one of `accumulate`, to the others'.

    The loss is a scalar. Over the ranks the gradient is averaged.
    """
    # NaN where the loss is not finite: then its whole gradient is NaN too, which `step` sees.
    one = 0 * loss.detach() + 1  # ()
    (loss / accumulate).backward(one)


def step(optimizer, clip):
    """Clip the gradient of this network's parameters, let AdamW step, leave no gradient behind.

    Returns the norm before clipping, (). Where a loss or gradient is not finite on some rank, the
    average tells all ranks, and none takes the step; the host is not asked.
    """
    parameters = []
    for group in optimizer.param_groups:
        parameters += [p for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)  # ()
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    # 1 where the norm is not finite: fused AdamW then leaves weights and moments as they are.
    optimizer.found_inf = (~norm.isfinite()).to(torch.float32)  # ()
    optimizer.skipped.append(optimizer.found_inf)  # for Run.record
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def follow(average, parameters, decay):
    """An exponential moving average, in place: average ← decay · average + (1 − decay) · p.

    Both are {name: tensor} of the same shapes, the average sharded as the parameters are.
    """
    for name, p in parameters.items():
        average[name].lerp_(p, 1 - decay)


@contextmanager
def exchanged(average, parameters):
    """Inside, the parameters have the average's values, and the average theirs.

    Both as for `follow`. Tensor by tensor: what it costs beside the two is a copy of the largest
    tensor's part on this rank, and reading and writing both twice. Bit for bit as before after it.
    """

    def exchange():
        for name, p in parameters.items():
            kept = p.detach().clone()
            p.data.copy_(average[name])
            average[name].copy_(kept)

    with torch.no_grad():
        exchange()
        try:
            yield
        finally:
            exchange()
