"""Rows of tensors on disk, in shards: made once, gone on with after a kill, read row by row.

All is safetensors and json, written aside and renamed: a file is whole or absent.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from runtime.files import claim, read_json, write_json, write_tensors
from runtime.settings import require

SHARD = "{:06d}.safetensors"
OPEN = 1024  # shards at a time: each is mapped, and a process may have 65,530 maps, often

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


def check_room(folder, kind, count, shard_size, row_bytes, ranks, advice=""):
    """Say how many rows are to be in `folder`, and how large the new ones are, row_bytes each.

    Raises BadInput, which ends in `advice`, where they do not fit on the disk.
    """
    out = Path(folder).absolute()
    shards = [out / SHARD.format(shard) for shard in range(shards_of(shard_size, count))]
    new = max(0, count - sum(rows_in(shard) for shard in shards))
    gigabytes = new * row_bytes / 1e9
    there = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(there).free / 1e9
    if ranks.main:
        about = f"{count} {kind} in {folder}, {new} of them new"
        print(f"{about}: {gigabytes:.3g} GB, {free:.3g} GB free", flush=True)
    need = f"{gigabytes:.3g} GB are needed, {free:.3g} free"
    require(gigabytes <= free, f"{new} new {kind} do not fit in {folder}: {need}{advice}")


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
        self.files = {}  # {shard: its open file}, at most OPEN of them
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
        """The file of a shard, which stays open until OPEN others have been."""
        if shard not in self.files:
            if len(self.files) == OPEN:
                first = next(iter(self.files))
                del self.files[first]
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
