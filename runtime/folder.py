"""A run's folder: config.json, log.csv, samples/, checkpoints/ and, at the end, pipeline/.

All of it is safetensors and json, written aside and renamed: a file is whole or absent.
"""

import csv
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open

from ode import on_the_line
from runtime.files import (
    aside,
    claim,
    file_sha256,
    read_json,
    remove,
    write_json,
    write_tensors,
)
from runtime.ranks import assign, gather, like
from runtime.script import Stopped
from runtime.settings import require


def starting_point(init, family, lora_rank):
    """(the student's Schedule, the pipeline folder of its first weights or None): init is "teacher", or the folder of an adp.py
    or adm.py run. Raises BadInput for one that is unfinished, of another model or another LoRA rank, and for LoRA without peft."""
    require(not lora_rank or find_spec("peft"), "--lora-rank needs the peft package: pip install peft")
    if init == "teacher":
        return family.schedule, None
    pipeline = Path(init) / "pipeline"
    saved = read_json(Path(init) / "config.json", "run of adp.py or adm.py", "teacher", "student", "config")
    require(saved["teacher"]["weights_sha256"] == family.weights_sha256,
            f"--init {init}: its student is one of {saved['teacher']['name']}, not of {family.name}")
    require((pipeline / "model_index.json").exists(), f"--init {init}: the run is not finished, it has no pipeline/ yet")
    require(lora_rank in (0, saved["config"]["lora_rank"]), f"--init {init}: its student has another --lora-rank than {lora_rank}")
    return (on_the_line(family.schedule) if saved["student"]["prediction"] == "flow" else family.schedule), pipeline


# When a run is resumed; the last three change where and how numbers are made, not which.
MAY_CHANGE = ("resume", "out", "iterations", "checkpoint_every", "sample_every", "keep_checkpoints",
              "accumulate", "samples", "gradient_checkpointing", "offload", "paper")

MOST_SKIPPED = 20  # updates of one network in a row, after which a run stops

def is_noted(name):
    """Whether a setting may change when a run is resumed, which config.json then notes."""
    return name == "ema" or name.startswith("lr_")


class Run:
    """The output folder of a training run: config.json, log.csv, samples/, checkpoints/ and, at the
    end, pipeline/. `facts` {setting: what it stands for} go into config.json too: the text or the
    weights behind a path, the number behind a default. Raises BadInput for a folder that holds
    anything, unless cfg.resume; then for a config that differs from the run's."""
    def __init__(self, stage, cfg, ranks, family, schedule, steps, **facts):
        self.folder, self.cfg, self.ranks, self.family = Path(cfg.out), cfg, ranks, family
        self.schedule, self.steps = schedule, steps
        self.asked, self.stop = False, None  # a signal came to this rank; the Stopped on which all have agreed
        teacher = {"name": family.name, "weights_sha256": family.weights_sha256}
        first_weights = family.weights_sha256
        if cfg.init != "teacher":
            first_weights = family.sha256_of(Path(cfg.init) / "pipeline")
        facts["init"] = {"weights_sha256": first_weights}
        times = schedule.timesteps(steps)[:-1].tolist()
        student = {"prediction": schedule.prediction, "times": times, "renoise": schedule.renoise}
        versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)}
        versions["python"] = sys.version.split()[0]
        self.about = {"config": {"stage": stage, **asdict(cfg)}, "teacher": teacher, **facts,
                      "student": student, "world_size": ranks.world, "versions": versions,
                      "changes": []}
        if cfg.resume:
            saved = read_json(self.folder / "config.json", "run to resume", "config", "teacher")
            self.saved = {"changes": [], **saved}  # earlier versions noted none
            differing = [f"{what} = {then!r}, not {now!r}"
                         for what, then, now in self.fixed(facts) if then != now]
            require(not differing, f"--resume: {self.folder} was run with {', '.join(differing)}")
        fresh = not (self.folder / "config.json").exists()
        require(cfg.resume or fresh, f"{self.folder} holds another run: "
                                     "continue it with --resume, or choose another --out")
        if not cfg.resume:
            claim(self.folder)
        ranks.barrier()
        if ranks.main and not cfg.resume:  # one that is resumed: see go_on
            write_json(self.folder / "config.json", self.about)

    def fixed(self, facts):
        """(what, its value in the run that is resumed, its value now) of all settings that may not
        change. One that stands for a fact is compared by that, not by its spelling, unless the run
        is of an earlier version, which did not write it down."""
        config, before = self.about["config"], self.saved["config"]
        facts = {**facts, "model": {"weights_sha256": self.family.weights_sha256}}
        known = {**self.saved, "model": self.saved["teacher"]}
        for name in [name for name in config if name not in MAY_CHANGE and not is_noted(name)]:
            if name not in facts or name not in known:
                yield name, before.get(name), config[name]
            elif isinstance(facts[name], dict):
                for key, now in facts[name].items():
                    yield f"{key} of {name} {before.get(name)}", known[name].get(key), now
            else:
                yield name, known[name], facts[name]

    def held(self, name, iteration):
        """The value of a setting in this iteration of the run that is resumed: config.json has the
        last one, and what it was before each change."""
        for change in self.saved["changes"]:
            if name in change and change["iteration"] >= iteration:
                return change[name][0]
        return self.saved["config"].get(name)

    def go_on(self, done):
        """Say in config.json what holds after iteration `done`, and what changed there; that on
        stderr too. Later changes are forgotten: they were of iterations that come again."""
        changed = {}
        for name, now in self.about["config"].items():
            if is_noted(name) and now != self.held(name, done):
                changed[name] = [self.held(name, done), now]
        changes = [change for change in self.saved["changes"] if change["iteration"] < done]
        if changed:
            changes.append({"iteration": done, **changed})
            said = [f"{name} = {now}, before {then}" for name, (then, now) in changed.items()]
            print(f"{self.folder}: from iteration {done + 1} on {'; '.join(said)}", file=sys.stderr)
        write_json(self.folder / "config.json", {**self.about, "changes": changes})

    def record(self, iteration, logs, began):
        """Append a row to log.csv: means over `logs`, one {name: tensor or None} a micro-batch, and over the ranks; what is always
        None stays empty. To be called on every rank: that mean also tells all of them whether one was asked to stop. Sets self.stop
        for that, and where too many updates were skipped."""
        values = {name: [log[name].detach().float() for log in logs if log[name] is not None] for name in logs[0]}
        values = {name: torch.stack(v).mean() if v else None for name, v in values.items()}
        tensors = {name: v for name, v in values.items() if v is not None}
        flags = [(name, flag) for name, optimizer in self.optimizers.items() for flag in optimizer.skipped]
        asked = torch.full((), float(self.asked), device=self.ranks.device)
        asked, *means = self.ranks.mean(torch.stack([asked, *tensors.values(), *(flag for _, flag in flags)])).tolist()
        skipped = means[len(tensors):]
        for (name, _), skip in zip(flags, skipped):
            self.in_a_row[name] = self.in_a_row[name] + 1 if skip else 0
            self.optimizers[name].skipped.clear()
        cuda, unit = self.ranks.device.type == "cuda", 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        row = {"iteration": iteration, **values, **dict(zip(tensors, means)), "skipped": int(sum(skipped)),
               "seconds": round(time.perf_counter() - began, 4), "peak_memory_gb": round(memory / 1e9, 3)}
        if self.ranks.main:
            with open(self.folder / "log.csv", "a", newline="") as f:
                header = [dict(zip(row, row))] if iteration == 1 else []
                csv.DictWriter(f, row, lineterminator="\n").writerows([*header, row])
        stopped, worst = f"{self.folder}: stopped after iteration {iteration}", max(self.in_a_row, key=self.in_a_row.get)
        if asked:
            self.stop = Stopped(0, f"{stopped}, as asked: the same command with --resume goes on")
        if self.in_a_row[worst] >= MOST_SKIPPED:
            self.stop = Stopped(1, f"{stopped}: {MOST_SKIPPED} updates of {worst} in a row met a loss or gradient that is not finite "
                                   "and were skipped; the checkpoint has the weights from before")

    def ask(self, number, frame):
        """From SIGTERM or SIGINT: finish the iteration, write a checkpoint, end. A second Ctrl-C ends at once."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def due(self, every, iteration):
        """Whether what is done `every` iterations (0: never) is due after this one; after the last it always is."""
        return every > 0 and ((iteration + 1) % every == 0 or iteration + 1 == self.cfg.iterations)

    def picture(self, iteration, latents):
        """samples/<iteration>.png, of rank 0: a row for each {label: latents (B, ...)}, for video a row of frames for each sample.
        The VAE is loaded for this and dropped again."""
        if not self.ranks.main:
            return
        vae, rows = self.family.vae(self.ranks.device), []
        for label, z in latents.items():
            with torch.no_grad():
                x = torch.cat([self.family.decode(vae, one) for one in z[:8 if z.ndim == 4 else 2].split(1)])
            x = x.float().clamp(-1, 1).add(1).mul(127.5).byte().cpu()
            rows += [(label, x)] if x.ndim == 4 else [(label, video[:8]) for video in x.transpose(1, 2)]
        height, width = (n * max(1, 96 // x.shape[-2]) for n in x.shape[-2:])  # small pictures are enlarged
        sheet = Image.new("RGB", (120 + len(rows[0][1]) * width, len(rows) * height), "white")
        for i, (label, images) in enumerate(rows):
            ImageDraw.Draw(sheet).text((4, i * height + 4), label, fill="black")
            for j, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
                sheet.paste(Image.fromarray(image).resize((width, height), Image.NEAREST), (120 + j * width, i * height))
        (self.folder / "samples").mkdir(exist_ok=True)
        sheet.save(self.folder / "samples" / f"{iteration:06d}.png")

    def checkpoints(self):
        """Their folders, oldest first. One that is being written has another kind of name."""
        return sorted((p for p in (self.folder / "checkpoints").glob("[0-9]*") if p.name.isdecimal()), key=lambda p: int(p.name))

    def save(self, iteration, networks, optimizers):
        """checkpoints/<iteration>/: {name: {name: parameter}} and {name: AdamW}, whole tensors whatever the number of ranks. The
        last cfg.keep_checkpoints stay."""
        folder, first, main = self.folder / "checkpoints" / f"{iteration:06d}", self.ranks.first, self.ranks.main
        with aside(folder) if main else nullcontext() as partial:
            first(lambda: partial.mkdir(parents=True))
            for name, parameters in networks.items():
                tensors = {f"weight/{n}": p for n, p in parameters.items()}
                if name in optimizers:
                    for i, slots in optimizers[name].state_dict()["state"].items():
                        tensors |= {f"adamw/{i}/{slot}": value for slot, value in slots.items()}
                tensors = gather(tensors, keep=main)  # one network at a time: in main memory it is whole
                first(lambda: write_tensors(partial / f"{name}.safetensors", tensors))
            first(lambda: write_json(partial / "state.json", checkpoint_state(iteration, partial, networks)))
        if main:
            for old in self.checkpoints()[:-self.cfg.keep_checkpoints]:
                shutil.rmtree(old)
        self.ranks.barrier()

    def as_saved(self, networks, iteration):
        """The networks of the checkpoint after this iteration: the average too, if it had one."""
        saved = {name: parameters for name, parameters in networks.items() if name != "ema"}
        if self.held("ema", iteration):
            saved["ema"] = networks.get("ema", networks["student"])  # of the same names and shapes
        return saved

    def newest_whole(self, networks):
        """The newest checkpoint that is whole, or None where there is none at all. The others are named on stderr. Raises BadInput
        where none is whole: to begin again would cost the log."""
        problems = []
        for folder in reversed(self.checkpoints()):
            try:
                check_checkpoint(folder, self.as_saved(networks, int(folder.name)))
                for line in problems:
                    print(f"{line}: going back to the checkpoint before it", file=sys.stderr)
                return folder
            except (OSError, ValueError, SafetensorError) as e:
                problems.append(f"{folder} is damaged ({e})")
        require(not problems, "; ".join(problems))

    def restore(self, networks, optimizers):
        """Load the newest whole checkpoint; return its iteration (0: none). There is no state besides weights and AdamW's: which data
        and noise an iteration sees depends on its number (see Draw). From here on SIGTERM and SIGINT are requests."""
        folder = self.ranks.first(lambda: self.newest_whole(networks)) if self.cfg.resume else None  # the same on all ranks
        done = int(folder.name) if folder else 0
        loaded = self.as_saved(networks, done).keys() & networks.keys() if folder else ()
        for name, parameters in ((name, networks[name]) for name in networks if name in loaded):
            slots, masters = {}, list(parameters.values())
            with safe_open(folder / f"{name}.safetensors", "pt") as f:  # tensor by tensor: each rank keeps its part
                for n, p in parameters.items():
                    assign(p, f.get_tensor(f"weight/{n}"))
                for _, i, slot in [key.split("/") for key in sorted(f.keys()) if key.startswith("adamw/")]:
                    value = f.get_tensor(f"adamw/{i}/{slot}")
                    slots.setdefault(int(i), {})[slot] = like(masters[int(i)], value) if value.ndim else value
            if name in optimizers:
                optimizers[name].load_state_dict({"state": slots, "param_groups": optimizers[name].state_dict()["param_groups"]})
        if "ema" in networks and "ema" not in loaded:  # the average begins here
            for name, average in networks["ema"].items():
                average.copy_(networks["student"][name].detach())
        log = self.folder / "log.csv"
        if self.ranks.main:
            if self.cfg.resume:
                self.go_on(done)
            for half in (self.folder / "checkpoints").glob("*.partial"):
                remove(half)
            if log.exists():  # what came after the checkpoint comes again
                with aside(log) as partial:
                    partial.write_text("".join(log.read_text().splitlines(True)[:done and done + 1]))
        self.optimizers, self.in_a_row = optimizers, dict.fromkeys(optimizers, 0)
        for optimizer in optimizers.values():
            optimizer.skipped = []
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self.ask)
        return done

    def finish(self, networks, export):
        """Let export(folder, write) make pipeline/ of the student, its average if there is one, and
        say so."""
        for name, average in networks.get("ema", {}).items():
            networks["student"][name].data.copy_(average)
        export(self.folder / "pipeline", write=self.ranks.main)
        if self.ranks.main:
            print(f"{self.folder}: log.csv, samples/, and pipeline/ for DiffusionPipeline.from_pretrained (see its README.md)")


def checkpoint_state(iteration, folder, networks):
    """What state.json says of the checkpoint in `folder`."""
    return {"iteration": iteration, "sha256": {name: file_sha256(folder / f"{name}.safetensors") for name in networks}}


def check_checkpoint(folder, networks):
    """Raises ValueError, OSError or SafetensorError unless the folder holds a checkpoint of {name: {name: parameter}} and nothing
    else, by checksums and then by the tensors' names and shapes. It may come from anywhere: no name in it is followed."""
    whole = ["state.json", *(f"{name}.safetensors" for name in networks)]
    plain = [f.name for f in folder.iterdir() if f.is_file() and not f.is_symlink() and not folder.is_symlink()]
    require(sorted(plain) == sorted(whole) and len(plain) == len(os.listdir(folder)), "other files than a checkpoint's")
    state = read_json(folder / "state.json", "checkpoint")
    require(state == checkpoint_state(int(folder.name), folder, networks), "the checksums are others than state.json says")
    for name, parameters in networks.items():
        with safe_open(folder / f"{name}.safetensors", "pt") as f:
            found = {key: (f.get_slice(key).get_dtype(), *f.get_slice(key).get_shape()) for key in f.keys()}
        expected = {f"weight/{n}": ("F32", *p.shape) for n, p in parameters.items()}
        for i, p in enumerate(parameters.values()):
            if any(key.startswith(f"adamw/{i}/") for key in found):  # all that AdamW keeps for a parameter, or nothing
                expected |= {f"adamw/{i}/step": ("F32",), f"adamw/{i}/exp_avg": ("F32", *p.shape), f"adamw/{i}/exp_avg_sq": ("F32", *p.shape)}
        odd = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        require(not odd, f"{name}.safetensors has other tensors than this run's {name}, beginning with {odd[:1]}")
