"""A real model's pipeline folder with all there is in it, of full width; weights are holes.

`--random-init` has configs alone, and noise where a prompt's embedding would be. Here the stock
pipeline opens tokenizers and text encoders. The tokenizers are the tiny models': what they say of a
prompt is not looked at.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import transformers
from files import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from families import full, tiny


def make(model, folder):
    """Write the folder of the model of this name."""
    folder = Path(folder)
    shutil.copytree(full.skeleton(model), folder)
    index = json.loads((folder / "model_index.json").read_text())
    kind, config = full.DENOISERS[model]
    net_name = "unet" if model == "sdxl" else "transformer"
    write(partial(kind, **config), folder / net_name / "diffusion_pytorch_model.safetensors")
    write(partial(full.vae, model), folder / "vae" / "diffusion_pytorch_model.safetensors")
    for name, config in full.text_encoders(model).items():
        kind = getattr(transformers, config.architectures[0])
        write(partial(kind, config), folder / name / "model.safetensors")
        its_tokenizer = tokenizer(model, config)
        beside = name.replace("text_encoder", "tokenizer")
        its_tokenizer.save_pretrained(folder / beside)
        index[name] = ["transformers", kind.__name__]
        index[beside] = ["transformers", type(its_tokenizer).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


def write(make_network, path):
    """A file of the network's weights, each once: T5's embedding has two names."""
    with FakeTensorMode():
        weights, seen = {}, set()
        for name, x in make_network().state_dict(keep_vars=True).items():
            if id(x) not in seen:
                weights[name] = x
            seen.add(id(x))
        save_file(weights, path, {"format": "pt"})


def tokenizer(model, config):
    """For the text encoder of this config."""
    if isinstance(config, transformers.CLIPTextConfig):
        return tiny.clip_tokenizer()
    return tiny.t5_tokenizer(226 if model.startswith("cogvideox") else 256)
