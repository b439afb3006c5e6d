"""What an iteration does with the device: when the host waits for it, and what lies in its memory.

Memory is that of tensors' storages, each rounded up as CUDA's allocator does. What a kernel needs
while it runs, the allocator's fragmentation and CUDA's own context are not seen.
"""

import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from device import Generator
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default  # what x.device asks: more than half of all that comes here
REDUCES = (  # over the ranks
    torch.ops.c10d._reduce_scatter_base_,
    torch.ops.c10d.allreduce_,
    torch.ops._c10d_functional.reduce_scatter_tensor,
    torch.ops._c10d_functional.all_reduce,
)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
UNIT = 512  # of CUDA's allocator, in bytes
plain_resize = torch.UntypedStorage.resize_


class Watch(TorchDispatchMode):
    """A mode inside which FakeTensorMode does the work; it answers what that cannot: values, 0.

    Sizes that depend on values (nonzero, a boolean mask), for which the host would wait too, are
    an error of FakeTensorMode's: the run ends.
    """

    def __init__(self):
        super().__init__()
        self.live = {}  # {storage: (bytes, what sees its end)} on the device
        self.now = 0
        self.pinned = weakref.WeakSet()  # storages
        self.phases = ["begin"]  # innermost last
        self.rounds = []  # of each micro-batch: (what lay there before it, {phase: bytes})
        self.reduced = Counter()  # {phase, how and type of what is reduced over the ranks: times}
        self.clear()

    def clear(self):
        """Forget what has been; what is there stays."""
        self.peak = self.now
        self.peaks = Counter()  # {phase: bytes}
        self.waits = Counter()  # {how and where in the code: times}
        self.copies = Counter()  # those that need no waiting

    @contextmanager
    def phase(self, name):
        self.phases.append(name)
        try:
            self.seen()
            yield
        finally:
            self.phases.pop()

    def back_to(self, network):
        """Backward has come to what this network has made."""
        phase = self.phases[-1]
        if phase.startswith("backward"):
            self.phases[-1] = f"{phase.partition(', ')[0]}, {network}"

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its parts come here
        if op is DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            check_generator(op, args, kwargs)
        if op is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self.value_of(args[0])
        if op is aten.equal.default:
            return self.are_equal(*args)
        if op is aten.is_pinned.default:
            return args[0].untyped_storage() in self.pinned
        if op is aten._pin_memory.default:
            copy = args[0].clone()
            self.pinned.add(copy.untyped_storage())
            return copy
        out = op(*args, **kwargs)
        self.note_crossings(op, args, kwargs, out)
        for x in [out] if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(x, FakeTensor) and x.fake_device.type == "cuda":
                self.track(x.untyped_storage())
        return out

    # --- Waiting ----------------------------------------------------------------------------------

    def value_of(self, x):
        if x.device.type == "cuda":
            self.waits[f"value {where()}"] += 1
        if x.dtype == torch.bool:
            return False
        return 0.0 if x.is_floating_point() else 0

    def values_of(self, x):
        """x.tolist(): the host waits once for all of them."""
        if x.device.type == "cuda":
            self.waits[f"values {where()}"] += 1
        one = 0.0 if x.is_floating_point() else 0
        return nested(one, x.shape)

    def are_equal(self, x, y):
        if x.device.type == "cuda":
            self.waits[f"value {where()}"] += 1
        return x.shape == y.shape

    def note_crossings(self, op, args, kwargs, out):
        packet = op.overloadpacket
        if packet in REDUCES:
            kinds = {str(x.dtype) for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
            how = "all-reduce" if "all" in str(packet) else "reduce-scatter"
            self.reduced[f"{self.phases[-1].split(' ')[0]}: {how} {', '.join(sorted(kinds))}"] += 1
        if packet in INDEXED and args[0].device.type == "cuda":
            for index in tree_leaves(args[1]):
                if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.waits[f"size {where()}"] += 1
                elif isinstance(index, torch.Tensor) and index.device.type == "cpu":
                    self.waits[f"to the device {where()}"] += 1
        if op is aten._to_copy.default:
            self.note_copy(args[0], out, kwargs.get("non_blocking", False))
        if op is aten.copy_.default:
            self.note_copy(args[1], args[0], len(args) > 2 and args[2])

    def note_copy(self, source, target, non_blocking):
        kinds = (source.device.type, target.device.type)
        if kinds == ("cuda", "cpu"):
            free = non_blocking and target.untyped_storage() in self.pinned
            counted = self.copies if free else self.waits
            counted[f"to the host {where()}"] += 1
        if kinds == ("cpu", "cuda"):
            # From memory that is not pinned CUDA stages the copy, and the host waits for that.
            free = non_blocking and source.untyped_storage() in self.pinned
            counted = self.copies if free else self.waits
            counted[f"to the device {where()}"] += 1

    # --- Memory -----------------------------------------------------------------------------------

    def track(self, storage):
        key = storage._cdata
        if key in self.live:
            return
        size = rounded(storage.nbytes())
        end = weakref.ref(storage, lambda _: self.free(key))
        self.live[key] = (size, end)
        self.now += size
        self.seen()

    def free(self, key):
        size, _ = self.live.pop(key)
        self.now -= size

    def resize(self, storage, size):
        """storage.resize_(size): FSDP empties and fills what it gathers into."""
        done = plain_resize(storage, size)
        key = storage._cdata
        if key in self.live:
            before, end = self.live[key]
            after = rounded(storage.nbytes())
            self.live[key] = (after, end)
            self.now += after - before
            self.seen()
        return done

    def seen(self):
        self.peak = max(self.peak, self.now)
        phase = self.phases[-1]
        for peaks in (self.peaks, *[peaks for _, peaks in self.rounds[-1:]]):
            peaks[phase] = max(peaks[phase], self.now)


def rounded(size):
    return -(-size // UNIT) * UNIT


def nested(one, shape):
    if not shape:
        return one
    return [nested(one, shape[1:]) for _ in range(shape[0])]


def check_generator(op, args, kwargs):
    """Raises as CUDA does where a generator is of another device than what it fills."""
    found = Generator.PLACES.get(kwargs["generator"]._cdata)
    if found is None:  # not one that the project made
        return
    there = kwargs.get("device") or "cpu"
    if args and isinstance(args[0], torch.Tensor):
        there = args[0].device
    expected = torch.device(there).type
    if expected != found:
        message = f"Expected a '{expected}' device type for generator but found '{found}'"
        raise RuntimeError(f"{op}: {message}")


@cache
def room_of(filename):
    """Whose code this is: "torch", "harness", "project" or "other"."""
    path = Path(filename)
    if "torch" in path.parts:
        return "torch"
    if path.parent == HERE:
        return "harness"
    if ROOT in path.parents and ".venv" not in path.parts:
        return "project"
    return "other"


def lines_of(*rooms):
    """(file, line, function) of the calls that are under way in these rooms, innermost first."""
    frame = sys._getframe(1)
    while frame:
        code = frame.f_code
        if room_of(code.co_filename) in rooms:
            yield code.co_filename, frame.f_lineno, code.co_name
        frame = frame.f_back


def where():
    """The innermost line that is not torch's, and the project's that led to it."""
    lines = [next(lines_of("project", "other"), None), next(lines_of("project"), None)]
    named = [f"{Path(file).name}:{line} {name}" for file, line, name in filter(None, lines)]
    return " < ".join(dict.fromkeys(named)) or "backward"
