"""A small CLIP of the digits: which prompt an image is of. It judges the digits: see measure."""

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from families import DIGITS, tiny
from toy.digits_teacher import EMPTY, MEANS, NAMES, WORDS, captions, held_out, training_images

CLIP = DIGITS.with_name("digits-clip")


def clip(folder=CLIP, data=None, iterations=4000):
    """Make toy/digits-clip/, as transformers has a CLIP, and print how well it reads new images.

    data: images (N, 3, 32, 32) and digits (N,); default: those that the teacher is trained on.
    """
    from transformers import CLIPImageProcessor  # only here: without torchvision it says so

    images, labels = data or training_images()
    torch.manual_seed(0)
    tokenizer = tiny.clip_tokenizer(WORDS, max_length=6)
    text = tiny.clip_text(vocab_size=len(tokenizer)).config
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
    )
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    model = CLIPModel(CLIPConfig(**both, projection_dim=32))
    tokens = tokenizer(list(MEANS), padding=True, return_tensors="pt")  # (16, 6) each
    learn(model, tokens, images, labels, iterations)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # pixels in [−1, 1], as held_out() has
    size = {"size": {"shortest_edge": 32}, "crop_size": 32}
    CLIPImageProcessor(**size, **grey).save_pretrained(folder)
    print(f"{folder}: reads {share_read(model, tokens):.1%} of the held-out images")


def learn(model, tokens, images, labels, iterations, batch_size=64, rate=2e-3):
    """Which prompt an image is of: one that is true of it.

    One image in eight is the mean of two, and of the empty prompt: a CLIP that has seen whole
    images alone finds a blurred digit as good as any, and a student that averages would pass.
    tokens: those of MEANS.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, iterations, pct_start=0.1)
    for _ in tqdm(range(iterations), "CLIP", disable=None):
        rows = torch.randint(len(images), (batch_size,))  # (B,)
        others = captions(labels[rows])  # (B,)
        own = (torch.rand(batch_size) < 0.7) | (others == EMPTY)  # (B,)
        number = torch.where(own, labels[rows], others)  # (B,)
        x = moved(images[rows])  # (B, 3, 32, 32)
        n = batch_size // 8
        x[:n] = (x[:n] + x[n : 2 * n]) / 2
        number[:n] = EMPTY
        logits = model(pixel_values=x, **tokens).logits_per_image  # (B, 16)
        loss = F.cross_entropy(logits, number)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()


def moved(x):
    """Images (B, 3, 32, 32), each turned, scaled and shifted a little at random."""
    angle = 0.15 * torch.randn(len(x))  # (B,), in radians
    size = 1 + 0.06 * torch.randn(len(x))  # (B,)
    cos, sin = size * angle.cos(), size * angle.sin()  # (B,) each
    shift = 0.05 * torch.randn(2, len(x))  # (2, B), in half widths of the image
    rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1)  # (B, 6)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # beyond the edge it is black


@torch.no_grad()
def share_read(model, tokens):
    """The share of held-out images whose digit's prompt is the nearest of the ten."""
    images, labels = held_out()
    logits = model(pixel_values=images, **tokens).logits_per_image  # (500, 16)
    return (logits[:, : len(NAMES)].argmax(1) == labels).float().mean().item()
