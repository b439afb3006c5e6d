"""What every model family shares: an opened diffusers pipeline folder, and what is asked of it.

Conventions, each pinned by a test: latents are (B, C, H, W), video latents (B, F, C, H, W);
conditioning is a dict of (B, ...) tensors; t is (B,) float32 or int64 and never cast.
"""

import hashlib
import json
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ode import FlowSchedule, T, VPSchedule
from runtime.files import Tensors, file_sha256
from runtime.ranks import like, own, own_rows, shard
from runtime.settings import BadInput, require

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of a denoiser's files
# Of the stock flow schedulers' options, those that change their process or their steps.
ODD_FOR_A_FLOW = (
    "use_dynamic_shifting",
    "stochastic_sampling",
    "shift_terminal",
    "invert_sigmas",
    "thresholding",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)
# What a decoder and its blocks call their normalisations, and what comes right after each.
NORMS = {"norm1", "norm2", "norm_out", "conv_norm_out"}
ACTIVATIONS = {"nonlinearity", "conv_act"}
SMALLEST_MAP = 8  # positions along a side of a feature map that a discriminator's head can take


def again(forward, *args, **kwargs):
    """What forward(*args, **kwargs) returns, and nothing of it random; backward runs it again."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class Family:
    """An opened diffusers pipeline folder.

    It holds no weights: `network`, `vae` and `text_pipeline` load them. A new family says

    read_schedule(scheduler)     the Schedule of the loaded diffusers scheduler; BadInput if that
                                 contradicts the family
    cond_shapes()                {name: shape} of one prompt's conditioning
    call(net, x_t, t, cond)      the denoiser's raw output, like x_t

    and overrides what differs.
    """

    pipeline_class: type  # the stock pipeline
    net_class: type  # the denoiser, in the pipeline's folder net_name
    net_name = "transformer"
    vae_class = diffusers.AutoencoderKL
    vae_parts = (ResnetBlock2D, Upsample2D)  # of its decoder: see `recompute`
    guidance: float  # default CFG scale of teacher scores and ODE pairs: the stock pipeline's
    embeds_guidance = False  # distilled: the network is told w; but for the teacher, this default
    even_sigmas = False  # the stock pipeline gives its scheduler u = 1, 1 − 1/n, …, 1/n itself
    student_steps: int  # default: the paper's
    blocks = ("transformer_blocks",)  # a transformer's, as it calls them, in order
    tokens_at = None  # where a block's output has the image tokens; None: it is nothing else
    text_tokens = None  # to how many the stock pipeline pads, where it must be told: see SD3
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]

    def __init__(self, folder, name, random_init=False):
        self.folder = Path(folder)
        self.name = name
        self.random_init = random_init  # weights at random: the folder has configs alone

        self.index = json.loads((self.folder / "model_index.json").read_text())
        has_weights = any((self.folder / self.net_name).glob("*.safetensors"))
        require(random_init or has_weights, f"{name} has no weights in {self.net_name}/")
        # Without storage: for the config's defaults, and where only a shape is asked for.
        with torch.device("meta"):
            config = self.net_class.load_config(folder, subfolder=self.net_name)
            self.meta_net = self.net_class.from_config(config)
            config = self.vae_class.load_config(folder, subfolder="vae")
            self.vae_config = SimpleNamespace(**self.vae_class.from_config(config).config)
        self.config = self.meta_net.config
        time_patches = self.config.get("patch_size_t")
        require(not time_patches, f"{name}: time patches (CogVideoX 1.5) are not supported")
        self.channels = self.config.in_channels  # of a latent
        self.measure()

        scheduler_class = getattr(diffusers, self.index["scheduler"][1])
        scheduler = scheduler_class.from_pretrained(folder, subfolder="scheduler")
        self.schedule = self.read_schedule(scheduler)  # at the model's own size

    def schedule_at(self, shape):
        """The Schedule of latents of this shape, for most families the same for all."""
        return self.schedule

    def measure(self):
        """Set, by the configs, vae_scale, default_size and grain."""
        # Pixels per latent, along a side.
        self.vae_scale = 2 ** (len(self.vae_config.block_out_channels) - 1)
        square = self.config.get("sample_size")
        height = self.config.get("sample_height", square)
        width = self.config.get("sample_width", square)
        self.default_size = [height, width]  # in latents
        # Latents along a side of one position of the coarsest tapped map: a DiT's patch, the bottom
        # of a UNet.
        self.grain = self.config.get("patch_size")
        if not self.grain:
            self.grain = 2 ** (len(self.config.block_out_channels) - 1)

    def size_of_call(self, **usual):
        """Set default_size where no config has one; returns {argument: its value}.

        usual: height, width and what else the stock call has by default, in pixels. A folder of
        ours says its own, as `_sampling`.
        """
        size = usual | self.index.get("_sampling", {})
        self.default_size = [size[side] // self.vae_scale for side in ("height", "width")]
        return size

    def made(self, kind, config):
        """A network of random weights, the same on every rank and for every role."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind.from_config(config)

    def tokens(self, tokenizer, most):
        """To how many the stock pipeline pads: the tokenizer's own limit, but at most so many."""
        config = self.folder / tokenizer / "tokenizer_config.json"
        if not config.exists():
            return most
        return min(most, json.loads(config.read_text())["model_max_length"])

    def random_cond(self, prompts):
        """What stands for `encode` where no text encoder is: noise that depends on the prompt."""
        digests = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts]
        seeds = [int(digest[:15], 16) for digest in digests]
        cond = {}
        for name, shape in self.cond_shapes().items():
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = [torch.randn(shape, generator=g) for g in generators]
            cond[name] = torch.stack(noise)  # (n, *shape)
        return cond

    def encode(self, pipe, prompts, **options):
        """n prompts → conditioning {name: (n, ...)}, by the stock pipeline's own encode_prompt."""
        if self.random_init:
            return self.random_cond(prompts)
        # Said explicitly: the pipeline's own guess may be the weightless denoiser's.
        options["device"] = pipe.text_encoder.device
        if not self.embeds_guidance:  # of those no pipeline asks for a second prompt
            options["do_classifier_free_guidance"] = False
        made = [c for c in pipe.encode_prompt(prompts, **options) if c is not None]
        return dict(zip(self.cond_shapes(), made, strict=False))  # FLUX's has more: text ids

    def unconditional(self, pipe):
        """The conditioning of no prompt, {name: (1, ...)}."""
        return self.encode(pipe, [""])

    def taps(self, net):
        """(blocks that the discriminator sees, the block after the last of them, channels of each).

        A DiT's are at 1/4, 2/4 and 3/4 of its depth. The paper does not say which (ours); the last
        quarter turns features into a prediction, and need not run.
        """
        blocks = self.layers(net)
        width = self.config.num_attention_heads * self.config.attention_head_dim
        chosen = sorted({max(len(blocks) * k // 4, 1) - 1 for k in (1, 2, 3)})
        return [blocks[i] for i in chosen], blocks[chosen[-1] + 1], [width] * len(chosen)

    def layers(self, net):
        """A transformer's blocks, in the order in which they run."""
        return [block for name in self.blocks for block in getattr(net, name)]

    def units(self, net):
        """What a sharded network gathers at a time: its blocks, inner ones first."""
        return self.layers(net)

    def to_map(self, output, x_t):
        """A tapped block's output → feature map (B, C, H, W), or (B, C, F, H, W)."""
        if self.tokens_at is not None:
            output = output[self.tokens_at]
        tokens = output.transpose(1, 2)  # (B, C, F·H·W)
        frames = x_t.shape[1:-3]  # none of an image
        height, width = (n // self.grain for n in x_t.shape[-2:])
        return tokens.unflatten(2, [*frames, height, width])

    def latent_shape(self, resolution=None, frames=None):
        """Shape of one latent, without the batch.

        resolution: "1024" or "480x720" (height x width, pixels); default: the model's own. Raises
        BadInput for a size that the VAE, the denoiser or the discriminator's heads cannot take.
        """
        if resolution:
            sides = resolution.lower().split("x")
        else:
            sides = [str(self.vae_scale * n) for n in self.default_size]
        readable = len(sides) <= 2 and all(side.isdecimal() for side in sides)
        say = "pixels, as 1024 or 480x720 (height x width)"
        require(readable, f"--resolution {resolution!r}: {say}")

        height, width = int(sides[0]), int(sides[-1])
        unit = self.vae_scale * self.grain
        flag = f"--resolution {height}x{width}"
        whole = height % unit == 0 and width % unit == 0
        require(whole, f"{flag}: {self.name} takes multiples of {unit} pixels")

        shape = (self.channels, height // self.vae_scale, width // self.vae_scale)
        own = list(shape[1:]) == self.default_size
        least = SMALLEST_MAP * unit
        need = "the discriminator's heads need feature maps of at least 8x8"
        enough = own or min(height, width) >= least
        require(enough, f"{flag}: {need}, for {self.name} {least} pixels a side")
        require(frames is None, f"--frames is for video models; {self.name} makes images")
        return shape

    def decode(self, vae, latents):
        """Latents (B, C, H, W) → images (B, 3, H', W') in about [−1, 1]; differentiable.

        In the VAE's type.
        """
        shift = getattr(self.vae_config, "shift_factor", None) or 0.0
        z = latents / self.vae_config.scaling_factor + shift  # (B, C, H, W)
        return vae.decode(z.to(vae.dtype)).sample

    def views(self, vae, latents, u):
        """The images (N, 3, H', W') that the pixel discriminator sees.

        u (3,) in [0, 1) chooses among a video's frames.
        """
        return self.decode(vae, latents)

    def vae(self, device="cpu", dtype=torch.float32):
        """The frozen VAE. In bf16 it rounds; in half precision SDXL's would overflow."""
        if self.random_init:
            vae = self.made(self.vae_class, vars(self.vae_config))
        else:
            vae = self.vae_class.from_pretrained(self.folder, subfolder="vae")
        return vae.to(device, dtype).eval().requires_grad_(False)

    def parts_of(self, vae):
        """The decoder's modules that `recompute` treats one by one."""
        found = [m for m in vae.decoder.modules() if isinstance(m, self.vae_parts)]
        inner = {n for m in found for n in m.modules() if n is not m}
        return [m for m in found if m not in inner]

    def recompute(self, vae):
        """Keep next to nothing of a pass of the decoder: backward makes it again, part by part.

        A whole block of full size would be ten gigabytes. While a part is made again, what its
        normalisations make is not kept either. The numbers are the same.
        """
        if vae._supports_gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        for module in vae.decoder.modules():
            children = dict(module.named_children())
            for name in children.keys() & ACTIVATIONS:
                setattr(module, name, torch.nn.Identity())
                for norm in children.keys() & NORMS:
                    children[norm].forward = self.activated(children[norm], children[name])
        for part in self.parts_of(vae):
            part.forward = partial(self.again, part.forward)

    def activated(self, norm, activation):
        """activation(norm(x)) as a function of x, which alone is kept; backward runs it again."""
        plain = norm.forward
        return partial(again, lambda x: activation(plain(x)))

    def again(self, forward, *args, **kwargs):
        """What forward(*args, **kwargs) returns; backward runs it again."""
        return again(forward, *args, **kwargs)

    def text_pipeline(self, device="cpu", dtype=torch.float32, mesh=None):
        """The stock pipeline with tokenizers and text encoders only, for `encode`.

        None where that needs none. Sharded over `mesh`, if given: each rank must encode then.
        """
        if self.random_init:
            return None
        parts = {"vae": None, self.net_name: self.meta_net}
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder, dtype=dtype, **parts)
        for part in pipe.components.values():
            if isinstance(part, transformers.PreTrainedModel):
                part.eval().requires_grad_(False)
                layers = [m for m in part.modules() if isinstance(m, GradientCheckpointingLayer)]
                shard(part, layers, mesh)
                part.to(device)
        return pipe

    def text_encoders(self, dtype=torch.bfloat16):
        """The text encoders without storage, by the folder's configs."""
        found = []
        for folder in sorted(self.folder.glob("text_encoder*")):
            config = transformers.AutoConfig.from_pretrained(folder)
            kind = getattr(transformers, config.architectures[0])
            with torch.device("meta"):
                found.append(kind(config).to(dtype))
        return found

    def network(self, device="cpu", dtype=torch.float32, folder=None, empty=False):
        """The denoising network with the weights in this (or that) folder, its matrices in dtype.

        An `empty` one waits for `load`: its parameters are on the meta device, but for shapes and
        types. On "meta" nothing is loaded. Raises BadInput for weights that cannot be loaded.
        """
        on_meta = torch.device(device).type == "meta"
        with torch.device("meta") if on_meta else init_empty_weights():  # which spares buffers
            net = self.net_class.from_config(self.config)
        net = cast_matrices(net, dtype).eval()
        if not empty:
            self.load(net, folder, device)
        return net

    @torch.no_grad()
    def load(self, net, folder=None, device=None):
        """Set the weights of a network to those in this (or that) folder, but for adapters.

        device: where an empty network, whole or in parts, gets its storage. Of one that is sharded
        each rank reads its own rows, and no more. Raises BadInput for weights that cannot be read,
        are missing, or of another shape.
        """
        if device is not None and torch.device(device).type == "meta":
            net.to("meta")  # peft's adapters are made on the CPU
            return
        saved = net.state_dict().keys()  # some buffers are in no file
        try:
            read = self.reader(folder)
            # One by one: with --random-init each makes room for the next.
            for path, module in net.named_modules():
                if device is not None:
                    give_storage(module, device)
                for name, x in tensors_of(module):
                    full = f"{path}.{name}".lstrip(".")
                    if full in saved and ".lora_" not in full:
                        plain = full.replace(".base_layer.", ".")  # as before peft
                        own(x).copy_(read(plain, x))
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            said = " ".join(str(e).split())[:300]
            where = folder or self.name
            raise BadInput(f"{where}: cannot load its {self.net_name}: {said}") from None

    def reader(self, folder=None):
        """A function (name, x) → this rank's rows of the weight that x, sharded or not, is to have.

        x: like the whole weight. With --random-init each name may be asked for once.
        """
        if self.random_init and not folder:
            made = self.made(self.net_class, self.config)
            weights = made.state_dict()
            made.to("meta")  # each weight is gone from main memory once it is asked for
            return lambda name, x: own(like(x, weights.pop(name)))
        files = self.weights(folder)

        def read(name, x):
            same = name in files.names() and files.shape(name) == x.shape
            require(same, f"{name} is missing, or has another shape than {tuple(x.shape)}")
            return files.read(name, own_rows(x))

        return read

    def weights(self, folder=None):
        """The denoiser's Tensors in this (or that) pipeline folder, by diffusers' names of files.

        Raises OSError, ValueError or SafetensorError where they cannot be read.
        """
        folder = Path(folder or self.folder) / self.net_name
        index = folder / f"{WEIGHTS}.safetensors.index.json"
        if not index.exists():
            return Tensors([folder / f"{WEIGHTS}.safetensors"])
        names = json.loads(index.read_text())["weight_map"].values()
        return Tensors([folder / name for name in sorted(set(names))])

    @cached_property
    def weights_sha256(self):
        """Hash of the denoiser's files: caches and runs say by it which teacher is theirs."""
        return self.sha256_of(self.folder)

    def sha256_of(self, pipeline):
        """Hash of the denoiser's files in this pipeline folder, the teacher's or a student's."""
        kinds = (".safetensors", ".json")
        everything = sorted((Path(pipeline) / self.net_name).iterdir())
        hashes = [file_sha256(file) for file in everything if file.suffix in kinds]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()


def tensors_of(module):
    """(name, tensor) of its own parameters and buffers, without its children's."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def give_storage(module, device):
    """Put a module's own parameters on `device`, uninitialised, and its buffers as they are."""
    buffers = dict(module.named_buffers(recurse=False))
    module.to_empty(device=device, recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        buffer.copy_(buffers[name])


def cast_matrices(net, dtype):
    """`net` with its matrices and kernels in dtype, and the rest, a thousandth, in float32.

    The rest is norms, biases, tables, position buffers. Autocast rounds matrices whatever their
    type, but takes those as they are: rounded, they would set the frozen teacher apart from student
    and fake score, which start as its copies in float32.
    """
    net.float()  # also CogVideoX's positions, a buffer that is not saved and begins in float64
    for name, p in net.named_parameters():
        if p.ndim > 1 and name.endswith("weight"):
            p.data = p.data.to(dtype)
    return net


def read_vp_schedule(scheduler, prediction, zero_terminal_snr, family):
    """VPSchedule of a loaded scheduler: BadInput unless `family`'s network was trained with it."""
    found = type(scheduler).__name__
    a_bar = getattr(scheduler, "alphas_cumprod", None)  # (1000,) after SNR shift and rescaling
    is_vp = a_bar is not None and len(a_bar) == T
    need = "a VP scheduler of 1000 time steps"
    require(is_vp, f"{family} needs {need}, not the folder's {found}")

    own = scheduler.config.prediction_type
    right = own == prediction
    require(right, f"{family} predicts {prediction}, but the folder's {found} says {own}")

    ends = "zero" if zero_terminal_snr else "non-zero"
    right = (a_bar[-1] < 1e-6) == zero_terminal_snr
    require(right, f"{family} ends at {ends} terminal SNR, the folder's {found} does not")
    return VPSchedule(a_bar, prediction, getattr(scheduler, "final_alpha_cumprod", 1.0))


def read_flow_schedule(scheduler, family, dynamic=False):
    """FlowSchedule of a loaded scheduler: BadInput unless it walks the straight line as usual.

    dynamic: its shift must depend on the size, for which the one returned does not hold.
    """
    found = type(scheduler).__name__
    config = scheduler.config
    is_euler = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    # UniPC and others are for several processes, and say of which they are.
    said = (config.get("prediction_type"), config.get("use_flow_sigmas"))
    is_flow = is_euler or said == ("flow_prediction", True)
    require(is_flow, f"{family} predicts a flow, but the folder's {found} is for another process")

    steps = config.num_train_timesteps
    require(steps == T, f"{family} has {T:.0f} training time steps, not {steps}")
    odd = [option for option in ODD_FOR_A_FLOW if config.get(option)]
    if dynamic:
        usual = config.get("time_shift_type") == "exponential"
        right = usual and "use_dynamic_shifting" in odd
        require(right, f"{family} shifts times by the size, the folder's {found} in another way")
        odd.remove("use_dynamic_shifting")
    require(not odd, f"the folder's {found} sets {odd[:1]}, which no {family} teacher does")
    return FlowSchedule(config.shift if is_euler else config.flow_shift)
