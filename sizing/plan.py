"""What a training run needs of each GPU, and whether it fits, before anything is loaded."""

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

from families import HUB, load_teacher, recipes
from runtime.ranks import gpu_memory, micro_batches, sharing, world_size
from runtime.settings import BadInput, flag, require
from sizing.count import COLUMNS, activations, build, copies, flops, gathered, states

FLOAT32 = 4  # bytes
GPUS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Plan:
    """Bytes on each GPU. `rows` are those of sizing.count.states, `phases` of an iteration."""

    rows: dict  # {role: {"parameters": number, "weights" ...: bytes}}
    waiting: dict  # {phase: {network: bytes of its activations}}
    again: dict  # {network: bytes of one block that checkpointing recomputes}
    phases: dict  # {phase: bytes, all that is there at its peak}
    gathered: int  # in them, of weights, for a pass
    loading: int  # of main memory, while all ranks of one node load
    latent: tuple  # the shape of one
    each: int  # samples at a time
    accumulate: int  # micro-batches

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


def plan_of(cfg, world, latent=None):
    """The Plan of adm.py or adp.py with these settings on `world` GPUs.

    latent: the shape of one, by default as --resolution and --frames say, or the model's own.
    Nothing is loaded or fetched. Raises BadInput for settings that cannot be.
    """
    family = opened(cfg.model)
    own = family.latent_shape(cfg.resolution, cfg.frames)
    latent = latent or own
    same_kind = len(latent) == len(own) and latent[-3] == own[-3]
    require(same_kind, f"latents of shape {tuple(latent)} are not {cfg.model}'s")
    together = sharing(world, cfg.shard_ranks)
    accumulate, each = micro_batches(cfg.batch_size, world, cfg.accumulate, cfg.samples)
    settings = [(name, getattr(cfg, name)) for name in OF_NETWORKS if hasattr(cfg, name)]
    parts, waiting, again = counted(cfg.model, latent, each, tuple(settings))
    live = family.text_encoders() if cfg.embed == "live" else ()
    rows = states(parts, cfg, together, live)
    of_pass = gathered(family, parts.student.net, world)
    phases = peaks(cfg, rows, waiting, again, of_pass, world, accumulate)
    largest = max(row["parameters"] for row in rows.values())
    loading = 0
    if world > 1:  # see Family.load: files are mapped, and ranks read their rows
        loading = FLOAT32 * largest * (world if cfg.random_init else 1)
    return Plan(rows, waiting, again, phases, of_pass, loading, latent, each, accumulate)


# The settings that networks and their activations depend on.
OF_NETWORKS = (
    "loss",
    "lora_rank",
    "head_width",
    "gradient_checkpointing",
    "fake_gradient",
    "pixel",
    "pixel_backbone",
)


@cache
def opened(model):
    """The Family of a model, of which nothing is fetched."""
    return load_teacher(model, random_init=model in HUB)


@cache
def counted(model, latent, each, settings):
    """(the Parts, their activations, those of a block), for `each` samples at a time.

    Once for all numbers of GPUs: it takes seconds.
    """
    cfg = SimpleNamespace(**dict(settings))
    family = opened(model)
    parts = build(family, cfg)
    plain = SimpleNamespace(**dict(settings, gradient_checkpointing=False))
    waiting, again = activations(family, build(family, plain), cfg, latent, each)
    if cfg.gradient_checkpointing:
        recomputing = build(family, cfg)
        waiting, _ = activations(family, recomputing, cfg, latent, each)
    else:
        again = dict.fromkeys(again, 0)
    return parts, waiting, again


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


def peaks(cfg, rows, waiting, again, of_pass, world, accumulate):
    """{phase: bytes at its peak}, as the phases follow each other in an iteration.

    All gradients of a round are made before any network steps; those of earlier micro-batches are
    there from the start.
    """
    total = {c: sum(row.get(c, 0) for row in rows.values()) for c in COLUMNS}
    always = total["weights"] + total["ema"]
    if not cfg.offload:
        always += total["moments"]
    gradients = {name: row["gradients"] for name, row in rows.items() if "gradients" in row}

    made = {"generator": [], "fake score": ["student", "heads"]}  # gradients, before its backward
    learns = {"generator": "student", "fake score": "fake"}
    phases = {}
    for phase, of_networks in waiting.items():
        in_graph = [name for name in ("student", "fake") if of_networks.get(name)]
        cast = sum(copies(rows[name], world, cfg.lora_rank) for name in in_graph)
        graph = most_in_backward(of_networks, again) + cast
        there = sum(gradients.values())
        if accumulate == 1:
            there = sum(gradients.get(name, 0) for name in made[phase])
            # As backward goes on, the graph goes and this network's gradient comes.
            graph = max(graph, gradients[learns[phase]])
        phases[phase] = always + there + graph + of_pass
    moments = max(row.get("moments", 0) for row in rows.values()) if cfg.offload else 0
    phases["updates"] = always + sum(gradients.values()) + moments
    return phases


def most_in_backward(waiting, again):
    """Bytes: of {network: its activations}, in the order of forward, the last goes first.

    While a network's goes, one block of it at a time is made again.
    """
    most = there = 0
    for network, size in waiting.items():
        there += size
        most = max(most, there + again[network])
    return most


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


def cheapest(cfg, world, gpu_bytes, latent=None):
    """(flags with which it fits, as they are typed; its Plan), or (None, None)."""
    for less in remedies(cfg, world):
        smaller = plan_of(replace(cfg, **less), world, latent)
        if smaller.peak[0] <= gpu_bytes:
            changed = {name: v for name, v in less.items() if v != getattr(cfg, name)}
            return typed(changed), smaller
    return None, None


def enough_gpus(cfg, world, gpu_bytes, latent=None):
    """The least number of GPUs among GPUS, above `world`, on which cfg fits, or None."""
    for more in GPUS:
        if more <= world:
            continue
        try:
            needed, _ = plan_of(cfg, more, latent).peak
        except BadInput:
            continue  # the batch does not come out even
        if needed <= gpu_bytes:
            return more
    return None


def typed(settings):
    """{name: value} as flags on a command line."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(flag(name))
        elif value is False:
            words.append(flag("no_" + name))
        else:
            words.append(f"{flag(name)} {value}")
    return " ".join(words)


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
    if peak <= gpu_bytes:
        return
    total = plan.total
    held = ", ".join(f"{name} {gb(total[name])}" for name in COLUMNS if total[name])
    flags, _ = cheapest(cfg, world, gpu_bytes, latent)
    advice = f"it fits with {flags}"
    if not flags:
        more = enough_gpus(cfg, world, gpu_bytes, latent)
        advice = f"no flag makes it fit, {more} GPUs do" if more else "no flag makes it fit"
    raise BadInput(
        f"{cfg.model} needs {gb(peak)} GB of each of {world} GPU(s) with {gb(gpu_bytes)} "
        f"(planned, in the {phase}'s phase; {held}): {advice}"
    )


def gb(size):
    return f"{size / 1e9:.2f}"
