"""The Python half of the fake device: what torch asks of a GPU before a fake tensor is made.

`install` is for a process of its own, before diffusers or this project are imported.
"""

import types
from collections import Counter

import torch
import torch.distributed.fsdp._fully_shard._fsdp_init as fsdp_init
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
HALVES = (torch.bfloat16, torch.float16)
chosen = Counter()  # how often each kernel of attention was
OURS = torch.library.Library("aten", "IMPL", "CUDA")


def install():
    # FakeTensorMode makes no real tensor on the device, as in a build without CUDA. By itself it
    # asks torch.cuda.is_available.
    FakeTensorMode.avoid_device_init = True
    for name, value in ANSWERS.items():
        setattr(torch.cuda, name, value)
    # FSDP's last wait is of a stream in C++, which would take a Nothing for an event, and read what
    # is no memory of it: now and then that was an error.
    torch.accelerator.current_stream = ANSWERS["current_stream"]
    torch.Generator = Generator
    torch.Tensor.record_stream = lambda self, stream: None
    torch.nn.Module._apply = apply_by_slots
    for name in ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "ones_"):
        setattr(torch.nn.init, name, lambda x, *args, **kwargs: x)  # a fake has no values to set
    F.scaled_dot_product_attention = Attention(F.scaled_dot_product_attention)
    fsdp_init._get_managed_states = moved_first(fsdp_init._get_managed_states)
    # One kernel on a GPU. Where there is none for the device, torch makes it of eight.
    OURS.impl("silu_backward", lambda grad, x: torch.empty_like(x))


class Nothing:
    """A stream, or an event: nothing runs on it, nobody waits for it."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def nothing(self, *args):
        pass

    record = wait = wait_event = wait_stream = synchronize = nothing

    def record_event(self, *args):
        return Nothing()

    def query(self):
        return True

    def is_capturing(self):
        return False


PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, total_memory=80 * 10**9, multi_processor_count=132
)
ANSWERS = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,  # else a mesh of devices begins to initialise it
    "is_bf16_supported": lambda *args, **kwargs: True,
    "current_device": lambda: 0,
    "device_count": lambda: 8,
    "get_device_properties": lambda *args: PROPERTIES,
    "get_device_capability": lambda *args: (9, 0),
    "set_device": lambda device: None,
    "manual_seed_all": lambda seed: None,
    "Stream": Nothing,
    "Event": Nothing,
    "current_stream": lambda *args: Nothing(),
    "stream": lambda stream: Nothing(),
}


class Generator(torch.Generator):
    """On the CPU, whatever device is asked for; PLACES says which that was."""

    PLACES = {}  # {address of a generator: kind of device}

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        cls.PLACES[made._cdata] = torch.device(device).type
        return made


def apply_by_slots(self, change, recurse=True, made=None):
    """Module._apply, for .to() and .float(): torch's own swaps what fakes refer to weakly.

    made: {id of a parameter: (it, the new one)}, so that what modules share stays shared.
    """
    made = {} if made is None else made
    for child in self.children() if recurse else ():
        child._apply(change, True, made)
    for slots in (self._parameters, self._buffers):
        for name, old in slots.items():
            if old is None:
                continue
            if id(old) not in made:
                with torch.no_grad():
                    new = change(old)
                if new is not old and slots is self._parameters:
                    new = torch.nn.Parameter(new, old.requires_grad)
                made[id(old)] = old, new
            slots[name] = made[id(old)][1]
    return self


def set_by_slot(module, name, device, value=None, dtype=None, **options):
    """accelerate's set_module_tensor_to_device: that makes a tensor of the old one's class."""
    *path, slot = name.split(".")
    owner = module.get_submodule(".".join(path))
    value = value.to(device, dtype)
    if slot in owner._parameters:
        owner._parameters[slot] = torch.nn.Parameter(value, owner._parameters[slot].requires_grad)
    else:
        owner._buffers[slot] = value


def moved_first(managed_states):
    """FSDP moves a unit's tensors by setting .data, which fake tensors of two devices refuse."""

    def moved(modules, *args):
        made = {}
        for module in modules:
            module._apply(lambda x: x if x.is_meta else x.to(GPU), False, made)
        return managed_states(modules, *args)

    return moved


class Attention:
    """The kernels that CUDA would choose, flash or memory-efficient: this build knows neither."""

    def __init__(self, on_cpu):
        self.on_cpu = on_cpu

    def __call__(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        if query.device.type == "cpu":
            rest = (attn_mask, dropout_p, is_causal)
            return self.on_cpu(query, key, value, *rest, scale=scale, enable_gqa=enable_gqa)
        assert not enable_gqa
        if torch.is_autocast_enabled("cuda"):  # attention is on its list
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = (x.to(dtype) for x in (query, key, value))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
        assert query.dtype == key.dtype == value.dtype, "attention of several types"
        width = query.shape[-1]
        kind = "flash"
        if attn_mask is not None or query.dtype not in HALVES or width > 256:
            kind = "efficient"
        chosen[f"{kind} {query.dtype} {'masked' if attn_mask is not None else ''}".strip()] += 1
        if kind == "flash":
            options = (dropout_p, is_causal)
            return aten._scaled_dot_product_flash_attention(
                query, key, value, *options, scale=scale
            )[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        options = (attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, *options, scale=scale
        )[0]
