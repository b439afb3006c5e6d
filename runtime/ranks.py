"""This process among the others, and networks that are sharded over all of them."""

import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime.settings import require


def world_size():
    """How many processes there are: plain python is one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_gpu():
    """The GPU of this process."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def gpu_memory():
    """Bytes of this process's GPU, or None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(own_gpu()).total_memory


class Ranks:
    """This process among the others; plain python is one rank of one.

    Batch sizes are global and split evenly.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = world_size()
        self.main = self.rank == 0
        cuda = torch.cuda.is_available()
        self.device = torch.device("cpu")
        if cuda:
            self.device = own_gpu()
            torch.cuda.set_device(self.device)
        # Of weights that are never trained.
        self.frozen_dtype = torch.bfloat16 if cuda else torch.float32
        # tqdm's `disable`; None: quiet when stderr is no terminal.
        self.no_bar = None if self.main else True
        self.mesh = None  # what networks are sharded over
        if self.world > 1:
            if not dist.is_initialized():
                # Longer than a shard or a big checkpoint takes. Where torchrun or a socket sees a
                # rank die, the others end at once.
                timeout = datetime.timedelta(minutes=30)
                dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
            self.mesh = init_device_mesh(self.device.type, (self.world,))
        # Same seed, same run: on CPUs bitwise; fused attention may differ.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False

    def mine(self, batch_size, accumulate=None, samples=None):
        """The numbers of this rank's samples in a global batch, a range for each micro-batch.

        Raises BadInput where that does not come out even: see micro_batches.
        """
        parts, each = micro_batches(batch_size, self.world, accumulate, samples)
        first = self.rank * (batch_size // self.world)
        return [range(first + i * each, first + (i + 1) * each) for i in range(parts)]

    def mean(self, tensor):
        """A tensor's mean over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def joined(self, tensor):
        """Every rank's tensor of this shape, (B, ...) each, one after another: (world·B, ...)."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def barrier(self):
        """Wait until every rank is here."""
        self.mean(torch.zeros(1, device=self.device)).item()

    def first(self, function):
        """What function() returns on rank 0, on every rank.

        If it raises, all end: rank 0 by that exception, the others silently.
        """
        problem = None
        try:
            box = [function() if self.main else None]
        except Exception as e:
            box = [SystemExit(1)]
            problem = e
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        if isinstance(box[0], SystemExit):
            raise problem or box[0]
        return box[0]


def micro_batches(batch_size, world, accumulate=None, samples=None):
    """(how many micro-batches a rank takes a batch in, how many samples are in each).

    There are `accumulate`, or as many as it takes for `samples` at a time, or one. Raises BadInput
    where that does not come out even.
    """
    wanted = f"{world} ranks"
    if accumulate:
        wanted += f" x --accumulate {accumulate}"
    elif samples and batch_size > world * samples:
        wanted += f" x --samples {samples}"
        accumulate = batch_size // (world * samples)
        even = world * accumulate * samples == batch_size
        require(even, f"--batch-size {batch_size}: no multiple of {wanted}")
    parts = world * (accumulate or 1)
    each = batch_size // parts
    even = each >= 1 and each * parts == batch_size
    require(even, f"--batch-size {batch_size}: no multiple of {wanted}")
    return accumulate or 1, each


def shard(module, units=(), mesh=None):
    """FSDP2: each rank of `mesh` keeps its part of every parameter. Without a mesh: nothing.

    Forward and backward gather the parameters of `module` unit by unit, in bf16 where the module
    computes in it, and gradients are averaged over the ranks in float32.
    """
    if mesh is None:
        return
    dtype = torch.bfloat16 if getattr(module, "bf16", False) else None
    # Inputs are not cast: a time in bf16 would be another time.
    how = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    # All is resharded at once, so that between passes parameters are always the sharded ones, whose
    # requires_grad `frozen` sets.
    for unit in (*units, module):
        fully_shard(unit, mesh=mesh, mp_policy=how, reshard_after_forward=True)
    # At its first forward FSDP settles what it will reduce: this one, before anything is `frozen`.
    module.forward = lambda: None
    module()
    del module.forward


def gather(tensors, keep=True):
    """{name: the whole of each tensor, on the CPU}.

    Every rank must call it, in the same order; only those that `keep` get any.
    """
    whole = {}
    for name, x in tensors.items():
        x = x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()
        if keep:
            whole[name] = x.cpu()
    return whole


def like(p, whole):
    """`whole` where p is, and sharded as p is."""
    whole = whole.detach().to(p.device)  # a copy of a parameter would be no leaf to distribute
    if isinstance(p, DTensor):
        return distribute_tensor(whole, p.device_mesh, p.placements)
    return whole


def assign(p, whole):
    """Set p, which may be sharded, to the tensor `whole`. Every rank must call it."""
    p.data.copy_(like(p.detach(), whole))
