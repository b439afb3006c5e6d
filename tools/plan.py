"""What a training run needs of each GPU, counted on networks without storage.

    python tools/plan.py adm --model sd3.5-large --world-size 8 --gpu-gb 80
    python tools/plan.py adp --model sdxl --world-size 8

Any flag of adm.py or adp.py will do, and a model's recipe holds as there. Nothing is loaded or
fetched. Not counted: CUDA's own context, kernels' workspace, fragmentation.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import adm
import adp
import data
from families import recipes
from runtime.flags import option
from runtime.script import subcommand
from runtime.settings import at_least, require
from sizing.count import COLUMNS
from sizing.plan import cheapest, checkpoint_bytes, enough_gpus, gb, plan_of, work_of

PEAK = {"H100": 989e12, "A100": 312e12}  # FLOP/s, dense bf16: NVIDIA's data sheets
SHARE = 0.4  # ours: what good training code reaches; nobody has measured it here

HOURS = option(False, "count the passes' FLOPs too, which takes a minute", "hardware")
WORLD = option(8, "GPUs", "hardware")
GPU_GB = option(80.0, "memory of each, in GB of 1e9 bytes", "hardware")


@dataclass
class AdmConfig(adm.Config):
    world_size: int = WORLD
    gpu_gb: float = GPU_GB
    hours: bool = HOURS


@dataclass
class AdpConfig(adp.Config):
    world_size: int = WORLD
    gpu_gb: float = GPU_GB
    hours: bool = HOURS


def check(cfg):
    """Raises BadInput for what no GPUs are like, and for what the stage itself refuses."""
    at_least(1, cfg, "world_size")
    require(cfg.gpu_gb > 0, f"--gpu-gb {cfg.gpu_gb}: a positive number")
    stage = adm if isinstance(cfg, adm.Config) else adp
    stage.check(cfg)


def show(cfg):
    """Print what a run with these settings needs. Raises BadInput for one that cannot be."""
    check(cfg)
    plan = plan_of(cfg, cfg.world_size)
    latent = "x".join(str(n) for n in plan.latent)
    title = f"{cfg.model}, {latent} latents, {plan.each} a GPU x {cfg.world_size} GPUs"
    if plan.accumulate > 1:
        title += f" x {plan.accumulate} micro-batches"
    print(f"{title}; GB (1e9 bytes) on each:")
    print_table({**plan.rows, "sum": plan.total})
    if plan.gathered:
        print_line("gathered", f"{gb(plan.gathered)} of weights, for a pass")
    for phase, size in plan.phases.items():
        waiting = plan.waiting.get(phase, {})
        of_it = ", ".join(f"{name} {gb(n)}" for name, n in waiting.items())
        print_line(phase, gb(size) + (f"; of it activations: {of_it}" if of_it else ""))
    if cfg.gradient_checkpointing:
        most = max(plan.again, key=plan.again.get)
        print_line("made again", f"{gb(plan.again[most])} at most, one block of the {most}'s")
    if plan.loading:
        print_line("loading", f"{gb(plan.loading)} of main memory, if all ranks are on one node")
    copies = f"; --keep-checkpoints {cfg.keep_checkpoints}, and one while it is written"
    print_line("checkpoint", f"{gb(checkpoint_bytes(plan))} of disk{copies}")
    if cfg.hours:
        print_work(cfg)
    peak, phase = plan.peak
    there = cfg.gpu_gb * 1e9
    print_line("peak", f"{gb(peak)} of {cfg.gpu_gb:g}, {phase}: {verdict(cfg, peak, there)}")


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


def verdict(cfg, peak, there):
    if peak <= there:
        return "it fits"
    flags, smaller = cheapest(cfg, cfg.world_size, there)
    if flags:
        return f"it does not fit; with {flags} it takes {gb(smaller.peak[0])}"
    more = enough_gpus(cfg, cfg.world_size, there)
    return f"it does not fit; on {more} GPUs it does" if more else "it does not fit"


def print_table(rows):
    print(f"{'':14}{'parameters':>11}" + "".join(f"{column:>11}" for column in COLUMNS))
    for name, row in rows.items():
        count = f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else ""
        cells = [gb(row[column]) if row.get(column) else "" for column in COLUMNS]
        line = f"{name:14}{count:>11}" + "".join(f"{cell:>11}" for cell in cells)
        print(line.rstrip())


def print_line(name, said):
    print(f"{name:14}{said}")


def main():
    commands = {"adm": (show, AdmConfig), "adp": (show, AdpConfig)}
    subcommand(commands, "plan.py", __doc__)


if __name__ == "__main__":
    main()
