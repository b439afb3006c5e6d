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
WAN_2_2_5B = dict(
    num_attention_heads=24,
    ffn_dim=14336,
    num_layers=30,
    in_channels=48,
    out_channels=48,
)
FLUX_DEV = dict(num_layers=19, num_single_layers=38, guidance_embeds=True)
DENOISERS = {
    "sdxl": (UNet2DConditionModel, UNET),
    "sd3": (SD3Transformer2DModel, MEDIUM),
    "sd3.5-large": (SD3Transformer2DModel, LARGE),
    "cogvideox-2b": (CogVideoXTransformer3DModel, COGVIDEOX_2B),
    "cogvideox-5b": (CogVideoXTransformer3DModel, COGVIDEOX_5B),
    "wan-1.3b": (WanTransformer3DModel, WAN_1_3B),
    "wan-14b": (WanTransformer3DModel, WAN_14B),
    "wan-2.2-5b": (WanTransformer3DModel, WAN_2_2_5B),
    "flux-dev": (FluxTransformer2DModel, FLUX_DEV),
}
PIPELINES = {
    UNet2DConditionModel: "StableDiffusionXLPipeline",
    SD3Transformer2DModel: "StableDiffusion3Pipeline",
    CogVideoXTransformer3DModel: "CogVideoXPipeline",
    WanTransformer3DModel: "WanPipeline",
    FluxTransformer2DModel: "FluxPipeline",
}
# fmt: off
WAN_2_2_VAE = dict(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=[
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542,
        0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665,
        -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799,
        -0.123, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957,
        0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ],
    latents_std=[
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894,
        1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146,
        0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709,
        0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537,
        0.5444, 0.4089, 0.7468, 0.7744,
    ],
)
# fmt: on


def scheduler(name):
    if name == "sdxl":
        return EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading")
    if name.startswith("sd3"):
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == "flux-dev":
        return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if name.startswith("wan"):
        line = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
        return UniPCMultistepScheduler(**line, flow_shift=5.0 if "2.2" in name else 3.0)
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
        return AutoencoderKLWan(**WAN_2_2_VAE if "2.2" in name else {})
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
    if name == "wan-2.2-5b":
        index["expand_timesteps"] = True  # see families.family_of
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
