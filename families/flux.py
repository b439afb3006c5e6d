"""FLUX.1-dev."""

from functools import cache
from math import exp

import diffusers
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from families.base import Family, read_flow_schedule
from families.sd3 import SD3
from ode import FlowSchedule, T
from runtime.settings import require

TOKENS = 512  # of T5, to which the pipeline's call pads a prompt


class Flux(Family):
    """MM-DiT into which guidance is distilled: flow-prediction, times shifted by the size."""

    pipeline_class = diffusers.FluxPipeline
    net_class = diffusers.FluxTransformer2DModel
    guidance = 3.5
    embeds_guidance = True
    even_sigmas = True
    student_steps = 4
    blocks = ("transformer_blocks", "single_transformer_blocks")
    tokens_at = 1  # of both kinds
    lora_targets = SD3.lora_targets

    def read_schedule(self, scheduler):
        few = f"{self.name} is told no guidance: FLUX.1-schnell has few steps already"
        require(self.config.guidance_embeds, few)
        read_flow_schedule(scheduler, "FLUX", dynamic=True)
        self.shifts = scheduler.config
        return self.schedule_at(self.default_size)

    def schedule_at(self, shape):
        tokens = shape[-2] * shape[-1] // self.grain**2
        ends = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return FlowSchedule(exp(calculate_shift(tokens, *(self.shifts[end] for end in ends))))

    def measure(self):
        super().measure()
        self.grain = 2  # the pipeline packs as many latents along a side into a token
        self.channels //= self.grain**2
        self.size_of_call(height=1024, width=1024)

    def cond_shapes(self):
        shape = (TOKENS, self.config.joint_attention_dim)
        return {"prompt_embeds": shape, "pooled": (self.config.pooled_projection_dim,)}

    def encode(self, pipe, prompts):
        return super().encode(pipe, prompts, max_sequence_length=TOKENS)

    @cache
    def positions(self, tokens, height, width, device):
        """Of the text's tokens, (tokens, 3), and of the image's, (height·width, 3)."""
        of_image = diffusers.FluxPipeline._prepare_latent_image_ids
        images = of_image(1, height, width, device, torch.float32)
        return {"txt_ids": images.new_zeros(tokens, 3), "img_ids": images}

    def call(self, net, x_t, t, cond):
        packed = F.pixel_unshuffle(x_t, self.grain)  # (B, 4 C, H/2, W/2)
        size, tokens = packed.shape[-2:], cond["prompt_embeds"].shape[1]
        w = cond.get("guidance", torch.full_like(t, self.guidance))  # (B,)
        # In bf16 the network would round time and guidance before it embeds them.
        exact = lambda module, args: (t, T * w, args[-1])  # noqa: E731
        with net.time_text_embed.register_forward_pre_hook(exact):
            out = net(
                hidden_states=packed.flatten(2).transpose(1, 2),  # (B, H/2·W/2, 4 C)
                timestep=t / T,
                guidance=w,
                pooled_projections=cond["pooled"],
                encoder_hidden_states=cond["prompt_embeds"],
                **self.positions(tokens, *size, x_t.device),
                return_dict=False,
            )[0]
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, size), self.grain)
