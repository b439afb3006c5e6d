"""The networks: the denoiser that returns (prediction, features), its roles, and discriminators.

Conventions, each pinned by a test: latents are (B, C, H, W), video latents (B, F, C, H, W);
conditioning is a dict of (B, ...) tensors; t is (B,) float32 or int64 and never cast; predictions
come back float32.

The paper's symbols (arXiv 2507.18569), here and in adp.py, adm.py and ode.py:

    G_θ              student    the generator: x_t' → x̂_0
    F_φ              teacher    the frozen real score, with CFG u + w (c − u), or told w = guidance
    f_ψ              fake       the fake score, trained on the student's samples, without CFG
    D_τ, D_τ1        LatentDiscriminator   frozen teacher + heads on some of its blocks → (B,)
    D_τ2             PixelDiscriminator    frozen SAM + heads, on decoded images → (N,)
    x̂_0, x̃_0         x0_hat     the student's sample, as latents
    x_t              x_t        α_t x̂_0 + σ_t ε, as latents
    x^real_{t−Δt}    x_real     one PF-ODE step from that x_t by the teacher, as latents
    x^fake_{t−Δt}    x_fake     the same by the fake score
    t, t−Δt          t, s       (B,) float32; t = T is noise, t = 0 is data
    T, Δt            T, dt      1000; Δt = T/64
    λ_1, λ_2         lambda_latent, lambda_pixel    0.85, 0.15
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from families import tiny
from families.base import SMALLEST_MAP, again
from families.video import Video
from runtime.ranks import assign, shard
from runtime.settings import BadInput, require

# --- The denoiser and its roles -------------------------------------------------------------------


class _Stop(Exception):
    """Leaves a forward pass."""


def _stop(module, args):
    raise _Stop


class Denoiser(nn.Module):
    """A denoising network as every loop here sees it: forward returns (prediction, features).

    Features too come from forward, so that a sharded module may be used through them alone. A LoRA
    role is an `adapter` on the frozen Denoiser `base`, and runs through that.
    """

    def __init__(self, family, net, bf16=False, base=None, adapter=None):
        super().__init__()
        self.family = family
        self.net = net
        self.bf16 = bf16
        self.base = base
        self.adapter = adapter
        self.embeds_guidance = family.embeds_guidance

    def forward(self, x_t, t, cond, want="prediction", adapter=None):
        """(prediction float32 like x_t, or None; [feature maps], or []) at x_t (B, ...), t (B,).

        cond: {name: (B, ...)}. want: "prediction", "both", or "features", which stops after the
        last tapped block.
        """
        if self.base:
            return self.base(x_t, t, cond, want, self.adapter)
        out, maps, hooks = None, [], []
        tapped, following, _ = self.family.taps(self.net)

        def keep(block, args, output):
            maps.append(self.family.to_map(output, x_t))

        if want != "prediction":
            hooks += [block.register_forward_hook(keep) for block in tapped]
        if want == "features":
            hooks.append(following.register_forward_pre_hook(_stop))
        use_adapter(self.net, adapter)
        autocast = torch.autocast(x_t.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        try:
            with autocast:
                out = self.family.call(self.net, x_t, t, cond).float()  # (B, ...)
        except _Stop:
            if isinstance(following, FSDPModule):
                following.reshard()  # it was gathered, and has not run
        finally:  # gone before backward, so that checkpointing's second forward meets no hook
            for hook in hooks:
                hook.remove()
        return out, maps

    def own_parameters(self):
        """{name: parameter} of this role alone: its adapter's if it has one, else its network's."""
        everything = dict(self.net.named_parameters())
        if not self.adapter:
            return everything
        return {name: p for name, p in everything.items() if f".{self.adapter}." in name}

    def load(self, pipeline):
        """Take the weights of this exported pipeline folder."""
        if self.adapter:
            weights = load_file(pipeline / "lora" / "pytorch_lora_weights.safetensors")
            for name, p in self.own_parameters().items():
                plain = name.replace(f".{self.adapter}.", ".")  # as peft saves an adapter's weights
                assign(p, weights[f"{self.family.net_name}.{plain}"])
        else:
            self.family.load(self.net, pipeline)

    def checkpoint_activations(self):
        """Recompute activations in backward, with the adapter that was active in forward."""

        def checkpointed(block, *args):
            role = getattr(self.net, "role", None)

            def in_its_role(*args):
                use_adapter(self.net, role)
                return block(*args)

            return checkpoint(in_its_role, *args, use_reentrant=False)

        self.net.enable_gradient_checkpointing(checkpointed)


def load_denoiser(family, device="cpu", dtype=torch.float32, folder=None, empty=False):
    """A new Denoiser of family.network(...); on a GPU it computes in bf16."""
    net = family.network(device, dtype, folder, empty)
    return Denoiser(family, net, bf16=torch.device(device).type == "cuda")


def use_adapter(net, role):
    """From here on `net` runs with that role's LoRA adapter, or with none.

    Unlike peft's own switch, it leaves alone who trains. Without adapters nothing happens.
    """
    if hasattr(net, "role") and net.role != role:
        flags = [(p, p.requires_grad) for p in net.parameters()]
        if role:
            net.enable_adapters()
            net.set_adapter(role)
        else:
            net.disable_adapters()
        for p, flag in flags:
            p.requires_grad_(flag)
        net.role = role


def make_roles(
    family,
    roles,
    lora_rank=0,
    device="cpu",
    frozen_dtype=torch.float32,
    gradient_checkpointing=False,
    mesh=None,
):
    """(teacher, one Denoiser a role): the frozen teacher, and trainable copies of it in float32.

    With lora_rank the copies are adapters (alpha = rank) on the teacher itself: one copy of the
    weights for all roles and the discriminator's backbone.
    """
    teacher = load_denoiser(family, device, frozen_dtype, empty=True)
    if lora_rank:
        add_adapters(teacher.net, roles, lora_rank, family.lora_targets)
    teacher.net.requires_grad_(False)
    trained = []
    for role in roles:
        if lora_rank:
            denoiser = Denoiser(family, teacher.net, base=teacher, adapter=role)
        else:
            denoiser = load_denoiser(family, device, empty=True)
        for p in denoiser.own_parameters().values():
            p.data = p.data.float()  # masters, whatever the base is held in
            p.requires_grad_(True)
        trained.append(denoiser)
    separate = [teacher] if lora_rank else [teacher, *trained]  # with networks of their own
    for denoiser in separate:  # cut into parts first, so that a rank never holds the whole of one
        fill = partial(family.load, denoiser.net, device=device)
        shard(denoiser, family.units(denoiser.net), mesh, fill)
        if gradient_checkpointing:
            denoiser.checkpoint_activations()
    if lora_rank:
        start_adapters(teacher.net)
    return teacher, *trained


def add_adapters(net, roles, rank, targets):
    """Give `net` one LoRA adapter a role, of which none is active yet."""
    from peft import LoraConfig  # needed for this alone

    for role in roles:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        net.add_adapter(config, role)
    net.role = "nobody's yet"  # see use_adapter


def start_adapters(net):
    """Set LoRA's factors as peft does: A at random, B to zero, so that an adapter is nothing yet.

    Every rank must have the same random numbers ahead.
    """
    for name, p in net.named_parameters():
        if ".lora_A." in name:
            whole = torch.empty(p.shape)  # (rank, in)
            assign(p, nn.init.kaiming_uniform_(whole, a=5**0.5))
        elif ".lora_B." in name:
            p.data.zero_()


@contextmanager
def frozen(*modules):
    """Inside, these modules' parameters take no gradient, activations stay differentiable.

    Must span forward *and* backward: with activation checkpointing the forward is run again in
    backward.
    """
    parameters = []
    for module in modules:
        is_role = isinstance(module, Denoiser)
        parameters += module.own_parameters().values() if is_role else module.parameters()
    flags = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


# --- Discriminators -------------------------------------------------------------------------------


class Head2d(nn.Module):
    """Feature map (B, C, H, W) → logits (B,), the mean over positions.

    arXiv 2507.18569, appendix B: 3 × [Conv 4x4, stride 2 → GroupNorm(32) → SiLU], [Conv 3x3 →
    GroupNorm(32) → SiLU], average pool, Linear. The strides need 8x8 positions; the 4x4 of the
    digits teacher are enlarged to that (ours).
    """

    smallest = SMALLEST_MAP
    conv = nn.Conv2d
    strided = (4, 2, 1)  # kernel, stride, padding
    plain = (3, 1, 1)

    def __init__(self, channels, width=256):
        super().__init__()
        # Narrower heads than the paper's get fewer groups (ours): a 1x1 map normalised channel by
        # channel is constant.
        groups = min(32, width // 8)
        stages = []
        for how in (self.strided, self.strided, self.strided, self.plain):
            stages += [self.conv(channels, width, *how), nn.GroupNorm(groups, width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*stages)
        self.to_logit = nn.Linear(width, 1)

    def forward(self, h):
        if min(h.shape[-2:]) < self.smallest:
            h = h.repeat_interleave(2, -1).repeat_interleave(2, -2)  # (B, C, 2 H, 2 W)
        pooled = self.body(h.float()).flatten(2).mean(2)  # (B, width)
        return self.to_logit(pooled)[:, 0]


class Head3d(Head2d):
    """Feature map (B, C, F, H, W) → logits (B,): 3x3x3 convolutions, average pool over time too.

    The rest is as in 2D (ours).
    """

    conv = nn.Conv3d
    strided = (3, (1, 2, 2), 1)


class Discriminator(nn.Module):
    """Frozen backbone + trainable heads, one a tapped map, sharded over `mesh`.

    Logits are means over positions, then over heads (ours).
    """

    def __init__(self, backbone, heads, mesh=None):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        for head in heads:
            shard(head, mesh=mesh)

    def logits(self, maps):
        """Feature maps, one a head → (B,), float32 also where the backbone is not."""
        logits = [head(h) for head, h in zip(self.heads, maps, strict=True)]
        return torch.stack(logits).mean(0)


def accuracy(real, fake):
    """The share of logits (B,) that are on their side of 0: real above, fake below."""
    return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2


class LatentDiscriminator(Discriminator):
    """D_τ, and D_τ1 of ADP: the frozen teacher's blocks, with prompt and t, without CFG."""

    def __init__(self, teacher, width=256, mesh=None):
        head = Head3d if isinstance(teacher.family, Video) else Head2d
        _, _, channels = teacher.family.taps(teacher.net)
        super().__init__(teacher, [head(c, width) for c in channels], mesh)

    def features(self, x_t, t, cond):
        """Tapped maps at noisy latents x_t (B, ...), t (B,).

        The teacher's forward stops after the last of them.
        """
        return self.backbone(x_t, t, cond, want="features")[1]


class PixelDiscriminator(Discriminator):
    """D_τ2 of ADP: a frozen vision transformer on clean images, heads on its four quarters.

    Those of SAM-B are layers 3, 6, 9, 12. backbone: a SamVisionModel, or a transformers ViT with
    class token(s) first (DINOv2: the paper's ablation A2).
    """

    def __init__(self, backbone, width=256, mesh=None):
        config = backbone.config
        super().__init__(backbone, [Head2d(config.hidden_size, width) for _ in range(4)], mesh)
        self.side = config.image_size // config.patch_size  # of its square maps
        # ImageNet's, of RGB.
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1))

    def recompute(self):
        """Keep of each layer its input alone: SAM-B's four global ones would keep gigabytes."""
        for layer in self.backbone.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(again, layer.forward)

    def features(self, images):
        """Four maps (N, C, H', W') of images (N, 3, H, W) in [−1, 1].

        The images are resized to the backbone's own square and ImageNet-normalised.
        """
        size = self.backbone.config.image_size
        square = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
        images = square / 2 + 0.5  # (N, 3, size, size) in [0, 1]
        normal = (images - self.mean) / self.std  # (N, 3, size, size)
        with images.device:  # SAM would make its tables of relative positions in main memory
            # [i]: after layer i
            seen = normal.to(self.backbone.dtype)
            hidden = self.backbone(seen, output_hidden_states=True).hidden_states
        layers = self.backbone.config.num_hidden_layers
        maps = []
        for k in (1, 2, 3, 4):
            h = hidden[layers * k // 4]
            if h.ndim == 3:  # a ViT's (N, 1 + H'·W', C), where SAM's is (N, H', W', C)
                h = h[:, -(self.side**2) :].unflatten(1, (self.side, self.side))
            maps.append(h.permute(0, 3, 1, 2))  # (N, C, H', W')
        return maps


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
        folder = tiny.build(name)
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
    plain = all(isinstance(size, int) for size in sizes)
    require(plain, f"{flag}: a {kind} is no plain vision transformer")
    side = sizes[0] // sizes[1]
    enough = side >= Head2d.smallest
    require(enough, f"{flag}: its {side}x{side} feature maps are too small for the heads")
    return backbone.eval().requires_grad_(False)
