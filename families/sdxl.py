"""Stable Diffusion XL."""

from functools import cache

import diffusers
import torch
from diffusers.models.attention import BasicTransformerBlock

from families.base import Family, read_vp_schedule


class SDXL(Family):
    """UNet, ε-prediction, variance preserving.

    Tapped is the encoder half, down blocks and middle (ours).
    """

    pipeline_class = diffusers.StableDiffusionXLPipeline
    net_class = diffusers.UNet2DConditionModel
    net_name = "unet"
    guidance = 5.0
    student_steps = 1

    def read_schedule(self, scheduler):
        return read_vp_schedule(scheduler, "epsilon", zero_terminal_snr=False, family="SDXL")

    def cond_shapes(self):
        time_ids = 6 * self.config.addition_time_embed_dim
        pooled = self.config.projection_class_embeddings_input_dim - time_ids
        tokens = self.tokens("tokenizer", 77)
        return {"prompt_embeds": (tokens, self.config.cross_attention_dim), "pooled": (pooled,)}

    def unconditional(self, pipe):
        """Zeros, not the empty prompt's conditioning, {name: (1, ...)}."""
        cond = self.encode(pipe, [""])
        return {name: torch.zeros_like(c) for name, c in cond.items()}

    @cache
    def time_ids(self, height, width, device):
        """Original size, crop's corner, target size of a whole picture, in pixels: (6,) int64."""
        return torch.tensor([height, width, 0, 0, height, width], device=device)

    def call(self, net, x_t, t, cond):
        height, width = (self.vae_scale * n for n in x_t.shape[-2:])
        time_ids = self.time_ids(height, width, x_t.device).expand(len(x_t), 6)  # (B, 6)
        pooled = cond["pooled"]
        return net(
            x_t,
            t,
            encoder_hidden_states=cond["prompt_embeds"],
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids.to(pooled.dtype)},
            return_dict=False,
        )[0]

    def taps(self, net):
        widths = self.config.block_out_channels
        return [*net.down_blocks, net.mid_block], net.up_blocks[0], [*widths, widths[-1]]

    def units(self, net):
        """The transformer layers inside the blocks, then the blocks.

        Blocks alone are uneven: up_blocks[0] has half of all parameters.
        """
        outer = [*net.down_blocks, net.mid_block, *net.up_blocks]
        parts = [part for block in outer for part in block.modules()]
        return [part for part in parts if isinstance(part, BasicTransformerBlock)] + outer

    def to_map(self, output, x_t):
        if isinstance(output, tuple):  # a down block also returns its residuals
            return output[0]
        return output
