"""The checks of first_hour_on_a_gpu.sh: each prints what was expected and found, and may stop it.

    python tools/first_hour.py device | waits FLAGS | start RUN FLAGS | resumed RUN SAME
    python tools/first_hour.py opens RUN | bench LINE TABLE FLAGS
    python tools/first_hour.py digits SCORES CLIP NOISE DISTANCE NOISE

RUN and SAME are folders of adm.py FLAGS, LINE is what bench.py --json FLAGS printed, SCORES a
folder of score.py; `waits` is adm.py FLAGS itself. Exit code 1 at the first difference.
"""

import csv
import inspect
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import torch

import adm
from runtime.flags import parser_of
from runtime.folder import Run
from runtime.script import in_one_line, parse, quiet, run
from runtime.settings import require
from sizing.plan import plan_of

ULP = 2**-8  # relative, of bf16
# Of an iteration's time to its passes' (tools/README.md: 1.07 to 1.16 on a CPU; the rest is ours,
# for a GPU that waits for Python).
RATIO = 1.3
# Peak memory beside the plan: 3% as tests/test_rehearsal.py, and what neither counts: workspaces of
# cuBLAS (32 MB: CUBLAS_WORKSPACE_CONFIG) and of cuDNN's convolutions (1 GB is ours). CUDA's context
# and fragmentation are not in what torch says is allocated.
OF_PLAN, WORKSPACE = 0.03, 1.0


class Different(Exception):
    """Something is not as predicted."""


def expect(what, expected, found, holds):
    """Print both; raises Different unless it `holds`."""
    line = f"{what}: expected {expected}, found {found}"
    if not holds:
        raise Different(line)
    print(f"  as expected: {line}")


def rows_of(folder):
    with open(Path(folder) / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def settings(flags):
    return parse(parser_of(adm.Config), adm.Config, flags)


def planned(cfg):
    """GB of one GPU."""
    return plan_of(cfg, 1).peak[0] / 1e9


def memory(found, plan, on_a_gpu):
    """found, plan: GB. On a CPU a process's memory has nothing to do with the plan."""
    if not on_a_gpu:
        print(f"  not compared: peak memory, planned {plan:.2f} GB of a GPU: there is none")
        return
    most = plan * (1 + OF_PLAN) + WORKSPACE
    least = plan * (1 - OF_PLAN) - WORKSPACE
    expected = f"{least:.2f} to {most:.2f} GB (planned {plan:.2f})"
    expect("peak memory", expected, f"{found:.2f}", least <= found <= most)


# --- The checks -----------------------------------------------------------------------------------


def device():
    """A GPU that torch can use, with bf16."""
    there = torch.cuda.is_available()
    expect("GPU", "one that torch sees", torch.cuda.get_device_name() if there else "none", there)
    expect("bf16", "supported", "", torch.cuda.is_bf16_supported())


def waits(*flags):
    """adm.py: from its first row of the log to its second the host waits once, as rehearsed."""
    record, there = Run.record, torch.cuda.is_available()

    def counted_from_here(self, iteration, *args):
        record(self, iteration, *args)
        if there:
            torch.cuda.set_sync_debug_mode("warn" if iteration == 1 else "default")

    Run.record = counted_from_here
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(adm.main, adm.Config, flags, prog="adm.py")
    finally:
        Run.record = record
    found = sum("synchronizing CUDA operation" in str(one.message) for one in said)
    if there:
        expect("waits for the GPU in iteration 2", "1, for its row", found, found == 1)
    else:
        print("  not compared: how often the host waits for a GPU: there is none")


def start(folder, *flags):
    """Without CFG: networks equal at the start, no update skipped, memory as planned."""
    cfg, rows = settings(flags), rows_of(folder)
    expect("iterations", cfg.iterations, len(rows), len(rows) == cfg.iterations)
    skipped = sum(int(row["skipped"]) for row in rows)
    expect("updates skipped", 0, skipped, skipped == 0)
    dmd = float(rows[0]["dmd_loss"])
    # ½ mean g², g the relative difference of teacher's and fake score's x_0: of one ulp it is 8e-6.
    expect("teacher = fake at the start: dmd_loss", "below 1e-9", f"{dmd:g}", dmd < 1e-9)
    memory(float(rows[-1]["peak_memory_gb"]), planned(cfg), torch.cuda.is_available())


def resumed(folder, same):
    """A run that was stopped and resumed is the one that was not: bitwise on a CPU."""
    allowed = 4 * ULP if torch.cuda.is_available() else 0.0
    for one, other in zip(rows_of(folder), rows_of(same), strict=True):
        for column in ("loss_fake", "x0_std", "grad_norm_fake"):
            a, b = float(one[column]), float(other[column])
            what = f"resumed, iteration {one['iteration']}, {column}"
            expect(what, f"{a:g} ± {allowed:.1%}", f"{b:g}", abs(a - b) <= allowed * abs(a))


def opens(folder):
    """Stock diffusers opens the student's network, and it is finite."""
    pipeline = Path(folder) / "pipeline"
    index = json.loads((pipeline / "model_index.json").read_text())
    (part,) = {"unet", "transformer"} & set(index)
    net = getattr(diffusers, index[part][1]).from_pretrained(pipeline, subfolder=part)
    finite = all(p.isfinite().all() for p in net.parameters())
    size = sum(p.numel() for p in net.parameters())
    expect("the exported network", "finite weights", f"{size / 1e6:.1f}M weights", finite)


def bench(line, table, *flags):
    """Append what bench.py with these flags found to the table (Markdown), then compare it."""
    found = json.loads(Path(line).read_text().splitlines()[-1])  # below what the run said
    cfg = settings(flags)
    cfg.samples = cfg.accumulate = None  # as in bench.py: the batch at once
    plan = planned(cfg)
    gpu = "gpu" in found
    cells = [
        f"`{found['model']}`, {found['batch_size']} a batch",
        f"{found['ms_iteration']:.0f}",
        f"{found['ratio']:.2f}",
        f"{1000 * found['batch_size'] / found['ms_iteration']:.2f}",
        f"{found['tflop_per_s']:.0f}" if gpu else "–",
        f"{found['share_of_peak']:.0%}" if gpu else "–",
        f"{found['peak_memory_gb']:.2f} / {plan:.2f}" if gpu else f"– / {plan:.2f}",
    ]
    table = Path(table)
    if not table.exists():
        on = found["gpu"] if gpu else "no GPU: a rehearsal on a CPU"
        head = (
            "| model | ms an iteration | ratio | samples/s | TFLOP/s | of a matmul's | GB / plan |"
        )
        table.write_text(f"{on}\n\n{head}\n|{' --- |' * len(cells)}\n")
    with open(table, "a") as f:
        f.write(f"| {' | '.join(cells)} |\n")
    ratio = found["ratio"]
    expect("iteration / its passes", f"at most {RATIO}", f"{ratio:.2f}", ratio <= RATIO)
    memory(found.get("peak_memory_gb", 0.0), plan, gpu)


def digits(scores, *expected):
    """The student's scores are those of the same commands on a CPU, to within noise."""
    rows = json.loads((Path(scores) / "table.json").read_text())["rows"]
    student = next(iter(rows.values()))  # the teacher is the last
    values = [float(word) for word in expected]
    for metric, value, noise in (("clip", *values[:2]), ("distance", *values[2:])):
        found = student[metric]["value"]
        said = f"{value:g} ± {noise:g}"
        expect(f"digits, {metric}", said, f"{found:.4g}", abs(found - value) <= noise)


def main(name="", *words):
    quiet()
    checks = {f.__name__: f for f in (device, waits, start, resumed, opens, bench, digits)}
    try:
        with in_one_line("first_hour.py"):
            require(name in checks, f"{name!r} is no check: there are {', '.join(checks)}")
            check_words(checks[name], words)
            checks[name](*words)
    except Different as e:
        print(f"first_hour.py: DIFFERENT: {e}", file=sys.stderr)
        sys.exit(1)


def check_words(check, words):
    """Raises BadInput where these are not the words of a check."""
    try:
        inspect.signature(check).bind(*words)
    except TypeError as e:
        require(False, f"{check.__name__}: {e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
