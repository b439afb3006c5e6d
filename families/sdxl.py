"""Stable Diffusion XL.
"""

from functools import cache

import diffusers
import torch
from diffusers.models.attention import BasicTransformerBlock

from families.base import Family, read_vp_schedule


class SDXL(Family):
    """UNet, ε-prediction, variance preserving. Tapped: the encoder half, down blocks and middle (ours)."""
    pipeline_class, net_class = diffusers.StableDiffusionXLPipeline, diffusers.UNet2DConditionModel
    net_name, guidance, student_steps = "unet", 5.0, 1

    def read_schedule(self, scheduler):
        return read_vp_schedule(scheduler, "epsilon", zero_terminal_snr=False, family="SDXL")

    def cond_shapes(self):
        pooled = self.config.projection_class_embeddings_input_dim - 6 * self.config.addition_time_embed_dim  # beside the time ids
        return {"prompt_embeds": (77, self.config.cross_attention_dim), "pooled": (pooled,)}

    def unconditional(self, pipe):
        return {name: torch.zeros_like(c) for name, c in self.encode(pipe, [""]).items()}  # zeros, not the empty prompt

    @cache
    def time_ids(self, height, width, device):
        """Original size, crop's corner, target size of a whole picture, in pixels: (6,) int64."""
        return torch.tensor([height, width, 0, 0, height, width], device=device)

    def call(self, net, x_t, t, cond):
        height, width = (self.vae_scale * n for n in x_t.shape[-2:])
        time_ids = self.time_ids(height, width, x_t.device)
        added = {"text_embeds": cond["pooled"], "time_ids": time_ids.expand(len(x_t), 6).to(cond["pooled"].dtype)}
        return net(x_t, t, encoder_hidden_states=cond["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]

    def taps(self, net):
        widths = self.config.block_out_channels
        return [*net.down_blocks, net.mid_block], net.up_blocks[0], [*widths, widths[-1]]

    def units(self, net):  # blocks are uneven, up_blocks[0] has half of all parameters: the transformer layers inside come first
        outer = [*net.down_blocks, net.mid_block, *net.up_blocks]
        return [m for block in outer for m in block.modules() if isinstance(m, BasicTransformerBlock)] + outer

    def to_map(self, output, x_t):
        return output[0] if isinstance(output, tuple) else output  # a down block also returns its residuals
