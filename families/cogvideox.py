"""CogVideoX, 2b and 5b."""

from functools import cache, partial
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D

from families.base import again, read_vp_schedule
from families.video import Video


class CogVideoX(Video):
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
    decoded_together = 2
    fps = 8

    def read_schedule(self, scheduler):
        return read_vp_schedule(
            scheduler, "v_prediction", zero_terminal_snr=True, family="CogVideoX"
        )

    def measure(self):
        super().measure()
        self.frame_scale = self.config.temporal_compression_ratio
        self.default_frames = self.config.sample_frames

    def cond_shapes(self):
        shape = (self.config.max_text_seq_length, self.config.text_embed_dim)
        return {"prompt_embeds": shape}

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

    def decode(self, vae, latents):
        """Latents (B, F, C, H, W) → frames (B, 3, F', H', W')."""
        z = latents.transpose(1, 2) / self.vae_config.scaling_factor  # (B, C, F, H, W)
        return vae.decode(z.to(vae.dtype)).sample

    def recompute(self, vae):
        """Part by part, and what follows a normalisation frame by frame."""
        for m in vae.decoder.modules():
            if isinstance(m, CogVideoXUpsample3D):  # else each normalisation would copy it
                m.register_forward_hook(lambda m, args, out: out.contiguous())
        super().recompute(vae)

    def activated(self, norm, activation):
        return partial(normalised, norm, activation)


def normalised(norm, activation, f, zq, conv_cache=None):
    """activation(norm(f, zq)), f (B, C, F, H, W), of an even number of frames, without a cache.

    A CogVideoXSpatialNorm3D makes six tensors of f's size, of up to 1.4 GB each. What comes after
    the statistics is pointwise: one frame of it at a time is kept.
    """
    zq = F.interpolate(zq, size=f.shape[-3:])  # (B, C', F, H, W)
    frames = zip(norm.norm_layer(f).split(1, 2), zq.split(1, 2), strict=True)
    return torch.cat([again(modulated, norm, activation, x, z) for x, z in frames], 2), {}


def modulated(norm, activation, x, z):
    """A frame x (B, C, 1, H, W) of what `norm` has normalised, scaled and shifted by z."""
    return activation(x * norm.conv_y(z)[0] + norm.conv_b(z)[0])
