"""A small CLIP of the digits: which prompt a scan is of. tools/score.py judges digits by it."""

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from families import DIGITS, tiny
from toy.digits_teacher import ANY_DIGIT, EMPTY, NAMES, PROMPTS, scans

CLIP = DIGITS.with_name("digits-clip")


def clip(folder=CLIP, iterations=1500):
    """Make toy/digits-clip/, as transformers has a CLIP, and print how well it reads new scans."""
    torch.manual_seed(0)
    tokenizer = tiny.clip_tokenizer(("a", "handwritten", *NAMES, "digit"), max_length=5)
    text = tiny.clip_text(vocab_size=len(tokenizer)).config
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=2,
    )
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    model = CLIPModel(CLIPConfig(**both, projection_dim=16))
    tokens = tokenizer([*PROMPTS, ""], padding=True, return_tensors="pt")  # (12, 5) each
    learn(model, tokens, iterations)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # pixels in [−1, 1], as scans() has
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8, **grey).save_pretrained(folder)
    print(f"{folder}: reads {share_read(model, tokens):.1%} of the held-out scans")


def learn(model, tokens, iterations, batch_size=64, rate=2e-3):
    """Which prompt an image is of: its own digit's, or one time in five "a handwritten digit".

    One image in four is the mean of two scans, and of the empty prompt: a CLIP that has seen whole
    scans alone finds a blurred digit as good as any, and a student that averages would pass.
    tokens: those of PROMPTS and the empty prompt.
    """
    (images, labels), _ = scans()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in tqdm(range(iterations), "CLIP", disable=None):
        rows = torch.randint(len(images), (batch_size,))  # (B,)
        number = torch.where(torch.rand(batch_size) < 0.2, ANY_DIGIT, labels[rows])  # (B,)
        x = images[rows]  # (B, 3, 8, 8)
        n = batch_size // 4
        others = torch.randint(len(images), (n,))
        x[:n] = (x[:n] + images[others]) / 2
        number[:n] = EMPTY
        logits = model(pixel_values=x, **tokens).logits_per_image  # (B, 12)
        loss = F.cross_entropy(logits, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


@torch.no_grad()
def share_read(model, tokens):
    """The share of held-out scans whose digit's prompt is the nearest of the ten."""
    images, labels = scans()[1]
    logits = model(pixel_values=images, **tokens).logits_per_image  # (300, 12)
    return (logits[:, :ANY_DIGIT].argmax(1) == labels).float().mean().item()
