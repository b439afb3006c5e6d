"""Images, or videos, of prompts by any diffusers pipeline: a student's, its teacher's, another's.

    python tools/sample.py --pipeline out/dmdx/pipeline --count 200 --out out/images/student
    python tools/sample.py --pipeline sdxl --count 200 --out out/images/teacher

A student that this project exported says itself how it is sampled (`_sampling` in its
model_index.json); of another pipeline its own defaults hold. Image i is of prompt i, again from the
first where there are more images than prompts, and all its noise is of seed --seed + i alone: the
same whatever the batch, the rank, or the call that made it, and the noise that another pipeline of
the same latents begins with, so that student and teacher can be compared image by image.

--out gets 000000.png, … (of videos folders of frames, with a GIF) and manifest.json: the prompt,
seed, steps, guidance and seconds of each; with --vbench also the videos where VBench looks for
them. A second call goes on where the first was stopped, and makes more for a greater --count. On
several GPUs: torchrun --nproc_per_node=8 tools/sample.py …
"""

import hashlib
import importlib.util
import inspect
import json
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from data import PROMPTS
from families import HUB, family_of, pipeline_folder, recipes
from runtime.files import aside, claim, file_sha256, read_json, write_json
from runtime.flags import option
from runtime.lines import Lines
from runtime.ranks import Ranks
from runtime.rows import check_same
from runtime.script import run
from runtime.settings import BadInput, at_least, require
from runtime.sheets import save_gif

PNG_END = b"IEND\xaeB`\x82"  # the last chunk's name and checksum
FPS = 8  # of a video whose pipeline is no family's (ours)
VBENCH_EACH = 5  # videos of a prompt that VBench looks at
LONGEST_NAME = 255  # bytes that file systems take


@dataclass
class Config:
    pipeline: str | None = option(
        None,
        "a diffusers pipeline folder, an id on the hub (owner/name), or a name that --model takes; "
        "default: none, it must be given",
        "what to make",
    )
    prompts: str = option(PROMPTS, "UTF-8 text file, one prompt a line", "what to make")
    count: int | None = option(
        None,
        "images in all; more than there are prompts: several of each; default: one of each "
        "prompt, five with --vbench",
        "what to make",
    )
    seed: int = option(0, "of image 0; image i has seed + i", "what to make")
    steps: int | None = option(
        None,
        "of a teacher; a student has its own; default: what the student says, or the pipeline's "
        "own",
        "what to make",
    )
    guidance: float | None = option(
        None,
        "CFG scale; default: what the student says, the model's recipe, or the pipeline's own",
        "what to make",
    )
    resolution: str | None = option(
        None,
        "pixels, 1024 or 480x720 (height x width); default: what the student says, or the "
        "pipeline's own",
        "what to make",
    )
    frames: int | None = option(
        None, "of a video; default: what the student says, or the pipeline's own", "what to make"
    )
    batch_size: int = option(1, "images at a time on each device", "memory")
    vbench: bool = option(
        False,
        "write the videos also as vbench/PROMPT-0.mp4, PROMPT-1.mp4, …, where VBench looks for "
        "them; a prompt that comes twice counts once",
        "output",
    )
    out: str = option("out/images", "folder to write; a second call goes on there", "output")


# --- The pipeline ---------------------------------------------------------------------------------


def folder_of(name):
    """Where the pipeline is, fetched first if it must be. Raises BadInput."""
    require(name, "--pipeline: which? A pipeline folder, an id on the hub, or a model's name")
    if Path(name).is_dir() or "/" not in name:
        return Path(pipeline_folder(name))
    try:
        return Path(DiffusionPipeline.download(name))
    except Exception as e:  # the hub has many errors, and all mean this
        said = f"{type(e).__name__}: no such pipeline, no network, or no access rights"
        raise BadInput(f"{name} is no folder here, and cannot be fetched ({said})") from None


def content_sha256(folder, index):
    """Hash of a pipeline's parts, weights and configs: by it a second call knows it again."""
    digest = hashlib.sha256()
    for part in sorted(name for name in index if (folder / name).is_dir()):
        for file in sorted((folder / part).iterdir()):
            if file.is_file() and file.stat().st_size:
                digest.update(f"{part}/{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def text_encoders(folder, index, dtype):
    """{part: model} of those parts of a pipeline that are transformers' own.

    Raises BadInput where weights are missing: transformers would take random ones in their place.
    """
    found = {}
    for part, (library, kind) in parts_of(index).items():
        class_ = getattr(transformers, kind, None) if library == "transformers" else None
        if inspect.isclass(class_) and issubclass(class_, transformers.PreTrainedModel):
            how = {"dtype": dtype, "output_loading_info": True}
            found[part], info = class_.from_pretrained(folder / part, **how)
            require(not info["missing_keys"], f"weights of {part} are missing")
    return found


def parts_of(index):
    """{part: (library, class)} of a model_index.json, those that the pipeline has."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list)}
    return {name: pair for name, pair in pairs.items() if None not in pair}


def opened(folder, name, index, ranks):
    """The pipeline, on this rank's device. Raises BadInput for one that is not complete."""
    try:
        for part in parts_of(index):
            require((folder / part).is_dir(), f"{part}/ is missing")
        dtype = ranks.frozen_dtype
        parts = text_encoders(folder, index, dtype)
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **parts)
        for part, module in pipe.components.items():
            if isinstance(module, torch.nn.Module):
                whole = not any(p.is_meta for p in module.parameters())
                require(whole, f"weights of {part} are missing")
            if isinstance(module, transformers.PreTrainedTokenizerBase):
                # Without its file transformers makes one of special tokens, and of T5's space.
                knows = len(module) > len(module.all_special_tokens) + 1
                require(knows, f"the words of {part} are missing")
    except Exception as e:  # whatever json, diffusers or torch make of a damaged folder
        kind = "" if isinstance(e, BadInput) else f"{type(e).__name__} "
        said = kind + " ".join(str(e).split())[:300]
        raise BadInput(f"{name} is no complete diffusers pipeline: {said}") from None
    takes = inspect.signature(pipe.__call__).parameters
    makes = "prompt" in takes and "num_inference_steps" in takes
    require(makes, f"{name}: a {type(pipe).__name__} makes nothing of a prompt alone")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(ranks.device)


def call_of(pipe, index, cfg):
    """Arguments of the pipeline's call, beside prompts and seeds; flags come before what it says.

    Raises BadInput for a flag that it does not take.
    """
    takes = inspect.signature(pipe.__call__).parameters
    call = {"num_inference_steps": takes["num_inference_steps"].default}
    if "guidance_scale" in takes:
        call["guidance_scale"] = takes["guidance_scale"].default
    # A T5 tokenizer that was made for fewer tokens than the pipeline pads to, as the digits' was.
    t5 = [part for part in pipe.components.values() if type(part).__name__.startswith("T5Token")]
    if "max_sequence_length" in takes and t5:
        usual = takes["max_sequence_length"].default
        call["max_sequence_length"] = min(usual, t5[0].model_max_length)
    recipe = recipes.PAIRS.get(cfg.pipeline, {})
    if "guidance" in recipe:
        call["guidance_scale"] = recipe["guidance"]
    call |= getattr(family_of(index), "call_size", {})
    student = index.get("_sampling", {})
    call |= student
    own = student.get("num_inference_steps", cfg.steps)
    fits = cfg.steps is None or cfg.steps == own
    require(fits, f"--steps {cfg.steps}: {cfg.pipeline} is a student of {own}, and of no other")
    flags = {
        "num_inference_steps": cfg.steps,
        "guidance_scale": cfg.guidance,
        "num_frames": cfg.frames,
        **size_of(cfg.resolution),
    }
    call |= {argument: value for argument, value in flags.items() if value is not None}
    unknown = [argument for argument in call if argument not in takes]
    require(not unknown, f"{cfg.pipeline}: a {type(pipe).__name__} takes no {unknown[:1]}")
    return call


def size_of(resolution):
    """{"height": pixels, "width": pixels} of 1024 or 480x720, {} of None."""
    if resolution is None:
        return {}
    sides = resolution.lower().split("x")
    readable = len(sides) <= 2 and all(side.isdecimal() and int(side) > 0 for side in sides)
    require(readable, f"--resolution {resolution!r}: pixels, as 1024 or 480x720 (height x width)")
    return {"height": int(sides[0]), "width": int(sides[-1])}


def sampled(pipe, prompts, seeds, call):
    """What the pipeline makes of each prompt with its seed: PIL images, or lists of them."""
    # Of the CPU, so that the noise is the same on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Between the steps some schedulers draw anew, and SD3's pipeline hands them no generator: they
    # would take torch's global one, which knows nothing of seeds. These go on where x_T ended, so
    # that an image does not depend on its batch, and is that of a plain call with
    # generator=torch.manual_seed(seed) on a CPU.
    plain = type(pipe.scheduler).step
    if "generator" in inspect.signature(plain).parameters:
        pipe.scheduler.step = partial(plain, pipe.scheduler, generator=generators)
    try:
        # Wan's would be arrays by default.
        made = pipe(prompt=prompts, generator=generators, output_type="pil", **call)
    except ValueError as e:  # of a size that the pipeline does not take, and the like
        raise BadInput(" ".join(str(e).split())[:300]) from None
    return made.frames if hasattr(made, "frames") else made.images


# --- What is written ------------------------------------------------------------------------------


def name_of(i, is_video):
    return f"{i:06d}" if is_video else f"{i:06d}.png"


def write(out, made, row, fps):
    """Write one image, or the frames of a video, whole or not at all.

    The row of the manifest goes into the picture too: nothing else is to be kept in step with it.
    """
    about = PngInfo()
    about.add_itxt("sample", json.dumps(row))
    with aside(out / row["file"]) as partial_path:
        if isinstance(made, Image.Image):
            made.save(partial_path, "PNG", pnginfo=about)
            return
        partial_path.mkdir(parents=True)
        for n, frame in enumerate(made):
            frame.save(partial_path / f"{n:03d}.png", "PNG", pnginfo=about)
        save_gif(made, partial_path / "video.gif", fps)


def vbench_name(i, prompts):
    """The file of video i in VBench's layout: its prompt, and which of that prompt's it is."""
    return f"{prompts[i % len(prompts)]}-{i // len(prompts)}.mp4"


def check_vbench(count, prompts):
    """Raises BadInput for what cannot be laid out as VBench wants it, before anything is made."""
    each = f"as many of each of {len(prompts)} prompts"
    require(count % len(prompts) == 0, f"--count {count}: --vbench wants {each}")
    for i in range(count):
        name = vbench_name(i, prompts)
        fits = len(f"{name}.partial".encode()) <= LONGEST_NAME
        possible = fits and "/" not in name and "\0" not in name
        problem = f"too long for a file's name, or with a slash: {name[:60]!r}"
        require(possible, f"--vbench: prompt {i % len(prompts) + 1} is {problem}")
    there = importlib.util.find_spec("imageio_ffmpeg")
    require(there, "--vbench needs an optional package: pip install imageio-ffmpeg")


def write_mp4(frames, path, fps):
    """Write the frames of a folder as a video, whole or not at all."""
    import imageio_ffmpeg  # an optional extra

    images = [Image.open(frame).convert("RGB") for frame in sorted(frames.glob("*.png"))]
    how = {"fps": fps, "quality": None, "macro_block_size": 2}  # H.264 by ffmpeg's own defaults
    how |= {"output_params": ["-f", "mp4"]}  # which a partial file's name does not say
    with (
        aside(path) as partial_path,
        closing(imageio_ffmpeg.write_frames(partial_path, images[0].size, **how)) as video,
    ):
        video.send(None)  # begin
        for image in images:
            video.send(image.tobytes())


def row_at(out, i):
    """The manifest's row of image i, or None where it is missing or truncated."""
    for name in (name_of(i, False), f"{name_of(i, True)}/000.png"):
        path = out / name
        try:
            with Image.open(path) as image:  # not decoded: there may be many
                row = json.loads(image.info["sample"])
        except (OSError, SyntaxError, ValueError, KeyError):
            continue
        if path.read_bytes().endswith(PNG_END):
            return row
    return None


def begin(out, manifest):
    """Write the manifest of an unfinished folder. Raises BadInput if it holds other images."""
    path = out / "manifest.json"
    if not path.exists():
        claim(out)
    elif any(p.name.removesuffix(".png").isdecimal() for p in out.iterdir()):
        check_same(read_json(path, "images", "count"), manifest, out)
    write_json(path, {**manifest, "complete": False, "images": []})


# --- The loop -------------------------------------------------------------------------------------


def main(cfg):
    at_least(1, cfg, "count", "steps", "batch_size", "frames")
    at_least(0, cfg, "seed", "guidance")
    size_of(cfg.resolution)
    prompts = list(Lines(cfg.prompts))
    if cfg.vbench:
        prompts = list(dict.fromkeys(prompts))  # VBench's own list has two of them twice
    count = cfg.count or len(prompts) * (VBENCH_EACH if cfg.vbench else 1)
    if cfg.vbench:
        check_vbench(count, prompts)
    ranks = Ranks()
    folder = folder_of(cfg.pipeline)
    index = read_json(folder / "model_index.json", "diffusers pipeline", "_class_name")
    pipe = opened(folder, cfg.pipeline, index, ranks)
    call = call_of(pipe, index, cfg)
    videos = "num_frames" in inspect.signature(pipe.__call__).parameters
    fps = getattr(family_of(index), "fps", FPS)
    require(videos or not cfg.vbench, f"--vbench: {cfg.pipeline} makes images, not videos")
    names = {address: name for name, address in HUB.items()}
    manifest = {
        "kind": "images",
        "model": cfg.pipeline,
        "teacher": index.get("_teacher", names.get(cfg.pipeline, cfg.pipeline)),
        "weights_sha256": ranks.first(lambda: content_sha256(folder, index)),
        "text_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seed": cfg.seed,
        "call": call,
        "count": count,
    }
    out = Path(cfg.out)
    ranks.first(lambda: begin(out, manifest))

    share = range(ranks.rank, count, ranks.world)
    mine = [i for i in share if row_at(out, i) is None]
    batches = [mine[at : at + cfg.batch_size] for at in range(0, len(mine), cfg.batch_size)]
    for numbers in tqdm(batches, "images", disable=ranks.no_bar):
        began = time.perf_counter()
        texts = [prompts[i % len(prompts)] for i in numbers]
        seeds = [cfg.seed + i for i in numbers]
        made = sampled(pipe, texts, seeds, call)
        seconds = (time.perf_counter() - began) / len(numbers)
        for i, one, text, seed in zip(numbers, made, texts, seeds, strict=True):
            row = {
                "file": name_of(i, not isinstance(one, Image.Image)),
                "prompt": text,
                "seed": seed,
                "steps": call["num_inference_steps"],
                "guidance": call.get("guidance_scale"),
                "seconds": round(seconds, 4),
            }
            write(out, one, row, fps)
    if cfg.vbench:
        (out / "vbench").mkdir(exist_ok=True)
        for i in share:
            path = out / "vbench" / vbench_name(i, prompts)
            if not path.exists():
                write_mp4(out / name_of(i, True), path, fps)
    ranks.barrier()
    if ranks.main:
        rows = [row_at(out, i) for i in range(count)]
        write_json(out / "manifest.json", {**manifest, "complete": True, "images": rows})
        print(f"{out}: {count} of {cfg.pipeline}, and manifest.json")


if __name__ == "__main__":
    run(main, Config, description=__doc__)
