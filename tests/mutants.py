"""Breakages of the core that the tests must notice.

    make mutants                             # all of them
    python tests/mutants.py heads "ADP: "    # those with such names

Each is one change of the source in a copy of the project; it is killed when one of its tests fails.
Not part of `make test`: a mutant takes a quarter of a minute, and two are tried at a time. A change
to the core brings its breakage along.
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    tests: str = "tests/test_reference.py"
    some: str = ""  # of these tests: pytest's -k


SD3 = "adm and sd3 and not adp"
OF_ADP = "of_adp and (sd3 or sdxl)"
MUTANTS = [
    # Nine that lived before tests/test_reference.py was there.
    Mutant(
        "heads climb",
        "adm.py",
        "backward(loss_d, cfg.accumulate)",
        "backward(-loss_d, cfg.accumulate)",
        some=SD3,
    ),
    Mutant(
        "cond and uncond exchanged",
        "adm.py",
        "with_guidance(teacher, cond, uncond, guidance)",
        "with_guidance(teacher, uncond, cond, guidance)",
        some=SD3,
    ),
    Mutant(
        "D: real against real",
        "adm.py",
        "discriminator.logits([h.detach() for h in maps_fake])",
        "discriminator.logits(maps_real)",
        some=SD3,
    ),
    Mutant(
        "D: real features at t",
        "adm.py",
        "maps_real = discriminator.features(x_real, s, cond)",
        "maps_real = discriminator.features(x_real, t, cond)",
        some=SD3,
    ),
    Mutant(
        "t_max ignored",
        "adm.py",
        "t = draw.uniform(least * T, cfg.t_max * T)",
        "t = draw.uniform(least * T, 0.5 * T)",
        some=SD3,
    ),
    Mutant(
        "fake score's range of t",
        "adm.py",
        "t_fake, eps = draw.uniform(0, schedule.t_noise)",
        "t_fake, eps = draw.uniform(300, schedule.t_noise)",
        some=SD3,
    ),
    Mutant(
        "ADP: real not noised",
        "adp.py",
        "x_real = schedule.add_noise(x_0, draw.normal(pairs.shape), t_d)",
        "x_real = (draw.normal(pairs.shape), x_0)[1]",
        some=OF_ADP,
    ),
    Mutant("ADP: λ_latent ignored", "adp.py", "[cfg.lambda_latent]", "[1.0]", some=OF_ADP),
    Mutant(
        "one tapped block", "models.py", "for k in (1, 2, 3)})", "for k in (1, 1, 1)})", some=SD3
    ),
    # The wiring of adm.py.
    Mutant(
        "generator climbs",
        "adm.py",
        "return -(fake if weight is None else weight * fake).mean()",
        "return (fake if weight is None else weight * fake).mean()",
        some=SD3,
    ),
    Mutant(
        "fake score learns x0_real",
        "adm.py",
        "                x0 = x0_hat.detach()\n",
        "                x0 = x0_real if r == 0 else x0_hat.detach()\n",
        some=SD3,
    ),
    Mutant(
        "a step after each micro-batch",
        "adm.py",
        "            trained = {",
        "                for o in optimizers.values():\n"
        "                    o.state and step(o, cfg.clip)\n"
        "            trained = {",
        some=SD3,
    ),
    Mutant(
        "heads of a resting D train",
        "adm.py",
        '"heads": cfg.loss == "adm"',
        '"heads": learns',
        some=SD3,
    ),
    Mutant(
        "warm-up one iteration too long",
        "adm.py",
        "iteration >= cfg.warmup",
        "iteration > cfg.warmup",
        some=SD3,
    ),
    Mutant(
        "student learns in every round",
        "adm.py",
        "learns = r == 0 and",
        "learns = r < 9 and",
        some=SD3,
    ),
    Mutant(
        "the same samples in every round",
        "adm.py",
        "draw = Draw((cfg.seed, STAGE, iteration, r), samples, device)",
        "draw = Draw((cfg.seed, STAGE, iteration, 0), samples, device)",
        some=SD3,
    ),
    Mutant(
        "always the last step",
        "adm.py",
        "k = int(common(cfg.seed, STAGE, iteration, r).integers(steps))",
        "k = steps - 1",
        some=SD3,
    ),
    Mutant(
        "x_real by the fake score",
        "adm.py",
        "x_real = schedule.pf_ode_step(x_t, out_real, t, s)",
        "x_real = schedule.pf_ode_step(x_t, out_fake, t, s)",
        some=SD3,
    ),
    Mutant(
        "fake's branch without its graph",
        "adm.py",
        'cfg.fake_gradient == "exact"):',
        'cfg.fake_gradient == "none"):',
        some=SD3,
    ),
    Mutant(
        "straight through by α_t",
        "adm.py",
        "straight_through(x_fake, x0_hat, schedule.alpha_sigma(s)[0])",
        "straight_through(x_fake, x0_hat, schedule.alpha_sigma(t)[0])",
        some=SD3,
    ),
    Mutant(
        "damping on real alone",
        "adm.py",
        "for x, logits in ((x_real, logits_real), (x_fake, logits_fake)):",
        "for x, logits in ((x_real, logits_real), (x_real, logits_fake)):",
        some=SD3,
    ),
    Mutant(
        "damping's weight",
        "adm.py",
        "loss_d = loss_d + cfg.damping * damping_loss",
        "loss_d = loss_d + damping_loss",
        some=SD3,
    ),
    Mutant(
        "weight 1/α at s",
        "adm.py",
        "1 / schedule.alpha_sigma(t)[0].clamp(min=1e-3)",
        "1 / schedule.alpha_sigma(s)[0].clamp(min=1e-3)",
        some=SD3,
    ),
    Mutant(
        "DMD's range depends on Δt",
        "adm.py",
        'cfg.t_min + cfg.dt if cfg.loss == "adm" else cfg.t_min',
        "cfg.t_min + cfg.dt",
        some=SD3,
    ),
    Mutant(
        "DMD's direction",
        "adm.py",
        "g = (x0_fake - x0_real) / distance",
        "g = (x0_real - x0_fake) / distance",
        some=SD3,
    ),
    Mutant(
        "DMD's normaliser over the batch",
        "adm.py",
        ".abs().flatten(1).mean(1).clamp(min=1e-5)",
        ".abs().mean().expand(len(x0_hat)).clamp(min=1e-5)",
        some=SD3,
    ),
    Mutant(
        "last: from the step after next",
        "adm.py",
        "times[k + 1:], lambda",
        "times[k + 2:] if k + 2 < steps else times[k + 1:], lambda",
        some=SD3,
    ),
    Mutant(
        "student sees the unshown time",
        "adm.py",
        "predict(x_in, student_schedule.shown(t_in))",
        "predict(x_in, t_in)",
        some="after_adp",
    ),
    Mutant(
        "exchanged rates",
        "adm.py",
        '"fake": cfg.lr_fake, "heads": cfg.lr_heads',
        '"fake": cfg.lr_heads, "heads": cfg.lr_fake',
        some=SD3,
    ),
    Mutant(
        "average of the fake score",
        "adm.py",
        'follow(networks["ema"], networks["student"], cfg.ema)',
        'follow(networks["ema"], networks["fake"], cfg.ema)',
        some=SD3,
    ),
    # The wiring of adp.py.
    Mutant(
        "ADP: cubic reversed", "adp.py", "(1 - (u / T) ** 3) * T", "(u / T) ** 3 * T", some=OF_ADP
    ),
    Mutant(
        "ADP: velocity's sign",
        "adp.py",
        "x_T.float() - x_0.float())",
        "x_0.float() - x_T.float())",
        some=OF_ADP,
    ),
    Mutant("ADP: heads not frozen", "adp.py", "with frozen(heads):", "with frozen():", some=OF_ADP),
    Mutant(
        "ADP: λ_pixel ignored",
        "adp.py",
        "lambdas.append(cfg.lambda_pixel)",
        "lambdas.append(0.15)",
        some=OF_ADP,
    ),
    Mutant(
        "ADP: regression for one iteration more",
        "adp.py",
        "iteration < cfg.mse_iterations",
        "iteration <= cfg.mse_iterations",
        some=OF_ADP,
    ),
    Mutant(
        "ADP: regression's own rate ignored",
        "adp.py",
        "cfg.lr_mse if regresses and cfg.lr_mse else cfg.lr_student",
        "cfg.lr_student",
        some=OF_ADP,
    ),
    Mutant(
        "ADP: noised on the line",
        "adp.py",
        "x_fake = schedule.add_noise(x0_hat, ",
        "x_fake = line.add_noise(x0_hat, ",
        some="of_adp and sdxl",
    ),
    Mutant(
        "ADP: heads descend the student's loss",
        "adp.py",
        'backward(log["loss_discriminator"], cfg.accumulate)',
        'backward(-log["loss_discriminator"], cfg.accumulate)',
        some=OF_ADP,
    ),
    Mutant(
        "ADP: the pixel heads see noise",
        "adp.py",
        "features(family.views(vae, x0_hat, u))",
        "features(family.views(vae, x_fake, u))",
        some=OF_ADP,
    ),
    # Shared parts.
    Mutant(
        "micro-batches are summed",
        "models.py",
        "(loss / accumulate).backward(one)",
        "loss.backward(one)",
        some=SD3,
    ),
    Mutant(
        "no clipping",
        "models.py",
        "clip_grad_norm_(parameters, clip)",
        "clip_grad_norm_(parameters, 1e9)",
    ),
    Mutant(
        "an average that forgets",
        "models.py",
        "lerp_(p, 1 - decay)",
        "lerp_(p, decay)",
        some=SD3 + " and k",
    ),
    Mutant(
        "guidance counts from 0",
        "ode.py",
        "return uncond.float() + w * (cond.float() - uncond.float())",
        "return cond.float() + w * (cond.float() - uncond.float())",
        some=SD3,
    ),
    Mutant(
        "heads' maximum",
        "models.py",
        "zip(self.heads, maps, strict=True)]).mean(0)",
        "zip(self.heads, maps, strict=True)]).amax(0)",
        some=SD3,
    ),
    Mutant(
        "index 1000",
        "ode.py",
        "t.floor().clamp(max=self.t_noise)",
        "t.floor()",
        "tests/test_ode.py",
    ),
]


def try_one(mutant, folder):
    """The first test that fails under it, or None."""
    copy = Path(tempfile.mkdtemp(dir=folder)) / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    source = (copy / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        return f"STALE: its text stands {source.count(mutant.old)} times in {mutant.file}"
    (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        *mutant.tests.split(),
    ]
    if mutant.some:
        command += ["-k", mutant.some]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    shutil.rmtree(copy.parent)
    if done.returncode == 0:
        return None
    failed = [
        line.split(" - ")[0]
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED", "ERROR"))
    ]
    return failed[0] if failed else f"BROKEN: {(done.stdout + done.stderr)[-500:]}"


def main(wanted):
    chosen = [m for m in MUTANTS if not wanted or any(part in m.name for part in wanted)]
    bad = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for mutant, verdict in zip(chosen, pool.map(lambda m: try_one(m, folder), chosen)):
            bad += verdict is None or verdict.startswith(("STALE", "BROKEN", "ERROR"))
            print(f"{mutant.name} | {verdict or 'LIVES'}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} killed")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
