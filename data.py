"""Prompts, their cached embeddings and ODE pairs: what training reads, and commands to make it.

    python data.py encode --model sd3 --prompts prompts.txt --out out/prompts-sd3
    torchrun --nproc_per_node=8 data.py pairs --model sdxl --count 10000 --out out/pairs-sdxl

Text encoders never sit in memory beside the four networks. All is safetensors and json, written
aside and renamed: a file is whole or absent. A second call of either command continues the first.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from families import load_teacher, recipes
from models import load_denoiser
from ode import Draw, teacher_sample, with_guidance
from runtime.configs import TeacherConfig
from runtime.files import claim, read_json, write_json, write_tensors
from runtime.flags import option
from runtime.ranks import Ranks
from runtime.script import subcommand
from runtime.settings import BadInput, at_least, require
from runtime.sheets import IMAGES

PROMPTS = str(Path(__file__).with_name("prompts.txt"))  # a few hundred, written for this project


SHARD = "{:06d}.safetensors"

STAGE = 0  # of the seeds' keys: other random numbers than in adp.py (1) and adm.py (2)

# Where things lie and what they are called, not what they are: another call may say it otherwise.
# "texts", the first prompts as captions of pictures, follow from the hash, and are missing in
# folders of earlier versions.
SPELLING = ("model", "prompts", "texts")


def rows_in(path):
    """How many rows a shard holds: none where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as f:
            names = f.keys()
            return min((f.get_slice(name).get_shape()[0] for name in names), default=0)
    except (OSError, SafetensorError):
        return 0


def shards_of(size, count):
    """How many shards hold `count` rows, `size` a shard; the last may be shorter."""
    return -(-count // size)


def shard_rows(shard, size, count):
    """The row numbers of a shard, `size` a shard and `count` in all."""
    return range(shard * size, min((shard + 1) * size, count))


def collect(folder, manifest, ranks, make):
    """Fill `folder` with shards of what make(rows) returns, {name: (len(rows), ...)}.

    The tensors of these row numbers depend on what `manifest` says. Each rank makes every world-th
    shard; rows of an earlier call stay, also where that was for fewer. Raises BadInput if the
    folder holds others, or more.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    size = manifest["shard_size"]
    count = manifest["count"]
    unfinished = {**manifest, "complete": False}
    fresh = not path.exists()
    if fresh:
        claim(folder)
    ranks.barrier()  # every rank has looked before one writes
    if fresh and ranks.main:
        write_json(path, unfinished)
    ranks.barrier()
    found = read_json(path, manifest["kind"], "count")
    check_same(found, manifest, folder)
    ranks.barrier()
    if found["count"] < count and ranks.main:
        write_json(path, unfinished)
    ranks.barrier()  # before a row is added, nobody takes the folder for finished
    with tqdm(total=count, unit="", desc=manifest["kind"], disable=ranks.no_bar) as bar:
        for shard in range(ranks.rank, shards_of(size, count), ranks.world):
            complete(folder / SHARD.format(shard), shard_rows(shard, size, count), make)
            bar.update(min(ranks.world * size, count - bar.n))  # the others keep pace
    ranks.barrier()
    if ranks.main:
        write_json(path, {**manifest, "complete": True})
    ranks.barrier()


def check_same(found, manifest, folder):
    """Raises BadInput unless the manifest `found` is of these settings, and of no more rows."""
    differing = [k for k in manifest if k != "count" and found.get(k) != manifest[k]]
    said = "; ".join(f"{k}: {found.get(k)} there, {manifest[k]} now" for k in differing)
    require(
        set(differing) <= set(SPELLING),
        f"{folder} holds {found.get('kind')} of other settings ({said})",
    )
    require(
        found["count"] <= manifest["count"],
        f"{folder} holds {found['count']} {manifest['kind']}, more than {manifest['count']}: "
        "for fewer choose another --out",
    )


def complete(path, rows, make):
    """Make what the shard at `path` lacks of these rows: all, or after a smaller count the last."""
    there = rows_in(path)
    if there >= len(rows):
        return
    tensors = make(rows[there:])
    if there > 0:
        before = load_file(path)
        tensors = {name: torch.cat([before[name], x.cpu()]) for name, x in tensors.items()}
    write_tensors(path, tensors)


def to_device(x, device):
    """x there. The host goes on at once; from memory that is not pinned it would wait its turn."""
    if torch.device(device).type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def read_manifest(folder, kind, *keys):
    """The manifest of a collection of this kind. Raises BadInput for another, or without `keys`."""
    path = Path(folder) / "manifest.json"
    found = read_json(path, kind, "kind")["kind"]
    require(found == kind, f"{folder} holds {found}, not {kind}")
    return read_json(path, kind, *keys)


class Rows:
    """A finished collection, read row by row: rows[numbers] is {name: (B, ...)}.

    Floating point comes as float32 on `device`. Raises BadInput unless the collection is of `kind`,
    whole, and of this teacher.
    """

    def __init__(self, folder, kind, teacher, device="cpu"):
        self.folder = Path(folder)
        self.device = device
        self.files = {}  # {shard: its open file}
        keys = ("count", "shard_size", "complete", "weights_sha256", "text_sha256", "model")
        m = read_manifest(folder, kind, *keys)
        self.manifest = m
        require(
            m["weights_sha256"] == teacher.weights_sha256,
            f"{folder} was made with {m['model']}, not with {teacher.name}",
        )
        size = m["shard_size"]
        count = m["count"]
        shards = range(shards_of(size, count))
        expected = [len(shard_rows(shard, size, count)) for shard in shards]
        found = [rows_in(self.folder / SHARD.format(shard)) for shard in shards]
        require(
            m["complete"] and found == expected,
            f"{folder} is half-written or damaged: the command that made it will mend it",
        )

    def __len__(self):
        return self.manifest["count"]

    def content(self):
        """What the rows are, wherever and however they are stored: a part of the manifest."""
        stored = (*SPELLING, "shard_size", "complete")
        return {k: v for k, v in self.manifest.items() if k not in stored}

    def opened(self, shard):
        """The file of a shard, which stays open."""
        if shard not in self.files:
            self.files[shard] = safe_open(self.folder / SHARD.format(shard), "pt")
        return self.files[shard]

    def __getitem__(self, rows):
        picked = []  # {name: (1, ...)} of each row
        for row in rows:
            shard, i = divmod(row, self.manifest["shard_size"])
            f = self.opened(shard)
            names = f.keys()
            picked.append({name: f.get_slice(name)[i : i + 1] for name in names})
        joined = {}
        for name in picked[0]:
            x = torch.cat([one[name] for one in picked])  # (B, ...)
            # Whole numbers, a pair's prompt, stay here: a row to look up. The cache may be bf16.
            if x.is_floating_point():
                x = to_device(x, self.device).float()
            joined[name] = x
        return joined


def read_prompts(path):
    """Lines of a plain UTF-8 text file, blank ones left out. Raises BadInput."""
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise BadInput(f"cannot read prompts from {path}: {reason}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    require(prompts, f"{path} holds no prompts: one a line is expected")
    return prompts


class Prompts(Rows):
    """Cached conditioning: prompts[numbers] is {name: (B, ...)}."""

    def __init__(self, folder, teacher, device="cpu"):
        super().__init__(folder, "prompts", teacher, device)
        self.none = Rows(self.folder / "unconditional", "prompts", teacher, device)[[0]]

    def texts(self, numbers):
        """What these prompts say, for captions: their numbers, where the folder does not tell."""
        known = self.manifest.get("texts", [])
        return [known[i] if i < len(known) else f"prompt {i + 1}" for i in numbers]

    def unconditional(self, batch_size):
        """The conditioning of no prompt, {name: (batch_size, ...)}."""
        return {name: c.expand(batch_size, *c.shape[1:]) for name, c in self.none.items()}


def text_sha256(path, teacher):
    """Hash of the prompts' text, the same for a text file and a folder that `encode` made of it.

    Raises BadInput for one that cannot be used, before anything is written.
    """
    if Path(path).is_dir():
        return Prompts(path, teacher).manifest["text_sha256"]
    text = "\n".join(read_prompts(path))
    return hashlib.sha256(text.encode()).hexdigest()


def encode_prompts(teacher, path, folder, ranks, batch_size=32):
    """The Prompts of a text file `path`, encoded into `folder`.

    Or of a folder `path` that `encode` made, used as it is. Raises BadInput for either.
    """
    if Path(path).is_dir():
        return Prompts(path, teacher, ranks.device)
    prompts = read_prompts(path)
    # Text encoders are loaded once, if any are needed at all.
    pipe = cache(lambda: teacher.text_pipeline(ranks.device, ranks.frozen_dtype))
    common = {
        "kind": "prompts",
        "model": teacher.name,
        "weights_sha256": teacher.weights_sha256,
        "dtype": str(ranks.frozen_dtype),
        "text_sha256": text_sha256(path, teacher),
    }

    def encode_some(rows):
        return teacher.encode(pipe(), [prompts[i] for i in rows])

    def encode_none(rows):
        return teacher.unconditional(pipe())

    with torch.no_grad():
        texts = [prompt[:200] for prompt in prompts[:IMAGES]]
        manifest = {**common, "count": len(prompts), "shard_size": batch_size, "texts": texts}
        collect(folder, manifest, ranks, encode_some)
        manifest = {**common, "count": 1, "shard_size": 1}
        collect(Path(folder) / "unconditional", manifest, ranks, encode_none)
    return Prompts(folder, teacher, ranks.device)


class Pairs(Rows):
    """ODE pairs and their prompts.

    Raises BadInput if they are of another model, or differ from what the user asked for.
    """

    def __init__(self, folder, teacher, device="cpu", resolution=None, frames=None, guidance=None):
        super().__init__(folder, "pairs", teacher, device)
        self.shape = tuple(self.manifest["shape"])  # of one latent
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
        self.prompts = Prompts(self.folder / self.manifest["prompts"], teacher, device)

    def batch(self, numbers):
        """(x_T float32 (B, ...), x_0 float32 (B, ...), conditioning {name: (B, ...)})."""
        rows = self[numbers]
        return rows["x_T"], rows["x_0"], self.prompts[rows["prompt"].tolist()]


def pairs_shape(folder):
    """The shape of one latent of a folder of pairs. Raises BadInput where there are none."""
    return tuple(read_manifest(folder, "pairs", "shape")["shape"])


def check_room(cfg, shape, ranks):
    """Say how many pairs of this shape are to be made, and how large they are.

    Raises BadInput where they do not fit on the disk.
    """
    out = Path(cfg.out).absolute()
    shards = [out / SHARD.format(shard) for shard in range(shards_of(cfg.shard_size, cfg.count))]
    new = max(0, cfg.count - sum(rows_in(shard) for shard in shards))
    gigabytes = new * 2 * 4 * float(np.prod(shape)) / 1e9  # two float32 latents a pair
    there = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(there).free / 1e9
    if ranks.main:
        size = "x".join(map(str, shape))
        print(
            f"{cfg.count} pairs of {size} in {cfg.out}, {new} of them new: "
            f"{gigabytes:.3g} GB, {free:.3g} GB free",
            flush=True,
        )
    require(gigabytes <= free, f"{new} new pairs do not fit in {cfg.out}")


def collect_pairs(cfg, teacher, ranks):
    """Teacher samples with the noise they came from: x_T ~ N(0, I), x_0 by the PF-ODE with CFG.

    Pair i has prompt i mod n. Raises BadInput if they do not fit, or cfg.out holds others.
    """
    shape = teacher.latent_shape(cfg.resolution, cfg.frames)
    guidance = teacher.guidance if cfg.guidance is None else cfg.guidance
    check_room(cfg, shape, ranks)
    text = text_sha256(cfg.prompts, teacher)
    out = Path(cfg.out).absolute()
    if not (out / "manifest.json").exists():
        claim(out)  # before prompts are encoded
    prompts = encode_prompts(teacher, cfg.prompts, f"{cfg.out.rstrip('/')}-prompts", ranks)
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
        "prompts": os.path.relpath(prompts.folder, out),
        "text_sha256": text,
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
        return x_T, teacher_sample(guided, teacher.schedule, x_T, cfg.steps)

    def make(rows):
        starts = range(0, len(rows), cfg.batch_size)
        made = [make_some(rows[at : at + cfg.batch_size]) for at in starts]
        return {
            "x_T": torch.cat([x_T for x_T, _ in made]),
            "x_0": torch.cat([x_0 for _, x_0 in made]),
            "prompt": torch.tensor([i % len(prompts) for i in rows]),
        }

    collect(cfg.out, manifest, ranks, make)


def teacher_steps(model):
    """In how many steps the teacher of this name makes a pair where no flag says otherwise."""
    return recipes.PAIRS.get(model, {}).get("steps", PairsConfig.steps)


@dataclass
class EncodeConfig(TeacherConfig):
    """Settings of `encode`."""

    prompts: str = option(PROMPTS, "UTF-8 text file, one prompt a line", "what to make")
    out: str = option("out/prompts", "folder to write", "what to make")
    batch_size: int = option(32, "prompts encoded together, and stored in one shard", "storage")
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
        "CFG scale w in u + w (c - u); default: the stock pipeline's for the model",
        "what to make",
    )
    seed: int = option(0, "of the noise; pair i depends on seed and i alone", "what to make")
    resolution: str | None = option(
        None, "pixels, 1024 or 480x720 (height x width); default: the model's own", "what to make"
    )
    frames: int | None = option(None, "video frames; default: the model's own", "what to make")
    batch_size: int = option(8, "pairs sampled together on a rank", "storage")
    shard_size: int = option(32, "pairs in a file", "storage")
    RECIPES: ClassVar = recipes.PAIRS


def encode(cfg):
    at_least(1, cfg, "batch_size")
    teacher = load_teacher(cfg.model, cfg.random_init)
    encode_prompts(teacher, cfg.prompts, cfg.out, Ranks(), cfg.batch_size)


def pairs(cfg):
    at_least(1, cfg, "count", "steps", "batch_size", "shard_size", "frames")
    at_least(0, cfg, "seed", "guidance")
    teacher = load_teacher(cfg.model, cfg.random_init)
    collect_pairs(cfg, teacher, Ranks())


if __name__ == "__main__":
    commands = {"encode": (encode, EncodeConfig), "pairs": (pairs, PairsConfig)}
    subcommand(commands, "data.py", __doc__)
