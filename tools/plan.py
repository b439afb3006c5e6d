"""What a run needs of each GPU: its states counted, its passes as a rehearsal has measured them.

    python tools/plan.py adm --model sd3.5-large --world-size 8 --gpu-gb 80
    python tools/plan.py adp --model sdxl --world-size 8 --gpu-gb 24 --fit
    python tools/plan.py pairs --model sdxl
    python tools/plan.py encode --model sd3
    python tools/plan.py record --models sd3

Any flag of adm.py, adp.py or data.py will do, and a model's recipe holds as there. Nothing is
loaded or fetched. Passes of settings that sizing/measured.json has not are rehearsed on fake
tensors, which takes minutes and a C++ compiler; --no-measure leaves them out. `record` rehearses
what runs usually are, and writes that table.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import adm
import adp
import data
from families import HUB, recipes
from runtime.flags import option
from runtime.script import Stopped, subcommand
from runtime.settings import at_least, positive, require
from sizing.count import COLUMNS
from sizing.measure import Row, along, blocks_of, measured, recorded, table, training_row, typed
from sizing.plan import (
    CONTEXT,
    FRAGMENTED,
    WORKSPACE,
    advice,
    checkpoint_bytes,
    fitting,
    gb,
    of_model,
    opened,
    plan_of,
    plan_of_encoding,
    plan_of_pairs,
    work_of,
)

PEAK = {"H100": 989e12, "A100": 312e12}  # FLOP/s, dense bf16: NVIDIA's data sheets
SHARE = 0.4  # ours: what good training code reaches; nobody has measured it here

HOURS = option(False, "count the passes' FLOPs too, which takes a minute", "hardware")
WORLD = option(8, "GPUs", "hardware")
GPU_GB = option(80.0, "memory of each, in GB of 1e9 bytes", "hardware")
FIT = option(False, "search the flags that cost least and fit, and show that run", "hardware")
MEASURE = option(
    True, "rehearse passes that the table has not: minutes, and a C++ compiler", "hardware"
)


@dataclass
class TrainingHardware:
    """What a training run is planned for."""

    world_size: int = WORLD
    gpu_gb: float = GPU_GB
    hours: bool = HOURS
    fit: bool = FIT
    measure: bool = MEASURE


@dataclass
class AdmConfig(TrainingHardware, adm.Config):
    pass


@dataclass
class AdpConfig(TrainingHardware, adp.Config):
    pass


@dataclass
class PairsConfig(data.PairsConfig):
    gpu_gb: float = GPU_GB
    measure: bool = MEASURE


@dataclass
class EncodeConfig(data.EncodeConfig):
    gpu_gb: float = GPU_GB
    measure: bool = MEASURE


STAGES = ("adm", "adp", "pairs", "encode", "decode")


@dataclass
class RecordConfig:
    """Settings of `record`."""

    models: str = option(",".join(HUB), "which, with commas between", "what to rehearse")
    stages: str = option(",".join(STAGES), "of them: decode is of a picture", "what to rehearse")
    again: bool = option(False, "also what the table has", "what to rehearse")
    check: bool = option(
        False,
        "compare what the table has of training with rehearsals of all blocks; nothing is written",
        "what to rehearse",
    )


def check(cfg):
    """Raises BadInput for what no GPUs are like, and for what the stage itself refuses."""
    at_least(1, cfg, "world_size")
    positive(cfg, "gpu_gb")
    stage = adm if isinstance(cfg, adm.Config) else adp
    stage.check(cfg)


def rehearsing(row):
    """{phase: MB at each depth} of a Row that the table has not."""
    print(f"rehearsing, which takes minutes: {row}", file=sys.stderr)
    (_, found), *_ = measured([row])
    return found


def show(cfg):
    """Print what a run with these settings needs. Raises BadInput for one that cannot be."""
    check(cfg)
    measure = rehearsing if cfg.measure else None
    gpu_bytes = cfg.gpu_gb * 1e9
    if cfg.fit:
        changed = fitting(cfg, cfg.world_size, gpu_bytes, measure)
        require(changed is not None, f"{cfg.model}: no flags make it fit {cfg.gpu_gb:g} GB")
        print(f"fits with: {typed(changed) or 'its settings as they are'}")
        cfg = replace(cfg, **changed)
    plan = plan_of(cfg, cfg.world_size, measure=measure)
    latent = "x".join(str(n) for n in plan.latent)
    title = f"{cfg.model}, {latent} latents, {plan.each} a GPU x {cfg.world_size} GPUs"
    if plan.accumulate > 1:
        title += f" x {plan.accumulate} micro-batches"
    print_plan(title, plan)
    if plan.loading:
        print_line("loading", f"{gb(plan.loading)} of main memory, if all ranks are on one node")
    copies = f"; --keep-checkpoints {cfg.keep_checkpoints}, and one while it is written"
    print_line("checkpoint", f"{gb(checkpoint_bytes(plan))} of disk{copies}")
    if cfg.hours:
        print_work(cfg)
    print_peak(cfg, plan, lambda: advice(cfg, cfg.world_size, gpu_bytes, measure=measure))


def show_pairs(cfg):
    """Print what `data.py pairs` with these settings needs."""
    at_least(1, cfg, "batch_size")
    positive(cfg, "gpu_gb")
    plan = plan_of_pairs(cfg, rehearsing if cfg.measure else None)
    latent = "x".join(str(n) for n in plan.latent)
    print_plan(f"{cfg.model}, pairs of {latent} latents, {plan.each} at a time", plan)
    print_peak(cfg, plan, lambda: "a smaller --batch-size takes less")


def show_encoding(cfg):
    """Print what `data.py encode` with these settings needs."""
    at_least(1, cfg, "batch_size")
    positive(cfg, "gpu_gb")
    plan = plan_of_encoding(cfg, rehearsing if cfg.measure else None)
    print_plan(f"{cfg.model}, {plan.each} prompts at a time", plan)
    print_peak(cfg, plan, lambda: "a smaller --batch-size takes less")


def print_plan(title, plan):
    print(f"{title}; GB (1e9 bytes) on each:")
    print_table({**plan.rows, "sum": plan.total})
    print()
    for phase, (size, network) in by_phase(plan).items():
        print(f"{phase:36}{gb(size):>10}" + (f", at the {network}" if network else ""))
    if not plan.measured:
        print_line("passes", "not counted: they are of no model in the table")


def by_phase(plan):
    """{phase: (bytes, the network at which it has them)}: backward goes through several."""
    found = {}
    for name, size in plan.phases.items():
        phase, _, network = name.partition(", ")
        if size > found.get(phase, (0, ""))[0]:
            found[phase] = size, network.removeprefix("the ")
    return found


def print_peak(cfg, plan, otherwise):
    """The last line: whether it fits, or what otherwise() says."""
    peak, phase = plan.peak
    beside = f"{gb(CONTEXT)} for CUDA's context, {gb(WORKSPACE)} for workspaces, {FRAGMENTED:.0%}"
    print_line("beside", f"{beside} between tensors: our allowance")
    fits = plan.fits(cfg.gpu_gb * 1e9)
    if fits is None:
        said = "its states do; what its passes need, nobody has rehearsed"
    elif fits:
        said = "it fits"
    else:
        said = f"it does not fit; {otherwise()}"
    print_line("peak", f"{gb(peak)}, {phase}; needed {gb(plan.needed)} of {cfg.gpu_gb:g}: {said}")


def print_work(cfg):
    """What one sample costs, and the whole run on GPUs that reach a share of their peak."""
    running, teacher = work_of(cfg)
    total = sum(running.values())
    of_it = ", ".join(f"{name} {n / 1e12:.1f}" for name, n in running.items())
    if cfg.gradient_checkpointing:
        without, _ = work_of(replace(cfg, gradient_checkpointing=False))
        of_it += f"; of it made again {(total - sum(without.values())) / 1e12:.1f}"
    print_line("work", f"{total / 1e12:.1f} TFLOP a sample and iteration: {of_it}")
    run = f"{cfg.iterations} iterations of {cfg.batch_size} samples"
    print_line("hours", f"{hours(total * cfg.batch_size * cfg.iterations)}, for {run}")
    if isinstance(cfg, AdpConfig):
        pairs = data.PairsConfig(**recipes.PAIRS.get(cfg.model, {}))
        made = hours(teacher * pairs.steps * pairs.count)
        print_line("pairs", f"{made}, for {pairs.count} of {pairs.steps} steps")


def hours(flops):
    """Of each GPU, at a share of its peak."""
    each = [f"{flops / (SHARE * peak * 3600):.0f} of an {gpu}" for gpu, peak in PEAK.items()]
    return f"{' or '.join(each)} at {SHARE:.0%} of its peak"


def print_table(rows):
    print(f"{'':14}{'parameters':>11}" + "".join(f"{column:>11}" for column in COLUMNS))
    for name, row in rows.items():
        count = f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else ""
        cells = [gb(row[column]) if row.get(column) else "" for column in COLUMNS]
        line = f"{name:14}{count:>11}" + "".join(f"{cell:>11}" for cell in cells)
        print(line.rstrip())


def print_line(name, said):
    print(f"{name:14}{said}")


# --- The table ------------------------------------------------------------------------------------

CLOSE = 0.02  # the most that few blocks, drawn out, may be off


USUAL = (  # {settings: (lora_rank, gradient_checkpointing), GPUs}, the most usual first
    (64, True, 1),
    (0, True, 8),
    (0, True, 1),
    (64, True, 8),
    (64, False, 1),
    (0, False, 8),
)


def usual(models):
    """The Rows of runs as they usually are, for all models."""
    names = {model: of_model(opened(model)) for model in models}
    for model, which in names.items():
        batch = recipes.PAIRS.get(model, {}).get("batch_size", data.PairsConfig.batch_size)
        yield Row("pairs", which, f"--batch-size {batch}")
        yield Row("decode", which, "")
        yield Row("encode", which, f"--batch-size {data.ENCODED}")
    for rank, again, world in USUAL:
        for which in names.values():
            for kind in (adm.Config, adp.Config):
                cfg = kind(lora_rank=rank, gradient_checkpointing=again)
                yield training_row(cfg, which, 1, world)
    cfg = adm.Config(lora_rank=64, gradient_checkpointing=True)
    for model in names.keys() & {"sdxl", "sd3"}:  # of first_hour_on_a_gpu.sh
        yield training_row(cfg, names[model], 8, 1)


def record(cfg):
    """Write sizing/measured.json anew, row by row; or compare it with whole networks.

    Raises Stopped with exit code 1 where a comparison is off by more than CLOSE.
    """
    models, stages = cfg.models.split(","), cfg.stages.split(",")
    for model in models:
        require(model in HUB, f"--models {model}: one of {', '.join(HUB)}")
    for stage in stages:
        require(stage in STAGES, f"--stages {stage}: one of {', '.join(STAGES)}")
    rows = [row for row in usual(models) if row.stage in stages]
    if cfg.check:
        there = [row for row in rows if row.stage in ("adm", "adp") and str(row) in table()]
        require(there, "--check: the table has no training of these models")
        far = [row for row in there if abs(compare(row)) > CLOSE]
        if far:
            raise Stopped(1, f"{len(far)} of {len(there)} off by more than {CLOSE:.0%}")
        return
    for row, found in measured([row for row in rows if cfg.again or str(row) not in table()]):
        recorded(row, found)
        print(f"{row}: {most(found)} MB", flush=True)


def most(found):
    """MB of the phase that needs most, at the last depth that was rehearsed."""
    return max(max(mb[-1]) for mb in found.values())


def compare(row):
    """Print how far the table's few blocks, drawn out, are from a rehearsal of all; a share."""
    config = opened(row.which.split()[1]).config
    blocks = blocks_of(config)
    ((_, whole),) = measured([row], blocks)
    drawn_out = {}
    for phase, (less, deeper) in table()[str(row)].items():
        ends = zip(less, deeper, strict=True)
        drawn_out[phase] = [[along(config, blocks, *end) for end in ends]]
    planned, there = most(drawn_out), most(whole)
    print(f"{row}, {blocks} blocks: {planned:.0f} MB planned, {there} rehearsed", flush=True)
    off = planned / there - 1
    print(f"  off by {off:+.2%}", flush=True)
    return off


if __name__ == "__main__":
    commands = {
        "adm": (show, AdmConfig),
        "adp": (show, AdpConfig),
        "pairs": (show_pairs, PairsConfig),
        "encode": (show_encoding, EncodeConfig),
        "record": (record, RecordConfig),
    }
    subcommand(commands, "plan.py", __doc__)
