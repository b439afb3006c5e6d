"""Tiny teachers and vision backbones, made offline from real diffusers and transformers classes.

`--model tiny-sd3` and its siblings end up here. Weights are random but seeded, so every build of a
name is the same; VAEs, text encoders and tokenizers are real, and the folder goes through the code
that opens a model from the hub.
"""

import atexit
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    SamVisionConfig,
    SamVisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
NO_QUANT = dict(use_quant_conv=False, use_post_quant_conv=False)
# What configs of one kind have in common, under the names that their classes share.
T5_SIZE = dict(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
DIT_SIZE = dict(in_channels=16, out_channels=16, num_layers=4, num_attention_heads=2)
VIT_SIZE = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2)


@cache
def build(name):
    """The folder (Path) of the tiny model `name`.

    It is written once a process, to a temporary place, and removed at exit.
    """
    makers = {
        "tiny-sdxl": sdxl,
        "tiny-sd3": sd3,
        "tiny-cogvideox-2b": cogvideox,
        "tiny-cogvideox-5b": partial(cogvideox, rotary=True),
        "tiny-wan": wan,
        "tiny-flux": flux,
        "tiny-sam": sam,
        "tiny-dinov2": dinov2,
    }
    make = makers[name]
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # A run's own random numbers do not depend on whether its teacher is tiny.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make().save_pretrained(folder)
    return folder


def clip_tokenizer(words=(), max_length=77):
    """Byte-level CLIP tokenizer.

    Each of `words` (a dozen at most) is one token; of any other word, every character is one.
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    merges = []
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        merges += [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]
    merges = list(dict.fromkeys(merges))
    tokens += [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def t5_tokenizer(max_length, words=()):
    """Unigram T5 tokenizer whose pieces are the printable ASCII characters and `words`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(c), -3.0) for c in range(33, 127)]
    pieces += [("▁" + word, -1.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def clip_text(model_class=CLIPTextModelWithProjection, vocab_size=514, **config):
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        # These must be this vocabulary's, or the pooled token is looked up in the wrong place.
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        **config,
    )
    return model_class(config)


def t5():
    return T5EncoderModel(T5Config(**T5_SIZE))


def image_vae(latent_channels, **config):
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        sample_size=64,
        latent_channels=latent_channels,
        **config,
    )


def sdxl():
    """0.1M-parameter UNet, 64x64 images, 32x32 latents."""
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    scheduler = EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading")
    return StableDiffusionXLPipeline(
        vae=image_vae(4, scaling_factor=0.13025),
        unet=unet,
        scheduler=scheduler,
        text_encoder=clip_text(CLIPTextModel),
        text_encoder_2=clip_text(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
    )


def sd3():
    """MM-DiT of four blocks, 32x32 images, 16x16 latents."""
    transformer = SD3Transformer2DModel(
        **DIT_SIZE,
        sample_size=16,
        patch_size=2,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(16, scaling_factor=1.5305, shift_factor=0.0609, **NO_QUANT),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(256),
    )


def cogvideox(rotary=False):
    """Video DiT of four blocks, nine 128x128 frames, latents of three 16x16 frames.

    Positions as in 2b, or 5b (rotary).
    """
    transformer = CogVideoXTransformer3DModel(
        **DIT_SIZE,
        attention_head_dim=16,
        time_embed_dim=16,
        text_embed_dim=32,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        use_rotary_positional_embeddings=rotary,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        norm_num_groups=2,
        block_out_channels=(8,) * 4,
        latent_channels=16,
        layers_per_block=1,
        sample_height=128,
        sample_width=128,
        scaling_factor=0.7 if rotary else 1.15258426,
    )
    scheduler = CogVideoXDDIMScheduler(
        **SD_BETAS,
        prediction_type="v_prediction",
        set_alpha_to_one=True,
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if rotary else 3.0,
    )
    return CogVideoXPipeline(
        tokenizer=t5_tokenizer(226),
        text_encoder=t5(),
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
    )


def wan():
    """Video DiT of four blocks, nine 64x64 frames, latents of three 16x16 frames."""
    transformer = WanTransformer3DModel(
        **DIT_SIZE,
        attention_head_dim=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=64,
    )
    vae = AutoencoderKLWan(
        base_dim=8,  # of four channels its norms would make rounding errors large
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=t5_tokenizer(512),
        text_encoder=UMT5EncoderModel(UMT5Config(**T5_SIZE)),
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
    )
    # Its size, of which no part's config says anything: see Wan.measure.
    pipe.register_to_config(_sampling={"height": 64, "width": 64, "num_frames": 9})
    return pipe


def flux():
    """MM-DiT of two blocks of two streams and two of one, 32x32 images, 16x16 latents."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(16, scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT),
        text_encoder=clip_text(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(512),
    )
    pipe.register_to_config(_sampling={"height": 32, "width": 32})  # no part's config says it
    return pipe


def sam():
    config = SamVisionConfig(
        **VIT_SIZE,
        output_channels=8,
        image_size=128,
        patch_size=16,
        window_size=4,
        global_attn_indexes=[1, 3],
        # By default 1e-10, which would make every feature and gradient vanish.
        initializer_range=0.02,
    )
    return SamVisionModel(config)


def dinov2():
    return Dinov2Model(Dinov2Config(**VIT_SIZE, image_size=112, patch_size=14))
