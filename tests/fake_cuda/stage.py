"""A script's run on the fake device, as the first of its ranks."""

import contextlib
import os
import sys
import time
import traceback
from functools import partial

import device
import notes
import torch
import whole
from diffusers.models import model_loading_utils
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401  it registers them
from torch.testing._internal.distributed.fake_pg import FakeStore
from watch import Watch

import adm
import adp
import data
import families.base
import models
from families import full
from runtime import sheets
from runtime.ranks import own
from runtime.script import run
from sizing import plan
from sizing.measure import with_blocks

torch.set_num_threads(1)
adm.teacher_steps = lambda model: 2  # of a sheet's teacher: fifty would show no more
plan.gpu_memory = lambda: None  # runs that do not fit are rehearsed too, and tell by how much
model_loading_utils.set_module_tensor_to_device = device.set_by_slot

REAL = dict(full.DENOISERS)
SAM = models.transformers.SamVisionConfig


@torch.no_grad()
def decode(cfg):
    """What a picture of a run takes beside the run: the VAE, one latent."""
    family = families.load_teacher(cfg.model, cfg.random_init)
    shape = family.latent_shape(cfg.resolution, cfg.frames)
    latent = torch.empty(1, *shape, device="cuda")
    family.decode(sheets.decoder(family, shape, latent.device), latent)


SCRIPTS = {
    "adm": (adm.main, adm.Config),
    "adp": (adp.main, adp.Config),
    "encode": (data.encode, data.EncodeConfig),
    "pairs": (data.pairs, data.PairsConfig),
    "decode": (decode, adm.Config),
}


def rehearse(script, words, world=1, blocks=None):
    """Run a script to its end; what was noted, and what went wrong.

    The script "folder" makes a model's whole folder: its words are the model's name and a path.
    blocks: of networks with so many, and of training the first iteration alone.
    """
    if blocks:
        of_depth(blocks)
    if script == "folder":
        whole.make(*words)
        return {"error": None}
    watch = Watch()
    notes.now = notes.Notes(watch)
    notes.now.most = 1 if blocks else None
    FakeTensor.tolist = lambda x: watch.values_of(x)
    device.Nothing.synchronize = torch.cuda.synchronize = lambda *args: watch.synchronized()
    torch.cuda.max_memory_allocated = lambda *args: watch.peak
    torch.UntypedStorage.resize_ = lambda storage, size: watch.resize(storage, size)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    began = time.process_time()
    wrong = None
    try:
        with ranks_of(world), contextlib.redirect_stdout(sys.stderr), fakes, watch:
            run(*SCRIPTS[script], words, prog=f"{script}.py")
    except notes.Enough:
        pass
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
        dist.all_gather_object = all_alike
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if dist.is_initialized():  # where the script ended before it did that itself
            dist.destroy_process_group()


def all_alike(found, mine):
    """What a rank says, all say."""
    found[:] = [mine] * len(found)


def of_depth(blocks):
    """Networks of full width from here on, with so many blocks; pairs are of any of them.

    SAM has all of its layers.
    """
    models.transformers.SamVisionConfig = SAM
    for name, (kind, config) in REAL.items():
        full.DENOISERS[name] = (kind, with_blocks(config, blocks))
    full.skeleton.cache_clear()
    families.base.Family.reader = lambda family, folder=None: lambda name, x: own(x)
    families.base.Family.sha256_of = lambda family, pipeline: "of any depth"


def make_shallow():
    """Of full width, with as many layers as it takes for each kind of them to be there."""
    for name, (kind, config) in full.DENOISERS.items():
        if "num_layers" in config:
            fewer = {"num_layers": 2, "num_single_layers": 2}
            fewer = {part: few for part, few in fewer.items() if part in config}
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
    full.text_encoders = of_two_layers(full.text_encoders)
    fewer = {"num_hidden_layers": 4, "global_attn_indexes": (1, 3)}
    sam = models.transformers
    sam.SamVisionConfig = partial(sam.SamVisionConfig, **fewer)


def of_two_layers(text_encoders):
    def shallow(name):
        found = text_encoders(name)
        for config in found.values():
            config.num_hidden_layers = 2  # of T5 that is another name of its num_layers
        return found

    return shallow
