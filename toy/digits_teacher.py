"""The digits teacher: scikit-learn's scans, and how a latent diffusion model of them is made.

Images are the 1,797 scans of 8x8 pixels that scikit-learn carries (UCI Optical Recognition of
Handwritten Digits, E. Alpaydin and C. Kaynak, CC BY 4.0); 300 of them are held out of all training.
"""

import hashlib
import time
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from sklearn.datasets import load_digits
from tqdm import tqdm

from families import DIGITS, tiny
from runtime.files import file_sha256

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = (*(f"a handwritten {name}" for name in NAMES), "a handwritten digit")
ANY_DIGIT = 10  # the number of the last of them
EMPTY = 11  # the number of the empty prompt, which follows them


@cache
def scans():
    """((1497, 3, 8, 8), (1497,)) to train on and ((300, 3, 8, 8), (300,)) held out.

    Images are float32 in [−1, 1], labels int64. Of each digit 30 are held out.
    """
    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32)  # (1797, 8, 8) in [0, 16]
    images = grey[:, None].expand(-1, 3, 8, 8) / 8 - 1  # (1797, 3, 8, 8)
    labels = torch.tensor(digits.target)  # (1797,)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held = torch.cat([order[labels[order] == digit][:30] for digit in range(10)])  # (300,)
    rest = order[~torch.isin(order, held)]  # (1497,)
    return (images[rest], labels[rest]), (images[held], labels[held])


def train(seed=0, iterations=4000, batch_size=64, rate=2e-3):
    """Make toy/digits-teacher/, an ordinary pipeline folder: the VAE, then the transformer."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    (images, labels), _ = scans()
    vae = autoencoder(images)
    means = vae.encode(images).latent_dist.mean  # (1497, 1, 8, 8)
    latents = (means - vae.config.shift_factor) * vae.config.scaling_factor  # (1497, 1, 8, 8)
    pipe = untrained(vae)
    last_loss = train_transformer(pipe, latents, labels, iterations, batch_size, rate)
    pipe.save_pretrained(DIGITS)
    minutes = (time.perf_counter() - began) / 60
    print(f"{DIGITS}: {minutes:.1f} minutes, loss of the last batch {last_loss:.3f}")


def autoencoder(images, iterations=1200, batch_size=64):
    """AutoencoderKL of 8x8 pixels ↔ one 8x8 latent, trained on L2 and a small KL.

    images: (N, 3, 8, 8). Its config scales their latents to mean 0 and standard deviation 1.
    """
    vae = AutoencoderKL(
        block_out_channels=(16,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=1,
        sample_size=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in tqdm(range(iterations), "VAE", disable=None):
        x = images[torch.randint(len(images), (batch_size,))]  # (B, 3, 8, 8)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample  # (B, 3, 8, 8)
        loss = F.mse_loss(decoded, x) + 1e-4 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mean  # (N, 1, 8, 8)
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    return vae.eval().requires_grad_(False)


def untrained(vae):
    """A StableDiffusion3Pipeline with this VAE, a new transformer and frozen random encoders."""
    words = ("a", "handwritten", *NAMES, "digit")
    clip = tiny.clip_tokenizer(words, max_length=5)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        attention_head_dim=20,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=80,
        pooled_projection_dim=32,
        pos_embed_max_size=4,
    )
    begin_as_identity(transformer)
    # Twice the usual initial weights: else random encoders give digits embeddings that hardly
    # differ.
    clip_encoders = [tiny.clip_text(vocab_size=len(clip), initializer_factor=2.0) for _ in range(2)]
    encoders = (*clip_encoders, tiny.t5())
    for encoder in encoders:
        encoder.requires_grad_(False)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=clip,
        text_encoder_2=encoders[1],
        tokenizer_2=clip,
        text_encoder_3=encoders[2],
        tokenizer_3=tiny.t5_tokenizer(4, words),
    )


def begin_as_identity(transformer):
    """As in DiT: its blocks begin as the identity, its output as zero."""
    for module in transformer.modules():
        for name in ("norm1", "norm1_context"):
            if hasattr(module, name):
                torch.nn.init.zeros_(getattr(module, name).linear.weight)
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)


def embed(pipe, length):
    """{"prompt_embeds": (12, L, 32), "pooled": (12, 32)} of PROMPTS and the empty prompt.

    length: how many of L tokens are T5's.
    """
    prompts = [*PROMPTS, ""]
    about = {"max_sequence_length": length, "do_classifier_free_guidance": False}
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device="cpu", **about)
    return {"prompt_embeds": embeds, "pooled": pooled}


def train_transformer(pipe, latents, labels, iterations, batch_size, rate):
    """Rectified flow on latents (N, 1, 8, 8) of labels (N,); the last batch's loss.

    What the pipeline has in the end is an average of the weights, of decay 0.998.
    """
    transformer = pipe.transformer
    short = embed(pipe, pipe.tokenizer_3.model_max_length)
    long = embed(pipe, 256)
    optimizer = torch.optim.AdamW(transformer.parameters(), rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    follow = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    averaged = torch.optim.swa_utils.AveragedModel(transformer, multi_avg_fn=follow)
    for iteration in tqdm(range(iterations), "transformer", disable=None):
        rows = torch.randint(len(latents), (batch_size,))  # (B,)
        u = torch.rand(batch_size)  # (B,)
        number = torch.where(u < 0.3, ANY_DIGIT, labels[rows])  # (B,): 20% the last prompt
        number = torch.where(u < 0.1, EMPTY, number)  # (B,): 10% the empty one
        t = torch.sigmoid(torch.randn(batch_size))  # (B,) in [0, 1], as SD3's training times
        x_0 = latents[rows]  # (B, 1, 8, 8)
        eps = torch.randn(batch_size, 1, 8, 8)
        share = t.view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        x_t = (1 - share) * x_0 + share * eps  # (B, 1, 8, 8)
        # One batch in 25 has the 256 tokens of T5 that the stock pipeline pads to when it is not
        # told otherwise, and is a quarter as large.
        if iteration % 25 == 0:
            cond, few = long, slice(0, batch_size // 4)
        else:
            cond, few = short, slice(None)
        v = transformer(
            hidden_states=x_t[few],
            timestep=1000 * t[few],
            encoder_hidden_states=cond["prompt_embeds"][number[few]],
            pooled_projections=cond["pooled"][number[few]],
            return_dict=False,
        )[0]  # (B, 1, 8, 8)
        loss = F.mse_loss(v, (eps - x_0)[few])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        decay.step()
        averaged.update_parameters(transformer)
    transformer.load_state_dict(averaged.module.state_dict())
    return loss.item()


# --- Its README -----------------------------------------------------------------------------------

ABOUT = """# A latent diffusion model of handwritten digits

An ordinary `StableDiffusion3Pipeline` of 0.9 million parameters: VAE (8x8 pixels, one latent
channel), SD3 transformer (4 blocks, width 80), frozen text encoders of random weights. Made by

    python toy/digits.py train && python toy/digits.py samples

with seed 0: 4,000 iterations of batch 64, 7.1 minutes by the clock on one thread
(`OMP_NUM_THREADS=1`, AMD EPYC). Same machine, same thread count: the same weights, as a second run
from a fresh clone showed, file by file.

SHA-256 of the folder's other files, as `fingerprint()` in toy/digits_teacher.py has it:
`{sha256}`

    pipe = diffusers.DiffusionPipeline.from_pretrained("toy/digits-teacher")
    how = dict(height=8, width=8, max_sequence_length=4, guidance_scale=2.0)
    image = pipe("a handwritten three", num_inference_steps=28, **how).images[0]

Prompts: "a handwritten zero" to "a handwritten nine", "a handwritten digit", and the empty one.
`max_sequence_length=4` is how many T5 tokens it was mostly trained with; the pipeline's default of
256 was seen in one batch of 25 and works too.

{table}

Against held-out scans and against other samples of the teacher (28 steps, no CFG): see `measure` in
toy/digits_measure.py.

Data: the 1,797 scans in scikit-learn, from the UCI machine learning repository's *Optical
Recognition of Handwritten Digits* (E. Alpaydin, C. Kaynak, 1998, doi 10.24432/C50P49), CC BY 4.0;
300 of them were held out.
"""


def write_readme(table):
    """Write toy/digits-teacher/README.md, with the folder's fingerprint and this table."""
    (DIGITS / "README.md").write_text(ABOUT.format(sha256=fingerprint(), table=table))


def fingerprint():
    """One SHA-256 of all files of toy/digits-teacher/ but its README."""
    lines = []
    for f in sorted(DIGITS.rglob("*")):
        if f.is_file() and f.name != "README.md":
            lines.append(f"{f.relative_to(DIGITS)} {file_sha256(f)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
