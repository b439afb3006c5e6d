"""SDXL at its full depth, in float32 on the CPU, to the end: `make rehearse-sdxl`.

    python tests/full_depth.py out/sdxl

adm.py trains random weights with LoRA for two iterations of one sample of 256 pixels, and exports
the student; stock diffusers opens that and draws an image in one step. Half an hour on two cores.
It fails where a process takes more than 20 GB of main memory, or the image is none.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 20e9  # bytes
KIB = 1024  # bytes, the unit of ru_maxrss on Linux
PROMPT = "a red fox"
FLAGS = (
    "--model sdxl --random-init --paper --lora-rank 4 --resolution 256 --iterations 2 "
    "--batch-size 1 --student-steps 1 --sample-every 0 --log-every 1"
)


def run(name, words):
    """Run python with these words; says how long it took, and what it held."""
    print(f"$ python {' '.join(words)}", flush=True)
    began = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss * KIB
    minutes = (time.perf_counter() - began) / 60
    print(f"{name}: {minutes:.1f} minutes, {peak / 1e9:.2f} GB at most", flush=True)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{name} failed")
    if peak > MOST:
        sys.exit(f"{name} took more than {MOST / 1e9:g} GB")


def draw(folder):
    """Draw one image by the pipeline in this folder, with stock diffusers alone.

    With --random-init nothing but the denoiser has weights: the VAE gets random ones, and noise
    stands for the embeddings of a prompt.
    """
    import diffusers
    import torch

    diffusers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = diffusers.AutoencoderKL.load_config(folder, subfolder="vae")
    parts = dict.fromkeys(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"))
    parts["vae"] = diffusers.AutoencoderKL.from_config(config)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    count = sum(p.numel() for p in pipe.unet.parameters())
    types = {str(p.dtype) for p in pipe.unet.parameters()}
    how = json.loads((Path(folder) / "model_index.json").read_text())["_sampling"]
    pixels = pipe(
        prompt_embeds=torch.randn(1, 77, 2048),
        pooled_prompt_embeds=torch.randn(1, 1280),
        output_type="np",
        **how,
    ).images  # (1, 256, 256, 3)
    print(f"{count / 1e9:.3f}G parameters, {types}; {how}")
    print(f"an image of shape {pixels.shape}, standard deviation {pixels.std():.3f}")
    if pixels.shape != (1, 256, 256, 3) or not pixels.std() > 0.01:
        sys.exit("that is no image")


def main(out):
    prompts = Path(f"{out}.txt")
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text(f"{PROMPT}\n")
    run("adm.py", ["adm.py", *FLAGS.split(), "--prompts", str(prompts), "--out", out])
    print((Path(out) / "log.csv").read_text())
    run("stock diffusers", ["tests/full_depth.py", "--draw", f"{out}/pipeline"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--draw", action="store_true", help="of a pipeline that is there")
    words = parser.parse_args()
    if words.draw:
        draw(words.out)
    else:
        main(words.out)
