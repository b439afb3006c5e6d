"""A run's folder: config.json, log.csv, samples/, checkpoints/ and, at the end, pipeline/.

samples/ and curves.png are made in sheets.py and curves.py. All else is safetensors and json,
written aside and renamed: a file is whole or absent.
"""

import csv
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open

from ode import on_the_line
from runtime import curves, doctor
from runtime.board import Board
from runtime.files import (
    Tensors,
    aside,
    claim,
    file_sha256,
    read_json,
    remove,
    write_json,
    write_tensors,
)
from runtime.progress import Progress
from runtime.ranks import in_parts, own, own_rows
from runtime.script import Stopped
from runtime.settings import BadInput, require

# When a run is resumed. From `accumulate` to `embed` they change where and how numbers are made,
# not which; `paper` sets other settings' defaults, and those are compared.
MAY_CHANGE = (
    "resume",
    "out",
    "iterations",
    "checkpoint_every",
    "sample_every",
    "log_every",
    "keep_checkpoints",
    "tensorboard",
    "accumulate",
    "samples",
    "gradient_checkpointing",
    "offload",
    "shard_ranks",
    "embed",
    "paper",
)

MOST_SKIPPED = 20  # updates of one network in a row, after which a run stops


def starting_point(init, family, schedule, lora_rank):
    """Where a student starts: (its Schedule, the pipeline folder of its first weights or None).

    schedule: the teacher's. init is "teacher", or the folder of an adp.py or adm.py run. Raises
    BadInput for one that is unfinished, of another model or another LoRA rank, and for LoRA without
    peft.
    """
    possible = not lora_rank or find_spec("peft")
    require(possible, "--lora-rank needs the peft package: pip install peft")
    if init == "teacher":
        return schedule, None
    pipeline = Path(init) / "pipeline"
    keys = ("teacher", "student", "config")
    saved = read_json(Path(init) / "config.json", "run of adp.py or adm.py", *keys)
    teacher = saved["teacher"]
    require(
        teacher["weights_sha256"] == family.weights_sha256,
        f"--init {init}: its student is one of {teacher['name']}, not of {family.name}",
    )
    require(
        (pipeline / "model_index.json").exists(),
        f"--init {init}: the run is not finished, it has no pipeline/ yet",
    )
    require(
        lora_rank in (0, saved["config"]["lora_rank"]),
        f"--init {init}: its student has another --lora-rank than {lora_rank}",
    )
    if saved["student"]["prediction"] == "flow":
        return on_the_line(schedule), pipeline
    return schedule, pipeline


def is_noted(name):
    """Whether a setting may change when a run is resumed, which config.json then notes."""
    return name == "ema" or name.startswith("lr_")


class Run:
    """The output folder of a training run.

    It holds config.json, log.csv, samples/, checkpoints/ and, at the end, pipeline/. `facts`
    {setting: what it stands for} go into config.json too: the text or the weights behind a path,
    the number behind a default. Raises BadInput for a folder that holds anything, unless
    cfg.resume; then for a config that differs from the run's.
    """

    def __init__(self, stage, cfg, ranks, family, schedule, steps, **facts):
        self.folder = Path(cfg.out)
        self.cfg = cfg
        self.ranks = ranks
        self.family = family
        self.schedule = schedule
        self.steps = steps
        self.asked = False  # a signal came to this rank
        self.board = None  # with --tensorboard rank 0's
        self.stop = None  # the Stopped on which all ranks have agreed
        first_weights = family.weights_sha256
        if cfg.init != "teacher":
            # One rank reads the files: a student can be tens of gigabytes.
            first_weights = ranks.first(lambda: family.sha256_of(Path(cfg.init) / "pipeline"))
        facts["init"] = {"weights_sha256": first_weights}
        times = schedule.timesteps(steps)[:-1].tolist()
        self.about = {
            "config": {"stage": stage, **asdict(cfg)},
            "teacher": {"name": family.name, "weights_sha256": family.weights_sha256},
            **facts,
            "student": {
                "prediction": schedule.prediction,
                "times": times,
                "renoise": schedule.renoise,
            },
            "world_size": ranks.world,
            "versions": versions(),
            "changes": [],
        }
        config_json = self.folder / "config.json"
        if cfg.resume:
            saved = read_json(config_json, "run to resume", "config", "teacher")
            self.saved = {"changes": [], **saved}  # earlier versions noted none
            self.check_same(facts)
        else:
            require(
                not config_json.exists(),
                f"{self.folder} holds another run: "
                "continue it with --resume, or choose another --out",
            )
            claim(self.folder)
        ranks.barrier()  # every rank has looked before one writes
        if not cfg.resume:  # one that is resumed: see go_on
            ranks.first(lambda: write_json(config_json, self.about))
        seen = all(ranks.each(config_json.exists))
        ranks.first(lambda: require(seen, f"{self.folder} is not on a disk that all ranks share"))

    def check_same(self, facts):
        """Raises BadInput where a setting that may not change is another than in the run."""
        differing = []
        for what, then, now in self.fixed(facts):
            if then != now:
                differing.append(f"{what} = {then!r}, not {now!r}")
        require(not differing, f"--resume: {self.folder} was run with {', '.join(differing)}")

    def fixed(self, facts):
        """(what, its value in the run that is resumed, its value now) of what may not change.

        A setting that stands for a fact is compared by that, not by its spelling, unless the run is
        of an earlier version, which did not write it down.
        """
        config = self.about["config"]
        before = self.saved["config"]
        facts = {**facts, "model": {"weights_sha256": self.family.weights_sha256}}
        known = {**self.saved, "model": self.saved["teacher"]}
        for name in config:
            if name in MAY_CHANGE or is_noted(name):
                continue
            if name not in facts or name not in known:
                yield name, before.get(name), config[name]
            elif isinstance(facts[name], dict):
                for key, now in facts[name].items():
                    yield f"{key} of {name} {before.get(name)}", known[name].get(key), now
            else:
                yield name, known[name], facts[name]

    def value_at(self, name, iteration):
        """The value of a setting in this iteration of the run that is resumed.

        config.json has the last one, and what it was before each change.
        """
        for change in self.saved["changes"]:
            if name in change and change["iteration"] >= iteration:
                return change[name][0]
        return self.saved["config"].get(name)

    def go_on(self, done):
        """Say in config.json what holds after iteration `done`, and what changed there.

        What changed stands on stderr too. Later changes are forgotten: they were of iterations that
        come again.
        """
        changed = {}
        for name, now in self.about["config"].items():
            then = self.value_at(name, done)
            if is_noted(name) and now != then:
                changed[name] = [then, now]
        changes = [change for change in self.saved["changes"] if change["iteration"] < done]
        if changed:
            changes.append({"iteration": done, **changed})
            said = [f"{name} = {now}, before {then}" for name, (then, now) in changed.items()]
            print(f"{self.folder}: from iteration {done + 1} on {'; '.join(said)}", file=sys.stderr)
        write_json(self.folder / "config.json", {**self.about, "changes": changes})

    def iterations(self, first):
        """The numbers of the iterations from `first` on; how far they are stands on stderr."""
        self.progress = Progress(self.cfg, first, self.ranks.main)
        yield from range(first, self.cfg.iterations)
        self.progress.close()

    def say(self, what):
        """A line on stderr about this run, of rank 0."""
        if self.ranks.main:
            print(f"{self.folder}: {what}", file=sys.stderr)

    def record(self, iteration, logs, began):
        """Append a row to log.csv, and set self.stop where the run ends after it.

        logs: one {name: tensor () or None} a micro-batch. The row has means over them and over the
        ranks; what is always None stays empty. began: time.perf_counter() when the iteration did.
        To be called on every rank: that mean also tells all of them whether one was asked to stop,
        and which updates were skipped.
        """
        values = {name: mean_of_given([log[name] for log in logs]) for name in logs[0]}
        tensors = {name: v for name, v in values.items() if v is not None}
        names, flags = [], []  # of each update since the last row: its network, and () 1 if skipped
        for name, optimizer in self.optimizers.items():
            names += [name] * len(optimizer.skipped)
            flags += optimizer.skipped
            optimizer.skipped.clear()
        asked_here = torch.full((), float(self.asked), device=self.ranks.device)
        # All in one tensor, (1 + values + updates,): the ranks and the host wait once.
        numbers = torch.stack([asked_here, *tensors.values(), *flags])
        asked, *means = self.ranks.mean(numbers).tolist()
        skipped = means[len(tensors) :]
        for name, skip in zip(names, skipped, strict=True):
            self.in_a_row[name] = self.in_a_row[name] + 1 if skip else 0
        row = {
            "iteration": iteration,
            **values,
            **dict(zip(tensors, means[: len(tensors)], strict=True)),
            "skipped": int(sum(skipped)),  # updates not made: a loss or gradient was not finite
            "seconds": round(time.perf_counter() - began, 4),  # of the iteration
            "peak_memory_gb": round(peak_memory(self.ranks.device) / 1e9, 3),  # of the run so far
        }
        if self.ranks.main:
            with open(self.folder / "log.csv", "a", newline="") as f:
                writer = csv.DictWriter(f, row, lineterminator="\n")
                if iteration == 1:
                    writer.writeheader()
                writer.writerow(row)
            if self.board:
                self.board.row(row)
        self.progress.show(row)
        self.decide(iteration, asked)

    def decide(self, iteration, asked):
        """Set self.stop where a rank was asked to stop, or too many updates were skipped."""
        stopped = f"{self.folder}: stopped after iteration {iteration}"
        if asked:
            self.stop = Stopped(0, f"{stopped}, as asked: the same command with --resume goes on")
        worst = max(self.in_a_row, key=self.in_a_row.get)
        if self.in_a_row[worst] >= MOST_SKIPPED:
            reason = (
                f"{MOST_SKIPPED} updates of {worst} in a row met a loss or gradient that is not "
                "finite and were skipped; the checkpoint has the weights from before"
            )
            self.stop = Stopped(1, f"{stopped}: {reason}")
            self.advise()

    def advise(self):
        """Say on stderr what log.csv shows to be wrong, if anything: three lines at most."""
        if not self.ranks.main:
            return
        with suppress(BadInput):  # a log that was damaged meanwhile: the run itself is whole
            for line in doctor.advice(self.folder):
                self.say(line)

    def ask(self, number, frame):
        """From SIGTERM or SIGINT: finish the iteration, write a checkpoint, end.

        A second Ctrl-C ends at once.
        """
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def due(self, every, iteration):
        """Whether what is done `every` iterations (0: never) is due after this one.

        After the last it always is.
        """
        if every <= 0:
            return False
        done = iteration + 1
        return done % every == 0 or done == self.cfg.iterations

    def checkpoints(self):
        """Their folders, oldest first. One that is being written has another kind of name."""
        found = (self.folder / "checkpoints").glob("[0-9]*")
        return sorted((p for p in found if p.name.isdecimal()), key=lambda p: int(p.name))

    def save(self, iteration, networks, optimizers):
        """Write checkpoints/<iteration>/ of {name: {name: parameter}} and {name: AdamW}.

        Nothing is gathered: each rank writes its rows of every tensor, and hashes them. The last
        cfg.keep_checkpoints stay. To be called on every rank.
        """
        if self.board:
            self.board.flush()
        folder = self.folder / "checkpoints" / f"{iteration:06d}"
        first, main = self.ranks.first, self.ranks.main
        with aside(folder) if main else nullcontext() as partial:
            partial = first(lambda: created(partial))
            sums = self.ranks.each(lambda: self.save_rows(partial, networks, optimizers))
            state = checkpoint_state(iteration, sums)
            first(lambda: write_json(partial / "state.json", state))
        if main:
            for old in self.checkpoints()[: -self.cfg.keep_checkpoints]:
                shutil.rmtree(old)
            if self.stop and self.cfg.sample_every:  # its last sheet may be older than its log
                curves.draw([self.folder], self.folder / "curves.png")
        self.ranks.barrier()

    def save_rows(self, folder, networks, optimizers):
        """Write this rank's rows of each network and of what AdamW, if it has one, keeps of it.

        Returns {name of a file: its hash}. Main memory takes those of one network at a time. Beyond
        the first --shard-ranks ranks there are copies, and nothing is written.
        """
        sums = {}
        if self.ranks.rank >= self.ranks.sharing:
            return sums
        for name, parameters in networks.items():
            tensors = {f"weight/{n}": own(p) for n, p in parameters.items()}
            if name in optimizers:
                for i, slots in optimizers[name].state_dict()["state"].items():
                    tensors |= {f"adamw/{i}/{slot}": own(value) for slot, value in slots.items()}
            path = folder / file_names(name, self.ranks.sharing)[self.ranks.rank]
            write_tensors(path, tensors)
            sums[path.stem] = file_sha256(path)
        return sums

    def as_saved(self, networks, iteration):
        """The networks of the checkpoint after this iteration: the average too, if it had one."""
        saved = {name: parameters for name, parameters in networks.items() if name != "ema"}
        if self.value_at("ema", iteration):
            saved["ema"] = networks.get("ema", networks["student"])  # of the same names and shapes
        return saved

    def newest_whole(self, networks):
        """The newest checkpoint that is whole, or None where there is none at all.

        Newer ones, which are damaged, are named on stderr. Raises BadInput where none is whole: to
        begin again would cost the log. To be called on every rank.
        """
        problems = []
        for folder in reversed(self.ranks.first(self.checkpoints)):
            damage = self.damage(folder, networks)
            if damage is None:
                for line in problems if self.ranks.main else ():
                    print(f"{line}: going back to the checkpoint before it", file=sys.stderr)
                return folder
            problems.append(f"{folder} is damaged ({damage})")
        self.ranks.first(lambda: require(not problems, "; ".join(problems)))
        return None

    def damage(self, folder, networks):
        """What is wrong with a checkpoint, in words, or None: the same on every rank.

        Each hashes its share of the files. To be called on every rank.
        """
        saved = self.as_saved(networks, int(folder.name))
        sums = self.ranks.each(lambda: hashes(folder, self.ranks.rank, self.ranks.world))

        def words():
            try:
                check_checkpoint(folder, saved, sums)
            except (OSError, ValueError, SafetensorError) as e:
                return str(e)

        return self.ranks.first(words)

    def restore(self, networks, optimizers):
        """Load the newest whole checkpoint, if cfg.resume; return its iteration (0: none).

        There is no state besides weights and AdamW's: which data and noise an iteration sees
        depends on its number (see Draw). From here on SIGTERM and SIGINT are requests.
        """
        done = 0
        loaded = []
        if self.cfg.resume:
            folder = self.newest_whole(networks)
            if folder:
                done = int(folder.name)
                saved = self.as_saved(networks, done)
                loaded = [name for name in networks if name in saved]
        for name in loaded:
            load_network(folder, name, networks[name], optimizers.get(name))
        if "ema" in networks and "ema" not in loaded:  # the average begins here
            for name, average in networks["ema"].items():
                average.copy_(networks["student"][name].detach())
        if self.ranks.main:
            if self.cfg.resume:
                self.go_on(done)
            self.forget_after(done)
            if self.cfg.tensorboard:
                self.board = Board(self.folder, done)
        self.optimizers = optimizers
        self.in_a_row = dict.fromkeys(optimizers, 0)
        for optimizer in optimizers.values():
            optimizer.skipped = []  # since the last row of the log, see `step`
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self.ask)
        return done

    def forget_after(self, done):
        """Remove half-written checkpoints, and rows of the log after iteration `done`.

        What came after the checkpoint comes again.
        """
        for half in (self.folder / "checkpoints").glob("*.partial"):
            remove(half)
        log = self.folder / "log.csv"
        if log.exists():
            lines = log.read_text().splitlines(keepends=True)
            kept = 1 + done if done else 0  # the first row brings the header
            with aside(log) as partial:
                partial.write_text("".join(lines[:kept]))

    def finish(self, networks, export):
        """Let export(folder, ranks) make pipeline/ of the student, and say so.

        Of its average, if there is one. What the log shows to be wrong is said too.
        """
        for name, average in networks.get("ema", {}).items():
            networks["student"][name].data.copy_(average)
        export(self.folder / "pipeline", self.ranks)
        if self.ranks.main:
            possible = ("log.csv", "curves.png", "samples")
            there = ", ".join(name for name in possible if (self.folder / name).exists())
            use = "pipeline/ for DiffusionPipeline.from_pretrained (see its README.md)"
            print(f"{self.folder}: {there}, and {use}")
        self.advise()


def versions():
    """{library: its version}: with others the numbers may differ."""
    found = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, np)}
    found["python"] = sys.version.split()[0]
    return found


def mean_of_given(values):
    """The mean of those that are not None, () float32, or None if all are."""
    given = [value.detach().float() for value in values if value is not None]
    if not given:
        return None
    return torch.stack(given).mean()


def peak_memory(device):
    """The most memory in use so far, in bytes: on a GPU, otherwise by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return peak * unit


def file_names(name, parts):
    """The names of a network's files in a checkpoint that so many ranks wrote, in their order."""
    if parts == 1:
        return [f"{name}.safetensors"]
    return [f"{name}-{i:05d}-of-{parts:05d}.safetensors" for i in range(1, parts + 1)]


def created(folder):
    """`folder`, which is made."""
    folder.mkdir(parents=True)
    return folder


def load_network(folder, name, parameters, optimizer):
    """Set {name: parameter}, and AdamW if it is not None, to those of `name` in a checkpoint.

    Whatever the number of ranks that wrote it; `folder` has passed check_checkpoint.
    """
    masters = list(parameters.values())
    slots = {}  # {number of a parameter: {"step", "exp_avg", "exp_avg_sq"}}
    paths = [folder / f"{name}.safetensors"]
    if not paths[0].exists():
        paths = sorted(folder.glob(f"{name}-*.safetensors"))
    saved = Tensors(paths)  # of which each rank reads its rows
    for n, p in parameters.items():
        own(p).copy_(saved.read(f"weight/{n}", own_rows(p)))
    for key in sorted(saved.names()):
        if key.startswith("adamw/"):
            _, i, slot = key.split("/")
            p = masters[int(i)]
            value = saved.read(key, own_rows(p)).clone()  # no longer the file's
            if value.ndim:  # all but the step
                value = in_parts(p, value)
            slots.setdefault(int(i), {})[slot] = value
    if optimizer is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": slots, "param_groups": groups})


def plain_files(folder):
    """The files in a folder, in order, that are no links, pipes or folders."""
    return sorted(f for f in folder.iterdir() if f.is_file() and not f.is_symlink())


def hashes(folder, rank=0, world=1):
    """{name of a file: its hash} of a rank's share of a checkpoint's tensors.

    Up to one that cannot be read or is empty: its hash is then missing to check_checkpoint.
    """
    sums = {}
    with suppress(OSError, ValueError):
        tensors = [file for file in plain_files(folder) if file.suffix == ".safetensors"]
        for file in tensors[rank::world]:
            sums[file.stem] = file_sha256(file)
    return sums


def checkpoint_state(iteration, sums):
    """What state.json says of a checkpoint. sums: of each rank {name of a file: its hash}."""
    together = {name: digest for part in sums for name, digest in part.items()}
    return {"iteration": iteration, "sha256": together}


def check_checkpoint(folder, networks, sums):
    """Raises unless the folder holds a checkpoint of {name: {name: parameter}} and nothing else.

    By checksums, and then by the tensors' names and shapes: ValueError, OSError or SafetensorError.
    It may come from anywhere: no name in it is followed. sums: what `hashes` gave each rank.
    """
    plain = plain_files(folder)
    parts = max(1, (len(plain) - 1) // len(networks))  # as many ranks wrote it
    files = {name: file_names(name, parts) for name in networks}
    expected = ["state.json", *(file for names in files.values() for file in names)]
    no_others = len(plain) == len(os.listdir(folder)) and not folder.is_symlink()
    same = sorted(file.name for file in plain) == sorted(expected)
    require(no_others and same, "other files than a checkpoint's")
    state = read_json(folder / "state.json", "checkpoint")
    require(
        state == checkpoint_state(int(folder.name), sums),
        "the checksums are others than state.json says",
    )
    for name, parameters in networks.items():
        found = found_tensors([folder / file for file in files[name]])
        expected = expected_tensors(parameters, found)
        keys = sorted(found.keys() | expected.keys())
        odd = [key for key in keys if found.get(key) != expected.get(key)]
        other = f"{name}.safetensors has other tensors than this run's {name}"
        require(not odd, f"{other}, beginning with {odd[:1]}")


def found_tensors(paths):
    """{key: (type, *shape)} of tensors with rows in each of these files; () where they differ."""
    parts = {}  # {key: [(type, *shape) in each file]}
    for path in paths:
        with safe_open(path, "pt") as f:
            keys = f.keys()
            for key in keys:
                x = f.get_slice(key)
                parts.setdefault(key, []).append((x.get_dtype(), *x.get_shape()))
    return {key: joined(kinds) if len(kinds) == len(paths) else () for key, kinds in parts.items()}


def joined(kinds):
    """(type, *shape) of parts [(type, *shape)], one after another; () where they do not fit."""
    if len({(len(kind), kind[0], *kind[2:]) for kind in kinds}) > 1:
        return ()
    dtype, *shape = kinds[0]
    if not shape:  # a number, which each part has
        return (dtype,)
    return (dtype, sum(kind[1] for kind in kinds), *shape[1:])


def expected_tensors(parameters, found):
    """{key: (type, *shape)} of {name: parameter}, and of the moments that are among `found`."""
    expected = {f"weight/{n}": ("F32", *p.shape) for n, p in parameters.items()}
    for i, p in enumerate(parameters.values()):
        prefix = f"adamw/{i}/"
        if any(key.startswith(prefix) for key in found):  # all that AdamW keeps, or nothing
            expected[f"{prefix}step"] = ("F32",)
            expected[f"{prefix}exp_avg"] = ("F32", *p.shape)
            expected[f"{prefix}exp_avg_sq"] = ("F32", *p.shape)
    return expected
