"""This process among the others, and networks that are sharded over them."""

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

    Batch sizes are global and split evenly. Networks are sharded over all ranks, or over each group
    of shard_ranks neighbours. Raises BadInput where that does not come out even.
    """

    def __init__(self, shard_ranks=None):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = world_size()
        self.main = self.rank == 0
        self.sharing = sharing(self.world, shard_ranks)  # how many ranks hold a network together
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
                # Longer than a shard of pairs or a rank's rows of a checkpoint take. Where torchrun
                # or a socket sees a rank die, the others end at once.
                timeout = datetime.timedelta(minutes=30)
                dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
            self.mesh = mesh_of(self.device.type, self.world, self.sharing)
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

    def each(self, function):
        """[what function() returns on each rank], on every rank.

        If it raises on some, all end: the first of them by its exception, the others silently.
        """
        problem = None
        try:
            mine = function()
        except Exception as e:
            mine, problem = SystemExit(1), e
        found = [mine]
        if self.world > 1:
            found = [None] * self.world
            dist.all_gather_object(found, mine)
        failed = [rank for rank, what in enumerate(found) if isinstance(what, SystemExit)]
        if failed and failed[0] == self.rank:
            raise problem
        if failed:
            raise SystemExit(1)
        return found

    def first(self, function):
        """What function() returns on rank 0, on every rank. If it raises, all end as in `each`."""
        return self.each(lambda: function() if self.main else None)[0]


def sharing(world, shard_ranks=None):
    """How many ranks hold a network together: shard_ranks, or all `world` of them.

    Raises BadInput where the ranks do not come out even.
    """
    size = shard_ranks or world
    require(
        world % size == 0, f"--shard-ranks {size}: does not divide the number of ranks, {world}"
    )
    return size


def mesh_of(kind, world, sharing):
    """All ranks, as devices of a kind, in groups of `sharing` neighbours: 1-D if one group is all.

    Otherwise (groups, ranks of a group): FSDP2 shards over the last dimension, replicates over the
    first.
    """
    if sharing == world:
        return init_device_mesh(kind, (world,))
    shape = (world // sharing, sharing)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


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


def shard(module, units=(), mesh=None, fill=None):
    """FSDP2: each rank of `mesh` keeps its part of every parameter. Without a mesh it stays whole.

    On a mesh of mesh_of(...) with several groups, each group has a copy in parts. Forward and
    backward gather the parameters of `module` unit by unit, in bf16 where the module computes in
    it, and gradients are averaged over all ranks in float32.

    fill(): gives parameters that are on the meta device their storage, once they are in parts.
    """
    if mesh is None:
        if fill:
            fill()
        return
    dtype = torch.bfloat16 if getattr(module, "bf16", False) else None
    # Inputs are not cast: a time in bf16 would be another time.
    how = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    # All is resharded at once, so that between passes parameters are always the sharded ones, whose
    # requires_grad `frozen` sets.
    for unit in (*units, module):
        fully_shard(unit, mesh=mesh, mp_policy=how, reshard_after_forward=True)
    if fill:
        fill()
    # At its first forward FSDP settles what it will reduce: this one, before anything is `frozen`.
    module.forward = lambda: None
    module()
    del module.forward


def own(x):
    """This rank's rows of a tensor: all of them where it is not sharded."""
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def own_rows(x):
    """Which rows of a tensor `own` are, a range; None where it is not sharded: all of them."""
    if not isinstance(x, DTensor):
        return None
    among = x.device_mesh.ndim - 1  # the dimension that shards: see mesh_of
    each = -(-len(x) // x.device_mesh.size(among))  # rounded up, as FSDP cuts
    first = min(x.device_mesh.get_local_rank(among) * each, len(x))
    return range(first, min(first + each, len(x)))


def in_parts(p, rows):
    """A tensor of p's shape, sharded as p is and where p is, of which this rank has these rows.

    They are copied from pinned memory without waiting.
    """
    rows = rows.to(p.device, non_blocking=True)
    if not isinstance(p, DTensor):
        return rows
    layout = {"shape": p.shape, "stride": p.stride()}
    return DTensor.from_local(rows, p.device_mesh, p.placements, **layout)


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
    """`whole`, which every rank has, where p is and sharded as p is."""
    whole = whole.detach().to(p.device)  # a copy of a parameter would be no leaf to distribute
    if isinstance(p, DTensor):
        # Nothing is sent: each rank cuts its own rows out.
        return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    return whole


def assign(p, whole):
    """Set p, which may be sharded, to the tensor `whole`, which every rank has."""
    p.data.copy_(like(p.detach(), whole))
