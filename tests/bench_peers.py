"""This project beside its peers' own code: gradient, sampler, export, the cost of an update.

    python tests/bench_peers.py --dmd2 CHECKOUT --fastgen CHECKOUT --json peers.json

CHECKOUT is your own clone of github.com/tianweiy/DMD2 or github.com/NVlabs/FastGen, read and run
where it lies: nothing of theirs is in this project. Written for the commits below (WRITTEN_FOR);
another of the same layout is measured too, and the table names the one it found. Without a clone
the cost table has this project alone.

All on tiny-sdxl with the same weights, noise, times and prompts, in float32 on one thread of a CPU:

gradient  of `adm.py --loss dmd`, and each peer's own, on the same inputs.
sampler   of four steps, what training feeds the student, and what the exported pipeline gives.
cost      of one generator update of a one-step student with all that its method does for it, in
          passes and in CPU time. The methods take turns in one process, and a ratio is the median
          over the turns: seconds on another day, or beside other jobs, are not comparable.

What is not theirs. Prompts are encoded once, on all sides, as this project caches them. DMD2's
Trainer is made without its __init__, which opens wandb and a data set: its train_one_step runs, on
latents of noise for real images, which cost the same. Both peers' GAN heads are for the 1280
channels of SDXL's middle block: DMD2's are built here, at this one's 16, as it has them for a map
of 8 x 8, FastGen's are its own class at that width. FastGen always recomputes activations: it is
measured so, and with that off. Packages of theirs that are not installed and only load data,
log or score are replaced while they are imported by modules whose functions refuse to be called
(STUBS). FastGen needs `pip install hydra-core omegaconf attrs loguru`, and both peers peft.
"""

import os

os.environ.update(HF_HUB_OFFLINE="1", LOCAL_FILES_ONLY="true", CUDA_VISIBLE_DEVICES="")
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import huggingface_hub
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from diffusers.optimization import get_scheduler
from torch import nn

import adm
from data import repeated
from families import load_teacher
from families.export import export_pipeline
from models import LatentDiscriminator, frozen, load_denoiser, make_roles
from ode import Draw, student_input, student_sample
from runtime.files import write_json
from runtime.flags import option, parser_of
from runtime.optimize import backward, make_optimizers, step
from runtime.script import parse, run
from runtime.settings import BadInput, at_least, require

os.environ.setdefault("HF_HOME", huggingface_hub.constants.HF_HOME)  # FastGen asks for it
torch.set_num_threads(1)

PROMPTS = ["a red fox", "two dogs on a hill", "a bowl of soup", "a letter"]
B = len(PROMPTS)
GUIDANCE = 8.0  # both peers' for SDXL
WARM_UP = 3  # turns that are not counted


@dataclass
class Config:
    """What to compare with."""

    dmd2: str | None = option(None, "your clone of DMD2; default: not compared")
    fastgen: str | None = option(None, "your clone of FastGen; default: not compared")
    repeats: int = option(17, "turns of each method that are timed")
    json: str | None = option(None, "file to write all figures to; default: none")


# --- Their checkouts ------------------------------------------------------------------------------

WRITTEN_FOR = {
    "DMD2": "8d8fa55633d47cfb81bbc7a892e7248f9518763f",
    "FastGen": "34f30e8ff1a563555fc0c7d59f1c1409dacd8af2",
}
LAYOUT = {  # of a checkout: what is called here, by file
    "DMD2": {
        "main/sd_guidance.py": ["compute_distribution_matching_loss", "compute_loss_fake"],
        "main/sd_unified_model.py": ["prepare_denoising_data", "SDUniModel"],
        "main/train_sd.py": ["train_one_step", "parse_args"],
        "main/sdxl/test_folder_sdxl.py": ["sample"],
    },
    "FastGen": {
        "fastgen/methods/distribution_matching/dmd2.py": ["single_train_step", "DMD2Model"],
        "fastgen/methods/model.py": ["generator_fn", "optimizers_schedulers_step"],
        "fastgen/networks/SDXL/network.py": ["StableDiffusionXL", "build_condition_input"],
        "fastgen/networks/noise_schedule.py": ["SDXLNoiseSchedule", "get_t_list"],
        "fastgen/networks/discriminators.py": ["Discriminator_SDXL"],
        "fastgen/configs/experiments/SDXL/config_dmd2.py": ["create_config"],
    },
}
MODULES = {
    "DMD2": ["main.sd_unified_model", "main.train_sd", "main.sdxl.test_folder_sdxl"],
    "FastGen": ["fastgen.configs.experiments.SDXL.config_dmd2", "fastgen.networks.SDXL.network"],
}
STUBS = {"wandb", "lmdb", "imageio", "av", "boto3", "einops", "ftfy", "timm", "webdataset"}
STUBS |= {
    "pandas",
    "torchvision",
    "main.coco_eval",
}  # the latter is DMD2's own: FID and CLIP scores


def commit_of(name, checkout):
    """The commit of a checkout, or "no commit". Raises BadInput where it is none of this peer."""
    folder = Path(checkout)
    require(folder.is_dir(), f"--{name.lower()} {checkout}: no such folder")
    asked = ["git", "--git-dir", str(folder / ".git"), "rev-parse", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "no commit"
    for file, names in LAYOUT[name].items():
        path = folder / file
        text = path.read_text() if path.is_file() else ""
        for wanted in names:
            there = f"def {wanted}(" in text or f"class {wanted}(" in text
            written = f"written for {name} {WRITTEN_FOR[name][:9]}"
            why = f"{file} has no {wanted}"
            require(there, f"--{name.lower()} {checkout}: {why}; {written}, this is {found[:9]}")
    return found


class Stubs:
    """Finds the modules `names` and what is below them: whatever is asked of one refuses to run."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path, target=None):
        if any(name == stub or name.startswith(stub + ".") for stub in self.names):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)

        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)

            def refuse(*args, **kwargs):
                raise RuntimeError(f"{spec.name}.{name} is a stub: it plays no part here")

            return type(name, (), {"__init__": refuse})

        module.__getattr__ = attribute
        return module

    def exec_module(self, module):
        pass


def imported(name, checkout):
    """A peer's modules, by the last part of their names. Raises BadInput for a missing package."""
    stubs = Stubs({stub for stub in STUBS if "." in stub or not importlib.util.find_spec(stub)})
    sys.path.append(str(Path(checkout).resolve()))
    sys.meta_path.insert(0, stubs)
    try:
        modules = [importlib.import_module(module) for module in MODULES[name]]
    except ImportError as e:
        raise BadInput(f"--{name.lower()} {checkout}: {e} (pip install; see --help)") from None
    finally:
        sys.meta_path.remove(stubs)
        for module in [*sys.modules.values()]:
            if getattr(module, "__loader__", None) is stubs:
                del sys.modules[module.__name__]  # nobody else shall take it for installed
    return types.SimpleNamespace(**{m.__name__.rpartition(".")[2]: m for m in modules})


# --- The common ground ----------------------------------------------------------------------------


class Ground(NamedTuple):
    """What all have in common."""

    family: object
    cond: dict  # {"prompt_embeds": (B, tokens, d), "pooled": (B, d)}
    uncond: dict  # the same, zeros
    states: dict  # {"teacher", "student", "fake": weights}
    shape: tuple  # of one latent
    pixels: int  # width and height of a picture

    @property
    def folder(self):
        return str(self.family.folder)


def common_ground():
    """tiny-sdxl, with a student and a fake score that have left the teacher, as in training."""
    family = load_teacher("tiny-sdxl")
    with torch.no_grad():
        pipe = family.text_pipeline()
        cond = family.encode(pipe, PROMPTS)
        uncond = repeated(family.unconditional(pipe), B)
        generator = torch.Generator().manual_seed(5)
        states = {}
        for role in ("teacher", "student", "fake"):
            net = load_denoiser(family).net
            for name, p in net.named_parameters():
                if role != "teacher":
                    noise = torch.randn(p.shape, generator=generator)
                    p += 0.05 * p.abs().mean() * noise
                # Random weights hardly hear the prompt.
                if any(part in name for part in ("add_embedding", "attn2.to_v", "attn2.to_out")):
                    p *= 4
            states[role] = net.state_dict()
    shape = family.latent_shape(None, None)
    return Ground(family, cond, uncond, states, shape, family.vae_scale * shape[-1])


class Recorded(Draw):
    """Whole times, as DMD2's, and a memory of what was drawn."""

    def __init__(self, seed):
        super().__init__((seed,), range(B))
        self.normals, self.times = [], []

    def normal(self, shape):
        self.normals.append(super().normal(shape))
        return self.normals[-1]

    def uniform(self, low, high):
        self.times.append(super().uniform(low, high).round().clamp(max=999))
        return self.times[-1]


@contextlib.contextmanager
def prescribed(times, normals):
    """Inside, a peer draws these: torch.randint gives `times` in turn, randn_like `normals`."""
    times, normals = iter(times), iter(normals)

    def randint(*args, **kwargs):
        return next(times)

    def randn_like(x, **kwargs):
        return next(normals).to(x.dtype)

    with patch("torch.randint", randint), patch("torch.randn_like", randn_like):
        yield


def difference(a, b):
    """max |a − b| / max |b| of two tensors, or two lists of them."""
    if not torch.is_tensor(a):
        a = torch.cat([x.flatten() for x in a if x is not None])
        b = torch.cat([x.flatten() for x in b if x is not None])
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max())


# --- This project ---------------------------------------------------------------------------------


class Ours:
    """adm.py's players on the common ground, and one update of its student."""

    def __init__(self, ground, *flags):
        own = ["--model", "tiny-sdxl", "--batch-size", B, "--student-steps", 1, "--head-width", 8]
        own += ["--guidance", GUIDANCE, *flags]
        cfg = parse(parser_of(adm.Config), adm.Config, [str(word) for word in own])
        family = ground.family
        checkpoint = cfg.gradient_checkpointing
        roles = make_roles(family, ("student", "fake"), gradient_checkpointing=checkpoint)
        for role, state in zip(roles, ground.states.values(), strict=True):
            role.net.load_state_dict(state)
        teacher, student, fake = roles
        discriminator = LatentDiscriminator(teacher, cfg.head_width)
        times = family.schedule.timesteps(1)[:-1]  # (1,)
        schedules = (family.schedule, family.schedule)
        how = (times, ground.shape, cfg.guidance)
        self.net = adm.Players(teacher, student, fake, discriminator, *schedules, *how)
        networks = {
            "student": student.own_parameters(),
            "fake": fake.own_parameters(),
            "heads": dict(discriminator.heads.named_parameters()),
        }
        rates = {"student": cfg.lr_student, "fake": cfg.lr_fake, "heads": cfg.lr_heads}
        self.optimizers = make_optimizers(networks, rates, cfg)
        for optimizer in self.optimizers.values():
            optimizer.skipped = []
        self.cfg, self.ground, self.iteration = cfg, ground, 0
        self.unets = {"student": student.net, "teacher": teacher.net, "fake": fake.net}

    def update(self):
        """An iteration of adm.main, without log, pictures and checkpoints."""
        ground, cfg = self.ground, self.cfg

        def learn(loss):
            if loss.requires_grad:
                backward(loss)

        for r in range(cfg.ttur):
            algorithm, trained = adm.round_of(cfg.loss, r)
            draw = Draw((0, adm.STAGE, self.iteration, r), range(B))
            with frozen(*([self.net.student] if r else [])):
                algorithm(self.net, cfg, draw, ground.cond, ground.uncond, 0, learn)
            for name in (*["student"] * (r == 0), *trained):
                step(self.optimizers[name], cfg.clip)
                self.optimizers[name].skipped.clear()
        self.iteration += 1


# --- DMD2 -----------------------------------------------------------------------------------------


class DMD2:
    """Its unified model on the common ground, and one generator update by its own Trainer.

    ratio: guidance updates for each generator update, 5 in its recipes. gan: with its GAN loss.
    """

    def __init__(self, theirs, ground, ratio=5, gan=True, guidance=GUIDANCE, steps=1):
        words = ["--sdxl", "--model_id", ground.folder, "--wandb_name", "none"]
        words += ["--wandb_iters", 10**9, "--initialie_generator", "--batch_size", B]
        words += ["--resolution", ground.pixels, "--latent_resolution", ground.shape[-1]]
        words += ["--real_guidance_scale", guidance, "--dfake_gen_update_ratio", ratio]
        words += ["--generator_lr", 5e-7, "--guidance_lr", 5e-7]
        if gan:  # as in its recipes for SDXL
            words += ["--cls_on_clean_image", "--gen_cls_loss", "--gen_cls_loss_weight", 5e-3]
            words += ["--guidance_cls_loss_weight", 1e-2]
            words += ["--diffusion_gan", "--diffusion_gan_max_timestep", 1000]
        if steps > 1:
            words += ["--denoising", "--backward_simulation", "--num_denoising_step", steps]
        with patch.object(sys, "argv", ["train_sd.py", *map(str, words)]):
            args = theirs.train_sd.parse_args()
        accelerator = Accelerator(cpu=True)
        with contextlib.redirect_stdout(None):
            model = theirs.sd_unified_model.SDUniModel(args, accelerator)
        guide = model.guidance_model
        unets = (model.feedforward_model, guide.real_unet, guide.fake_unet)
        self.unets = dict(zip(("student", "teacher", "fake"), unets, strict=True))
        for role, unet in self.unets.items():
            unet.load_state_dict(ground.states[role])
        cond = ground.cond
        model.text_encoder.forward = lambda batch: (cond["prompt_embeds"], cond["pooled"])
        time_ids = model.add_time_ids.repeat(B, 1)  # (B, 6)
        self.added = {"time_ids": time_ids, "text_embeds": cond["pooled"]}
        self.not_added = {"time_ids": time_ids, "text_embeds": ground.uncond["pooled"]}
        self.ground, self.model, self.guide = ground, model, guide
        self.trainer = self.made_trainer(theirs, args, accelerator)

    def made_trainer(self, theirs, args, accelerator):
        """Its Trainer with what train_one_step reads, as its __init__ would have set it."""
        trainer = theirs.train_sd.Trainer.__new__(theirs.train_sd.Trainer)
        vars(trainer).update(vars(args))
        trainer.args, trainer.accelerator, trainer.model = args, accelerator, self.model
        if args.cls_on_clean_image:
            self.guide.cls_pred_branch = head_of_dmd2(self.unets["fake"])
        noise = torch.randn(B, *self.ground.shape)  # (B, ...)
        batch = {"images": noise, "text_input_ids_one": None, "text_input_ids_two": None}
        for name in ("dataloader", "guidance_dataloader", "real_dataloader"):
            setattr(trainer, name, iter(lambda: dict(batch), None))
        for name, part in (("generator", self.model.feedforward_model), ("guidance", self.guide)):
            learns = [p for p in part.parameters() if p.requires_grad]
            rate = getattr(args, f"{name}_lr")
            optimizer = torch.optim.AdamW(learns, rate, betas=(0.9, 0.999), weight_decay=0.01)
            warm_up = {"num_warmup_steps": args.warmup_step}
            scheduler = get_scheduler("constant_with_warmup", optimizer, **warm_up)
            setattr(trainer, f"optimizer_{name}", optimizer)
            setattr(trainer, f"scheduler_{name}", scheduler)
        trainer.step = args.dfake_gen_update_ratio  # its step 0 draws pictures
        return trainer

    def update(self):
        for _ in range(self.trainer.dfake_gen_update_ratio):
            self.trainer.train_one_step()
            self.trainer.step += 1


def head_of_dmd2(unet):
    """A GAN head in its arrangement, for the middle block of this UNet, a map of 8 x 8."""
    channels = unet.config.block_out_channels[-1]

    def layer(stride, padding):
        convolution = nn.Conv2d(channels, channels, 4, stride, padding)
        return [convolution, nn.GroupNorm(channels // 4, channels), nn.SiLU()]

    return nn.Sequential(*layer(2, 1), *layer(4, 0), nn.Conv2d(channels, 1, 1))


# --- FastGen --------------------------------------------------------------------------------------


class FastGen:
    """Its DMD2Model on the common ground, and one student update as its trainer makes it.

    freq: iterations of which one is the student's, the others fake score's and discriminator's.
    """

    def __init__(self, theirs, ground, freq=5, gan=True, guidance=GUIDANCE, recompute=True):
        from fastgen.callbacks.grad_clip import GradClipCallback
        from fastgen.methods import DMD2Model
        from fastgen.networks import noise_schedule
        from fastgen.networks.discriminators import Discriminator_SDXL
        from fastgen.utils import LazyCall
        from fastgen.utils.logging_utils import set_log_level

        set_log_level("ERROR")
        size = ground.shape[-1]
        config = theirs.config_dmd2.create_config().model
        config.net = LazyCall(theirs.network.StableDiffusionXL)(model_id=ground.folder)
        config.discriminator = LazyCall(Discriminator_SDXL)(
            feature_indices=None,
            all_res=[size // 2, size // 4, size // 4, size // 4],
            in_channels=ground.family.config.block_out_channels[-1],
        )
        config.input_shape, config.device, config.precision = list(ground.shape), "cpu", "float32"
        config.pretrained_model_path, config.student_sample_steps = "", 1
        config.student_update_freq, config.guidance_scale = freq, guidance
        if not gan:
            config.gan_loss_weight_gen = 0.0
        its_own = DDIMScheduler.from_pretrained(ground.folder, subfolder="scheduler")
        with patch.object(noise_schedule, "DDIMScheduler") as scheduler:  # theirs asks the hub
            scheduler.from_pretrained.return_value = its_own
            self.model = DMD2Model(config)
            self.model.on_train_begin()
            self.model.init_optimizers()
        self.clip = GradClipCallback(grad_norm=10.0, model_key="net")
        networks = (self.model.net, self.model.teacher, self.model.fake_score)
        self.unets = {}
        for role, network in zip(("student", "teacher", "fake"), networks, strict=True):
            network.unet.load_state_dict(ground.states[role], strict=False)  # has a layer more
            network.add_time_ids = network.build_condition_input(ground.pixels)
            if not recompute:
                network.unet.disable_gradient_checkpointing()
            self.unets[role] = network.unet
        noise = torch.randn(B, *ground.shape)  # (B, ...)
        cond, uncond = list(ground.cond.values()), list(ground.uncond.values())
        self.data = {"real": noise, "condition": cond, "neg_condition": uncond}
        self.freq, self.iteration = freq, freq

    def update(self):
        model = self.model
        for _ in range(self.freq):
            loss, _ = model.single_train_step(self.data, self.iteration)
            model.grad_scaler.scale(loss["total_loss"]).backward()
            self.clip.on_optimizer_step_begin(model, self.iteration)
            model.optimizers_schedulers_step(self.iteration)
            model.optimizers_zero_grad(self.iteration)
            self.iteration += 1


# --- (a) The gradient of --loss dmd ---------------------------------------------------------------


def gradients(ground, w, dmd2, fastgen):
    """{what: difference} at guidance w, of ours to theirs, on the same inputs."""
    ours = Ours(ground, "--loss", "dmd", "--guidance", w)
    draw, learned = Recorded(0), []
    how = (ours.net, ours.cfg, draw, ground.cond, ground.uncond)
    _, latents = adm.dmd_round(*how, 0, learned.append)
    loss, loss_fake = learned
    x0_hat, x0_real, x0_fake, _ = latents.values()  # (B, ...) each, and t
    weights = [*ours.unets["student"].parameters()]
    own_x, *own = torch.autograd.grad(loss, [x0_hat, *weights])
    x_T, eps, eps_fake = draw.normals  # (B, ...) each
    t, t_fake = (times.long() for times in draw.times)  # (B,) each
    found = {}

    if dmd2:
        peer = DMD2(dmd2, ground, gan=False, guidance=w)
        x = x0_hat.detach().requires_grad_()
        texts = (ground.cond["prompt_embeds"], ground.uncond["prompt_embeds"])
        with prescribed([t], [eps]):
            losses, _ = peer.guide.compute_distribution_matching_loss(
                x, *texts, peer.added, peer.not_added
            )
        (its_x,) = torch.autograd.grad(losses["loss_dm"], x)
        found["DMD2: gradient in x̂_0"] = difference(own_x, its_x)
        with prescribed([t], [eps]):
            losses, _ = peer.model(x_T, {}, None, generator_turn=True)
        its = torch.autograd.grad(losses["loss_dm"], [*peer.unets["student"].parameters()])
        found["DMD2: gradient in the student's weights"] = difference(own, its)
        with prescribed([t_fake], [eps_fake]):
            losses, _ = peer.guide.compute_loss_fake(x0_hat, *texts, peer.added, peer.not_added)
        its_fake = losses["loss_fake_mean"]
        found["DMD2: loss of the fake score"] = difference(loss_fake.detach(), its_fake.detach())

    if fastgen:
        peer = FastGen(fastgen, ground, gan=False, guidance=w)
        schedule = peer.model.net.noise_scheduler
        start = torch.full((B,), schedule.max_t, dtype=schedule.t_precision)  # (B,)
        times = (start, t.to(schedule.t_precision) / 1000)
        texts = {"condition": peer.data["condition"], "neg_condition": peer.data["neg_condition"]}
        peer.model._setup_grad_requirements(0)
        losses, _ = peer.model._student_update_step(x_T, *times, eps, peer.data, **texts)
        names = dict(ours.unets["student"].named_parameters())
        its_weights = [p for name, p in peer.unets["student"].named_parameters() if name in names]
        its = torch.autograd.grad(losses["total_loss"], its_weights)
        found["FastGen: gradient in the student's weights"] = difference(own, its)
    return found


# --- (b) Samplers and export ----------------------------------------------------------------------

STEPS = 4


def samplers(ground, dmd2, fastgen):
    """{what: difference} of ours to theirs, one student in four steps."""
    family, schedule = ground.family, ground.family.schedule
    times = schedule.timesteps(STEPS)[:-1]  # (STEPS,)
    student = load_denoiser(family)
    student.net.load_state_dict(ground.states["student"])
    draw = Recorded(1)
    x_T, *noise = [draw.normal(ground.shape) for _ in range(STEPS + 2)]  # (B, ...) each

    def predict(x, t):
        return student(x, t, ground.cond)[0]

    def walk(k):
        """What the student is shown at its step k, (B, ...)."""
        return student_input(predict, schedule, x_T, times, k, partial_noise())

    def partial_noise():
        fresh = iter(noise)
        return lambda: next(fresh)

    found = {}
    with torch.no_grad():
        own = student_sample(predict, schedule, x_T, times, partial_noise())  # (B, ...)
        if dmd2:
            peer = DMD2(dmd2, ground, gan=False, steps=STEPS)
            found |= samplers_of_dmd2(dmd2, peer, own, [walk(k) for k in range(STEPS)], x_T, noise)
        if fastgen:
            peer = FastGen(fastgen, ground, gan=False)
            found |= sampler_of_fastgen(peer, own, times, x_T, noise)
    if dmd2:
        found |= exports(ground, student, schedule)
    return found


def samplers_of_dmd2(theirs, peer, own, own_inputs, x_T, noise):
    """own: our sample (B, ...); own_inputs: what our student is shown at each step."""
    kept = []

    def decode(latents, return_dict):
        kept.append(latents)
        return [latents]

    config = types.SimpleNamespace(scaling_factor=1.0)
    vae = types.SimpleNamespace(config=config, decode=decode)
    unet, scheduler = peer.unets["student"], peer.model.noise_scheduler
    text = peer.ground.cond["prompt_embeds"]
    how = {"device": "cpu", "num_step": STEPS}
    with prescribed([], noise):
        theirs.test_folder_sdxl.sample(x_T, peer.added, unet, vae, scheduler, text, **how)
    found = {"DMD2: sample in four steps": difference(own, kept[0])}
    worst = 0.0
    for k, own_input in enumerate(own_inputs):
        # Its walk of k steps draws k noises and drops the last: what it was handed is used.
        chain, last = noise[: max(k - 1, 0)], noise[max(k - 1, 0)]
        if k == 0:
            last = x_T
        step_drawn = [torch.zeros(B, dtype=torch.long), torch.tensor([k])]
        with prescribed(step_drawn, [x_T, *chain, x_T]):
            *_, its_input = peer.model.prepare_denoising_data({}, None, last)
        worst = max(worst, difference(own_input, its_input))
    return found | {"DMD2: what the student is trained on, worst of four steps": worst}


def sampler_of_fastgen(peer, own, times, x_T, noise):
    """At our times from pure noise, and at its own."""
    cond = peer.data["condition"]
    schedule = peer.model.net.noise_scheduler
    same = [*(float(t) / 1000 for t in times), 0.0]
    sigma = schedule.sigmas[-1]  # its walk starts at σ_T ε

    def sample(start, t_list):
        with prescribed([], noise):
            return peer.model.generator_fn(
                peer.model.net, start, STEPS, t_list=t_list, condition=cond
            )

    name = "FastGen: sample in four steps"
    return {
        f"{name}, at our times and from ε": difference(own, sample(x_T / sigma.float(), same)),
        f"{name}, at its own, from σ_T ε": difference(own, sample(x_T, None)),
    }


def exports(ground, student, schedule):
    """Our exported pipeline beside the same UNet as DMD2's README has it sampled."""
    with tempfile.TemporaryDirectory() as folder:
        export_pipeline(student, schedule, STEPS, ground.shape, f"{folder}/pipeline")
        ours = DiffusionPipeline.from_pretrained(f"{folder}/pipeline")
        its = DiffusionPipeline.from_pretrained(ground.folder, unet=student.net)
        its.scheduler = LCMScheduler.from_config(its.scheduler.config)

        def latents(pipe, **how):
            pipe.set_progress_bar_config(disable=True)
            size = {"height": ground.pixels, "width": ground.pixels, "output_type": "latent"}
            generator = torch.Generator().manual_seed(7)
            how |= {"num_inference_steps": STEPS, "generator": generator}
            return pipe(PROMPTS, **size, **how).images

        own = latents(ours, guidance_scale=1.0)
        listed = latents(its, guidance_scale=0, timesteps=[999, 749, 499, 249])
        unlisted = latents(its, guidance_scale=0)
    return {
        "DMD2: pipeline, theirs with `timesteps=`": difference(own, listed),
        "DMD2: pipeline, theirs without": difference(own, unlisted),
    }


# --- (c) The cost of one generator update ---------------------------------------------------------


def methods(ground, dmd2, fastgen):
    """{label: what has update() and unets}"""
    found = {
        "ADM": Ours(ground),
        "ADM --gradient-checkpointing": Ours(ground, "--gradient-checkpointing"),
        "ADM --fake-gradient straight-through": Ours(ground, "--fake-gradient", "straight-through"),
        "ADM --ttur 5": Ours(ground, "--ttur", 5),
        "DMD": Ours(ground, "--loss", "dmd"),
        "DMD --ttur 5": Ours(ground, "--loss", "dmd", "--ttur", 5),
    }
    if dmd2:
        found |= {
            "DMD2's recipe: ratio 5, GAN": DMD2(dmd2, ground),
            "DMD2, ratio 1, GAN": DMD2(dmd2, ground, ratio=1),
            "DMD2, ratio 5": DMD2(dmd2, ground, gan=False),
            "DMD2, ratio 1": DMD2(dmd2, ground, ratio=1, gan=False),
        }
    if fastgen:
        plain = {"recompute": False}
        found |= {
            "FastGen's recipe: 1 in 5, GAN, recomputing": FastGen(fastgen, ground),
            "FastGen, 1 in 5, GAN": FastGen(fastgen, ground, **plain),
            "FastGen, 1 in 2, GAN": FastGen(fastgen, ground, freq=2, **plain),
            "FastGen, 1 in 5": FastGen(fastgen, ground, gan=False, **plain),
            "FastGen, 1 in 2": FastGen(fastgen, ground, freq=2, gan=False, **plain),
        }
    return found


def passes(method):
    """{role: {"forward", "backward": (whole, part)}} of one update, in batches of B samples.

    A pass in part ends at the middle block, where the heads tap it. Activations that are computed
    again do not count.
    """
    counts = Counter()

    def watch(layer, *key):
        def count(module, args, out):
            share = len(out) / B
            counts[(*key, "forward")] += share
            if out.requires_grad:
                out.register_hook(lambda gradient: counts.update({(*key, "backward"): share}))

        return layer.register_forward_hook(count)

    hooks = []
    for role, unet in method.unets.items():
        hooks += [watch(unet.conv_in, role, "first"), watch(unet.conv_out, role, "last")]
    method.update()
    for hook in hooks:
        hook.remove()
    found = {}
    for role in method.unets:
        found[role] = {}
        for way in ("forward", "backward"):
            whole = counts[role, "last", way]
            found[role][way] = (whole, counts[role, "first", way] - whole)
    return found


def cost(found, repeats):
    """{label: {"seconds": [of each turn], "ratio": quartiles, to ADM's of that turn, "passes"}}"""
    seconds = {label: [] for label in found}
    labels = list(found)
    for turn in range(WARM_UP + repeats):
        first = turn % len(labels)
        for label in labels[first:] + labels[:first]:
            began = time.process_time()  # of this process: other jobs share the machine
            found[label].update()
            if turn >= WARM_UP:
                seconds[label].append(time.process_time() - began)
    rows = {}
    for label, method in found.items():
        ratios = [s / adm_s for s, adm_s in zip(seconds[label], seconds["ADM"], strict=True)]
        quartiles = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75]))  # (3,)
        ratio = quartiles.tolist()
        rows[label] = {"seconds": seconds[label], "ratio": ratio, "passes": passes(method)}
    return rows


# --- Tables ---------------------------------------------------------------------------------------


def shown_passes(counts):
    """3 whole ones and 2 in part as "3 + 2p"."""
    whole, part = (f"{n:g}" for n in counts)
    if part == "0":
        return whole
    return f"{part}p" if whole == "0" else f"{whole} + {part}p"


def tables(results):
    lines = [f"{name}: commit {commit}" for name, commit in results["commits"].items()]
    if results["differences"]:
        lines += ["", "| max abs. difference / max abs. of theirs | |", "| --- | --- |"]
        lines += [f"| {what} | {value:.1e} |" for what, value in results["differences"].items()]
    roles = ("student", "teacher", "fake")
    columns = ["one generator update", "CPU time (quartiles)", "ms"]
    columns += ["forward: " + ", ".join(roles), "backward"]
    lines += ["", f"| {' | '.join(columns)} |", "| --- | --- | --- | --- | --- |"]
    for label, row in results["cost"].items():
        low, ratio, high = row["ratio"]
        ms = 1000 * statistics.median(row["seconds"])
        cells = [label, f"{ratio:.2f} ({low:.2f} to {high:.2f})", f"{ms:.0f}"]
        for way in ("forward", "backward"):
            cells.append(", ".join(shown_passes(row["passes"][role][way]) for role in roles))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(cfg):
    at_least(1, cfg, "repeats")
    if cfg.json:
        parent = Path(cfg.json).resolve().parent
        require(parent.is_dir(), f"--json {cfg.json}: there is no folder {parent}")
    asked = {"DMD2": cfg.dmd2, "FastGen": cfg.fastgen}
    asked = {name: checkout for name, checkout in asked.items() if checkout}
    commits = {name: commit_of(name, checkout) for name, checkout in asked.items()}
    with contextlib.redirect_stdout(sys.stderr):  # theirs log as they go
        results = {"commits": commits} | measured(asked, cfg.repeats)
    if cfg.json:
        write_json(cfg.json, results)
    print(tables(results))


def measured(asked, repeats):
    """{"differences", "cost"}, beside the peers asked for, {name: checkout}."""
    torch.manual_seed(0)
    ground = common_ground()  # what libraries import lazily is imported before the stubs
    theirs = {name: imported(name, checkout) for name, checkout in asked.items()}
    peers = (theirs.get("DMD2"), theirs.get("FastGen"))
    differences = {}
    if theirs:
        for w in (GUIDANCE, 1.0):
            for what, value in gradients(ground, w, *peers).items():
                differences[f"{what}, w = {w:g}"] = value
        differences |= samplers(ground, *peers)
    return {"differences": differences, "cost": cost(methods(ground, *peers), repeats)}


if __name__ == "__main__":
    run(main, Config, description=__doc__)
