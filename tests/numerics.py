"""A CPU that computes in bf16 as a GPU does: its autocast keeps float32 where CUDA's does.

Which operations those are, torch's own header says, in the version that is installed.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.utils._pytree import tree_map_only

from runtime.ranks import Ranks

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
LISTS = ("FP32", "FP32_SET_OPT_DTYPE", "DIFFERENT_REDISPATCH_SIGNATURE")
AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU)


def float32_on_cuda():
    """The names of the operations that CUDA's autocast runs in float32: "exp", "softmax.int"."""
    names = []
    for which in LISTS:
        macro = rf"#define AT_FORALL_{which}\(_\)(.*?)\n\n"
        said = re.search(macro, HEADER.read_text(), re.DOTALL)[1]
        if which == LISTS[-1]:
            names += re.findall(r'"([\w.]+)"', said)
        else:
            names += [name.replace(", ", ".") for name in re.findall(r"_\(([\w, ]+)\)", said)]
    return names


def in_float32(x):
    return x.float() if x.dtype == torch.bfloat16 else x


def kernel(name):
    """What autocast does with this operation on CUDA: its inputs become float32."""
    base, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, base), overload or "default")

    def run(*args, **kwargs):
        with _ExcludeDispatchKeyGuard(AUTOCAST):
            args, kwargs = tree_map_only(torch.Tensor, in_float32, (args, kwargs))
            return operation(*args, **kwargs)

    return run


@contextmanager
def autocast_as_on_cuda():
    """Inside, a CPU's bf16 autocast keeps float32 where CUDA's does."""
    added = torch.library.Library("aten", "IMPL", "AutocastCPU")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        for name in float32_on_cuda():
            if not has(f"aten::{name}", "AutocastCPU"):  # others a CPU runs in float32 itself
                added.impl(name, kernel(name))
        yield
    finally:
        added._destroy()


class RanksOfGpus(Ranks):
    """On a CPU, but what is never trained is held as on a GPU."""

    def __init__(self, shard_ranks=None):
        super().__init__(shard_ranks)
        self.frozen_dtype = torch.bfloat16
