"""Recipes: the settings that a model's runs have where no flag says otherwise. One place for all.

The paper (arXiv 2507.18569) says: steps, Δt = T/64, TTUR 1, λ, heads of 256 channels, 8,000
iterations for CogVideoX, SD3-Medium by LoRA and the others in full. Those are defaults of adm.py
and adp.py, or are marked `paper` here. All else is ours, after peers and what the digits taught:
nobody has confirmed it at full size.
"""

from families import DIGITS, TINY
from families.cogvideox import CogVideoX
from families.flux import Flux
from families.sd3 import SD3
from families.sdxl import SDXL
from families.wan import Wan

DIGITS_PROMPTS = str(DIGITS.with_name("digits-prompts.txt"))

# A full-size run on GPUs. The global batch does not depend on the hardware: micro-batches follow.
LARGE = {
    "iterations": 8000,  # paper: of CogVideoX
    "batch_size": 32,
    "samples": 1,
    "gradient_checkpointing": True,
    "ema": 0.999,
    "checkpoint_every": 500,
    "sample_every": 500,
}
VIDEO = {"batch_size": 8}
SD3_5 = {"guidance": 4.5}  # its model card's
LORA = {"lora_rank": 64}  # paper: SD3-Medium is tuned by LoRA


def usual(family):
    """A family's own settings: the stock pipeline's CFG scale, the paper's steps."""
    return {"guidance": family.guidance, "student_steps": family.student_steps}


ADM_LARGE = {**LARGE, "warmup": 100}
ADM_LORA = {**LORA, "lr_student": 5e-6, "lr_fake": 1e-5}
ADM = {
    "digits": {
        "prompts": DIGITS_PROMPTS,
        "iterations": 360,
        "batch_size": 16,
        "guidance": 2.0,
        "warmup": 60,
        "dt": 1 / 4,
        "fake_gradient": "straight-through",
        "fake_samples": "last",
        "damping": 0.1,
        "damping_sigma": 0.05,
        "head_width": 64,
        "lr_student": 1e-5,
        "lr_fake": 3e-4,
        "lr_heads": 2e-4,
        "ema": 0.99,
        "checkpoint_every": 120,
        "sample_every": 120,
    },
    "sdxl": {**ADM_LARGE, **usual(SDXL)},
    "sd3": {**ADM_LARGE, **usual(SD3), **ADM_LORA},
    "sd3.5-large": {**ADM_LARGE, **usual(SD3), **SD3_5},
    "cogvideox-2b": {**ADM_LARGE, **usual(CogVideoX), **VIDEO},
    "cogvideox-5b": {**ADM_LARGE, **usual(CogVideoX), **VIDEO},
    "wan-1.3b": {**ADM_LARGE, **usual(Wan), **VIDEO},
    "wan-14b": {**ADM_LARGE, **usual(Wan), **VIDEO},
    "wan-2.2-5b": {**ADM_LARGE, **usual(Wan), **VIDEO},
    "flux-dev": {**ADM_LARGE, **usual(Flux)},
}
# --paper: the paper's method, also where a recipe above has another, and what --help compares with.
ADM_PAPER = {
    "loss": "adm",
    "ttur": 1,
    "warmup": 0,
    "dt": 1 / 64,
    "fake_gradient": "exact",
    "fake_samples": "each",
    "gen_weight": "none",
    "damping": 0.0,
    "head_width": 256,
    "ema": 0.0,
}

ADP_LARGE = {**LARGE, "iterations": 10_000, "mse_iterations": 5000}
ADP = {
    **dict.fromkeys(TINY, {"pixel_backbone": "tiny-sam"}),
    "digits": {
        "pixel_backbone": "tiny-sam",
        "iterations": 800,
        "mse_iterations": 600,
        "batch_size": 16,
        "head_width": 64,
        "lr_student": 3e-6,
        "lr_mse": 1e-4,
        "ema": 0.99,
        "checkpoint_every": 200,
        "sample_every": 200,
    },
    "sdxl": ADP_LARGE,
    "sd3": {**ADP_LARGE, **LORA},
    "sd3.5-large": ADP_LARGE,
    "cogvideox-2b": {**ADP_LARGE, **VIDEO},
    "cogvideox-5b": {**ADP_LARGE, **VIDEO},
    "wan-1.3b": {**ADP_LARGE, **VIDEO},
    "wan-14b": {**ADP_LARGE, **VIDEO},
    "wan-2.2-5b": {**ADP_LARGE, **VIDEO},
    "flux-dev": ADP_LARGE,
}
ADP_PAPER = {
    "loss": "adp",
    "schedule": "cubic",
    "pixel": True,
    "lambda_latent": 0.85,
    "lambda_pixel": 0.15,
    "head_width": 256,
    "lr_mse": None,
    "ema": 0.0,
}

ENCODE = {"digits": {"prompts": DIGITS_PROMPTS}}
PAIRS_LARGE = {"count": 10_000}
PAIRS_VIDEO = {**PAIRS_LARGE, "batch_size": 1}
PAIRS = {
    **dict.fromkeys(TINY, {"steps": 4}),  # of random weights: fifty would show no more
    "digits": {
        "prompts": DIGITS_PROMPTS,
        "count": 3000,
        "steps": 28,
        "guidance": 2.0,
        "batch_size": 100,
        "shard_size": 500,
    },
    "sdxl": {**PAIRS_LARGE, "guidance": SDXL.guidance},
    "sd3": {**PAIRS_LARGE, "guidance": SD3.guidance},
    "sd3.5-large": {**PAIRS_LARGE, **SD3_5},
    "cogvideox-2b": {**PAIRS_VIDEO, "guidance": CogVideoX.guidance},
    "cogvideox-5b": {**PAIRS_VIDEO, "guidance": CogVideoX.guidance},
    "wan-1.3b": {**PAIRS_VIDEO, "guidance": Wan.guidance},
    "wan-14b": {**PAIRS_VIDEO, "guidance": Wan.guidance},
    "wan-2.2-5b": {**PAIRS_VIDEO, "guidance": Wan.guidance},
    "flux-dev": {**PAIRS_LARGE, "guidance": Flux.guidance},
}
