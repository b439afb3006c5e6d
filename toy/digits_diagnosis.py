"""A diagnosis: what D learns of a student that rests."""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import adm
from families import load_teacher
from models import LatentDiscriminator, accuracy, make_roles
from ode import Draw
from runtime.files import read_json, remove, write_json
from runtime.folder import starting_point
from runtime.settings import require
from toy.digits_changes import EXACT, NONE, changed
from toy.digits_experiment import HOME, execute, read_weights
from toy.digits_samples import opened, table
from toy.digits_teacher import PROMPTS
from toy.run import slope_and_gap

STAGE = 5  # of the seed's keys: other random numbers than in training and in the measure
VARIANTS = {  # adm.py's flags, beside the recipe's, and one of digits_changes.py's CHANGES
    "paper: Δt = T/64, no damping": ("--dt 0.015625 --damping 0", NONE),
    "Δt = T/64": ("--dt 0.015625", NONE),
    "Δt = T/4, no damping": ("--damping 0", NONE),
    "recipe: Δt = T/4": ("", NONE),
    "Δt = T/2": ("--dt 0.5", NONE),
    "heads' rate 1e-3": ("--lr-heads 1e-3", NONE),
    "TTUR 4": ("--ttur 4", NONE),
    "batch of 64": ("--batch-size 64", NONE),
    "damping by ∇D itself": ("", EXACT),
    "damping by ∇D itself, Δt = T/64": ("--dt 0.015625", EXACT),
}
FITTED = {"∇D fitted to the gap": "recipe: Δt = T/4", "the same, Δt = T/64": "Δt = T/64"}


def diagnose(init, out, iterations=200):
    """What the heads have learnt of a student that rests, for each of VARIANTS: `alignment`.

    init: the run that the student is from; adm.py is in its warm-up throughout. After each quarter
    of the iterations; printed, and in the json file out. The runs are made anew, in
    out/digits/diagnosis. Then what such heads could express: `fitted`. Raises BadInput where out's
    folder is not there.
    """
    require(Path(out).parent.is_dir(), f"{out}: there is no folder {Path(out).parent}")
    remove(HOME / "diagnosis")
    family = load_teacher("digits")
    every = iterations // 4
    rows, checkpoints = {}, {}  # {variant, iterations: alignment}, {variant: its last}
    for i, (name, (flags, change)) in enumerate(VARIANTS.items()):
        resting = f"--init {init} --student-steps 1 --iterations {iterations} --warmup {iterations}"
        written = f"--checkpoint-every {every} --keep-checkpoints 4 --sample-every 0"
        command = f"python adm.py {resting} {flags} {written} --out {HOME}/diagnosis/{i}"
        with changed(change):
            folder = execute(command)
        for checkpoint in sorted((folder / "checkpoints").iterdir()):
            rows[f"{name}; {int(checkpoint.name)}"] = alignment(*players(checkpoint, family))
            checkpoints[name] = checkpoint
    for name, variant in FITTED.items():
        net, cfg = players(checkpoints[variant], family)
        for iteration, row in fitted(net, cfg, iterations, every):
            rows[f"{name}; {iteration}"] = row
    print(table(rows))
    write_json(out, {"init": str(init), "variants": rows})


def alignment(net, cfg):
    """{margin, accuracy, cosine, length} of the heads, on 200 new samples.

    margin    E[D(x_real) − D(x_fake)]
    accuracy  D's: the share of logits that are on their side of 0
    cosine    of ∇D at x_fake with x_real − x_fake: a mean over samples
    length    of ∇D over that of x_real − x_fake: the median (toy/why.py has a projection)
    """
    real, fake, slope, gap = judged(net, cfg, (cfg.seed, STAGE), 200)
    return {
        "margin": (real - fake).mean().item(),
        "accuracy": accuracy(real, fake).item(),
        "cosine": F.cosine_similarity(slope, gap).mean().item(),
        "length": (slope.norm(dim=1) / gap.norm(dim=1)).median().item(),
    }


def fitted(net, cfg, iterations, every):
    """Yields (iteration, `alignment`) of new heads that are shown the gap: ½ E|∇D − gap|².

    They have the run's rate and batches; its student and fake score rest. What D could express if
    it were told x_real − x_fake, which ADM's D is to find from which is which.
    """
    torch.manual_seed(cfg.seed)
    discriminator = LatentDiscriminator(net.teacher, cfg.head_width)
    net = net._replace(discriminator=discriminator)
    optimizer = torch.optim.AdamW(discriminator.heads.parameters(), cfg.lr_heads)
    for iteration in range(1, iterations + 1):
        with sdpa_kernel(SDPBackend.MATH):  # attention whose gradient has a gradient
            key = cfg.seed, STAGE, iteration
            *_, slope, gap = judged(net, cfg, key, cfg.batch_size, learn=True)
            (0.5 * (slope - gap).square().sum(1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(discriminator.heads.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        if iteration % every == 0:
            yield iteration, alignment(net, cfg)


def judged(net, cfg, key, batch_size, learn=False):
    """toy/run.py's `slope_and_gap` on new samples, of prompts at random."""
    draw = Draw(key, range(batch_size))
    numbers = draw.integers(len(PROMPTS))
    texts = opened(net.teacher.family)[0]
    cond = {name: c[numbers] for name, c in texts.items()}  # (B, ...) each
    uncond = {name: c[[len(PROMPTS)] * batch_size] for name, c in texts.items()}
    with torch.no_grad():
        x0_hat, _ = adm.sample(net, draw, cond, 0)  # (B, 4, 8, 8)
    return slope_and_gap(net, cfg, draw, x0_hat, cond, uncond, learn)


def players(checkpoint, family):
    """(adm.py's Players, settings) at a checkpoint of a run in which a one-step student rests."""
    settings = read_json(checkpoint.parent.parent / "config.json", "run", "config")["config"]
    cfg = SimpleNamespace(**settings)
    schedule, pipeline = starting_point(cfg.init, family, family.schedule, 0)
    teacher, student, fake = make_roles(family, ("student", "fake"))
    student.load(pipeline)
    discriminator = LatentDiscriminator(teacher, cfg.head_width)
    read_weights(fake.own_parameters(), checkpoint / "fake.safetensors")
    read_weights(dict(discriminator.heads.named_parameters()), checkpoint / "heads.safetensors")
    schedules = (family.schedule, schedule)
    times, shape = schedule.timesteps(1)[:-1], family.latent_shape()
    net = adm.Players(teacher, student, fake, discriminator, *schedules, times, shape, cfg.guidance)
    return net, cfg
