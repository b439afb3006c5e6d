"""Times whole iterations of adm.py, and the passes that they cannot do without.

    python tools/bench.py --model tiny-cogvideox-5b --head-width 8 --batch-size 2
    python tools/bench.py --model sd3 --gradient-checkpointing --batch-size 8 --json   # a GPU

Any flag of adm.py will do. The iterations are adm.py's own, as its log.csv has them; after each one
the same networks make the passes alone, through whole networks. Medians, after a warm-up. `ratio`
is iteration / sum of passes: what heads, losses, random draws, AdamW and Python add. Beside it a
DMD step, and a plain fine-tuning step: forward and backward of one network, and its update. On a
GPU also samples/s, the passes' TFLOP/s (what gradient checkpointing computes again is counted) and
their share of a large bf16 matmul's, and peak memory.
"""

import csv
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import adm
from models import frozen
from ode import with_guidance
from runtime.folder import Run
from runtime.optimize import backward, step
from runtime.script import in_one_line, plain_parser, run


class Enough(Exception):
    """Ends a run that has been measured."""


def timed(work, device):
    """Milliseconds of work()."""

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    work()
    return 1000 * (now() - began)


def passes(cfg, roles, discriminator, optimizers, family, prompts, ranks):
    """({name: what makes this pass of an iteration alone}, what makes a fine-tuning step).

    Both are functions without arguments, for a one-step student.
    """
    teacher, student, fake = roles
    n = cfg.batch_size // ranks.world
    cond = prompts[[i % len(prompts) for i in range(n)]]
    uncond = prompts.unconditional(n)
    shape = family.latent_shape(cfg.resolution, cfg.frames)
    x = torch.randn(n, *shape, device=ranks.device)  # (B, ...)
    t = torch.full((n,), 500.0, device=ranks.device)  # (B,)
    w = family.guidance if cfg.guidance is None else cfg.guidance

    def forward_backward(network):
        network(x, t, cond)[0].square().mean().backward()
        for p in network.own_parameters().values():
            p.grad = None

    def to_input(outputs):
        """Backward of outputs(x), maps or predictions, down to x."""
        x_in = x.clone().requires_grad_()
        sum(out.float().square().mean() for out in outputs(x_in)).backward()

    def teacher_cfg():
        with torch.no_grad():
            with_guidance(teacher, cond, uncond, w)(x, t)

    def fake_in_graph():
        with frozen(fake):
            to_input(lambda x: [fake(x, t, cond)[0]])

    def fake_without_graph():
        with torch.no_grad():
            fake(x, t, cond)

    def backbone_fake():
        to_input(lambda x: discriminator.features(x, t, cond))

    def backbone_real():
        with torch.no_grad():
            discriminator.features(x, t, cond)

    def finetune():
        backward(fake(x, t, cond)[0].square().mean())
        step(optimizers["fake"], cfg.clip)
        optimizers["fake"].skipped.clear()

    exact = cfg.loss == "adm" and cfg.fake_gradient == "exact"
    alone = {
        "student": partial(forward_backward, student),
        "teacher": teacher_cfg,
        "fake_step": fake_in_graph if exact else fake_without_graph,
    }
    if cfg.loss == "adm":
        alone["backbone_fake"] = backbone_fake
        alone["backbone_real"] = backbone_real
    alone["fake_own"] = partial(forward_backward, fake)
    return alone, finetune


def measure(cfg, warm_up, repeats):
    """What one run of adm.main with `cfg` took.

    {"iteration": ms, "passes": {name: ms}, "finetune": ms, "flops": of the passes,
    "peak_memory_gb"}
    """
    seen, times, flops = {}, {}, []
    make_roles = adm.make_roles
    make_discriminator = adm.LatentDiscriminator
    encode = adm.encode_prompts
    restore, record = Run.restore, Run.record

    def keep(name, function):
        def spy(*args, **kwargs):
            seen[name] = function(*args, **kwargs)
            return seen[name]

        return spy

    def spy_restore(self, networks, optimizers):
        seen["optimizers"] = optimizers
        return restore(self, networks, optimizers)

    def spy_record(self, iteration, log, began):
        record(self, iteration, log, began)
        parts = (seen["roles"], seen["discriminator"], seen["optimizers"])
        alone, finetune = passes(cfg, *parts, self.family, seen["prompts"], self.ranks)
        if iteration == 1:
            with FlopCounterMode(display=False) as counter:
                for work in alone.values():
                    work()
            flops.append(counter.get_total_flops())
        for name, work in {**alone, "finetune": finetune}.items():
            times.setdefault(name, []).append(timed(work, self.ranks.device))
        if iteration == warm_up + repeats:
            raise Enough

    adm.make_roles = keep("roles", make_roles)
    adm.LatentDiscriminator = keep("discriminator", make_discriminator)
    adm.encode_prompts = keep("prompts", encode)
    Run.restore, Run.record = spy_restore, spy_record
    try:
        adm.main(cfg)
    except Enough:
        pass
    finally:
        adm.make_roles = make_roles
        adm.LatentDiscriminator = make_discriminator
        adm.encode_prompts = encode
        Run.restore, Run.record = restore, record
    with open(Path(cfg.out) / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))[warm_up:]
    medians = {name: statistics.median(ms[warm_up:]) for name, ms in times.items()}
    return {
        "iteration": statistics.median(1000 * float(row["seconds"]) for row in rows),
        "finetune": medians.pop("finetune"),
        "passes": medians,
        "flops": flops[0],
        "peak_memory_gb": float(rows[-1]["peak_memory_gb"]),
    }


def matmul_peak(device):
    """TFLOP/s of the fastest large bf16 matmul."""
    best = 0.0
    for n in (4096, 8192, 16384):
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        ms = min(timed(partial(torch.matmul, a, a), device) for _ in range(10))
        best = max(best, 2 * n**3 / ms / 1e9)
    return best


def compared(cfg, adm_run, dmd_run):
    """{name: value}: what is shown of the two runs that were measured."""
    ms = adm_run["iteration"]
    ms_passes = sum(adm_run["passes"].values())
    line = {
        "model": cfg.model,
        "batch_size": cfg.batch_size,
        "ratio": ms / ms_passes,
        "ms_iteration": ms,
        "ms_passes": ms_passes,
    }
    line |= {f"ms_{name}": value for name, value in adm_run["passes"].items()}
    line["ms_dmd"] = dmd_run["iteration"]
    line["ms_finetune"] = adm_run["finetune"]
    if torch.cuda.is_available():
        tflops = adm_run["flops"] / ms / 1e9
        peak = matmul_peak(torch.device("cuda"))
        line["samples_per_s"] = 1000 * cfg.batch_size / ms
        line["tflop_per_s"] = tflops
        line["matmul_peak_tflop_per_s"] = peak
        line["share_of_peak"] = tflops / peak
        line["peak_memory_gb"] = adm_run["peak_memory_gb"]
        line["gpu"] = torch.cuda.get_device_name()
    return line


def main(argv=None):
    own = plain_parser(__doc__)
    own.add_argument("--json", action="store_true", help="one line of JSON")
    own.add_argument("--repeats", type=int, default=20)
    own.add_argument("--warm-up", type=int, default=3)
    with in_one_line("bench.py"):
        own, rest = own.parse_known_args(argv)

    def bench(cfg):
        cfg.iterations = own.warm_up + own.repeats + 1
        cfg.student_steps = 1
        cfg.ttur = 1
        cfg.warmup = 0  # where the student rests, passes are missing
        cfg.samples = cfg.accumulate = None  # the batch at once, as in the passes beside it
        cfg.sample_every = 0
        cfg.checkpoint_every = 10**9
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            for loss in ("adm", "dmd"):
                cfg.loss = loss
                cfg.out = f"{folder}/{loss}"
                results[loss] = measure(cfg, own.warm_up, own.repeats)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        line = compared(cfg, results["adm"], results["dmd"])
        if own.json:
            print(json.dumps(line))
            return
        for name, value in line.items():
            shown = f"{value:.2f}" if isinstance(value, float) else value
            print(f"{name:24} {shown}")

    run(bench, adm.Config, rest, prog="bench.py")


if __name__ == "__main__":
    main()
