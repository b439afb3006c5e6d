"""The model families: opening a teacher by its name or folder."""

import json
from pathlib import Path

import transformers

# The import of diffusers' pipelines warns of packages that are not needed here: silence for that
# long, and no longer. What a script shows, it says itself (runtime.script.quiet).
verbosity = transformers.utils.logging.get_verbosity()
transformers.utils.logging.set_verbosity_error()
from diffusers import DiffusionPipeline  # noqa: E402

from families import full, tiny  # noqa: E402
from families.cogvideox import CogVideoX  # noqa: E402
from families.sd3 import SD3  # noqa: E402
from families.sdxl import SDXL  # noqa: E402

transformers.utils.logging.set_verbosity(verbosity)

from runtime.settings import BadInput, require  # noqa: E402

HUB = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0", "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
       "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
       "cogvideox-2b": "THUDM/CogVideoX-2b", "cogvideox-5b": "THUDM/CogVideoX-5b"}

DIGITS = Path(__file__).parents[1] / "toy" / "digits-teacher"  # small, but trained, on real images: see its README

TINY = ("tiny-sdxl", "tiny-sd3", "tiny-cogvideox-2b", "tiny-cogvideox-5b")

def load_teacher(name_or_folder, random_init=False):
    """The Family of a model name (digits, sdxl, sd3, sd3.5-large, cogvideox-2b, cogvideox-5b, tiny-…) or local pipeline folder. Raises
    BadInput for an unknown name, an unreachable hub, a folder of no known pipeline, and a scheduler that contradicts it.
    random_init: a model of the hub at its full size with random weights, to measure or to rehearse with; nothing is fetched."""
    name = str(name_or_folder)
    require(name in HUB or not random_init, f"--random-init is for {', '.join(HUB)}")
    if random_init:
        folder = full.skeleton(name)
    elif name == "digits":
        folder = DIGITS
    elif name in TINY:
        folder = tiny.build(name)
    elif name in HUB:
        try:
            folder = DiffusionPipeline.download(HUB[name])
        except Exception as e:  # the hub has many errors, and all mean this
            raise BadInput(f"cannot fetch {HUB[name]} ({type(e).__name__}: no network, or no access rights); a local pipeline "
                           f"folder will do, and --model tiny-{name.removesuffix('.5-large')} runs offline") from None
    else:
        folder = name
        require(Path(name).is_dir(), f"unknown model {name!r}: neither a folder nor one of {', '.join(['digits', *HUB, *TINY])}")
    families = {f.pipeline_class.__name__: f for f in (SDXL, SD3, CogVideoX)}
    try:
        pipeline = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]
        require(pipeline in families, f"{name} is a {pipeline}; the families here are {', '.join(families)}")
        return families[pipeline](folder, name, random_init)
    except Exception as e:  # whatever json, diffusers or torch make of a damaged file
        said = f"{name} is no complete diffusers pipeline folder: {type(e).__name__} {' '.join(str(e).split())[:300]}"
        raise e if isinstance(e, BadInput) else BadInput(said) from None
