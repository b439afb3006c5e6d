"""Wan 2.1, of text: 1.3B and 14B."""

from functools import cache

import diffusers
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as of_vae

from families.base import read_flow_schedule
from families.video import Video
from runtime.settings import require

TOKENS = 512  # to so many the pipeline's call pads a prompt; its encode_prompt alone to 226


class Wan(Video):
    """Video DiT, rotary positions: flow-prediction on the straight line, shifted sampling times."""

    pipeline_class = diffusers.WanPipeline
    net_class = diffusers.WanTransformer3DModel
    vae_class = diffusers.AutoencoderKLWan
    vae_parts = (of_vae.WanResidualBlock, of_vae.WanResample, of_vae.WanCausalConv3d)
    guidance = 5.0
    student_steps = 4
    fps = 16
    call_size = {"height": 480, "width": 832, "num_frames": 81}  # no config says it
    blocks = ("blocks",)

    def read_schedule(self, scheduler):
        _, second = self.index.get("transformer_2", (None, None))
        require(second is None, f"{self.name}: Wan 2.2's two experts are not supported")
        return read_flow_schedule(scheduler, "Wan")  # UniPC's shift; its steps are not taken

    def measure(self):
        self.vae_scale = self.vae_config.scale_factor_spatial
        self.frame_scale = self.vae_config.scale_factor_temporal
        self.grain = self.config.patch_size[1]
        size = self.size_of_call(**self.call_size)
        self.default_frames = size["num_frames"]

    def cond_shapes(self):
        return {"prompt_embeds": (TOKENS, self.config.text_dim)}

    def encode(self, pipe, prompts):
        return super().encode(pipe, prompts, max_sequence_length=TOKENS)

    def call(self, net, x_t, t, cond):
        out = net(
            hidden_states=x_t.transpose(1, 2),  # (B, C, F, H, W)
            timestep=t,
            encoder_hidden_states=cond["prompt_embeds"],
            return_dict=False,
        )[0]
        return out.transpose(1, 2)

    @cache
    def statistics(self, device):
        """(mean, standard deviation) of the VAE's latents, (C, 1, 1, 1) each."""
        both = (self.vae_config.latents_mean, self.vae_config.latents_std)
        return [torch.tensor(numbers, device=device).view(-1, 1, 1, 1) for numbers in both]

    def decode(self, vae, latents):
        """Latents (B, F, C, H, W) → frames (B, 3, F', H', W')."""
        mean, std = self.statistics(latents.device)
        z = latents.transpose(1, 2) * std + mean  # (B, C, F, H, W)
        return vae.decode(z.to(vae.dtype)).sample

    def activated(self, norm, activation):
        """Frame by frame: it computes in float32, and each position by itself."""
        of_frames = super().activated(norm, activation)
        return lambda x: torch.cat([of_frames(frame) for frame in x.split(1, 2)], 2)

    def again(self, forward, x, feat_cache, feat_idx=None):
        """On the decoder's cache as it was then: a part changes its next two entries at most."""
        if feat_idx is None:  # a convolution, and the one entry that it reads
            return super().again(forward, x, feat_cache)
        at = feat_idx[0]

        def pure(x, *entries):
            cache, place = [None] * at + [*entries], [at]
            out = forward(x, feat_cache=cache, feat_idx=place)
            return out, *cache[at : place[0]]

        out, *entries = super().again(pure, x, *feat_cache[at : at + 2])
        feat_cache[at : at + len(entries)] = entries
        feat_idx[0] += len(entries)
        return out
