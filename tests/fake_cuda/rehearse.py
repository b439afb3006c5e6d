"""The scripts on a GPU that is not there.

    python tests/fake_cuda/rehearse.py SHIM.so RUNS.json [--shallow]

Every tensor is fake, on a fake cuda:0: shapes, types, devices and storages are true, values are 0.
Networks of any size take no memory; --shallow ones have few layers, of full width. RUNS.json is a
list of

    {"name", "script": "adm", "adp" or "pairs", "words": [of its command line],
     "world": number of ranks, of which this is the first; 1 where it is not there}

For each a line of json on stdout: what went wrong, when the host waited, what lay in memory, and of
which types parameters, gradients and times were.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import shim

problem = shim.other_torch()
if problem:
    sys.exit(problem)
shim.load(sys.argv[1])

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import device
import files
import torch

torch.set_num_threads(1)
device.install()
files.install()

from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401  it registers them
from torch.testing._internal.distributed.fake_pg import FakeStore
from watch import Watch

import notes
from diffusers.models import model_loading_utils
from families import full
from runtime.script import run

notes.install()
model_loading_utils.set_module_tensor_to_device = device.set_by_slot

import adm
import adp
import data
import models

SCRIPTS = {
    "adm": (adm.main, adm.Config),
    "adp": (adp.main, adp.Config),
    "pairs": (data.pairs, data.PairsConfig),
}


def rehearse(script, words, world=1):
    """Run a script to its end; what was noted, and what went wrong."""
    watch = Watch()
    notes.now = notes.Notes(watch)
    FakeTensor.tolist = lambda x: watch.values_of(x)
    torch.cuda.max_memory_allocated = lambda *args: watch.peak
    torch.UntypedStorage.resize_ = lambda storage, size: watch.resize(storage, size)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    began = time.process_time()
    wrong = None
    try:
        with ranks_of(world), contextlib.redirect_stdout(sys.stderr), fakes, watch:
            run(*SCRIPTS[script], words, prog=f"{script}.py")
    except SystemExit as e:
        wrong = f"it ended with {e.code}"
    except Exception:
        wrong = traceback.format_exc()
    seconds = round(time.process_time() - began, 2)
    noted = notes.now.as_json()
    notes.now = None
    return {"error": wrong, "seconds": seconds, "peak": watch.peak, **noted}


@contextlib.contextmanager
def ranks_of(world):
    """As the first of `world` ranks, whose collectives do nothing."""
    before = dict(os.environ)
    if world > 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world))
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if dist.is_initialized():
            dist.destroy_process_group()


def make_shallow():
    """Of full width, with as many layers as it takes for each kind of them to be there."""
    for name, (kind, config) in full.DENOISERS.items():
        if "num_layers" in config:
            fewer = {"num_layers": 2}
        else:
            fewer = {
                "block_out_channels": (320, 640),
                "attention_head_dim": (5, 10),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 1),
                "layers_per_block": 1,
            }
        full.DENOISERS[name] = (kind, {**config, **fewer})
    fewer = {"num_hidden_layers": 4, "global_attn_indexes": (1, 3)}
    sam = models.transformers
    sam.SamVisionConfig = partial(sam.SamVisionConfig, **fewer)


def main():
    if "--shallow" in sys.argv:
        make_shallow()
    for spec in json.loads(Path(sys.argv[2]).read_text()):
        name = spec.pop("name")
        print(json.dumps({"name": name, **rehearse(**spec)}), flush=True)


if __name__ == "__main__":
    main()
