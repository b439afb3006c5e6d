"""What a training run needs of each GPU, and whether it fits, before anything is loaded."""

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import torch

from families import HUB, load_teacher, recipes
from runtime.ranks import gpu_memory, micro_batches, sharing, world_size
from runtime.settings import BadInput, require
from sizing.count import COLUMNS, build, flops, part, states
from sizing.measure import (
    MB,
    RANKS,
    Row,
    along,
    blocks_of,
    hub_name,
    size_of,
    table,
    training_row,
    typed,
)

FLOAT32 = 4  # bytes
GPUS = (1, 2, 4, 8, 16, 32, 64)
NODE = 8  # GPUs of one, as most have them


# What a rehearsal does not see, in bytes. CUDA's own context and its kernels' code: half a gigabyte
# (ours, as nvidia-smi shows of a process that has done nothing yet). Workspaces: cuBLAS has 32 MB
# (CUBLAS_WORKSPACE_CONFIG in runtime/ranks.py), cuDNN's convolutions and NCCL what they ask for, a
# gigabyte (ours). What the allocator cannot use, between tensors: a twentieth (ours). Nobody has
# measured them with this code: tools/first_hour_on_a_gpu.sh will.
CONTEXT = 500 * MB
WORKSPACE = 1000 * MB
FRAGMENTED = 0.05


@dataclass
class Plan:
    """Bytes on each GPU. `rows` are those of sizing.count.states."""

    rows: dict  # {role: {"parameters": number, "weights" ...: bytes}}
    phases: dict  # {phase: bytes of all tensors at its peak}
    measured: bool  # else passes are not in the phases: nobody has rehearsed them
    loading: int = 0  # of main memory, while all ranks of one node load
    latent: tuple = ()  # the shape of one
    each: int = 1  # samples at a time
    accumulate: int = 1  # micro-batches

    @property
    def total(self):
        """{column: sum over the rows}."""
        columns = ("parameters", *COLUMNS)
        return {c: sum(row.get(c, 0) for row in self.rows.values()) for c in columns}

    @property
    def peak(self):
        """(bytes, the phase that they are needed in)."""
        phase = max(self.phases, key=self.phases.get)
        return self.phases[phase], phase

    @property
    def needed(self):
        """Bytes of a GPU: the peak, and what no rehearsal sees."""
        return CONTEXT + WORKSPACE + self.peak[0] * (1 + FRAGMENTED)

    def fits(self, gpu_bytes):
        """Whether it does; None where it hangs on passes that nobody has rehearsed."""
        if self.needed > gpu_bytes:
            return False
        return True if self.measured else None


def plan_of(cfg, world, latent=None, measure=None):
    """The Plan of adm.py or adp.py with these settings on `world` GPUs.

    latent: the shape of one, by default as --resolution and --frames say, or the model's own.
    measure(row): rehearses a Row that the table has not; by default the plan is without its passes.
    Nothing is loaded or fetched. Raises BadInput for settings that cannot be.
    """
    family = opened(cfg.model)
    own = family.latent_shape(cfg.resolution, cfg.frames)
    latent = tuple(latent or own)
    same_kind = len(latent) == len(own) and latent[-3] == own[-3]
    require(same_kind, f"latents of shape {latent} are not {cfg.model}'s")
    together = sharing(world, cfg.shard_ranks)
    accumulate, each = micro_batches(cfg.batch_size, world, cfg.accumulate, cfg.samples)
    parts = built(cfg.model, tuple((n, getattr(cfg, n)) for n in OF_NETWORKS if hasattr(cfg, n)))
    live = family.text_encoders() if cfg.embed == "live" else ()
    rows = states(parts, cfg, together, live)
    always, gradients, largest = held(rows, cfg.offload)

    which = of_model(family, latent)
    passes = figures(training_row(cfg, which, each, world), measure)
    # Gradients of earlier micro-batches are there from the start; otherwise they come as backward
    # goes on, each rank's part of them: in the rehearsal, of RANKS.
    more = gradients
    if accumulate == 1 and world > 1:
        _, of_rehearsal, _ = held(states(parts, cfg, RANKS), cfg.offload)
        more = max(0, gradients - of_rehearsal)
    elif accumulate == 1:
        more = 0
    phases = {}
    for phase, (less, deeper) in passes.items():
        nth = 0 if accumulate == 1 else 1
        size = along(family.config, blocks_of(family.config), less[nth], deeper[nth])
        phases[phase] = always + more + MB * size
    phases["updates"] = always + gradients + largest
    picture = figures(Row("decode", which, ""), measure) if cfg.sample_every else {}
    for ((size,),) in picture.values():
        phases["picture"] = always + MB * size
    loading = 0
    if world > 1:  # see Family.load: files are mapped, and ranks read their rows
        most = max(row["parameters"] for row in rows.values())
        loading = FLOAT32 * most * (world if cfg.random_init else 1)
    return Plan(rows, phases, bool(passes), loading, latent, each, accumulate)


def held(rows, offload):
    """Bytes of (what is there all the time, all gradients, moments that come for an update)."""
    total = {c: sum(row.get(c, 0) for row in rows.values()) for c in COLUMNS}
    always = total["weights"] + total["ema"]
    if offload:
        return always, total["gradients"], max(row.get("moments", 0) for row in rows.values())
    return always + total["moments"], total["gradients"], 0


def figures(row, measure=None):
    """{phase: MB at each depth} of a Row: the table's, else by measure(row), else none."""
    if not row.which:
        return {}
    if str(row) in table():
        return table()[str(row)]
    return measure(row) if measure else {}


def of_model(family, latent=None):
    """The words that name this denoiser among the hub's, and latents of this shape; "" if none."""
    name = hub_name(family)
    return typed({"model": name, **size_of(family, latent)}) if name else ""


# The settings that networks depend on.
OF_NETWORKS = (
    *("loss", "lora_rank", "head_width", "gradient_checkpointing"),
    *("fake_gradient", "pixel", "pixel_backbone"),
)


@cache
def opened(model):
    """The Family of a model, of which nothing is fetched."""
    return load_teacher(model, random_init=model in HUB)


@cache
def built(model, settings):
    """The Parts of a stage, once for all numbers of GPUs."""
    return build(opened(model), SimpleNamespace(**dict(settings)))


def plan_of_pairs(cfg, measure=None):
    """The Plan of `data.py pairs` on each GPU: the teacher alone."""
    family = opened(cfg.model)
    latent = family.latent_shape(cfg.resolution, cfg.frames)
    net = family.network("meta", torch.bfloat16)
    tensors = [*net.parameters(), *net.buffers()]
    weights = sum(x.nbytes for x in tensors)
    count = sum(p.numel() for p in net.parameters())
    row = Row("pairs", of_model(family, latent), f"--batch-size {cfg.batch_size}")
    passes = figures(row, measure)
    phases = {"weights": weights}
    phases |= {phase: weights + MB * n for phase, ((n,),) in passes.items()}
    rows = {"teacher": {"parameters": count, "weights": weights}}
    return Plan(rows, phases, bool(passes), latent=latent, each=cfg.batch_size)


def plan_of_encoding(cfg, measure=None):
    """The Plan of `data.py encode` on each GPU: the text encoders, whole."""
    family = opened(cfg.model)
    rows = {}
    for number, encoder in enumerate(family.text_encoders(), 1):
        own = list(encoder.parameters())
        size = {"parameters": sum(p.numel() for p in own), "weights": part(own, 1)}
        rows[f"encoder {number}"] = size
    row = Row("encode", of_model(family), f"--batch-size {cfg.batch_size}")
    passes = figures(row, measure)
    phases = {"weights": sum(size["weights"] for size in rows.values())}
    phases |= {phase: MB * n for phase, ((n,),) in passes.items()}
    return Plan(rows, phases, bool(passes), each=cfg.batch_size)


def work_of(cfg):
    """({what runs: FLOPs of a sample in a mean iteration}, those of one pass of the teacher).

    Warm-up, --damping and --fake-samples last are not counted. It takes a minute at full size.
    """
    family = opened(cfg.model)
    latent = family.latent_shape(cfg.resolution, cfg.frames)
    guidance = family.guidance if cfg.guidance is None else cfg.guidance
    once = flops(family, build(family, cfg), cfg, latent, guidance != 1)
    if "regression" in once:
        share = min(1.0, cfg.mse_iterations / cfg.iterations) if cfg.loss == "adp" else 1.0
        often = {"teacher": 0, "regression": share, "generator": 1 - share}
        often["discriminator"] = 1 - share
    else:
        steps = cfg.student_steps or family.student_steps
        rounds = cfg.ttur  # further ones are new samples of the student
        before = rounds * (steps - 1) / 2 + rounds - 1
        often = {"step before": before, "generator": 1, "discriminator": rounds}
        often |= {"fake score": rounds, "teacher": rounds if cfg.loss == "adm" else 1}
    return {name: n * often[name] for name, n in once.items() if often[name]}, once["teacher"]


def checkpoint_bytes(plan):
    """Of one on disk: what is trained, its moments and the average, whole."""
    trained = [row["parameters"] for row in plan.rows.values() if "moments" in row]
    size = 3 * FLOAT32 * sum(trained)
    if plan.total["ema"]:
        size += FLOAT32 * plan.rows["student"]["parameters"]
    return size


# --- What would make it fit -----------------------------------------------------------------------


def remedies(cfg, world):
    """Settings that need less memory, as {name: value}, the least costly first.

    Sharding over all ranks costs traffic between nodes, recomputing a third more time, fewer
    samples at a time some speed, moments in main memory their way there and back; LoRA trains
    other parameters; without pixels ADP has one adversary.
    """
    less = {}
    if cfg.shard_ranks and cfg.shard_ranks < world:
        less = {"shard_ranks": world}
        yield less
    if not cfg.gradient_checkpointing:
        less = {**less, "gradient_checkpointing": True}
        yield less
    _, each = micro_batches(cfg.batch_size, world, cfg.accumulate, cfg.samples)
    if each > 1:
        least = {"accumulate": cfg.batch_size // world} if cfg.accumulate else {"samples": 1}
        less = {**less, **least}
        yield less
    if not cfg.offload:
        less = {**less, "offload": True}
        yield less
    if not cfg.lora_rank and cfg.init == "teacher":  # an earlier run's student has its own rank
        less = {**less, **(recipes.ADM_LORA if hasattr(cfg, "lr_fake") else recipes.LORA)}
        yield {**less, "offload": cfg.offload}
        yield less
    if getattr(cfg, "pixel", False):
        yield {**less, "pixel": False}


class Unrehearsed(BadInput):
    """Nothing is known to fit, and what some settings need is not known."""


def unrehearsed(cfg, flags, latent):
    """The Unrehearsed that names the command which would know: tools/plan.py with these flags."""
    family = opened(cfg.model)
    if not of_model(family):
        why = f"passes of {cfg.model} cannot be: a rehearsal knows the hub's models alone"
        return Unrehearsed(f"nothing that has been rehearsed fits, and {why}")
    stage = "adm" if hasattr(cfg, "lr_fake") else "adp"
    words = f"{flags} {typed(size_of(family, latent))}".strip()
    command = f"`python tools/plan.py {stage} {words}` with this run's flags"
    return Unrehearsed(f"nothing that has been rehearsed fits: {command} rehearses the others")


def cheapest(cfg, world, gpu_bytes, latent=None, measure=None):
    """(flags with which it fits, as they are typed; its Plan), or (None, None).

    Without `measure`, of settings that are in the table. Raises Unrehearsed as first_fit.
    """
    changed, plan = first_fit(cfg, remedies(cfg, world), world, gpu_bytes, latent, measure)
    return (typed(changed), plan) if plan else (None, None)


def fitting(cfg, world, gpu_bytes, measure=None):
    """{setting that changes: value} with which cfg costs least and fits, or None.

    What cfg itself saves memory with is taken back first, sharding beyond a node too, but for LoRA,
    which trains other parameters. Raises Unrehearsed as first_fit.
    """
    free = {"gradient_checkpointing": False, "offload": False}
    cfg = replace(cfg, shard_ranks=cfg.shard_ranks or world)
    if cfg.shard_ranks > NODE and world % NODE == 0:
        free["shard_ranks"] = NODE
    remedied = remedies(replace(cfg, **free), world)
    changes = ({**free, **less} for less in ({}, *remedied))
    changed, _ = first_fit(cfg, changes, world, gpu_bytes, measure=measure)
    return changed


def first_fit(cfg, changes, world, gpu_bytes, latent=None, measure=None):
    """(what differs from cfg, its Plan) of the first of changes, {name: value} each, that fits.

    (None, None) where none does. Raises Unrehearsed where that is not known of all.
    """
    unknown = False
    for settings in changes:
        plan = plan_of(replace(cfg, **settings), world, latent, measure)
        fits = plan.fits(gpu_bytes)
        if fits:
            changed = {name: v for name, v in settings.items() if v != getattr(cfg, name)}
            return changed, plan
        unknown |= fits is None
    if unknown:
        raise unrehearsed(cfg, f"--fit --world-size {world} --gpu-gb {gpu_bytes / 1e9:.4g}", latent)
    return None, None


def enough_gpus(cfg, world, gpu_bytes, latent=None):
    """The least number of GPUs among GPUS, above `world`, on which cfg fits, or None.

    Raises Unrehearsed where that is not known of all.
    """
    unknown = None
    for more in GPUS:
        if more <= world:
            continue
        try:
            plan = plan_of(cfg, more, latent)
        except BadInput:
            continue  # the batch does not come out even
        fits = plan.fits(gpu_bytes)
        if fits:
            return more
        if fits is None:
            unknown = unknown or more
    if unknown:
        raise unrehearsed(cfg, f"--world-size {unknown}", latent)
    return None


def advice(cfg, world, gpu_bytes, latent=None, measure=None):
    """What would make cfg fit, in words: flags, or else more GPUs; or who would know."""
    unknown = more = None
    try:
        flags, smaller = cheapest(cfg, world, gpu_bytes, latent, measure)
        if flags:
            return f"in {gb(smaller.peak[0])} GB it fits with {flags}"
    except Unrehearsed as e:
        unknown = e
    try:
        more = enough_gpus(cfg, world, gpu_bytes, latent)
    except Unrehearsed as e:
        unknown = unknown or e
    said = str(unknown or "no flag makes it fit")
    return f"{said}; on {more} GPUs it fits" if more else said


def must_fit(cfg, latent=None):
    """Raises BadInput where a run cannot fit its GPU: the plan's figures, and what would make it.

    latent: the shape of one, if it is known. On a CPU there is nothing to refuse.
    """
    memory = gpu_memory()
    if memory is not None:
        refuse_what_does_not_fit(cfg, world_size(), memory, latent)


def refuse_what_does_not_fit(cfg, world, gpu_bytes, latent=None):
    """Raises BadInput where the plan of cfg on `world` GPUs needs more than gpu_bytes of each."""
    plan = plan_of(cfg, world, latent)
    peak, phase = plan.peak
    if peak <= gpu_bytes:  # the allowances are no reason to refuse
        return
    total = plan.total
    there = ", ".join(f"{name} {gb(total[name])}" for name in COLUMNS if total[name])
    raise BadInput(
        f"{cfg.model} needs {gb(peak)} GB of each of {world} GPU(s) with {gb(gpu_bytes)} "
        f"(planned, {phase}; {there}): {advice(cfg, world, gpu_bytes, latent)}"
    )


def gb(size):
    return f"{size / 1e9:.2f}"
