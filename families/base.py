"""What every model family shares: an opened diffusers pipeline folder, and what is asked of it.

Conventions, each pinned by a test: latents are (B, C, H, W), video latents (B, F, C, H, W);
conditioning is a dict of (B, ...) tensors; t is (B,) float32 or int64 and never cast.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import transformers

from ode import T, VPSchedule
from runtime.files import file_sha256
from runtime.settings import BadInput, require

SMALLEST_MAP = 8  # positions along a side of a feature map that a discriminator's head can take


class Family:
    """An opened diffusers pipeline folder; no weights are held (`network`, `vae`, `text_pipeline` load
    them). A new family says

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
        require(own or min(height, width) >= SMALLEST_MAP * unit, f"--resolution {height}x{width}: the discriminator's heads need "
                f"feature maps of at least 8x8, for {self.name} {SMALLEST_MAP * unit} pixels a side")
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
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder, vae=None, dtype=dtype, **{self.net_name: self.meta_net})
        for encoder in (c for c in pipe.components.values() if isinstance(c, transformers.PreTrainedModel)):
            encoder.to(device).eval().requires_grad_(False)
        return pipe

    def network(self, device="cpu", dtype=torch.float32, folder=None, mesh=None):
        """The denoising network with the weights in this (or that) pipeline folder, `held` in dtype.

        One that is to be sharded over `mesh` waits in main memory: a GPU never holds the whole of it.
        On "meta" nothing is loaded. Raises BadInput for weights that cannot be loaded.
        """
        if torch.device(device).type == "meta":
            with torch.device("meta"):
                return held(self.net_class.from_config(self.config), dtype).eval()
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
        return net.eval()

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


def read_vp_schedule(scheduler, prediction, zero_terminal_snr, family):
    """VPSchedule of a loaded scheduler, after checking that it is the one `family`'s network was trained with."""
    a_bar, found = getattr(scheduler, "alphas_cumprod", None), type(scheduler).__name__  # (1000,) after SNR shift and rescaling
    require(a_bar is not None and len(a_bar) == T, f"{family} needs a VP scheduler of 1000 time steps, not the folder's {found}")
    require(scheduler.config.prediction_type == prediction,
            f"{family} predicts {prediction}, but the folder's {found} says {scheduler.config.prediction_type}")
    require((a_bar[-1] < 1e-6) == zero_terminal_snr,
            f"{family} ends at {'zero' if zero_terminal_snr else 'non-zero'} terminal SNR, the folder's {found} does not")
    return VPSchedule(a_bar, prediction, getattr(scheduler, "final_alpha_cumprod", 1.0))
