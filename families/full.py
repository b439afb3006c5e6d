"""The real models without their weights: explicit configs, all offline.

For `--random-init` and for planning a run.
"""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from transformers import CLIPTextConfig, T5Config, UMT5Config

from families.tiny import SD_BETAS

UNET = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
MEDIUM = dict(
    sample_size=128,
    num_layers=24,
    num_attention_heads=24,
    attention_head_dim=64,
    caption_projection_dim=1536,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
    pos_embed_max_size=192,
    out_channels=16,
)
LARGE = dict(
    MEDIUM,
    num_layers=38,
    num_attention_heads=38,
    caption_projection_dim=2432,
    qk_norm="rms_norm",
)
COGVIDEOX_2B = dict(num_attention_heads=30, num_layers=30)
COGVIDEOX_5B = dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
WAN_1_3B = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
WAN_14B = dict(num_attention_heads=40, ffn_dim=13824, num_layers=40)
FLUX_DEV = dict(num_layers=19, num_single_layers=38, guidance_embeds=True)
DENOISERS = {
    "sdxl": (UNet2DConditionModel, UNET),
    "sd3": (SD3Transformer2DModel, MEDIUM),
    "sd3.5-large": (SD3Transformer2DModel, LARGE),
    "cogvideox-2b": (CogVideoXTransformer3DModel, COGVIDEOX_2B),
    "cogvideox-5b": (CogVideoXTransformer3DModel, COGVIDEOX_5B),
    "wan-1.3b": (WanTransformer3DModel, WAN_1_3B),
    "wan-14b": (WanTransformer3DModel, WAN_14B),
    "flux-dev": (FluxTransformer2DModel, FLUX_DEV),
}
PIPELINES = {
    UNet2DConditionModel: "StableDiffusionXLPipeline",
    SD3Transformer2DModel: "StableDiffusion3Pipeline",
    CogVideoXTransformer3DModel: "CogVideoXPipeline",
    WanTransformer3DModel: "WanPipeline",
    FluxTransformer2DModel: "FluxPipeline",
}


def scheduler(name):
    if name == "sdxl":
        return EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading")
    if name.startswith("sd3"):
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == "flux-dev":
        return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if name.startswith("wan"):
        line = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
        return UniPCMultistepScheduler(**line, flow_shift=3.0)
    return CogVideoXDDIMScheduler(
        **SD_BETAS,
        prediction_type="v_prediction",
        set_alpha_to_one=True,
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0 if "2b" in name else 1.0,
    )


def vae(name):
    if name.startswith("wan"):
        return AutoencoderKLWan()
    if name.startswith("cogvideox"):
        return AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            latent_channels=16,
            block_out_channels=(128, 256, 256, 512),
            layers_per_block=3,
            scaling_factor=1.15258426 if "2b" in name else 0.7,
        )
    if name == "sdxl":
        own = dict(latent_channels=4, scaling_factor=0.13025)
    else:
        own = dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
        if name == "flux-dev":
            own |= dict(scaling_factor=0.3611, shift_factor=0.1159)
        else:
            own |= dict(scaling_factor=1.5305, shift_factor=0.0609)
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **own,
    )


def clip_text(width, layers, heads, kind="CLIPTextModelWithProjection", **more):
    """The config of a CLIP's text encoder."""
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        architectures=[kind],
        **more,
    )


def text_encoders(name):
    """{folder: config} of the model's text encoders."""
    clip_g = clip_text(1280, 32, 20, hidden_act="gelu")
    xxl = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
    xxl |= dict(feed_forward_proj="gated-gelu")
    if name.startswith("wan"):
        config = UMT5Config(vocab_size=256384, **xxl, architectures=["UMT5EncoderModel"])
        return {"text_encoder": config}
    t5_xxl = T5Config(**xxl, architectures=["T5EncoderModel"])
    if name.startswith("cogvideox"):
        return {"text_encoder": t5_xxl}
    if name in ("sdxl", "flux-dev"):
        clip_l = clip_text(768, 12, 12, "CLIPTextModel")
        return {"text_encoder": clip_l, "text_encoder_2": clip_g if name == "sdxl" else t5_xxl}
    clip_l = clip_text(768, 12, 12)
    return {"text_encoder": clip_l, "text_encoder_2": clip_g, "text_encoder_3": t5_xxl}


@cache
def skeleton(name):
    """The folder (Path) of the real model `name`, but of configs alone; removed at exit.

    It is what the model's pipeline would save.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kind, config = DENOISERS[name]
    net_name = "unet" if name == "sdxl" else "transformer"
    with torch.device("meta"):
        parts = {net_name: kind(**config), "vae": vae(name)}
    parts["scheduler"] = scheduler(name)
    for part, made in parts.items():
        made.save_config(folder / part)
    for part, config in text_encoders(name).items():  # not of the pipeline: for planning
        config.save_pretrained(folder / part)
    classes = {part: ["diffusers", type(made).__name__] for part, made in parts.items()}
    index = {"_class_name": PIPELINES[kind], **classes}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
