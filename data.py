"""Prompts, their embeddings and ODE pairs: what training reads, and commands to make it.

From a text file of prompts to a scored one-step student of SDXL, on a node of eight GPUs:

    torchrun --nproc_per_node=8 data.py encode --model sdxl --prompts p.txt --out out/prompts
    torchrun --nproc_per_node=8 data.py pairs --model sdxl --prompts out/prompts --out out/pairs
    torchrun --nproc_per_node=8 adp.py --model sdxl --pairs out/pairs --out out/adp
    torchrun --nproc_per_node=8 adm.py --model sdxl --prompts out/prompts --init out/adp \\
        --out out/dmdx
    torchrun --nproc_per_node=8 tools/sample.py --pipeline out/dmdx/pipeline --count 1000 \\
        --out out/s
    torchrun --nproc_per_node=8 tools/sample.py --pipeline sdxl --count 1000 --out out/t
    python tools/score.py out/s out/t --out out/scores

A second call of encode or pairs goes on where the first was stopped. Text encoders sit in memory
beside the four networks with --embed live alone.
"""

import os
import shutil
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import ClassVar, Literal

import torch

from families import load_teacher, recipes
from models import load_denoiser
from ode import Draw, teacher_sample, with_guidance
from runtime.configs import EMBED, TeacherConfig
from runtime.files import aside, claim
from runtime.flags import option
from runtime.lines import Lines
from runtime.ranks import Ranks
from runtime.rows import Rows, check_room, collect, read_manifest, to_device
from runtime.script import subcommand
from runtime.settings import at_least, require
from runtime.sheets import IMAGES

PROMPTS = str(Path(__file__).with_name("prompts.txt"))  # a few hundred, written for this project

STAGE = 0  # of the seeds' keys: other random numbers than in adp.py (1) and adm.py (2)
FLOAT32 = 4  # bytes
ENCODED = 32  # prompts encoded together, and stored in one shard


# --- Prompts --------------------------------------------------------------------------------------


class Prompts(Rows):
    """Cached conditioning: prompts[numbers] is {name: (B, ...)}."""

    def __init__(self, folder, teacher, device="cpu"):
        super().__init__(folder, "prompts", teacher, device)
        self.sha256 = self.manifest["text_sha256"]
        self.none = Rows(self.folder / "unconditional", "prompts", teacher, device)[[0]]

    def texts(self, numbers):
        """What these prompts say, for captions: their numbers, where the folder does not tell."""
        known = self.manifest.get("texts", [])
        return [known[i] if i < len(known) else f"prompt {i + 1}" for i in numbers]

    def unconditional(self, batch_size):
        """The conditioning of no prompt, {name: (batch_size, ...)}."""
        return repeated(self.none, batch_size)


class LivePrompts:
    """What Prompts is, but encoded when it is asked for: nothing of it is on disk.

    The text encoders stay on the device, or their parts where they are sharded over `mesh`; then
    every rank must ask at the same time.
    """

    def __init__(self, teacher, lines, device, dtype, mesh=None):
        self.teacher = teacher
        self.lines = lines
        self.device = device
        self.pipe = teacher.text_pipeline(device, dtype, mesh)
        with torch.no_grad():
            self.none = self.floats(teacher.unconditional(self.pipe))  # {name: (1, ...)}

    def __len__(self):
        return len(self.lines)

    def floats(self, cond):
        return {name: to_device(c, self.device).float() for name, c in cond.items()}

    @torch.no_grad()
    def __getitem__(self, numbers):
        return self.floats(self.teacher.encode(self.pipe, self.texts(numbers)))

    def texts(self, numbers):
        """What these prompts say."""
        return [self.lines[i] for i in numbers]

    def unconditional(self, batch_size):
        """The conditioning of no prompt, {name: (batch_size, ...)}."""
        return repeated(self.none, batch_size)


def repeated(cond, count):
    """{name: (count, ...)} of one prompt's conditioning, {name: (1, ...)}."""
    return {name: c.expand(count, *c.shape[1:]) for name, c in cond.items()}


def read_prompts(path, teacher, folder, ranks, embed="cached", shard_size=ENCODED):
    """What --prompts names: the Lines of a text file, or the Prompts that `encode` made of one.

    Either has the hash of the text, as sha256. Of a text file that is to be encoded into `folder`
    it says how large that will be. Raises BadInput for prompts that cannot be used, or embeddings
    for which there is no room, before anything is written.
    """
    if Path(path).is_dir():
        require(embed == "cached", f"--embed live is for a text file: {path} holds embeddings")
        return Prompts(path, teacher, ranks.device)
    lines = Lines(path)
    if embed == "cached":
        numbers = sum(prod(shape) for shape in teacher.cond_shapes().values())
        row = numbers * ranks.frozen_dtype.itemsize  # bytes
        need = "encoded prompts"
        advice = "; adm.py, adp.py and data.py pairs need none with --embed live"
        check_room(folder, need, len(lines), shard_size, row, ranks, advice)
    return lines


def encode_prompts(teacher, prompts, folder, ranks, embed="cached", shard_size=ENCODED):
    """The conditioning of what `read_prompts` found: Prompts, in `folder` if need be, or live."""
    if isinstance(prompts, Prompts):
        return prompts
    if embed == "live":
        return LivePrompts(teacher, prompts, ranks.device, ranks.frozen_dtype, ranks.mesh)
    # Text encoders are loaded once, if any are needed at all.
    pipe = cache(lambda: teacher.text_pipeline(ranks.device, ranks.frozen_dtype))
    common = {
        "kind": "prompts",
        "model": teacher.name,
        "weights_sha256": teacher.weights_sha256,
        "dtype": str(ranks.frozen_dtype),
        "text_sha256": prompts.sha256,
    }

    def encode_some(rows):
        return teacher.encode(pipe(), [prompts[i] for i in rows])

    def encode_none(rows):
        return teacher.unconditional(pipe())

    with torch.no_grad():
        shown = range(min(IMAGES, len(prompts)))
        texts = [prompts[i][:200] for i in shown]
        manifest = {**common, "count": len(prompts), "shard_size": shard_size, "texts": texts}
        collect(folder, manifest, ranks, encode_some)
        manifest = {**common, "count": 1, "shard_size": 1}
        collect(Path(folder) / "unconditional", manifest, ranks, encode_none)
    return Prompts(folder, teacher, ranks.device)


# --- ODE pairs ------------------------------------------------------------------------------------


class Pairs(Rows):
    """ODE pairs.

    Raises BadInput if they are of another model, or differ from what the user asked for.
    """

    def __init__(self, folder, teacher, device="cpu", resolution=None, frames=None, guidance=None):
        super().__init__(folder, "pairs", teacher, device)
        self.shape = tuple(self.manifest["shape"])  # of one latent
        # Their embeddings' folder, or a text file: what read_prompts takes.
        self.prompts = self.folder / self.manifest["prompts"]
        made_with = self.manifest["guidance"]
        wanted = self.shape
        if resolution or frames:
            wanted = teacher.latent_shape(resolution, frames)
        require(
            wanted == self.shape,
            f"{folder} holds latents of shape {self.shape}, "
            f"but --resolution and --frames ask for {wanted}",
        )
        require(
            guidance in (None, made_with),
            f"{folder} was made with guidance {made_with}, not {guidance}: it is in the pairs",
        )

    def check_text(self, prompts):
        """Raises BadInput unless these, found by read_prompts, are what the pairs were made of."""
        same = prompts.sha256 == self.manifest["text_sha256"]
        require(same, f"{self.prompts} are not the prompts that {self.folder} was made of")

    def batch(self, numbers, prompts):
        """(x_T float32 (B, ...), x_0 float32 (B, ...), conditioning {name: (B, ...)})."""
        rows = self[numbers]
        return rows["x_T"], rows["x_0"], prompts[rows["prompt"].tolist()]


def pairs_shape(folder):
    """The shape of one latent of a folder of pairs. Raises BadInput where there are none."""
    return tuple(read_manifest(folder, "pairs", "shape")["shape"])


def collect_pairs(cfg, teacher, ranks):
    """Teacher samples with the noise they came from: x_T ~ N(0, I), x_0 by the PF-ODE with CFG.

    Pair i has prompt i mod n. Raises BadInput if they do not fit, or cfg.out holds others.
    """
    shape = teacher.latent_shape(cfg.resolution, cfg.frames)
    schedule = teacher.schedule_at(shape)
    guidance = teacher.guidance if cfg.guidance is None else cfg.guidance
    row = 2 * FLOAT32 * prod(shape)  # bytes of a pair
    check_room(cfg.out, "pairs", cfg.count, cfg.shard_size, row, ranks)
    beside = f"{cfg.out.rstrip('/')}-prompts"
    found = read_prompts(cfg.prompts, teacher, beside, ranks, cfg.embed)
    out = Path(cfg.out).absolute()
    if not (out / "manifest.json").exists():
        claim(out)  # before prompts are encoded
    if cfg.embed == "live":
        there = ranks.first(lambda: copied(found, Path(f"{beside}.txt")))
        # Not sharded: the ranks' shards are of different lengths.
        prompts = LivePrompts(teacher, found, ranks.device, ranks.frozen_dtype)
    else:
        prompts = encode_prompts(teacher, found, beside, ranks)
        there = prompts.folder
    manifest = {
        "kind": "pairs",
        "model": teacher.name,
        "weights_sha256": teacher.weights_sha256,
        "solver": "first-order PF-ODE: DDIM, or Euler on a flow",
        "steps": cfg.steps,
        "guidance": guidance,
        "seed": cfg.seed,
        "shape": list(shape),
        "dtype": "float32",
        "prompts": os.path.relpath(there, out),
        "text_sha256": found.sha256,
        "count": cfg.count,
        "shard_size": cfg.shard_size,
    }

    @cache
    def denoiser():
        found = load_denoiser(teacher, ranks.device, ranks.frozen_dtype)
        return found.requires_grad_(False)

    @torch.no_grad()
    def make_some(rows):
        cond = prompts[[i % len(prompts) for i in rows]]
        uncond = prompts.unconditional(len(rows))
        guided = with_guidance(denoiser(), cond, uncond, guidance)
        x_T = Draw((cfg.seed, STAGE), rows, ranks.device).normal(shape)  # (B, ...) float32
        return x_T, teacher_sample(guided, schedule, x_T, cfg.steps)

    def make(rows):
        starts = range(0, len(rows), cfg.batch_size)
        made = [make_some(rows[at : at + cfg.batch_size]) for at in starts]
        return {
            "x_T": torch.cat([x_T for x_T, _ in made]),
            "x_0": torch.cat([x_0 for _, x_0 in made]),
            "prompt": torch.tensor([i % len(prompts) for i in rows]),
        }

    collect(cfg.out, manifest, ranks, make)


def copied(lines, path):
    """The text file `path`, a copy of these Lines' file. Raises BadInput if it holds others."""
    if path.exists():
        require(Lines(path).sha256 == lines.sha256, f"{path} holds other prompts")
    else:
        with aside(path) as partial:
            shutil.copyfile(lines.path, partial)
    return path


def teacher_steps(model):
    """In how many steps the teacher of this name makes a pair where no flag says otherwise."""
    return recipes.PAIRS.get(model, {}).get("steps", PairsConfig.steps)


@dataclass
class EncodeConfig(TeacherConfig):
    """Settings of `encode`."""

    prompts: str = option(PROMPTS, "UTF-8 text file, one prompt a line", "what to make")
    out: str = option("out/prompts", "folder to write", "what to make")
    batch_size: int = option(
        ENCODED, "prompts encoded together, and stored in one shard", "storage"
    )
    RECIPES: ClassVar = recipes.ENCODE


@dataclass
class PairsConfig(TeacherConfig):
    """Settings of `pairs`."""

    prompts: str = option(
        PROMPTS, "UTF-8 text file, one prompt a line, or a folder made by `encode`", "what to make"
    )
    out: str = option("out/pairs", "folder to write", "what to make")
    count: int = option(
        64,
        "number of pairs; prompts are used again, with other noise, where it is more than theirs; "
        "pairs that are in --out already stay",
        "what to make",
    )
    steps: int = option(50, "PF-ODE steps of the teacher", "what to make")
    guidance: float | None = option(
        None,
        "CFG scale w in u + w (c - u), or what FLUX is told; default: the stock pipeline's for the "
        "model",
        "what to make",
    )
    seed: int = option(0, "of the noise; pair i depends on seed and i alone", "what to make")
    resolution: str | None = option(
        None, "pixels, 1024 or 480x720 (height x width); default: the model's own", "what to make"
    )
    frames: int | None = option(None, "video frames; default: the model's own", "what to make")
    embed: Literal["cached", "live"] = EMBED
    batch_size: int = option(8, "pairs sampled together on a rank", "storage")
    shard_size: int = option(32, "pairs in a file", "storage")
    RECIPES: ClassVar = recipes.PAIRS


def encode(cfg):
    at_least(1, cfg, "batch_size")
    require(not Path(cfg.prompts).is_dir(), f"--prompts {cfg.prompts}: a folder, not a text file")
    teacher = load_teacher(cfg.model, cfg.random_init)
    ranks = Ranks()
    prompts = read_prompts(cfg.prompts, teacher, cfg.out, ranks, shard_size=cfg.batch_size)
    encode_prompts(teacher, prompts, cfg.out, ranks, shard_size=cfg.batch_size)


def pairs(cfg):
    at_least(1, cfg, "count", "steps", "batch_size", "shard_size", "frames")
    at_least(0, cfg, "seed", "guidance")
    teacher = load_teacher(cfg.model, cfg.random_init)
    collect_pairs(cfg, teacher, Ranks())


if __name__ == "__main__":
    commands = {"encode": (encode, EncodeConfig), "pairs": (pairs, PairsConfig)}
    subcommand(commands, "data.py", __doc__)
