"""A diagnosis: what D learns of a student that rests."""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import adm
from families import load_teacher
from models import LatentDiscriminator, accuracy, make_roles
from ode import Draw
from runtime.files import read_json, remove, write_json
from runtime.folder import starting_point
from runtime.settings import require
from toy.digits_experiment import HOME, execute, read_weights
from toy.digits_samples import opened, table
from toy.digits_teacher import PROMPTS
from toy.run import slope_and_gap

STAGE = 5  # of the seed's keys: other random numbers than in training and in the measure
VARIANTS = {  # of adm.py's flags, beside the recipe's
    "paper: Δt = T/64, no damping": "--dt 0.015625 --damping 0",
    "Δt = T/64": "--dt 0.015625",
    "Δt = T/4, no damping": "--damping 0",
    "recipe: Δt = T/4": "",
    "Δt = T/2": "--dt 0.5",
    "heads' rate 1e-3": "--lr-heads 1e-3",
    "TTUR 4": "--ttur 4",
}


def diagnose(init, out, iterations=200):
    """What the heads have learnt of a student that rests, for each of VARIANTS: `alignment`.

    init: the run that the student is from; adm.py is in its warm-up throughout. After each quarter
    of the iterations; printed, and in the json file out. The runs are made anew, in
    out/digits/diagnosis. Raises BadInput where out's folder is not there.
    """
    require(Path(out).parent.is_dir(), f"{out}: there is no folder {Path(out).parent}")
    remove(HOME / "diagnosis")
    family = load_teacher("digits")
    every = iterations // 4
    rows = {}  # {variant, iterations: alignment}
    for i, (name, flags) in enumerate(VARIANTS.items()):
        resting = f"--init {init} --student-steps 1 --iterations {iterations} --warmup {iterations}"
        written = f"--checkpoint-every {every} --keep-checkpoints 4 --sample-every 0"
        folder = execute(f"python adm.py {resting} {flags} {written} --out {HOME}/diagnosis/{i}")
        for checkpoint in sorted((folder / "checkpoints").iterdir()):
            rows[f"{name}; {int(checkpoint.name)}"] = alignment(folder, checkpoint, family)
    print("\n".join(table(rows)))
    write_json(out, {"init": str(init), "variants": rows})


def alignment(folder, checkpoint, family, batch_size=200):
    """{margin, accuracy, cosine, length} of the heads at a checkpoint of adm.py, on new samples.

    margin    E[D(x_real) − D(x_fake)]
    accuracy  D's: the share of logits that are on their side of 0
    cosine    of ∇D at x_fake with x_real − x_fake: a mean over samples
    length    of ∇D over that of x_real − x_fake: the median (toy/why.py has a projection)
    """
    cfg = SimpleNamespace(**read_json(folder / "config.json", "run", "config")["config"])
    net = players(checkpoint, family, cfg)
    draw = Draw((cfg.seed, STAGE), range(batch_size))
    numbers = draw.integers(len(PROMPTS))
    texts = opened(family)[0]
    cond = {name: c[numbers] for name, c in texts.items()}  # (B, ...) each
    uncond = {name: c[[len(PROMPTS)] * batch_size] for name, c in texts.items()}
    with torch.no_grad():
        x0_hat, _ = adm.sample(net, draw, cond, 0)  # (B, 4, 8, 8)
    real, fake, slope, gap = slope_and_gap(net, cfg, draw, x0_hat, cond, uncond)
    return {
        "margin": (real - fake).mean().item(),
        "accuracy": accuracy(real, fake).item(),
        "cosine": F.cosine_similarity(slope, gap).mean().item(),
        "length": (slope.norm(dim=1) / gap.norm(dim=1)).median().item(),
    }


def players(checkpoint, family, cfg):
    """adm.py's Players at a checkpoint of a run in which a one-step student of cfg.init rests."""
    schedule, pipeline = starting_point(cfg.init, family, family.schedule, 0)
    teacher, student, fake = make_roles(family, ("student", "fake"))
    student.load(pipeline)
    discriminator = LatentDiscriminator(teacher, cfg.head_width)
    read_weights(fake.own_parameters(), checkpoint / "fake.safetensors")
    read_weights(dict(discriminator.heads.named_parameters()), checkpoint / "heads.safetensors")
    schedules = (family.schedule, schedule)
    times, shape = schedule.timesteps(1)[:-1], family.latent_shape()
    return adm.Players(
        teacher, student, fake, discriminator, *schedules, times, shape, cfg.guidance
    )
