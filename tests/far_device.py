"""python tests/far_device.py runs.json: runs on a device that is this CPU by another name.

Its tensors know that they are not in main memory, so that every crossing is seen, by whatever code
it is made. As on CUDA the host waits for the device where it reads a value or a number of values,
and where it copies between it and ordinary memory; not between it and pinned memory without
blocking. What the CPU does with its own tensors is not counted.

runs.json: [[stage, {field of its Config: value}], ...], for the scripts' own main functions. Beside
each run's files: crossings.json, for each iteration {"waits": [where in the code, ...],
"copies" (those that need no waiting): [...]}.
"""

import inspect
import json
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import diffusers
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import adm
import adp
import runtime.folder
import runtime.ranks

aten = torch.ops.aten
RETURNS_NUMBERS = {aten._local_scalar_dense.default, aten.equal.default}
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
seen = {"waits": [], "copies": []}
pinned = set()  # ids of tensors in pinned memory
kept = []  # these tensors, so that no id comes twice


class Far(torch.Tensor):
    """A tensor of the device; `near` has its values."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device="far:0",
        )

    def __init__(self, near):
        self.near = near

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})

    def tolist(self):  # torch has none for a subclass
        return self.cpu().tolist()


class Watch(TorchDispatchMode):
    """Inside, every operation passes through `compute`."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})


def compute(op, args, kwargs):
    """One operation of torch, wherever its tensors are. What it changes stays the same object."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far = {id(x.near): x for x in tensors if isinstance(x, Far)}
    goes_there = goes_to_the_device(op, args, kwargs, far)
    if not far and not goes_there:
        return op(*args, **kwargs)

    near = [x for x in tensors if not isinstance(x, Far)]
    by_mask = op == aten.index.Tensor and any(x.dtype == torch.bool for x in tensors[1:])
    reads = op in RETURNS_NUMBERS or op in SIZED_BY_VALUES or by_mask
    asked = args[2:] if op == aten.copy_.default else (kwargs.get("non_blocking"),)
    without_blocking = any(asked)
    free = without_blocking and all(id(x) in pinned for x in near)
    if far and (reads or not goes_there):
        note("copies" if free and near else "waits")
    if near and goes_there:
        note("copies" if free else "waits")

    near_args, near_kwargs = tree_map_only(Far, lambda x: x.near, (args, kwargs))
    if kwargs.get("device") is not None:
        near_kwargs["device"] = torch.device("cpu")
    out = op(*near_args, **near_kwargs)
    if not goes_there or op in RETURNS_NUMBERS:
        return out
    return tree_map_only(torch.Tensor, lambda x: far[id(x)] if id(x) in far else Far(x), out)


def goes_to_the_device(op, args, kwargs, far):
    """Whether the operation's result is on the device; far: its arguments that are."""
    if op == aten.copy_.default:
        return isinstance(args[0], Far)
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == "far"
    return bool(far)


def note(kind):
    """Where in the code that was: the innermost lines that are neither torch's nor this file's."""
    places = []
    for frame, line in traceback.walk_stack(inspect.currentframe()):
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path != Path(__file__):
            places.append(f"{path.name}:{line} {frame.f_code.co_name}")
    seen[kind].append(" < ".join(places[:3]))


def pin(x):
    """Tensor.pin_memory: a copy that counts as pinned."""
    copy = x.clone()
    pinned.add(id(copy))
    kept.append(copy)
    return copy


class Generator(torch.Generator):
    """Of the device, too: the numbers are drawn on the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def copy_from(near, far, non_blocking=False):
    """What is left of torch.tensor(numbers, device=far) when it comes to a device."""
    note("waits")
    far.near.copy_(near)
    return far


def make_the_device():
    """torch knows the device `far`, and Ranks runs on it. Returns what must be kept as long."""
    _setup_privateuseone_for_python_backend("far")
    library = torch.library.Library("aten", "IMPL")
    for op in (aten.empty.memory_format, aten.empty_strided.default):
        name = op._name.removeprefix("aten::")
        library.impl(name, lambda *args, op=op, **kwargs: compute(op, args, kwargs), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    torch.Generator = Generator
    torch.Tensor.pin_memory = pin
    begin = runtime.ranks.Ranks.__init__

    def begin_far(ranks, *args):
        begin(ranks, *args)
        ranks.device = torch.device("far", 0)

    runtime.ranks.Ranks.__init__ = begin_far
    return library


def main(path):
    """The runs of runs.json, one after the other."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    library = make_the_device()  # kept: its implementations would go with it
    iterations = []
    record = runtime.folder.Run.record

    def spy_record(*args):
        record(*args)
        iterations.append({kind: list(where) for kind, where in seen.items()})
        for where in seen.values():
            where.clear()

    runtime.folder.Run.record = spy_record
    for stage, config in json.loads(Path(path).read_text()):
        iterations.clear()
        module = {"adm": adm, "adp": adp}[stage]
        with Watch():
            module.main(module.Config(**config))
        (Path(config["out"]) / "crossings.json").write_text(json.dumps(iterations))
    library._destroy()


if __name__ == "__main__":
    main(sys.argv[1])
