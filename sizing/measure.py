"""What passes need of a GPU's memory: measured by a rehearsal, kept in measured.json.

tests/fake_cuda runs the scripts themselves on fake tensors and follows each storage. Networks of
few blocks, of full width, tell for any number: with each block, a phase's peak grows by as much.
"""

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from families import HUB, full
from runtime.settings import BadInput, flag, require

ROOT = Path(__file__).resolve().parents[1]
HARNESS = ROOT / "tests" / "fake_cuda"
TABLE = Path(__file__).with_name("measured.json")
RANKS = 8  # of a rehearsal of several: how many there are shows in gradients alone
MB = 10**6  # bytes: the table's unit
# The settings that passes depend on.
OF_TRAINING = ("loss", "lora_rank", "gradient_checkpointing", "head_width")
OF_STAGE = {"adm": ("fake_gradient", "damping"), "adp": ("pixel",)}
TRAINING = "--random-init --iterations 2 --accumulate 2 --ema 0 --sample-every 0"
ALWAYS = {  # of a rehearsal
    "adm": f"{TRAINING} --warmup 0 --student-steps 1",
    "adp": f"{TRAINING} --mse-iterations 0",
    "pairs": "--random-init --count 1 --steps 1",
    "decode": "--random-init",
}


# --- Few blocks for many --------------------------------------------------------------------------


def blocks_of(config):
    """How many blocks a denoiser with this config has; of a UNet, those of its deepest level."""
    if "transformer_layers_per_block" in config:
        return config["transformer_layers_per_block"][-1]
    return config["num_layers"]


def with_blocks(config, blocks):
    """The config with so many blocks, of each kind in proportion."""
    if "transformer_layers_per_block" in config:
        *others, _ = config["transformer_layers_per_block"]
        return {**config, "transformer_layers_per_block": (*others, blocks)}
    kinds = [name for name in ("num_layers", "num_single_layers") if name in config]
    fewer = {name: config[name] * blocks // config["num_layers"] for name in kinds}
    return {**config, **fewer}


def few(config):
    """The two depths that are rehearsed. D taps quarters of a DiT."""
    return (2, 4) if "transformer_layers_per_block" in config else (4, 8)


def along(config, blocks, less, more):
    """What grows with each block by as much, at so many, from what it is at the depths of `few`."""
    at, then = few(config)
    return less + (more - less) * (blocks - at) / (then - at)


# --- Settings and their rows ----------------------------------------------------------------------


def typed(settings):
    """{name: value} as flags on a command line."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(flag(name))
        elif value is False:
            words.append(flag("no_" + name))
        else:
            words.append(f"{flag(name)} {value}")
    return " ".join(words)


def hub_name(family):
    """The name of the model of the hub whose denoiser this family's is like, or None."""
    for name in HUB:
        kind, config = full.DENOISERS[name]
        own = {key: family.config.get(key) for key in config}
        alike = all(as_list(own[key]) == as_list(config[key]) for key in config)
        if family.net_class is kind and alike:
            return name
    return None


def as_list(value):
    return list(value) if isinstance(value, tuple) else value


def size_of(family, latent):
    """{} of the model's own size, or the --resolution and --frames of latents of this shape."""
    if latent is None or tuple(latent) == tuple(family.latent_shape()):
        return {}
    height, width = (n * family.vae_scale for n in latent[-2:])
    size = {"resolution": f"{height}x{width}"}
    if len(latent) == 4:
        size["frames"] = (latent[0] - 1) * family.frame_scale + 1
    return size


class Row(NamedTuple):
    """What is measured: a command line of adm.py, adp.py or data.py."""

    stage: str  # adm, adp, pairs, encode, or decode: of a picture
    which: str  # --model, and a size if it is not the model's own
    how: str  # the other flags
    world: int = 1

    def __str__(self):
        return " ".join([self.stage, self.which, self.how, f"x {self.world}"])


def training_row(cfg, which, each, world):
    """The Row of adm.py or adp.py with these settings, for `each` samples at a time."""
    stage = "adm" if hasattr(cfg, "fake_gradient") else "adp"
    settings = {name: getattr(cfg, name) for name in (*OF_TRAINING, *OF_STAGE[stage])}
    return Row(stage, which, f"{typed(settings)} --samples {each}", 1 if world == 1 else RANKS)


@cache
def table():
    """{name of a Row: {phase: its MB at each depth}}, as `measured` found them."""
    return json.loads(TABLE.read_text())


def recorded(row, found):
    """Put what was measured of a Row into the table."""
    rows = {**table(), str(row): found}
    lines = [f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    table.cache_clear()


# --- Measuring ------------------------------------------------------------------------------------


def measured(rows, blocks=None):
    """Yields (Row, {phase: its MB at each depth that was rehearsed}) of each: a minute or more.

    blocks: rehearse so many instead of `few`. Raises BadInput where the machine has no C++
    compiler, or another torch.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "prompts.txt").write_text("a red fox\n" * 2)
        specs, depths = [], {}
        for row in rows:
            depths[row] = [blocks] if blocks else depths_of(row)
            for depth in depths[row]:
                specs += specs_of(row, depth, folder / str(len(specs)))
        named = {str(row): row for row in rows}
        found = {row: [] for row in rows}
        for noted in rehearsed(specs, folder):
            row = named.get(noted["name"])
            if not row:
                continue  # what another reads
            found[row].append(seen(row.stage, noted))
            if len(found[row]) == len(depths[row]):
                yield row, {phase: [one[phase] for one in found[row]] for phase in found[row][-1]}


def depths_of(row):
    """What is rehearsed of a Row: pairs and pictures need as much at any depth."""
    if row.stage == "encode":
        return [None]  # text encoders are whole
    _, config = full.DENOISERS[row.which.split()[1]]
    return few(config) if row.stage in OF_STAGE else few(config)[:1]


def specs_of(row, blocks, folder):
    """The runs of a Row with networks of so many blocks, for `rehearsed`; its own is the last."""
    words = [row.which, row.how, ALWAYS.get(row.stage, ""), f"--out {folder}"]
    prompts = f"--prompts {folder.parent}/prompts.txt"
    before = []
    if row.stage == "adp":
        pairs = folder.with_name(f"{folder.name}-pairs")
        before = specs_of(Row("pairs", row.which, "--batch-size 1"), blocks, pairs)
        words += [f"--pairs {pairs}"]
    elif row.stage == "encode":
        model, whole = row.which.split()[1], f"{folder}-whole"
        before = [{"name": "whole", "script": "folder", "words": [model, whole]}]
        words = [f"--model {whole}", *words[1:], prompts]
    elif row.stage != "decode":
        words += [prompts]
    if row.stage in OF_STAGE:
        each = int(row.how.split()[-1])
        words += [f"--batch-size {2 * each * row.world}"]
    own = {"name": str(row), "script": row.stage, "words": " ".join(words).split()}
    return [*before, {**own, "world": row.world, "blocks": blocks}]


def rehearsed(specs, folder):
    """Yields what tests/fake_cuda/rehearse.py notes of each of these runs.

    Raises BadInput where one fails, or the process is ended.
    """
    sys.path.insert(0, str(HARNESS))
    import shim

    require(not shim.other_torch(), shim.other_torch())
    require(shim.compiler(), "to measure it needs a C++ compiler: install g++")
    library = shim.build(folder)
    runs = folder / "runs.json"
    runs.write_text(json.dumps(specs))
    command = [sys.executable, str(HARNESS / "rehearse.py"), str(library), str(runs)]
    said = folder / "said"
    with open(said, "w") as stderr:
        pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
            for line in process.stdout:
                noted = json.loads(line)
                if noted["error"]:
                    process.kill()
                    wrong = last_line(noted["error"])
                    raise BadInput(f"the rehearsal of {noted['name']}: {wrong}")
                yield noted
    if process.returncode:
        wrong = f"exit code {process.returncode} ({last_line(said.read_text())})"
        raise BadInput(f"the rehearsal: {wrong}")


def last_line(text):
    """The last line that a process wrote, which tells what ended it."""
    return next(reversed(text.strip().splitlines()), "it said nothing")


def seen(stage, noted):
    """{phase: [MB]} of what a rehearsal noted.

    Of training above weights and buffers, in a first micro-batch and in a later one, then above the
    gradients too; of pairs above the weights; of encode and decode all there is.
    """
    if stage in ("encode", "decode"):
        return {stage: [round(noted["peak"] / MB)]}
    found = {}
    there, _ = noted["rounds"][0]
    for _, peaks in noted["rounds"]:
        for phase, peak in peaks.items():
            if not phase.startswith(("step", "log", "begin")):
                found.setdefault(phase, []).append(round((peak - there) / MB))
        there += sum(noted["held"].get(name, 0) for name in ("student", "fake", "heads"))
    return found
