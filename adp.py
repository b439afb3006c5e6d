"""Stage 1 of DMDX: Adversarial Distillation Pre-training (Lu et al., ICCV 2025, arXiv 2507.18569).

The student learns to jump along the teacher's ODE pairs (x_T, x_0): first by regression on the straight line's velocity, then
against two discriminators, D_τ1 on noised latents (heads on the frozen teacher) and D_τ2 on decoded images (heads on a frozen
SAM). That gives stage 2, adm.py, a student whose samples already overlap with the teacher's.

    python data.py pairs && python adp.py                                  # a small teacher of digits, offline, CPU: minutes
    torchrun --nproc_per_node=8 adp.py --model sdxl --pairs out/pairs-sdxl --batch-size 32 --iterations 10000 --out out/adp-sdxl

Expect loss_mse to fall and level out in the first phase, and both accuracies between 0.5 and 1 in the second. Whatever the
teacher predicts, the student predicts a flow from here on: config.json says so and the exported scheduler knows.
"""

import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
import transformers
from torch.optim import AdamW
from tqdm import tqdm

from data import OffloadedAdamW, Prompts, Ranks, Rows, Run, at_least, option, run, starting_point
from models import BadInput, Head2d, LatentDiscriminator, PixelDiscriminator, backward, follow
from models import frozen, load_teacher, make_roles, require, step, tensors_sha256
from ode import Draw, T, common, on_the_line, student_sample


@dataclass
class Config:
    model: str = option("digits", "teacher: digits, sdxl, sd3, sd3.5-large, cogvideox-2b, cogvideox-5b, tiny-… or a pipeline folder")
    random_init: bool = option(False, "random weights instead of the hub's, at full size, and noise for text embeddings")
    pairs: str = option("out/pairs", "folder made by `data.py pairs` with the same model")
    out: str = option("out/adp", "folder to write; must be empty, or a run to --resume")
    init: str = option("teacher", "where the student starts: teacher, or the folder of another adp.py run")
    iterations: int = option(50, "student updates in all")
    mse_iterations: int = option(25, "the first of them, by velocity regression (the paper does not say how many: ours)")
    batch_size: int = option(4, "global, whatever the number of ranks (ours)")
    seed: int = option(0, "of everything random")
    resolution: str | None = option(None, "pixels, 1024 or 480x720: checked against the pairs")
    frames: int | None = option(None, "video frames: checked against the pairs")
    guidance: float | None = option(None, "CFG scale: checked against the pairs, which have it in them")
    loss: Literal["adp", "mse"] = option("adp", "regression, then adversaries; or regression throughout (ablation A1)")
    schedule: Literal["cubic", "uniform"] = option("cubic", "where on the line the student trains (paper: cubic)")
    pixel: bool = option(True, "use the pixel discriminator, which needs the VAE decoder in memory")
    pixel_backbone: str | None = option(None, "its vision encoder, hub id or folder (DINOv2: ablation A2); default: "
                                              "facebook/sam-vit-base, for tiny teachers tiny-sam")
    lambda_latent: float = option(0.85, "λ_1, weight of the latent discriminator (paper: 0.85)")
    lambda_pixel: float = option(0.15, "λ_2, weight of the pixel discriminator (paper: 0.15)")
    head_width: int = option(256, "channels of the discriminators' heads (paper: 256)")
    student_steps: int = option(1, "steps of the exported student's sampler; ADP is made for 1")
    lora_rank: int = option(0, "train a LoRA adapter of this rank on the frozen teacher; 0: a full network")
    lr_student: float = option(1e-5, "learning rate of the student (ours)")
    lr_mse: float | None = option(None, "the student's in regression, which bears more than adversaries do; default: --lr-student (ours)")
    lr_heads: float = option(1e-4, "learning rate of the discriminators' heads (ours)")
    beta1: float = option(0.9, "AdamW's β1 (ours; peers use 0 or 0.9)")
    ema: float = option(0.0, "decay of an average of the student's weights, which is what is exported; 0: none (ours; paper: none)")
    clip: float = option(1.0, "gradient norm at which each network's update is clipped (ours)")
    accumulate: int = option(1, "micro-batches that the batch is split into: less memory, the same updates")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, more time")
    offload: bool = option(False, "keep AdamW's moments in main memory between steps: less GPU memory, more time")
    checkpoint_every: int = option(25, "iterations between checkpoints")
    keep_checkpoints: int = option(2, "how many of the last checkpoints stay")
    sample_every: int = option(25, "iterations between picture grids; 0: none")
    resume: bool = option(False, "continue the run in --out")
    DIGITS: ClassVar = {  # defaults with --model digits: see the README, what we learnt
        "iterations": 800, "mse_iterations": 600, "batch_size": 16, "head_width": 64, "lr_student": 3e-6, "lr_mse": 1e-4,
        "ema": 0.99, "checkpoint_every": 200, "sample_every": 200}


STAGE = 1  # of the seeds' keys: other random numbers than in adm.py (2) and data.py (0)
COLUMNS = ("loss_generator", "loss_discriminator", "loss_mse", "d_accuracy", "d_accuracy_pixel", "grad_norm_student",
           "grad_norm_heads", "x0_mean", "x0_std")


# --- Losses ----------------------------------------------------------------------------------------------------------
# Logits are lists of (B,) or (N,) float32, one a discriminator, with one weight λ each. Every loss is a scalar.


def line_times(u, schedule):
    """u ~ U[0, T], (B,), to the student's times (arXiv 2507.18569, ADP's schedule): cubic t = [1 − (u/T)³]·T, biased to noise, or uniform t = u."""
    return (1 - (u / T) ** 3) * T if schedule == "cubic" else u


def velocity_loss(v, x_0, x_T):
    """ADP's pre-training loss (arXiv 2507.18569), regression on the pairs' straight line as in rectified flow: E|v − (x_T − x_0)|²."""
    return F.mse_loss(v.float(), x_T.float() - x_0.float())


def discriminator_loss(real, fake, lambdas):
    """ADP's hinge (arXiv 2507.18569, the two discriminators weighted by λ_1, λ_2): Σ_i λ_i (E[max(0, 1 − D_i(real))] + E[max(0, 1 + D_i(fake))])."""
    return sum(w * (F.relu(1 - r).mean() + F.relu(1 + f).mean()) for w, r, f in zip(lambdas, real, fake, strict=True))


def generator_loss(fake, lambdas):
    """ADP's generator (arXiv 2507.18569, with the hinge above): −Σ_i λ_i E[D_i(fake)]."""
    return -sum(w * f.mean() for w, f in zip(lambdas, fake, strict=True))


# --- Training --------------------------------------------------------------------------------------------------------


def check(cfg):
    """Raises BadInput for settings without meaning, before anything is loaded or written."""
    at_least(1, cfg, "iterations", "batch_size", "student_steps", "accumulate")
    at_least(1, cfg, "checkpoint_every", "keep_checkpoints")
    at_least(0, cfg, "seed", "mse_iterations", "lora_rank", "guidance", "lambda_latent", "lambda_pixel", "sample_every")
    for name in ("lr_student", "lr_heads", "clip", *(["lr_mse"] if cfg.lr_mse is not None else [])):
        require(0 < getattr(cfg, name) < float("inf"), f"--{name.replace('_', '-')} {getattr(cfg, name)}: a positive number")
    for name in ("beta1", "ema"):
        require(0 <= getattr(cfg, name) < 1, f"--{name} {getattr(cfg, name)}: in [0, 1)")
    require(cfg.head_width >= 8 and cfg.head_width % 8 == 0, f"--head-width {cfg.head_width}: a multiple of 8")


def main(cfg):
    check(cfg)
    family, use_pixel = load_teacher(cfg.model, cfg.random_init), cfg.pixel and cfg.loss == "adp"
    if use_pixel:
        tiny = cfg.model.startswith(("tiny-", "digits"))
        backbone = load_pixel_backbone(cfg.pixel_backbone or ("tiny-sam" if tiny else "facebook/sam-vit-base"), cfg.random_init)
    ranks = Ranks()
    device, parts = ranks.device, ranks.mine(cfg.batch_size, cfg.accumulate)
    pairs = Pairs(cfg.pairs, family, device, cfg.resolution, cfg.frames, cfg.guidance)
    line = on_the_line(family.schedule)  # the student's process
    schedule = family.schedule  # the teacher's, on which the latent discriminator lives
    _, weights = starting_point(cfg.init, family, cfg.lora_rank)
    facts = {"pairs": pairs.content()}
    if use_pixel:
        facts["pixel_backbone"] = {"weights_sha256": tensors_sha256(backbone.state_dict())}
    here = Run("adp", cfg, ranks, family, line, cfg.student_steps, **facts)

    torch.manual_seed(cfg.seed)  # initial weights of the heads, and of LoRA adapters
    teacher, student = make_roles(
        family, ("student",), cfg.lora_rank, device, ranks.frozen_dtype, cfg.gradient_checkpointing, ranks.mesh)
    if weights:
        student.load(weights)
    times = line.timesteps(cfg.student_steps)[:-1].to(device)  # (steps,) of the exported sampler
    discriminators, lambdas = [LatentDiscriminator(teacher, cfg.head_width, ranks.mesh).to(device)], [cfg.lambda_latent]
    if use_pixel:
        vae = family.vae(device)
        if cfg.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        discriminators.append(PixelDiscriminator(backbone, cfg.head_width, ranks.mesh).to(device))
        lambdas.append(cfg.lambda_pixel)
    heads = torch.nn.ModuleList(d.heads for d in discriminators)

    networks = {"student": student.own_parameters(), "heads": dict(heads.named_parameters())}  # what trains; β2, decay as peers
    rates = {"student": cfg.lr_student, "heads": cfg.lr_heads}
    adamw = OffloadedAdamW if cfg.offload else AdamW
    optimizers = {name: adamw(networks[name].values(), rates[name], (cfg.beta1, 0.999), weight_decay=0.01, fused=True)
                  for name in networks}
    if cfg.ema:
        networks["ema"] = {name: p.detach().clone() for name, p in networks["student"].items()}
    first = here.restore(networks, optimizers)

    for iteration in tqdm(range(first, cfg.iterations), cfg.loss, cfg.iterations, initial=first, disable=ranks.no_bar):
        began, logs = time.perf_counter(), []
        regresses = cfg.loss == "mse" or iteration < cfg.mse_iterations
        for group in optimizers["student"].param_groups:
            group["lr"] = cfg.lr_mse if regresses and cfg.lr_mse else cfg.lr_student
        for samples in parts:  # micro-batches: gradients add up, and only then the networks step
            logs.append(log := dict.fromkeys(COLUMNS))
            draw = Draw((cfg.seed, STAGE, iteration), samples, device)
            x_T, x_0, cond = pairs.batch(draw.integers(len(pairs)))  # (B, ...) each

            # 1. The student's input on the pair's line, its velocity, its sample x̃_0.
            t = line_times(draw.uniform(0, T), cfg.schedule)  # (B,)
            x_t = line.add_noise(x_0, x_T, t)
            v = student(x_t, line.shown(t), cond)[0]
            x0_hat = line.to_x0_eps(x_t, v, t)[0]
            log |= {"loss_mse": velocity_loss(v, x_0, x_T), "x0_mean": x0_hat.mean(), "x0_std": x0_hat.flatten(1).std(1).mean()}

            if regresses:
                # 2. Regression: the student trains.
                log["loss_generator"] = log["loss_mse"]
                backward(log["loss_mse"], cfg.accumulate)
            else:
                # 3. What the discriminators see: both samples noised to the same t' with independent noise; both decoded, clean.
                t_d = draw.uniform(0, schedule.t_noise)  # (B,)
                x_fake = schedule.add_noise(x0_hat, draw.normal(pairs.shape), t_d)
                x_real = schedule.add_noise(x_0, draw.normal(pairs.shape), t_d)
                u = common(cfg.seed, STAGE, iteration).random(3)  # which video frames the pixel discriminator sees

                # 4. Generator: the student trains, heads are frozen; the gradient runs through the frozen teacher, the frozen SAM
                #    and the VAE's decoder.
                with frozen(heads):
                    maps_fake = [discriminators[0].features(x_fake, t_d, cond)]
                    if use_pixel:
                        maps_fake.append(discriminators[1].features(family.views(vae, x0_hat, u)))
                    log["loss_generator"] = generator_loss([d.logits(m) for d, m in zip(discriminators, maps_fake)], lambdas)
                    backward(log["loss_generator"], cfg.accumulate)

                # 5. Discriminators: the heads train, on the features that the generator's step made of x_fake.
                with torch.no_grad():
                    maps_real = [discriminators[0].features(x_real, t_d, cond)]
                    if use_pixel:
                        maps_real.append(discriminators[1].features(family.views(vae, x_0, u)))
                real = [d.logits(m) for d, m in zip(discriminators, maps_real)]
                fake = [d.logits([h.detach() for h in m]) for d, m in zip(discriminators, maps_fake)]
                log["loss_discriminator"] = discriminator_loss(real, fake, lambdas)
                for name, r, f in zip(("d_accuracy", "d_accuracy_pixel"), real, fake):
                    log[name] = ((r > 0).float().mean() + (f < 0).float().mean()) / 2
                backward(log["loss_discriminator"], cfg.accumulate)

        log["grad_norm_student"] = step(optimizers["student"], cfg.clip)
        if not regresses:
            log["grad_norm_heads"] = step(optimizers["heads"], cfg.clip)
        if cfg.ema:
            follow(networks["ema"], networks["student"], cfg.ema)
        here.record(iteration + 1, logs, began)
        if here.due(cfg.sample_every, iteration):
            with torch.no_grad():
                x0 = student_sample(lambda x, t: student(x, t, cond)[0], line, x_T, times, lambda: draw.normal(pairs.shape))
            here.picture(iteration + 1, {"teacher x_0": x_0, f"student, {cfg.student_steps} step": x0})
        if here.stop or here.due(cfg.checkpoint_every, iteration):
            here.save(iteration + 1, networks, optimizers)
        if here.stop:
            raise here.stop  # on all ranks: one line, and the exit code
    here.finish(student, networks, pairs.shape)


# --- What training reads ---------------------------------------------------------------------------------------------


class Pairs(Rows):
    """ODE pairs and their prompts. Raises BadInput if they are of another model, or differ from what the user asked for."""
    def __init__(self, folder, teacher, device="cpu", resolution=None, frames=None, guidance=None):
        super().__init__(folder, "pairs", teacher, device)
        self.shape, made_with = tuple(self.manifest["shape"]), self.manifest["guidance"]
        wanted = teacher.latent_shape(resolution, frames) if resolution or frames else self.shape
        require(wanted == self.shape, f"{folder} holds latents of shape {self.shape}, but --resolution and --frames ask for {wanted}")
        require(guidance in (None, made_with), f"{folder} was made with guidance {made_with}, not {guidance}: it is in the pairs")
        self.prompts = Prompts(self.folder / self.manifest["prompts"], teacher, device)

    def batch(self, numbers):
        """(x_T float32 (B, ...), x_0 float32 (B, ...), conditioning {name: (B, ...)})."""
        rows = self[numbers]
        return rows["x_T"], rows["x_0"], self.prompts[rows["prompt"].tolist()]


def load_pixel_backbone(name, random_init=False):
    """The frozen vision encoder tiny-sam or tiny-dinov2, of a hub id, or in a local folder; or SAM-B at random. Raises BadInput."""
    if random_init:  # the config's defaults are SAM-B's, but for this scale, at which features would vanish
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.SamVisionModel(transformers.SamVisionConfig(initializer_range=0.02)).eval().requires_grad_(False)
    folder = name
    if name in ("tiny-sam", "tiny-dinov2"):
        from toy.tiny import build
        folder = build(name)
    try:
        kind = transformers.AutoConfig.from_pretrained(folder).model_type
        loader = transformers.SamVisionModel if kind in ("sam", "sam_vision_model") else transformers.AutoModel
        backbone = loader.from_pretrained(folder)
    except Exception as e:  # of hub, file and class alike
        raise BadInput(f"--pixel-backbone {name}: cannot load it ({type(e).__name__}); tiny-sam runs offline") from None
    require(all(isinstance(getattr(backbone.config, part, None), int) for part in ("image_size", "patch_size", "hidden_size")),
            f"--pixel-backbone {name}: a {kind} is no plain vision transformer")
    side = backbone.config.image_size // backbone.config.patch_size
    require(side >= Head2d.smallest, f"--pixel-backbone {name}: its {side}x{side} feature maps are too small for the heads")
    return backbone.eval().requires_grad_(False)


if __name__ == "__main__":
    run(main, Config, description=__doc__)
