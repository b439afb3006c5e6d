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
from families.flux import Flux  # noqa: E402
from families.sd3 import SD3  # noqa: E402
from families.sdxl import SDXL  # noqa: E402
from families.wan import Wan  # noqa: E402
from families.wan22 import Wan22  # noqa: E402

transformers.utils.logging.set_verbosity(verbosity)
del verbosity

from runtime.settings import BadInput, did_you_mean, require  # noqa: E402

FAMILIES = (SDXL, SD3, CogVideoX, Wan, Flux)
HUB = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "cogvideox-2b": "THUDM/CogVideoX-2b",
    "cogvideox-5b": "THUDM/CogVideoX-5b",
    "wan-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan-2.2-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
}

# Small, but trained, on real images: see its README.
DIGITS = Path(__file__).parents[1] / "toy" / "digits-teacher"

TINY = (
    "tiny-sdxl",
    "tiny-sd3",
    "tiny-cogvideox-2b",
    "tiny-cogvideox-5b",
    "tiny-wan",
    "tiny-flux",
)


def load_teacher(name_or_folder, random_init=False):
    """The Family of a model name or of a local pipeline folder.

    Names: digits, those of HUB, those of TINY.
    random_init: a model of the hub at its full size with random weights, to measure or to rehearse
    with; nothing is fetched.

    Raises BadInput for an unknown name, an unreachable hub, a folder of no known pipeline, and a
    scheduler that contradicts it.
    """
    name = str(name_or_folder)
    require(name in HUB or not random_init, f"--random-init is for {', '.join(HUB)}")
    folder = full.skeleton(name) if random_init else pipeline_folder(name)
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text())
        family = family_of(index)
        known = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
        require(family, f"{name} is a {index['_class_name']}; the families here are {known}")
        return family(folder, name, random_init)
    except BadInput:
        raise
    except Exception as e:  # whatever json, diffusers or torch make of a damaged file
        said = f"{type(e).__name__} {' '.join(str(e).split())[:300]}"
        raise BadInput(f"{name} is no complete diffusers pipeline folder: {said}") from None


def family_of(index):
    """The Family of a pipeline, by its model_index.json; None where it is no family's."""
    kind = index["_class_name"]
    if kind == "WanPipeline" and index.get("expand_timesteps"):
        return Wan22
    return next((family for family in FAMILIES if family.pipeline_class.__name__ == kind), None)


def pipeline_folder(name):
    """Where the pipeline of this name is, made or fetched first if it must be."""
    if name == "digits":
        return DIGITS
    if name in TINY:
        return tiny.build(name)
    if name in HUB:
        try:
            return DiffusionPipeline.download(HUB[name])
        except Exception as e:  # the hub has many errors, and all mean this
            why = f"{type(e).__name__}: no network, or no access rights"
            tiny_name = next(t for t in TINY if name.startswith(t.removeprefix("tiny-")))
            instead = f"a local pipeline folder will do, and --model {tiny_name} runs offline"
            raise BadInput(f"cannot fetch {HUB[name]} ({why}); {instead}") from None
    known = ", ".join(["digits", *HUB, *TINY])
    is_folder = Path(name).is_dir()
    near = did_you_mean(name, [*HUB, *TINY, "digits"])
    require(is_folder, f"unknown model {name!r}: neither a folder nor one of {known}{near}")
    return name
