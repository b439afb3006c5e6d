"""safetensors files of fake tensors: a true header, and a hole where the values would be.

A checkpoint of many gigabytes then takes a few kilobytes and no time. Read inside FakeTensorMode,
any file gives fake tensors.
"""

import json
import os
import shutil
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
real_open = safetensors.safe_open
real_save = safetensors.torch.save_file
real_load = safetensors.torch.load_file
real_copy = shutil.copyfile


def install():
    """To be called before anybody imports these functions by name."""
    safetensors.safe_open = safetensors.torch.safe_open = File
    safetensors.torch.save_file = save_file
    safetensors.torch.load_file = load_file
    shutil.copyfile = copyfile


def save_file(tensors, path, metadata=None):
    if not any(isinstance(x, FakeTensor) for x in tensors.values()):
        return real_save(tensors, path, metadata)
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, x in tensors.items():
        begin, end = end, end + x.numel() * x.element_size()
        shape = list(x.shape)
        header[name] = {"dtype": NAMES[x.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_hole(path, text, end)


def write_hole(path, header, size):
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + size)


def copyfile(source, target, **options):
    """A hole stays one."""
    header = header_bytes(source)
    if header is None:
        return real_copy(source, target, **options)
    write_hole(target, header, os.stat(source).st_size - 8 - len(header))
    return target


def load_file(path, device="cpu"):
    if not active_fake_mode():
        return real_load(path, device)
    with File(path) as f:
        names = f.keys()  # as safe_open, it is no dictionary
        return {name: f.get_tensor(name).to(device) for name in names}


class File:
    """safe_open."""

    def __init__(self, path, *args, **kwargs):
        self.file = real_open(path, "pt")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def keys(self):
        return self.file.keys()

    def metadata(self):
        return self.file.metadata()

    def get_tensor(self, name):
        if not active_fake_mode():
            return self.file.get_tensor(name)
        return Slice(self.file.get_slice(name))[:]

    def get_slice(self, name):
        return Slice(self.file.get_slice(name))


class Slice:
    def __init__(self, part):
        self.part = part

    def get_shape(self):
        return self.part.get_shape()

    def get_dtype(self):
        return self.part.get_dtype()

    def __getitem__(self, rows):
        if not active_fake_mode():
            return self.part[rows]
        whole = torch.empty(self.get_shape(), dtype=TYPES[self.get_dtype()])
        return whole[rows] if whole.ndim else whole


def header_bytes(path):
    """The header of a file with a hole in it, or None: it says all there is."""
    path = Path(path)
    size = os.stat(path).st_size
    if path.suffix != ".safetensors" or os.stat(path).st_blocks * 512 >= size:
        return None
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        return f.read(length)
