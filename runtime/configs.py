"""The settings that scripts share: which teacher, and how a training run goes."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from runtime.flags import option
from runtime.settings import at_least, positive, require


@dataclass
class TeacherConfig:
    """Which pipeline folder is opened: what families.load_teacher takes."""

    model: str = option(
        "digits",
        "teacher: digits, sdxl, sd3, sd3.5-large, cogvideox-2b, cogvideox-5b, wan-1.3b, wan-14b, "
        "wan-2.2-5b, flux-dev, tiny-… or a pipeline folder, which has no recipe, only the scripts' "
        "own small defaults",
        "what to distil",
    )
    random_init: bool = option(
        False,
        "random weights instead of the hub's, at full size, and noise for text embeddings",
        "what to distil",
    )


EMBED = option(
    "cached",
    "of a text file: encode all prompts first, on disk, or each batch when it is needed, with the "
    "text encoders in GPU memory, sharded over the ranks: for more prompts than the disk holds",
    "memory",
)


@dataclass
class TrainingConfig(TeacherConfig):
    """What adp.py and adm.py have in common; each adds its method, and its rates and folder."""

    init: str = option(
        "teacher",
        "where the student starts: teacher, or the folder of an adp.py (or adm.py) run",
        "what to distil",
    )
    resolution: str | None = option(
        None, "pixels, 1024 or 480x720 (height x width); default: the model's own", "what to distil"
    )
    frames: int | None = option(None, "video frames; default: the model's own", "what to distil")
    guidance: float | None = option(
        None,
        "teacher's CFG scale w in u + w (c - u), or what FLUX's is told; default: the stock "
        "pipeline's for the model",
        "what to distil",
    )
    student_steps: int | None = option(
        None,
        "student's steps; default: the paper's for the model, SDXL 1, others 4",
        "what to distil",
    )
    paper: bool = option(
        False,
        "the paper's method where the model's recipe has another: the values that are called the "
        "paper's below",
        "the method",
    )
    head_width: int = option(256, "channels of the discriminators' heads", "the method")
    iterations: int = option(
        50, "in all, those of --warmup or --mse-iterations among them", "training"
    )
    batch_size: int = option(4, "global, whatever the number of ranks (ours)", "training")
    seed: int = option(0, "of everything random", "training")
    lr_student: float = option(1e-5, "learning rate of the student (ours)", "training")
    lr_heads: float = option(1e-4, "learning rate of the discriminators' heads (ours)", "training")
    beta1: float = option(
        0.9, "AdamW's β1 (ours; peers use 0 or 0.9; ADM of digits came nearer at 0.5)", "training"
    )
    ema: float = option(
        0.0,
        "decay of an average of the student's weights, which is what is exported; 0: none (ours)",
        "training",
    )
    clip: float = option(
        1.0, "gradient norm at which each network's update is clipped (ours)", "training"
    )
    lora_rank: int = option(
        0, "train LoRA adapters of this rank on one shared base; 0: full networks", "memory"
    )
    samples: int | None = option(
        None,
        "samples a GPU at a time (ours): micro-batches follow from it; default: all at once",
        "memory",
    )
    accumulate: int | None = option(
        None,
        "micro-batches that the batch is split into, whatever --samples says: less memory, the "
        "same updates; default: by --samples",
        "memory",
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in backward: less memory, more time", "memory"
    )
    offload: bool = option(
        False,
        "keep AdamW's moments in main memory between steps: less GPU memory, more time",
        "memory",
    )
    shard_ranks: int | None = option(
        None,
        "shard networks over groups of so many neighbouring ranks, say the GPUs of a node: each "
        "group has a copy, and only gradients pass between groups, which is faster and takes more "
        "memory; default: over all ranks",
        "memory",
    )
    embed: Literal["cached", "live"] = EMBED
    out: str = option("out/run", "folder to write; must be empty, or a run to --resume", "output")
    checkpoint_every: int = option(25, "iterations between checkpoints", "output")
    keep_checkpoints: int = option(2, "how many of the last checkpoints stay", "output")
    sample_every: int = option(
        25, "iterations between sheets of samples, and curves.png; 0: none", "output"
    )
    log_every: int = option(
        25,
        "where stderr is no terminal: iterations between lines of progress on it; 0: none",
        "output",
    )
    tensorboard: bool = option(
        False,
        "write log.csv and the sheets for TensorBoard too, from here on: tensorboard/ in --out",
        "output",
    )
    resume: bool = option(False, "continue the run in --out", "output")


def check_training(cfg):
    """Raises BadInput for settings of a TrainingConfig without meaning."""
    at_least(1, cfg, "iterations", "batch_size", "student_steps", "samples", "accumulate")
    at_least(1, cfg, "frames", "shard_ranks")
    at_least(1, cfg, "checkpoint_every", "keep_checkpoints")
    at_least(0, cfg, "seed", "lora_rank", "guidance", "sample_every", "log_every")
    positive(cfg, "lr_student", "lr_heads", "clip")
    for name in ("beta1", "ema"):
        require(0 <= getattr(cfg, name) < 1, f"--{name} {getattr(cfg, name)}: in [0, 1)")
    whole = cfg.head_width >= 8 and cfg.head_width % 8 == 0
    require(whole, f"--head-width {cfg.head_width}: a multiple of 8")
    possible = not cfg.tensorboard or find_spec("tensorboard")
    require(possible, "--tensorboard needs a package of that name: pip install tensorboard")
