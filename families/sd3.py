"""Stable Diffusion 3 and 3.5."""

from functools import cached_property

import diffusers

from families.base import Family, read_flow_schedule
from runtime.settings import require


class SD3(Family):
    """MM-DiT: flow-prediction on the straight line, shifted sampling times."""

    pipeline_class = diffusers.StableDiffusion3Pipeline
    net_class = diffusers.SD3Transformer2DModel
    guidance = 7.0
    student_steps = 4
    tokens_at = 1
    lora_targets = Family.lora_targets + ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    def read_schedule(self, scheduler):
        return read_flow_schedule(scheduler, "SD3")

    @cached_property
    def text_tokens(self):
        """T5's tokens: the stock pipeline's default of 256, or as few as the folder's tokenizer."""
        return self.tokens("tokenizer_3", 256)

    def cond_shapes(self):
        tokens = self.tokens("tokenizer", 77) + self.text_tokens  # CLIP's, then T5's
        return {
            "prompt_embeds": (tokens, self.config.joint_attention_dim),
            "pooled": (self.config.pooled_projection_dim,),
        }

    def encode(self, pipe, prompts):
        options = {"prompt_2": None, "prompt_3": None, "max_sequence_length": self.text_tokens}
        return super().encode(pipe, prompts, **options)

    def call(self, net, x_t, t, cond):
        return net(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]

    def latent_shape(self, resolution=None, frames=None):
        shape = super().latent_shape(resolution, frames)
        largest = self.config.pos_embed_max_size * self.config.patch_size  # latents along a side
        most = largest * self.vae_scale
        fits = max(shape[1:]) <= largest
        require(fits, f"--resolution: {self.name} takes at most {most} pixels a side")
        return shape
