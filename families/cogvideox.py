"""CogVideoX, 2b and 5b.
"""

from functools import cache
from types import SimpleNamespace

import diffusers

from families.base import Family, read_vp_schedule
from runtime.settings import require


class CogVideoX(Family):
    """Video DiT, v-prediction, variance preserving with zero terminal SNR. 2b: sine positions; 5b: rotary."""
    pipeline_class, net_class = diffusers.CogVideoXPipeline, diffusers.CogVideoXTransformer3DModel
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
        return diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, height, width, frames, device)

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
