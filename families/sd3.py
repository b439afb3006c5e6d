"""Stable Diffusion 3 and 3.5.
"""

import json
from functools import cached_property

import diffusers

from families.base import Family
from ode import FlowSchedule, T
from runtime.settings import require


class SD3(Family):
    """MM-DiT of Stable Diffusion 3 and 3.5: flow-prediction on the straight line, shifted sampling times."""
    pipeline_class, net_class = diffusers.StableDiffusion3Pipeline, diffusers.SD3Transformer2DModel
    guidance, student_steps, tokens_at = 7.0, 4, 1
    lora_targets = Family.lora_targets + ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    def read_schedule(self, scheduler):
        found, config = type(scheduler).__name__, scheduler.config
        require(isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler), f"SD3 predicts a flow, but the folder has {found}")
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
