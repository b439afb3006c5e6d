"""The networks: model families, the denoiser that returns (prediction, features), heads, discriminators, export.

Conventions, each pinned by a test: latents are (B, C, H, W), video latents (B, F, C, H, W); conditioning is a dict of (B, ...)
tensors; t is (B,) float32 or int64 and never cast; predictions come back float32.
"""

import hashlib, json, shutil
from contextlib import contextmanager, nullcontext
from dataclasses import field
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np, torch, torch.nn.functional as F, transformers

# The import of diffusers' pipelines warns of packages that are not needed here: silence for that
# long, and no longer. What a script shows, it says itself (data.quiet).
verbosity = transformers.utils.logging.get_verbosity()
transformers.utils.logging.set_verbosity_error()
import diffusers
from diffusers import CogVideoXPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
transformers.utils.logging.set_verbosity(verbosity)

from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from ode import FlowSchedule, T, VPSchedule

HUB = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0", "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
       "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
       "cogvideox-2b": "THUDM/CogVideoX-2b", "cogvideox-5b": "THUDM/CogVideoX-5b"}
DIGITS = Path(__file__).with_name("toy") / "digits-teacher"  # small, but trained, on real images: see its README
TINY = ("tiny-sdxl", "tiny-sd3", "tiny-cogvideox-2b", "tiny-cogvideox-5b")


class BadInput(ValueError):
    """A mistake in what the user passed: one line on stderr and exit code 2."""


def option(default, help):
    """A config's field: its default and the help text of its flag (`lr_student` is --lr-student)."""
    return field(default=default, metadata={"help": help})


def require(condition, message):
    if not condition:
        raise BadInput(message)


# --- Families --------------------------------------------------------------------------------------------------------

class Family:
    """An opened diffusers pipeline folder; no weights are held (`denoiser`, `vae`, `text_pipeline` load them). A new family says

    read_schedule(scheduler)     the Schedule of the loaded diffusers scheduler; BadInput if that contradicts the family
    call(net, x_t, t, cond)      the denoiser's raw output, like x_t

    and overrides what differs.
    """
    pipeline_class: type  # the stock pipeline
    net_class: type  # the denoiser, in the pipeline's folder net_name
    net_name = "transformer"
    vae_class = diffusers.AutoencoderKL
    guidance: float  # default CFG scale of teacher scores and ODE pairs: the stock pipeline's
    student_steps: int  # default: the paper's
    tokens_at: int  # where a transformer block's output tuple has the image tokens
    text_tokens = None  # where the stock pipeline must be told how many text tokens to pad to: SD3 below
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]

    def __init__(self, folder, name, random_init=False):
        self.folder, self.name, self.random_init = Path(folder), name, random_init  # at random: of these configs, without files
        scheduler_class = getattr(diffusers, json.loads((self.folder / "model_index.json").read_text())["scheduler"][1])
        self.schedule = self.read_schedule(scheduler_class.from_pretrained(folder, subfolder="scheduler"))
        self.vae_config = SimpleNamespace(**self.vae_class.load_config(folder, subfolder="vae"))
        require(random_init or any((self.folder / self.net_name).glob("*.safetensors")), f"{name} has no weights in {self.net_name}/")
        with torch.device("meta"):  # without storage: for the config's defaults, and where only a shape is asked for
            self.meta_net = self.net_class.from_config(self.net_class.load_config(folder, subfolder=self.net_name))
        self.config = self.meta_net.config
        require(not self.config.get("patch_size_t"), f"{name}: time patches (CogVideoX 1.5) are not supported")
        self.vae_scale = 2 ** (len(self.vae_config.block_out_channels) - 1)  # pixels per latent, along a side
        self.default_size = [self.config.get(side, self.config.get("sample_size")) for side in ("sample_height", "sample_width")]
        # Latents along a side of one position of the coarsest tapped map: a DiT's patch, the bottom of a UNet.
        self.grain = self.config.get("patch_size") or 2 ** (len(self.config.block_out_channels) - 1)

    def made(self, kind, config):
        """A network of random weights, the same on every rank and for every role."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind.from_config(config)

    def cond_shapes(self):
        """Shapes of one prompt's conditioning, by the denoiser's config. 333 = 77 tokens of CLIP + 256 of T5."""
        return {"prompt_embeds": (333, self.config.joint_attention_dim), "pooled": (self.config.pooled_projection_dim,)}

    def random_cond(self, prompts):
        """What stands for `encode` where there is no text encoder: noise, which depends on the prompt alone."""
        seeds = [int(hashlib.sha256(prompt.encode()).hexdigest()[:15], 16) for prompt in prompts]
        return {name: torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
                for name, shape in self.cond_shapes().items()}

    def encode(self, pipe, prompts, **options):
        """n prompts → conditioning {name: (n, ...)}, by the stock pipeline's own encode_prompt."""
        if self.random_init:
            return self.random_cond(prompts)
        where = pipe.text_encoder.device  # said explicitly: the pipeline's own guess may be the weightless denoiser's
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=where, do_classifier_free_guidance=False, **options)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def unconditional(self, pipe):
        return self.encode(pipe, [""])  # the conditioning of no prompt, {name: (1, ...)}

    def taps(self, net):
        """(blocks the discriminator sees, the block after the last of them, channels): a DiT's at 1/4, 2/4, 3/4 of its depth.
        The paper does not say which (ours); the last quarter turns features into a prediction, and need not run."""
        blocks, width = net.transformer_blocks, self.config.num_attention_heads * self.config.attention_head_dim
        chosen = sorted({max(len(blocks) * k // 4, 1) - 1 for k in (1, 2, 3)})
        return [blocks[i] for i in chosen], blocks[chosen[-1] + 1], [width] * len(chosen)

    def units(self, net):
        """What a sharded network gathers at a time: its blocks, inner ones first."""
        return list(net.transformer_blocks)

    def to_map(self, output, x_t):
        """A tapped block's output → feature map (B, C, H, W), or (B, C, F, H, W)."""
        grid = [n // self.config.patch_size for n in x_t.shape[-2:]]
        return output[self.tokens_at].transpose(1, 2).unflatten(2, [*x_t.shape[1:-3], *grid])  # video: frames first

    def latent_shape(self, resolution=None, frames=None):
        """Shape of one latent. resolution: "1024" or "480x720" (height x width, pixels); default: the model's own.
        Raises BadInput for a size that the VAE, the denoiser or the discriminator's heads cannot take."""
        sides = resolution.lower().split("x") if resolution else [str(self.vae_scale * n) for n in self.default_size]
        require(len(sides) <= 2 and all(s.isdecimal() for s in sides),
                f"--resolution {resolution!r}: pixels, as 1024 or 480x720 (height x width)")
        height, width, unit = int(sides[0]), int(sides[-1]), self.vae_scale * self.grain
        require(height % unit == 0 and width % unit == 0,
                f"--resolution {height}x{width}: {self.name} takes multiples of {unit} pixels")
        own = [height // self.vae_scale, width // self.vae_scale] == self.default_size
        require(own or min(height, width) >= Head2d.smallest * unit, f"--resolution {height}x{width}: the discriminator's heads need "
                f"feature maps of at least 8x8, for {self.name} {Head2d.smallest * unit} pixels a side")
        require(frames is None, f"--frames is for video models; {self.name} makes images")
        return self.config.in_channels, height // self.vae_scale, width // self.vae_scale

    def decode(self, vae, latents):
        """Latents (B, C, H, W) → images (B, 3, H', W') in about [−1, 1]; differentiable."""
        shift = getattr(self.vae_config, "shift_factor", None) or 0.0
        return vae.decode(latents / self.vae_config.scaling_factor + shift).sample

    def views(self, vae, latents, u):
        """The images (N, 3, H', W') that the pixel discriminator sees. u (3,) in [0, 1) chooses among a video's frames."""
        return self.decode(vae, latents)

    def vae(self, device="cpu"):
        """The frozen VAE, float32 (SDXL's overflows in half precision)."""
        vae = (self.made(self.vae_class, vars(self.vae_config)) if self.random_init
               else self.vae_class.from_pretrained(self.folder, subfolder="vae"))
        return vae.to(device, torch.float32).eval().requires_grad_(False)

    def text_pipeline(self, device="cpu", dtype=torch.float32):
        """The stock pipeline with tokenizers and text encoders only, for `encode`; None where that needs none."""
        if self.random_init:
            return None
        pipe = DiffusionPipeline.from_pretrained(self.folder, vae=None, dtype=dtype, **{self.net_name: self.meta_net})
        for encoder in (c for c in pipe.components.values() if isinstance(c, transformers.PreTrainedModel)):
            encoder.to(device).eval().requires_grad_(False)
        return pipe

    def denoiser(self, device="cpu", dtype=torch.float32, folder=None, mesh=None):
        """A new Denoiser with the weights in this (or that) pipeline folder, `held` in dtype.
        On a GPU it computes in bf16.
        One that is to be sharded over `mesh` waits in main memory: a GPU never holds the whole of it. On "meta" nothing is loaded."""
        if torch.device(device).type == "meta":
            with torch.device("meta"):
                return Denoiser(self, held(self.net_class.from_config(self.config), dtype).eval())
        try:
            if self.random_init and not folder:
                net = self.made(self.net_class, self.config)
            else:
                net = self.net_class.from_pretrained(
                    folder or self.folder, subfolder=self.net_name, dtype=torch.float32,
                    use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as e:
            raise BadInput(f"{folder or self.name}: cannot load its {self.net_name}: {' '.join(str(e).split())[:300]}") from None
        net = held(net, dtype).to("cpu" if mesh else device)
        return Denoiser(self, net.eval(), bf16=torch.device(device).type == "cuda")

    @cached_property
    def weights_sha256(self):
        """Hash of the denoiser's files: what caches and runs name to say which teacher they belong to."""
        return self.sha256_of(self.folder)

    def sha256_of(self, pipeline):
        """Hash of the denoiser's files in this pipeline folder, the teacher's or a student's."""
        kinds = (".safetensors", ".json")
        files = [f for f in sorted((Path(pipeline) / self.net_name).iterdir()) if f.suffix in kinds]
        return hashlib.sha256("".join(file_sha256(f) for f in files).encode()).hexdigest()


def held(net, dtype):
    """`net` with its matrices and kernels held in dtype, and what else it has, a thousandth, in
    float32: norms, biases, position buffers. Autocast rounds matrices whatever they are held in,
    but takes those as they are: rounded, they would set the frozen teacher apart from student and
    fake score, which start as its copies in float32."""
    net.float()  # also CogVideoX's positions, a buffer that is not saved and begins in float64
    for p in net.parameters():
        if p.ndim > 1:
            p.data = p.data.to(dtype)
    return net


def remove(path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextmanager
def aside(path):
    """A path to write a file or folder to, which becomes `path` when all went well, and is gone when not: whole or absent."""
    path, partial = Path(path), Path(f"{path}.partial")
    remove(partial)  # of a process that was killed
    try:
        yield partial
        if partial.is_dir():
            remove(path)  # a file is replaced in one go, a folder cannot be
        partial.replace(path)
    finally:
        remove(partial)


def file_sha256(path):
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def tensors_sha256(tensors):
    """Hash of {name: tensor}: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_vp_schedule(scheduler, prediction, zero_terminal_snr, family):
    """VPSchedule of a loaded scheduler, after checking that it is the one `family`'s network was trained with."""
    a_bar, found = getattr(scheduler, "alphas_cumprod", None), type(scheduler).__name__  # (1000,) after SNR shift and rescaling
    require(a_bar is not None and len(a_bar) == T, f"{family} needs a VP scheduler of 1000 time steps, not the folder's {found}")
    require(scheduler.config.prediction_type == prediction,
            f"{family} predicts {prediction}, but the folder's {found} says {scheduler.config.prediction_type}")
    require((a_bar[-1] < 1e-6) == zero_terminal_snr,
            f"{family} ends at {'zero' if zero_terminal_snr else 'non-zero'} terminal SNR, the folder's {found} does not")
    return VPSchedule(a_bar, prediction, getattr(scheduler, "final_alpha_cumprod", 1.0))


class SDXL(Family):
    """UNet, ε-prediction, variance preserving. Tapped: the encoder half, down blocks and middle (ours)."""
    pipeline_class, net_class = StableDiffusionXLPipeline, diffusers.UNet2DConditionModel
    net_name, guidance, student_steps = "unet", 5.0, 1

    def read_schedule(self, scheduler):
        return read_vp_schedule(scheduler, "epsilon", zero_terminal_snr=False, family="SDXL")

    def cond_shapes(self):
        pooled = self.config.projection_class_embeddings_input_dim - 6 * self.config.addition_time_embed_dim  # beside the time ids
        return {"prompt_embeds": (77, self.config.cross_attention_dim), "pooled": (pooled,)}

    def unconditional(self, pipe):
        return {name: torch.zeros_like(c) for name, c in self.encode(pipe, [""]).items()}  # zeros, not the empty prompt

    @cache
    def time_ids(self, height, width, device):
        """Original size, crop's corner, target size of a whole picture, in pixels: (6,) int64."""
        return torch.tensor([height, width, 0, 0, height, width], device=device)

    def call(self, net, x_t, t, cond):
        height, width = (self.vae_scale * n for n in x_t.shape[-2:])
        time_ids = self.time_ids(height, width, x_t.device)
        added = {"text_embeds": cond["pooled"], "time_ids": time_ids.expand(len(x_t), 6).to(cond["pooled"].dtype)}
        return net(x_t, t, encoder_hidden_states=cond["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]

    def taps(self, net):
        widths = self.config.block_out_channels
        return [*net.down_blocks, net.mid_block], net.up_blocks[0], [*widths, widths[-1]]

    def units(self, net):  # blocks are uneven, up_blocks[0] has half of all parameters: the transformer layers inside come first
        outer = [*net.down_blocks, net.mid_block, *net.up_blocks]
        return [m for block in outer for m in block.modules() if isinstance(m, BasicTransformerBlock)] + outer

    def to_map(self, output, x_t):
        return output[0] if isinstance(output, tuple) else output  # a down block also returns its residuals

class SD3(Family):
    """MM-DiT of Stable Diffusion 3 and 3.5: flow-prediction on the straight line, shifted sampling times."""
    pipeline_class, net_class = StableDiffusion3Pipeline, diffusers.SD3Transformer2DModel
    guidance, student_steps, tokens_at = 7.0, 4, 1
    lora_targets = Family.lora_targets + ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    def read_schedule(self, scheduler):
        found, config = type(scheduler).__name__, scheduler.config
        require(isinstance(scheduler, FlowMatchEulerDiscreteScheduler), f"SD3 predicts a flow, but the folder has {found}")
        require(config.num_train_timesteps == T, f"SD3 has {T:.0f} training time steps, not {config.num_train_timesteps}")
        odd = [o for o in ("use_dynamic_shifting", "stochastic_sampling", "shift_terminal", "invert_sigmas") if config.get(o)]
        require(not odd, f"the folder's {found} sets {odd[:1]}, which no SD3 teacher does")
        return FlowSchedule(shift=config.shift)

    @cached_property
    def text_tokens(self):
        """T5's tokens: the stock pipeline's default of 256, or fewer where the folder's tokenizer was made for fewer."""
        tokenizer = self.folder / "tokenizer_3" / "tokenizer_config.json"
        return min(256, json.loads(tokenizer.read_text())["model_max_length"]) if tokenizer.exists() else 256

    def encode(self, pipe, prompts):
        return super().encode(pipe, prompts, prompt_2=None, prompt_3=None, max_sequence_length=self.text_tokens)

    def call(self, net, x_t, t, cond):
        return net(hidden_states=x_t, timestep=t, encoder_hidden_states=cond["prompt_embeds"],
                   pooled_projections=cond["pooled"], return_dict=False)[0]

    def latent_shape(self, resolution=None, frames=None):
        shape, largest = super().latent_shape(resolution, frames), self.config.pos_embed_max_size * self.config.patch_size
        require(max(shape[1:]) <= largest, f"--resolution: {self.name} takes at most {largest * self.vae_scale} pixels a side")
        return shape


class CogVideoX(Family):
    """Video DiT, v-prediction, variance preserving with zero terminal SNR. 2b: sine positions; 5b: rotary."""
    pipeline_class, net_class = CogVideoXPipeline, diffusers.CogVideoXTransformer3DModel
    vae_class, guidance, student_steps, tokens_at = diffusers.AutoencoderKLCogVideoX, 6.0, 4, 0

    def read_schedule(self, scheduler):
        return read_vp_schedule(scheduler, "v_prediction", zero_terminal_snr=True, family="CogVideoX")

    def cond_shapes(self):
        return {"prompt_embeds": (self.config.max_text_seq_length, self.config.text_embed_dim)}

    def encode(self, pipe, prompts):
        if self.random_init:
            return self.random_cond(prompts)
        embeds, _ = pipe.encode_prompt(prompts, device=pipe.text_encoder.device, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def call(self, net, x_t, t, cond):
        rope = self.rotary(*x_t.shape[-4:], x_t.device) if self.config.use_rotary_positional_embeddings else None
        return net(hidden_states=x_t, timestep=t, encoder_hidden_states=cond["prompt_embeds"], image_rotary_emb=rope,
                   return_dict=False)[0]

    @cache
    def rotary(self, frames, channels, height, width, device):
        """(cos, sin), float32, shared over the batch: the stock pipeline's own, for latents of that shape."""
        pipe = SimpleNamespace(vae_scale_factor_spatial=1, transformer=self.meta_net)
        return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, height, width, frames, device)

    def latent_shape(self, resolution=None, frames=None):
        frames, ratio = frames or self.config.sample_frames, self.config.temporal_compression_ratio
        require(frames > 1 and frames % (2 * ratio) == 1,  # its VAE decodes latent frames in twos, after the first
                f"--frames {frames}: {self.name} takes {2 * ratio}n + 1 frames")
        return (frames - 1) // ratio + 1, *super().latent_shape(resolution)

    def decode(self, vae, latents):
        """Latents (B, F, C, H, W) → frames (B, 3, F', H', W')."""
        return vae.decode(latents.transpose(1, 2) / self.vae_config.scaling_factor).sample

    def views(self, vae, latents, u):
        """Two frames of two neighbouring latent frames (ours): a whole video and its graph would not fit."""
        start = int(u[0] * (latents.shape[1] - 1))
        video = self.decode(vae, latents[:, start:start + 2])  # (B, 3, F', H', W')
        return video[:, :, [int(n * video.shape[2]) for n in u[1:]]].transpose(1, 2).flatten(0, 1)


def load_teacher(name_or_folder, random_init=False):
    """The Family of a model name (digits, sdxl, sd3, sd3.5-large, cogvideox-2b, cogvideox-5b, tiny-…) or local pipeline folder. Raises
    BadInput for an unknown name, an unreachable hub, a folder of no known pipeline, and a scheduler that contradicts it.
    random_init: a model of the hub at its full size with random weights, to measure or to rehearse with; nothing is fetched."""
    name = str(name_or_folder)
    require(name in HUB or not random_init, f"--random-init is for {', '.join(HUB)}")
    if random_init:
        from toy.full import skeleton
        folder = skeleton(name)
    elif name == "digits":
        folder = DIGITS
    elif name in TINY:
        from toy.tiny import build  # reaches up: tiny models are made here, not fetched
        folder = build(name)
    elif name in HUB:
        try:
            folder = DiffusionPipeline.download(HUB[name])
        except Exception as e:  # the hub has many errors, and all mean this
            raise BadInput(f"cannot fetch {HUB[name]} ({type(e).__name__}: no network, or no access rights); a local pipeline "
                           f"folder will do, and --model tiny-{name.removesuffix('.5-large')} runs offline") from None
    else:
        folder = name
        require(Path(name).is_dir(), f"unknown model {name!r}: neither a folder nor one of {', '.join(['digits', *HUB, *TINY])}")
    families = {f.pipeline_class.__name__: f for f in (SDXL, SD3, CogVideoX)}
    try:
        pipeline = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]
        require(pipeline in families, f"{name} is a {pipeline}; the families here are {', '.join(families)}")
        return families[pipeline](folder, name, random_init)
    except Exception as e:  # whatever json, diffusers or torch make of a damaged file
        said = f"{name} is no complete diffusers pipeline folder: {type(e).__name__} {' '.join(str(e).split())[:300]}"
        raise e if isinstance(e, BadInput) else BadInput(said) from None


# --- The denoiser and its roles --------------------------------------------------------------------------------------

class _Stop(Exception):
    @classmethod
    def now(cls, *args):  # a hook that leaves the forward pass
        raise cls


class Denoiser(nn.Module):
    """A denoising network as every loop here sees it: forward returns (prediction, features), so that a sharded module may be
    used through its features alone. A LoRA role is an `adapter` on the frozen Denoiser `base`, and runs through that."""
    def __init__(self, family, net, bf16=False, base=None, adapter=None):
        super().__init__()
        self.family, self.net, self.bf16, self.base, self.adapter = family, net, bf16, base, adapter

    def forward(self, x_t, t, cond, want="prediction", adapter=None):
        """x_t (B, ...), t (B,), cond {name: (B, ...)} → (prediction float32 like x_t, or None; [feature maps], or []).
        want: "prediction", "both", or "features", which stops after the last tapped block."""
        if self.base:
            return self.base(x_t, t, cond, want, self.adapter)
        out, maps, hooks, (tapped, following, _) = None, [], [], self.family.taps(self.net)
        if want != "prediction":
            hooks += [block.register_forward_hook(lambda block, args, output: maps.append(self.family.to_map(output, x_t)))
                      for block in tapped]
        if want == "features":
            hooks.append(following.register_forward_pre_hook(_Stop.now))
        use_adapter(self.net, adapter)
        try:
            with torch.autocast(x_t.device.type, torch.bfloat16) if self.bf16 else nullcontext():
                out = self.family.call(self.net, x_t, t, cond).float()
        except _Stop:
            if isinstance(following, FSDPModule):
                following.reshard()  # it was gathered, and has not run
        finally:  # gone before backward, so that checkpointing's second forward meets no hook
            for hook in hooks:
                hook.remove()
        return out, maps

    def own_parameters(self):
        """{name: parameter} of this role alone: its adapter's if it has one, else the whole network's."""
        mark = f".{self.adapter}." if self.adapter else ""
        return {name: p for name, p in self.net.named_parameters() if mark in name}

    def load(self, pipeline):
        """Take the weights of this exported pipeline folder."""
        if self.adapter:  # peft leaves an adapter's name out when it saves
            weights = load_file(pipeline / "lora" / "pytorch_lora_weights.safetensors")
            found = lambda name: weights[f"{self.family.net_name}.{name.replace(f'.{self.adapter}.', '.')}"]
        else:
            found = self.family.denoiser(folder=pipeline).net.get_parameter
        for name, p in self.own_parameters().items():
            assign(p, found(name))

    def checkpoint_activations(self):
        """Recompute activations in backward: non-reentrant, and with the adapter that was active in forward."""
        def checkpointed(block, *args):
            def again(*args, role=getattr(self.net, "role", None)):
                use_adapter(self.net, role)
                return block(*args)
            return checkpoint(again, *args, use_reentrant=False)
        self.net.enable_gradient_checkpointing(checkpointed)


def use_adapter(net, role):
    """From here on `net` runs with that role's LoRA adapter, or with none. Unlike peft's own switch, it leaves alone who trains."""
    if hasattr(net, "role") and net.role != role:
        flags = [(p, p.requires_grad) for p in net.parameters()]
        net.enable_adapters() if role else net.disable_adapters()
        if role:
            net.set_adapter(role)
        for p, flag in flags:
            p.requires_grad_(flag)
        net.role = role


def make_roles(family, roles, lora_rank=0, device="cpu", frozen_dtype=torch.float32, gradient_checkpointing=False, mesh=None):
    """(teacher, one Denoiser a role): the frozen teacher, and trainable copies of it in float32. With lora_rank the copies are
    adapters (alpha = rank) on the teacher itself: one copy of the weights for all roles and the discriminator's backbone."""
    teacher, trained = family.denoiser(device, frozen_dtype, mesh=mesh), []
    if lora_rank:
        from peft import LoraConfig
        for role in roles:
            teacher.net.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=family.lora_targets), role)
        teacher.net.to(next(teacher.net.parameters()).device).role = "nobody's yet"
    teacher.net.requires_grad_(False)
    for role in roles:
        trained.append(Denoiser(family, teacher.net, base=teacher, adapter=role) if lora_rank else family.denoiser(device, mesh=mesh))
        for p in trained[-1].own_parameters().values():
            p.data = p.data.float()  # masters, whatever the base is held in
            p.requires_grad_(True)
        lora_rank or shard(trained[-1], family.units(trained[-1].net), mesh)
    shard(teacher, family.units(teacher.net), mesh)
    for denoiser in [teacher, *([] if lora_rank else trained)] if gradient_checkpointing else []:
        denoiser.checkpoint_activations()
    return teacher, *trained


# --- Sharding --------------------------------------------------------------------------------------------------------

def shard(module, units=(), mesh=None):
    """FSDP2: each rank of `mesh` keeps its part of every parameter of `module`; forward and backward gather them unit by unit, in
    bf16 where the module computes in it, and gradients are averaged over the ranks in float32. Without a mesh: nothing."""
    if mesh is None:
        return
    # Inputs are not cast: a time in bf16 would be another time. All is resharded at once, so that between passes parameters are
    # always the sharded ones, whose requires_grad `frozen` sets.
    how = MixedPrecisionPolicy(torch.bfloat16 if getattr(module, "bf16", False) else None, torch.float32, cast_forward_inputs=False)
    for unit in (*units, module):
        fully_shard(unit, mesh=mesh, mp_policy=how, reshard_after_forward=True)
    # At its first forward FSDP settles what it will reduce: this one, before anything is `frozen`.
    module.forward = lambda: None
    module()
    del module.forward


def gather(tensors, keep=True):
    """{name: the whole of each tensor, on the CPU}. Every rank must call it, in the same order; only those that `keep` get any."""
    whole = {}
    for name, x in tensors.items():
        x = x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()
        whole |= {name: x.cpu()} if keep else {}
    return whole


def like(p, whole):
    """`whole` where p is, and sharded as p is."""
    whole = whole.to(p.device)
    return distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole


def assign(p, whole):
    """Set p, which may be sharded, to the tensor `whole`. Every rank must call it."""
    p.data.copy_(like(p.detach(), whole))


def backward(loss, accumulate=1):
    """Add the gradient of a micro-batch's `loss`, one of `accumulate`, to the others'; over the ranks it is averaged."""
    one = 0 * loss.detach() + 1  # NaN where the loss is not finite: then its whole gradient is NaN too, which `step` sees
    (loss / accumulate).backward(one)


def step(optimizer, clip):
    """Clip the gradient of this network's parameters, let AdamW step, leave no gradient behind. Returns the norm before clipping.

    Where a loss or gradient is not finite on some rank, the average tells all ranks, and none takes the step; the host is not asked.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    optimizer.found_inf = (~norm.isfinite()).to(torch.float32)  # 1: fused AdamW leaves weights and moments as they are
    optimizer.skipped.append(optimizer.found_inf)  # for Run.record
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def follow(average, parameters, decay):
    """An exponential moving average, in place and sharded as the parameters are: average ← decay · average + (1 − decay) · p."""
    for name, p in parameters.items():
        average[name].lerp_(p, 1 - decay)


@contextmanager
def frozen(*modules):
    """Inside, these modules' parameters take no gradient, activations stay differentiable. Must span forward *and* backward:
    with activation checkpointing the forward is run again in backward."""
    owned = [m.own_parameters().values() if isinstance(m, Denoiser) else m.parameters() for m in modules]
    flags = [(p, p.requires_grad) for parameters in owned for p in parameters]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


# --- Discriminators --------------------------------------------------------------------------------------------------

class Head2d(nn.Module):
    """Feature map (B, C, H, W) → logits (B,), the mean over positions (arXiv 2507.18569, appendix B):
    3 × [Conv 4x4, stride 2 → GroupNorm(32) → SiLU], [Conv 3x3 → GroupNorm(32) → SiLU], average pool, Linear.
    The strides need 8x8 positions; the 4x4 of the digits teacher are enlarged to that (ours)."""
    smallest, conv, strided, plain = 8, nn.Conv2d, (4, 2, 1), (3, 1, 1)  # kernel, stride, padding

    def __init__(self, channels, width=256):
        super().__init__()
        stages = []
        for c, how in ((channels, self.strided), (width, self.strided), (width, self.strided), (width, self.plain)):
            # Narrower heads than the paper's get fewer groups (ours): a 1x1 map normalised channel by channel is constant.
            stages += [self.conv(c, width, *how), nn.GroupNorm(min(32, width // 8), width), nn.SiLU()]
        self.body, self.to_logit = nn.Sequential(*stages), nn.Linear(width, 1)

    def forward(self, h):
        if min(h.shape[-2:]) < self.smallest:
            h = h.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return self.to_logit(self.body(h.float()).flatten(2).mean(2))[:, 0]


class Head3d(Head2d):
    """Feature map (B, C, F, H, W) → logits (B,): 3x3x3 convolutions, average pool over time too; the rest as in 2D (ours)."""
    conv, strided = nn.Conv3d, (3, (1, 2, 2), 1)


class Discriminator(nn.Module):
    """Frozen backbone + trainable heads, one a tapped map, sharded over `mesh`. Logits: mean over positions, then over heads (ours)."""
    def __init__(self, backbone, heads, mesh=None):
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleList(heads)
        for head in heads:
            shard(head, mesh=mesh)

    def logits(self, maps):
        """Feature maps, one a head → (B,), float32 also where the backbone is not."""
        return torch.stack([head(h) for head, h in zip(self.heads, maps, strict=True)]).mean(0)


def accuracy(real, fake):
    """The share of logits (B,) that are on their side of 0: real above, fake below."""
    return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2


class LatentDiscriminator(Discriminator):
    """D_τ, and D_τ1 of ADP: the frozen teacher's blocks, conditioned on prompt and t, without CFG."""
    def __init__(self, teacher, width=256, mesh=None):
        head = Head3d if isinstance(teacher.family, CogVideoX) else Head2d
        super().__init__(teacher, [head(channels, width) for channels in teacher.family.taps(teacher.net)[2]], mesh)

    def features(self, x_t, t, cond):
        """Tapped maps at noisy latents x_t (B, ...), t (B,). The teacher's forward stops after the last of them."""
        return self.backbone(x_t, t, cond, want="features")[1]


class PixelDiscriminator(Discriminator):
    """D_τ2 of ADP: a frozen vision transformer on clean images, heads on its four quarters (SAM-B: layers 3, 6, 9, 12).
    backbone: a SamVisionModel, or a transformers ViT with class token(s) first (DINOv2: the paper's ablation A2)."""
    def __init__(self, backbone, width=256, mesh=None):
        super().__init__(backbone, [Head2d(backbone.config.hidden_size, width) for _ in range(4)], mesh)
        self.side = backbone.config.image_size // backbone.config.patch_size  # of its square maps
        for name, rgb in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(rgb).view(3, 1, 1))

    def features(self, images):
        """Images (N, 3, H, W) in [−1, 1], resized to the backbone's own square and ImageNet-normalised → four maps."""
        size, layers = self.backbone.config.image_size, self.backbone.config.num_hidden_layers
        images = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True) / 2 + 0.5
        normal = (images - self.mean) / self.std
        with images.device:  # SAM would make its tables of relative positions in main memory
            # [i]: after layer i
            hidden = self.backbone(normal, output_hidden_states=True).hidden_states
        maps = [hidden[layers * k // 4] for k in (1, 2, 3, 4)]  # SAM's are (N, H, W, C), a ViT's (N, 1 + H·W, C)
        maps = [h if h.ndim == 4 else h[:, -self.side ** 2:].unflatten(1, (self.side, self.side)) for h in maps]
        return [h.permute(0, 3, 1, 2) for h in maps]


def load_pixel_backbone(name, random_init=False):
    """The frozen vision encoder tiny-sam or tiny-dinov2, of a hub id, or in a local folder.

    random_init: SAM-B with random weights. Raises BadInput for what is no plain vision transformer.
    """
    if random_init:
        # The config's defaults are SAM-B's, but for this scale, at which features would vanish.
        config = transformers.SamVisionConfig(initializer_range=0.02)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.SamVisionModel(config).eval().requires_grad_(False)
    folder = name
    if name in ("tiny-sam", "tiny-dinov2"):
        from toy.tiny import build
        folder = build(name)
    flag = f"--pixel-backbone {name}"
    try:
        kind = transformers.AutoConfig.from_pretrained(folder).model_type
        is_sam = kind in ("sam", "sam_vision_model")
        loader = transformers.SamVisionModel if is_sam else transformers.AutoModel
        backbone = loader.from_pretrained(folder)
    except Exception as e:  # of hub, file and class alike
        said = f"{flag}: cannot load it ({type(e).__name__}); tiny-sam runs offline"
        raise BadInput(said) from None
    sizes = [getattr(backbone.config, n, None) for n in ("image_size", "patch_size", "hidden_size")]
    require(all(isinstance(size, int) for size in sizes),
            f"{flag}: a {kind} is no plain vision transformer")
    side = sizes[0] // sizes[1]
    require(side >= Head2d.smallest,
            f"{flag}: its {side}x{side} feature maps are too small for the heads")
    return backbone.eval().requires_grad_(False)


# --- Export ----------------------------------------------------------------------------------------------------------

def student_scheduler(schedule, steps):
    """The stock diffusers scheduler that walks the student's `schedule` in `steps` steps as ode.student_sample does. SD3's warps
    σ = linspace(1, σ_min) by its `shift` k, then stretches it to `shift_terminal`: Möbius maps that fix 1, as is the student's
    K u / (1 + (K − 1) u), u = 1 − i/n, so that some k gives it exactly."""
    if isinstance(schedule, VPSchedule):  # predict x_0, re-noise: LCM's sampler with its skip connection off
        a_bar = schedule.alphas_cumprod
        betas = 1 - a_bar / torch.cat([a_bar.new_ones(1), a_bar[:-1]])
        return diffusers.LCMScheduler(trained_betas=betas.tolist(), prediction_type=schedule.prediction, clip_sample=False,
                                      original_inference_steps=int(T), timestep_scaling=1e6)
    if not schedule.renoise:  # see ode.on_the_line
        return diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=1,
                                                     final_sigmas_type="zero")
    K, n, k = schedule.shift, steps, 1.0
    if K != 1 and n > 1:  # (k − 1) · 0.999 n K = k (n − 1) (K − 1) (1 + 0.001 (k − 1)), since σ_min is warped by k too
        c = (n - 1) * (K - 1)
        b = 0.999 * (n * K - c)
        k = (b - (b * b - 4 * 0.001 * c * 0.999 * n * K) ** 0.5) / (2 * 0.001 * c)
    last = K / (n + K - 1) if n > 1 else None
    return FlowMatchEulerDiscreteScheduler(shift=k, shift_terminal=last, stochastic_sampling=True)


USAGE = """# A {steps}-step student of {base}

    pipe = diffusers.DiffusionPipeline.from_pretrained("path/to/this/folder")
    result = pipe("a red fox", num_inference_steps={steps}, guidance_scale=1.0, {size})

Pass all of these: the scheduler visits the student's own times at this number of steps only, guidance is in the weights, and the
size is what it was trained at. Stable Diffusion 3's pipeline draws the noise between steps from torch's global generator: seed that
(`torch.manual_seed`) for a repeatable picture.
"""


def export_pipeline(student, schedule, steps, shape, folder, write=True):
    """Write `folder`: a diffusers pipeline with the student's weights (float32) and the scheduler of its steps; the rest is the
    teacher's. A LoRA student is merged; its adapter alone goes into folder/lora, for `pipe.load_lora_weights`. shape: of a latent.
    Of a sharded student: called on every rank, and one of them is to `write`."""
    family = student.family
    state = gather(student.own_parameters() if student.adapter else student.net.state_dict(), write)
    if not write:
        return
    with aside(folder) as partial:
        index = json.loads((family.folder / "model_index.json").read_text())
        for name in [n for n in index if n not in ("scheduler", family.net_name) and (family.folder / n).is_dir()]:
            shutil.copytree(family.folder / name, partial / name)
        if student.adapter:  # by the names that peft gives an adapter's weights
            layers = {name.replace(f".{student.adapter}.", "."): w for name, w in state.items()}
            family.pipeline_class.save_lora_weights(partial / "lora", **{f"{family.net_name}_lora_layers": layers})
            net = family.denoiser().net
            net.load_lora_adapter(partial / "lora", prefix=family.net_name, weight_name="pytorch_lora_weights.safetensors")
            net.fuse_lora(), net.unload_lora()
        else:  # a plain network around the gathered weights
            with torch.device("meta"):
                net = family.net_class.from_config(family.config)
            net.load_state_dict(state, assign=True)
        net.save_pretrained(partial / family.net_name)
        scheduler = student_scheduler(schedule, steps)
        scheduler.save_pretrained(partial / "scheduler")
        (partial / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", type(scheduler).__name__]}, indent=2))
        size = f"height={shape[-2] * family.vae_scale}, width={shape[-1] * family.vae_scale}"
        size += f", num_frames={(shape[0] - 1) * family.config.temporal_compression_ratio + 1}" if len(shape) == 4 else ""
        size += f", max_sequence_length={family.text_tokens}" if family.text_tokens not in (None, 256) else ""
        (partial / "README.md").write_text(USAGE.format(steps=steps, base=family.name, size=size))


if __name__ == "__main__":  # python models.py --model sd3.5-large --world-size 8 --gpu-gb 80
    from toy.plan import main  # reaches up, for one command to ask: does it fit?
    main()
