"""Times whole iterations of adm.py and, in turn with them, the passes through whole networks that an iteration cannot do without.

    python tools/bench.py --model tiny-cogvideox-5b --head-width 8 --batch-size 2
    python tools/bench.py --model sd3 --gradient-checkpointing --batch-size 8 --json      # a GPU; any flag of adm.py

The iterations are adm.py's own, as its log.csv has them; after each one the same networks make the passes alone. Medians, after a
warm-up. `ratio` is iteration / sum of passes: what heads, losses, random draws, AdamW and Python add. Beside it a DMD step, and a plain
fine-tuning step: forward and backward of one network, and its update. On a GPU also samples/s, the passes' TFLOP/s (what gradient
checkpointing computes again is counted) and their share of a large bf16 matmul's, and peak memory.
"""

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import adm
from models import frozen
from ode import with_guidance
from runtime.folder import Run
from runtime.optimize import backward, step
from runtime.script import run


class Enough(Exception):
    pass


def timed(step, device):
    """Milliseconds of step()."""
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    began = now()
    step()
    return 1000 * (now() - began)


def passes(cfg, roles, discriminator, optimizers, family, prompts, ranks):
    """({name: a function that makes this pass of an iteration alone}, one that makes a fine-tuning step), for a one-step student."""
    teacher, student, fake = roles
    n = cfg.batch_size // ranks.world
    cond, uncond = prompts[[i % len(prompts) for i in range(n)]], prompts.unconditional(n)
    x = torch.randn(n, *family.latent_shape(cfg.resolution, cfg.frames), device=ranks.device)  # (B, ...)
    t = torch.full((n,), 500.0, device=ranks.device)
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

    def backbone_real():
        with torch.no_grad():
            discriminator.features(x, t, cond)

    def finetune():
        backward(fake(x, t, cond)[0].square().mean())
        step(optimizers["fake"], cfg.clip)
        optimizers["fake"].skipped.clear()

    exact = cfg.loss == "adm" and cfg.fake_gradient == "exact"
    of_d = {"backbone_fake": lambda: to_input(lambda x: discriminator.features(x, t, cond)), "backbone_real": backbone_real}
    return {"student": lambda: forward_backward(student), "teacher": teacher_cfg,
            "fake_step": fake_in_graph if exact else fake_without_graph, **(of_d if cfg.loss == "adm" else {}),
            "fake_own": lambda: forward_backward(fake)}, finetune


def measure(cfg, warm_up, repeats):
    """One run of adm.main with `cfg`: {"iteration": ms, "passes": {name: ms}, "finetune": ms, "flops", "peak_memory_gb"}."""
    seen, times, flops = {}, {}, []
    make_roles, restore, record, encode = adm.make_roles, Run.restore, Run.record, adm.encode_prompts
    make_discriminator = adm.LatentDiscriminator

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
        alone, finetune = passes(cfg, seen["roles"], seen["discriminator"], seen["optimizers"], self.family, seen["prompts"], self.ranks)
        if iteration == 1:
            with FlopCounterMode(display=False) as counter:
                for step in alone.values():
                    step()
            flops.append(counter.get_total_flops())
        for name, step in {**alone, "finetune": finetune}.items():
            times.setdefault(name, []).append(timed(step, self.ranks.device))
        if iteration == warm_up + repeats:
            raise Enough

    adm.make_roles, adm.LatentDiscriminator, adm.encode_prompts = (
        keep("roles", make_roles), keep("discriminator", make_discriminator), keep("prompts", encode))
    Run.restore, Run.record = spy_restore, spy_record
    try:
        adm.main(cfg)
    except Enough:
        pass
    finally:
        adm.make_roles, adm.LatentDiscriminator, adm.encode_prompts = make_roles, make_discriminator, encode
        Run.restore, Run.record = restore, record
    with open(Path(cfg.out) / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))[warm_up:]
    medians = {name: statistics.median(ms[warm_up:]) for name, ms in times.items()}
    return {"iteration": statistics.median(1000 * float(row["seconds"]) for row in rows), "finetune": medians.pop("finetune"),
            "passes": medians, "flops": flops[0], "peak_memory_gb": float(rows[-1]["peak_memory_gb"])}


def matmul_peak(device):
    """TFLOP/s of the fastest large bf16 matmul."""
    best = 0.0
    for n in (4096, 8192, 16384):
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        ms = min(timed(lambda: a @ a, device) for _ in range(10))
        best = max(best, 2 * n ** 3 / ms / 1e9)
    return best


def main(argv=None):
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    own.add_argument("--json", action="store_true", help="one line of JSON")
    own.add_argument("--repeats", type=int, default=20)
    own.add_argument("--warm-up", type=int, default=3)
    own, rest = own.parse_known_args(argv)

    def bench(cfg):
        device, results = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
        with tempfile.TemporaryDirectory() as folder:
            for loss in ("adm", "dmd"):
                vars(cfg).update(loss=loss, out=f"{folder}/{loss}", iterations=own.warm_up + own.repeats + 1, student_steps=1, ttur=1,
                                 sample_every=0, checkpoint_every=10 ** 9)
                results[loss] = measure(cfg, own.warm_up, own.repeats)
                torch.cuda.is_available() and torch.cuda.empty_cache()
        one, dmd = results["adm"], results["dmd"]
        ms_passes = sum(one["passes"].values())
        line = {"model": cfg.model, "batch_size": cfg.batch_size, "ratio": one["iteration"] / ms_passes, "ms_iteration": one["iteration"],
                "ms_passes": ms_passes, **{f"ms_{name}": ms for name, ms in one["passes"].items()}, "ms_dmd": dmd["iteration"],
                "ms_finetune": one["finetune"]}
        if device.type == "cuda":
            tflops, peak = one["flops"] / one["iteration"] / 1e9, matmul_peak(device)
            line |= {"samples_per_s": 1000 * cfg.batch_size / one["iteration"], "tflop_per_s": tflops, "matmul_peak_tflop_per_s": peak,
                     "share_of_peak": tflops / peak, "peak_memory_gb": one["peak_memory_gb"], "gpu": torch.cuda.get_device_name()}
        print(json.dumps(line) if own.json else "\n".join(
            f"{name:24} {value if isinstance(value, (str, int)) else format(value, '.2f')}" for name, value in line.items()))

    run(bench, adm.Config, rest, prog="bench.py")


if __name__ == "__main__":
    main()
