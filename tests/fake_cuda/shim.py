"""Builds fake_cuda.cpp, and loads it before torch. Imports nothing of torch itself."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
# The shim overrides methods of torch's C++ classes and the harness replaces private functions:
# both are right for this version, and are to be looked at again for another.
TORCH = "2.13.0"


def torch_folder():
    return Path(importlib.util.find_spec("torch").origin).parent


def other_torch():
    """What is wrong with the installed torch, in one line, or None."""
    found = importlib.metadata.version("torch").partition("+")[0]
    if found == TORCH:
        return None
    where = "tests/fake_cuda/shim.py"
    return f"fake CUDA is written for torch {TORCH}, not {found}: look it over, then set {where}"


def compiler():
    """The path of a C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def build(folder):
    """The shared library in `folder`, built if it is not there for this source and torch."""
    key = SOURCE.read_bytes() + importlib.metadata.version("torch").encode()
    library = Path(folder) / f"fake_cuda-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if library.exists():
        return library
    include = torch_folder() / "include"
    partial = library.with_suffix(".partial")
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-isystem", str(include)]
    command = [compiler(), *flags, str(SOURCE), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(library)
    return library


def load(library):
    """Make the fake device known to torch, which must not be imported yet."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
