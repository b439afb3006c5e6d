"""Files that are whole or absent, json and safetensors, and hashes of what is in them."""

import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from runtime.settings import BadInput, require


def remove(path):
    """Delete a file, a link or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def aside(path):
    """A path to write a file or folder to: `path` itself is whole or absent.

    It becomes `path` when all went well, and is gone when not.
    """
    path = Path(path)
    partial = Path(f"{path}.partial")
    remove(partial)  # of a process that was killed
    try:
        yield partial
        if partial.is_dir():
            remove(path)  # a file is replaced in one go, a folder cannot be
        partial.replace(path)
    finally:
        remove(partial)


def file_sha256(path):
    """Hash of a file's bytes, which are mapped and not read into memory at once."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def tensors_sha256(tensors):
    """Hash of {name: tensor}: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_json(path, value):
    """Write a value as json, whole or not at all."""
    with aside(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path, what, *keys):
    """A json object that has these keys. Raises BadInput, naming `what` should have been there."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        return content | {key: content[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        problem = f"{path.name} is missing or damaged"
        raise BadInput(f"{path.parent} holds no {what}: {problem}") from None


def write_tensors(path, tensors):
    """Write {name: tensor} as safetensors, whole or not at all."""
    on_cpu = {name: x.contiguous().cpu() for name, x in tensors.items()}
    with aside(path) as partial:
        save_file(on_cpu, partial)


class Tensors:
    """The tensors of some safetensors files, read row by row: the files are mapped, not loaded.

    A name that several files have is one tensor, of which each has some rows, in the files' order.
    Raises OSError or SafetensorError for a file that cannot be opened.
    """

    def __init__(self, paths):
        self.parts = {}  # {name: [its slice of each file that has it]}
        for path in paths:
            file = safe_open(path, "pt")
            names = file.keys()
            for name in names:
                self.parts.setdefault(name, []).append(file.get_slice(name))

    def names(self):
        return self.parts.keys()

    def shape(self, name):
        first, *others = [part.get_shape() for part in self.parts[name]]
        if not first:  # a number, which each file has
            return torch.Size()
        rows = first[0] + sum(shape[0] for shape in others)
        return torch.Size([rows, *first[1:]])

    def read(self, name, rows=None):
        """A tensor's rows, a range, or all of it: (len(rows), ...) on the CPU, as it is stored."""
        parts = self.parts[name]
        if not parts[0].get_shape():
            return parts[0][...]  # ()
        rows = range(self.shape(name)[0]) if rows is None else rows
        found = []
        start = 0  # of this part among all rows
        for part in parts:
            stop = start + part.get_shape()[0]
            first = min(max(rows.start, start), stop)
            last = min(max(rows.stop, first), stop)
            found.append(part[first - start : last - start])
            start = stop
        return found[0] if len(found) == 1 else torch.cat(found)


def claim(folder):
    """Create `folder`, so that nothing of the user's is written over.

    Raises BadInput if it holds anything but what a killed process left, or cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = all(p.suffix == ".partial" for p in folder.iterdir())
        require(empty, f"{folder} is not empty: choose another --out")
    except OSError as e:
        raise BadInput(f"cannot create the folder {folder}: {e.strerror}") from None
