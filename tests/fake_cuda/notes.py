"""What is noted while a script runs: phases, and of which types everything is.

The project's functions are wrapped where they are defined, before the scripts import them by name.
"""

import linecache
from collections import Counter
from functools import wraps

import diffusers
import numpy as np
import torch
from files import header_bytes
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from watch import lines_of

import families
import families.base
import models
import ode
import runtime.curves
import runtime.files
import runtime.folder
import runtime.optimize
import runtime.ranks
import runtime.sheets


class Notes:
    """Of one run, which `watch` sees. Counters are of what was seen, in words."""

    def __init__(self, watch):
        self.watch = watch
        self.names = {}  # {id of a Denoiser: its role}
        self.owners = {}  # {id of a parameter that is trained: its role}
        self.held = {}  # {network: its bytes on this device}
        self.parameters = Counter()
        self.buffers = Counter()
        self.gradients = Counter()
        self.times = Counter()
        self.conditions = Counter()  # what the roles are shown of a prompt
        self.encoders = Counter()  # of text: their parameters and buffers
        self.iterations = []
        self.pictured = None  # bytes there, right after the last picture
        self.most = None  # after so many the run is left

    def as_json(self):
        counted = ("parameters", "buffers", "gradients", "times", "conditions", "encoders")
        return {
            **{name: sorted(getattr(self, name)) for name in counted},
            "reduced": sorted(self.watch.reduced),
            "held": self.held,
            "iterations": self.iterations,
            "pictured": self.pictured,
            "end": figures(self.watch),
            "rounds": self.watch.rounds,
        }


class Enough(Exception):
    """Leaves a run of which no more is to be seen."""


now = None  # the Notes of the run that is on


def figures(watch):
    """What has been since watch.clear(), in json's terms."""
    return {
        "waits": dict(watch.waits),
        "copies": dict(watch.copies),
        "peak": watch.peak,
        "peaks": dict(watch.peaks),
        "left": watch.now,
    }


def install():
    families.load_teacher = outside(families.load_teacher)
    runtime.ranks.init_device_mesh = outside(runtime.ranks.init_device_mesh)
    models.make_roles = noting_roles(models.make_roles)
    runtime.optimize.step = noting_step(runtime.optimize.step)
    wrap(models.Denoiser, "__call__", role_phase)
    wrap(models.LatentDiscriminator, "features", lambda *args: "features of the discriminator")
    wrap(models.PixelDiscriminator, "features", pixel_phase)
    wrap(models.Discriminator, "logits", lambda *args: "heads")
    vaes = ("AutoencoderKL", "AutoencoderKLCogVideoX", "AutoencoderKLWan")
    for kind in vaes:
        wrap(getattr(diffusers, kind), "decode", vae_phase)
    wrap(torch.Tensor, "backward", backward_phase)
    ode.Draw.__init__ = beginning_a_round(ode.Draw.__init__)
    for name in ("save", "finish", "restore"):
        wrap(runtime.folder.Run, name, lambda *args, name=name, **kwargs: name)
    for name in ("draw", "batch"):
        wrap(runtime.sheets.Sheets, name, lambda *args, **kwargs: "picture")
        drawn = getattr(runtime.sheets.Sheets, name)
        setattr(runtime.sheets.Sheets, name, noting_what_stays(drawn))
    runtime.folder.Run.save_rows = of_all_ranks(runtime.folder.Run.save_rows)
    hashes = runtime.folder.hashes
    runtime.folder.hashes = lambda folder, rank, world: hashes(folder)
    record = runtime.folder.Run.record
    runtime.folder.Run.record = noting_record(record)
    families.base.Family.text_pipeline = noting_encoders(families.base.Family.text_pipeline)
    note_conditions()
    # Where time enters a network, and where there it becomes sines.
    note_times(models.Denoiser, "a role", lambda x_t=None, t=None, *args, **kwargs: t)
    note_times(diffusers.models.embeddings.Timesteps, "an embedding", lambda t: t)
    # What would look at values.
    runtime.files.file_sha256 = of_headers(runtime.files.file_sha256)
    runtime.files.tensors_sha256 = lambda tensors: " ".join(sorted(tensors))
    families.base.file_sha256 = runtime.folder.file_sha256 = runtime.files.file_sha256
    runtime.sheets.decoded = black
    runtime.sheets.IMAGES = runtime.sheets.VIDEOS = 1  # they cost the teacher's passes
    runtime.curves.draw = lambda folders, path: None  # a log's picture has no tensors


def black(family, vae, latents):
    """Decodes, and shows none of it: a fake has no values."""
    device = next(vae.parameters()).device
    for one in latents.split(1):
        family.decode(vae, one.to(device))
    return np.zeros((len(latents), 1, 8, 8, 3), np.uint8)


def outside(plain):
    """For what needs a scheduler's numbers, not fakes."""

    @wraps(plain)
    def inside(*args, **kwargs):
        with unset_fake_temporarily():
            return plain(*args, **kwargs)

    return inside


def of_headers(sha256):
    def short(path):
        header = header_bytes(path)
        return sha256(path) if header is None else header.hex()

    return short


def of_all_ranks(save_rows):
    """A checkpoint has the rows of the ranks that are not there, too."""

    def rows_of(rank, sharing):
        def own(x):
            each = -(-len(x) // sharing)  # rounded up, as FSDP cuts
            rows = range(len(x))[rank * each : (rank + 1) * each]
            return torch.empty(len(rows), *x.shape[1:])

        return lambda x: own(x) if isinstance(x, DTensor) else x.detach()

    def saving(self, *args):
        sums = save_rows(self, *args)
        own = runtime.folder.own
        for rank in range(1, self.ranks.sharing):
            self.ranks.rank = rank
            runtime.folder.own = rows_of(rank, self.ranks.sharing)
            sums |= save_rows(self, *args)
        self.ranks.rank, runtime.folder.own = 0, own
        return sums

    return saving


# --- Phases ---------------------------------------------------------------------------------------


def wrap(owner, name, phase_of):
    """Let owner.name(...) be the phase phase_of(its arguments)."""
    plain = getattr(owner, name)

    @wraps(plain)
    def inside(*args, **kwargs):
        if now is None:
            return plain(*args, **kwargs)
        watch, phase = now.watch, phase_of(*args, **kwargs)
        with watch.phase(phase):
            out = plain(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                x.register_hook(lambda gradient: watch.back_to(phase.rpartition(" of ")[2]))
        return out

    setattr(owner, name, inside)


def noting_what_stays(drawn):
    """What is there after a picture, while the run goes on."""

    @wraps(drawn)
    def inside(*args, **kwargs):
        drawn(*args, **kwargs)
        now.pictured = now.watch.now

    return inside


def role_phase(role, *args, **kwargs):
    """Inside a discriminator, or another role, it stays that."""
    phase = now.watch.phases[-1]
    if phase.startswith(("forward", "features")):
        return phase
    return f"forward of {now.names.get(id(role), 'teacher')}"


def pixel_phase(discriminator, images):
    now.held["pixel backbone"] = bytes_of(discriminator.backbone.parameters())
    return "features of the pixel discriminator"


def vae_phase(vae, *args, **kwargs):
    if "picture" not in now.watch.phases:  # for that it is loaded, and dropped again
        now.held["VAE"] = bytes_of(vae.parameters())
    return "VAE"


def backward_phase(*args, **kwargs):
    """Named by whose loss it is, as the line of a script says that asks for it."""
    for file, line, name in lines_of("project"):
        if name not in ("learn", "backward"):
            loss = linecache.getline(file, line).strip().removeprefix("learn(")
            return f"backward of {LOSSES[loss.split()[0].rstrip(')')]}"


LOSSES = {
    "loss_g": "the generator",
    "loss_d": "the heads",
    "loss": "the fake score",
    "loss_mse": "the regression",
}


def beginning_a_round(init):
    """Random numbers are a micro-batch's first step."""

    @wraps(init)
    def beginning(*args, **kwargs):
        if now is not None:
            now.watch.rounds.append((now.watch.now, Counter()))
        init(*args, **kwargs)

    return beginning


def noting_record(record):
    @wraps(record)
    def noting(self, *args, **kwargs):
        with now.watch.phase("log row"):
            record(self, *args, **kwargs)
        now.iterations.append(figures(now.watch))
        now.watch.clear()
        if len(now.iterations) == now.most:
            raise Enough

    return noting


# --- Types ----------------------------------------------------------------------------------------


def kind_of(x):
    return f"{str(x.dtype).removeprefix('torch.')} on {x.device}"


def bytes_of(tensors):
    """Of this rank's parts."""
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(x.nbytes for x in parts)


def noting_roles(make_roles):
    @wraps(make_roles)
    def noting(family, roles, *args, **kwargs):
        teacher, *trained = made = make_roles(family, roles, *args, **kwargs)
        for name, role in zip(roles, trained, strict=True):
            now.owners |= {id(p): name for p in role.own_parameters().values()}
        frozen = [p for p in teacher.net.parameters() if id(p) not in now.owners]
        buffers = {}  # LoRA's roles share theirs
        for name, role in zip(("teacher", *roles), made, strict=True):
            now.names[id(role)] = name
            for b in role.net.buffers():
                buffers[id(b)] = b
                now.buffers[f"{name}: {kind_of(b)}"] += 1
        now.held |= {"teacher": bytes_of(frozen), "buffers": bytes_of(buffers.values())}
        return made

    return noting


def noting_step(step):
    @wraps(step)
    def noting(optimizer, clip):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        network = now.owners.get(id(parameters[0]), "heads")
        now.held[network] = bytes_of(parameters)
        for p in parameters:
            now.parameters[f"{network}: {kind_of(p)}"] += 1
            gradient = "none" if p.grad is None else kind_of(p.grad)
            now.gradients[f"{network}: {gradient}"] += 1
        with now.watch.phase(f"step of {network}"):
            return step(optimizer, clip)

    return noting


def note_times(owner, who, time_of):
    plain = owner.__call__

    @wraps(plain)
    def noting(self, *args, **kwargs):
        t = time_of(*args, **kwargs)
        if now is not None and t is not None:  # FSDP settles what it shards by a call without
            now.times[f"{who}: {kind_of(t)}"] += 1
        return plain(self, *args, **kwargs)

    owner.__call__ = noting


def note_conditions():
    plain = models.Denoiser.__call__

    @wraps(plain)
    def noting(self, *args, **kwargs):
        if now is not None and args:  # FSDP settles what it shards by a call without
            now.conditions.update(f"{name}: {kind_of(c)}" for name, c in args[2].items())
        return plain(self, *args, **kwargs)

    models.Denoiser.__call__ = noting


def noting_encoders(text_pipeline):
    @wraps(text_pipeline)
    def noting(self, device, dtype, mesh=None):
        pipe = text_pipeline(self, device, dtype, mesh)
        if now is None or pipe is None:
            return pipe
        encoders = {n: m for n, m in pipe.components.items() if n.startswith("text_encoder")}
        for name, encoder in encoders.items():
            for p in encoder.parameters():
                parts = "its part, " if isinstance(p, DTensor) else ""
                now.encoders[f"{name}: {parts}{kind_of(p)}"] += 1
        if mesh:  # they stay
            each = [bytes_of(encoder.parameters()) for encoder in encoders.values()]
            now.held["text encoders"] = sum(each)
        return pipe

    return noting
