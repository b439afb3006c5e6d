"""From a loss to a step: gradients that add up, clipping, AdamW, the average.
"""


import torch
from torch.distributed.tensor import DTensor


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments are in main memory except while it steps: a network's are not beside another's, nor beside activations."""
    def place(self, on_device):
        for p, slots in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                own = slots[name].to_local() if isinstance(slots[name], DTensor) else slots[name]  # this rank's part
                own = own.to(p.device if on_device else "cpu")
                if on_device and isinstance(p, DTensor):
                    own = DTensor.from_local(own, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                slots[name] = own

    def step(self, closure=None):
        self.place(on_device=True)
        super().step(closure)
        self.place(on_device=False)

    def state_dict(self):
        self.place(on_device=True)
        state = super().state_dict()
        state["state"] = {i: dict(slots) for i, slots in state["state"].items()}  # these stay on the device, while they are in use
        self.place(on_device=False)
        return state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.place(on_device=False)


def make_optimizers(networks, rates, cfg):
    """{name: AdamW} of {name: {parameter's name: parameter}}, each with its own rate; β2 and decay as
    peers have them (ours)."""
    kind = OffloadedAdamW if cfg.offload else torch.optim.AdamW
    betas = (cfg.beta1, 0.999)
    return {name: kind(networks[name].values(), rates[name], betas, weight_decay=0.01, fused=True)
            for name in rates}


def backward(loss, accumulate=1):
    """Add the gradient of a micro-batch's `loss`, one of `accumulate`, to the others'; over the ranks it is averaged."""
    one = 0 * loss.detach() + 1  # NaN where the loss is not finite: then its whole gradient is NaN too, which `step` sees
    (loss / accumulate).backward(one)


def step(optimizer, clip):
    """Clip the gradient of this network's parameters, let AdamW step, leave no gradient behind. Returns the norm before clipping.

    Where a loss or gradient is not finite on some rank, the average tells all ranks, and none takes the step; the host is not asked.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    optimizer.found_inf = (~norm.isfinite()).to(torch.float32)  # 1: fused AdamW leaves weights and moments as they are
    optimizer.skipped.append(optimizer.found_inf)  # for Run.record
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def follow(average, parameters, decay):
    """An exponential moving average, in place and sharded as the parameters are: average ← decay · average + (1 − decay) · p."""
    for name, p in parameters.items():
        average[name].lerp_(p, 1 - decay)
