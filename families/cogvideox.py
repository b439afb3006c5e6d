"""CogVideoX, 2b and 5b."""

from functools import cache, partial
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXResnetBlock3D,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch.utils.checkpoint import checkpoint

from families.base import Family, read_vp_schedule
from runtime.settings import require


class CogVideoX(Family):
    """Video DiT, v-prediction, variance preserving with zero terminal SNR.

    2b has sine positions, 5b rotary ones.
    """

    pipeline_class = diffusers.CogVideoXPipeline
    net_class = diffusers.CogVideoXTransformer3DModel
    vae_class = diffusers.AutoencoderKLCogVideoX
    vae_parts = (CogVideoXCausalConv3d, CogVideoXSpatialNorm3D)
    guidance = 6.0
    student_steps = 4
    tokens_at = 0

    def read_schedule(self, scheduler):
        return read_vp_schedule(
            scheduler, "v_prediction", zero_terminal_snr=True, family="CogVideoX"
        )

    def cond_shapes(self):
        shape = (self.config.max_text_seq_length, self.config.text_embed_dim)
        return {"prompt_embeds": shape}

    def encode(self, pipe, prompts):
        if self.random_init:
            return self.random_cond(prompts)
        where = pipe.text_encoder.device
        embeds, _ = pipe.encode_prompt(prompts, device=where, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def call(self, net, x_t, t, cond):
        rope = None
        if self.config.use_rotary_positional_embeddings:
            rope = self.rotary(*x_t.shape[-4:], x_t.device)
        return net(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=cond["prompt_embeds"],
            image_rotary_emb=rope,
            return_dict=False,
        )[0]

    @cache
    def rotary(self, frames, channels, height, width, device):
        """(cos, sin), float32, shared over the batch: the stock pipeline's, for such latents."""
        pipe = SimpleNamespace(vae_scale_factor_spatial=1, transformer=self.meta_net)
        make = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
        return make(pipe, height, width, frames, device)

    def latent_shape(self, resolution=None, frames=None):
        frames = frames or self.config.sample_frames
        ratio = self.config.temporal_compression_ratio
        takes = 2 * ratio  # the VAE decodes latent frames in twos, after the first
        whole = frames > 1 and frames % takes == 1
        require(whole, f"--frames {frames}: {self.name} takes {takes}n + 1 frames")
        return (frames - 1) // ratio + 1, *super().latent_shape(resolution)

    def decode(self, vae, latents):
        """Latents (B, F, C, H, W) → frames (B, 3, F', H', W')."""
        z = latents.transpose(1, 2) / self.vae_config.scaling_factor  # (B, C, F, H, W)
        return vae.decode(z.to(vae.dtype)).sample

    def recompute(self, vae):
        """Part by part, and what follows a normalisation frame by frame."""
        for m in vae.decoder.modules():
            if isinstance(m, CogVideoXSpatialNorm3D):
                m.forward = partial(normalised, m)
            elif isinstance(m, CogVideoXResnetBlock3D):
                m.nonlinearity = torch.nn.Identity()  # it is in `normalised`
            elif isinstance(m, CogVideoXUpsample3D):  # else each normalisation would copy it
                m.register_forward_hook(lambda m, args, out: out.contiguous())
        vae.decoder.conv_act = torch.nn.Identity()
        super().recompute(vae)

    def views(self, vae, latents, u):
        """Two frames of two neighbouring latent frames, (2 B, 3, H', W').

        Ours: a whole video and its graph would not fit.
        """
        start = int(u[0] * (latents.shape[1] - 1))
        video = self.decode(vae, latents[:, start : start + 2])  # (B, 3, F', H', W')
        chosen = [int(n * video.shape[2]) for n in u[1:]]
        frames = [video[:, :, i] for i in chosen]  # by a list of numbers the host would wait
        return torch.stack(frames, 1).flatten(0, 1)


def normalised(norm, f, zq, conv_cache=None):
    """SiLU(norm(f, zq)), f (B, C, F, H, W), of an even number of frames, without a cache.

    A CogVideoXSpatialNorm3D makes six tensors of f's size, of up to 1.4 GB each. What comes after
    the statistics is pointwise: one frame of it at a time is kept.
    """
    zq = F.interpolate(zq, size=f.shape[-3:])  # (B, C', F, H, W)
    frames = zip(norm.norm_layer(f).split(1, 2), zq.split(1, 2), strict=True)
    how = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(modulated, norm, x, z, **how) for x, z in frames], 2), {}


def modulated(norm, x, z):
    """A frame x (B, C, 1, H, W) of what `norm` has normalised, scaled and shifted by z."""
    return F.silu(x * norm.conv_y(z)[0] + norm.conv_b(z)[0])
