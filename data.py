"""What is on disk (prompts, text embeddings, ODE pairs, runs and their checkpoints), and how a script is run.

    python data.py encode --model sd3 --prompts prompts.txt --out out/prompts-sd3
    torchrun --nproc_per_node=8 data.py pairs --model sdxl --count 10000 --out out/pairs-sdxl

Training reads these files only, so text encoders never sit in memory beside the four networks. All is safetensors and json,
written aside and renamed: a file is whole or absent. A second call of either command continues the first.
"""

import argparse, csv, datetime, difflib, errno, hashlib, json, os, resource
import shutil, signal, sys, time, warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import diffusers, numpy as np, torch, torch.distributed as dist, transformers
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from models import DIGITS, BadInput, aside, assign, export_pipeline, file_sha256, gather, like, load_teacher, option, remove, require
from ode import Draw, on_the_line, teacher_sample, with_guidance

PROMPTS = str(Path(__file__).with_name("prompts.txt"))  # a few hundred, written for this project
DIGITS_PROMPTS = str(DIGITS.with_name("digits-prompts.txt"))
SHARD = "{:06d}.safetensors"

# --- Running a script ------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """All ranks end a run before its time. args: the exit code, and the line that rank 0 prints."""


def quiet():
    """For a process whose stderr is its own, as a script's is: of transformers and diffusers only
    errors, and no progress bars."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # Nothing here works in place on what a sharded module returns. Student and fake score are two
    # adapters on one network on purpose.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")


def did_you_mean(word, known):
    """The end of a sentence on `word`: which of the known words is near it, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def no_such(unknown, parser):
    """A sentence about command-line arguments that the parser does not know."""
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        return f"{unknown[0]}: no such argument, all are flags"
    known = [name for name in parser._option_string_actions if "_" not in name]
    return f"{flags[0]}: no such flag{did_you_mean(flags[0].replace('_', '-'), known)}"


def run(main, config_class, argv=None, **about):
    """Parse the command line and call main(config). Bad input, an unknown flag too: one line on stderr, exit code 2. A full disk: one
    line and 1. A run that is stopped: one line and its exit code. config_class.DIGITS are its defaults with --model digits."""
    quiet()
    parser = transformers.HfArgumentParser(config_class, allow_abbrev=False, formatter_class=type(
        "Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}), **about)
    parser.error = lambda message: require(False, message)
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    try:
        asked = [a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")]  # help shows the defaults that hold
        if getattr(parser.parse_known_args(asked)[0], "model", None) == "digits":
            parser.set_defaults(**getattr(config_class, "DIGITS", {}))
        settings, unknown = parser.parse_known_args(argv)
        if unknown:
            raise BadInput(no_such(unknown, parser))
        main(config_class(**vars(settings)))
    except BadInput as e:
        print(f"{parser.prog}{rank}: {e}", file=sys.stderr)
        sys.exit(2)
    except Stopped as e:
        code, line = e.args
        print(f"{parser.prog}: {line}\n" * (os.environ.get("RANK", "0") == "0"), end="", file=sys.stderr)
        sys.exit(code)
    except (OSError, SafetensorError) as e:
        full = [m for m in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) if m in str(e)]  # safetensors' has no errno
        if not full:
            raise
        print(f"{parser.prog}{rank}: {full[0]}. What was whole still is: make room, then go on (training: --resume)", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def at_least(least, cfg, *names):
    """Raises BadInput for a setting among `names` that is given and below `least`."""
    for flag, value in ((name.replace("_", "-"), getattr(cfg, name)) for name in names):
        require(value is None or value >= least, f"--{flag} {value}: at least {least}")


def positive(cfg, *names):
    """Raises BadInput for a setting among `names` that is given and is no positive number."""
    for name in names:
        value = getattr(cfg, name)
        fine = value is None or 0 < value < float("inf")
        require(fine, f"--{name.replace('_', '-')} {value}: a positive number")


class Ranks:
    """This process among the others; plain python is one rank of one. Batch sizes are global and split evenly."""
    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, cuda = self.rank == 0, torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        self.frozen_dtype = torch.bfloat16 if cuda else torch.float32  # of weights that are never trained
        self.no_bar = None if self.main else True  # tqdm's `disable`; None: quiet when stderr is no terminal
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            # Longer than a shard or a big checkpoint takes. Where torchrun or a socket sees a rank die, the others end at once.
            dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=30))
        self.mesh = init_device_mesh(self.device.type, (self.world,)) if self.world > 1 else None  # what networks are sharded over
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # same seed, same run: on CPUs bitwise; fused attention may differ
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False

    def mine(self, batch_size, accumulate=1):
        """The numbers of this rank's samples in a global batch: a range for each of the micro-batches that it is split into."""
        parts = self.world * accumulate
        each, first = batch_size // parts, self.rank * (batch_size // self.world)
        require(each >= 1 and each * parts == batch_size, f"--batch-size {batch_size}: no multiple of {self.world} ranks"
                                                          + f" x --accumulate {accumulate}" * (accumulate > 1))
        return [range(first + i * each, first + (i + 1) * each) for i in range(accumulate)]

    def mean(self, tensor):
        """A tensor's mean over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def barrier(self):
        self.mean(torch.zeros(1, device=self.device)).item()

    def first(self, function):
        """What function() returns on rank 0, on every rank. If it raises, all end: rank 0 by that exception, the others silently."""
        problem = None
        try:
            box = [function() if self.main else None]
        except Exception as e:
            box, problem = [SystemExit(1)], e
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        if isinstance(box[0], SystemExit):
            raise problem or box[0]
        return box[0]


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments are in main memory except while it steps: a network's are not beside another's, nor beside activations."""
    def place(self, on_device):
        for p, slots in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                own = slots[name].to_local() if isinstance(slots[name], DTensor) else slots[name]  # this rank's part
                own = own.to(p.device if on_device else "cpu")
                if on_device and isinstance(p, DTensor):
                    own = DTensor.from_local(own, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                slots[name] = own

    def step(self, closure=None):
        self.place(on_device=True)
        super().step(closure)
        self.place(on_device=False)

    def state_dict(self):
        self.place(on_device=True)
        state = super().state_dict()
        state["state"] = {i: dict(slots) for i, slots in state["state"].items()}  # these stay on the device, while they are in use
        self.place(on_device=False)
        return state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.place(on_device=False)


def make_optimizers(networks, rates, cfg):
    """{name: AdamW} of {name: {parameter's name: parameter}}, each with its own rate; β2 and decay as
    peers have them (ours)."""
    kind = OffloadedAdamW if cfg.offload else torch.optim.AdamW
    betas = (cfg.beta1, 0.999)
    return {name: kind(networks[name].values(), rates[name], betas, weight_decay=0.01, fused=True)
            for name in rates}


# --- Sharded collections: text embeddings and ODE pairs --------------------------------------------------------------
def write_json(path, value):
    with aside(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path, what, *keys):
    """A json object that has these keys. Raises BadInput, naming `what` should have been there."""
    try:
        content = json.loads(Path(path).read_text())
        return content | {key: content[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(f"{Path(path).parent} holds no {what}: {Path(path).name} is missing or damaged") from None


def write_tensors(path, tensors):
    with aside(path) as partial:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial)


def rows_in(path):
    """How many rows a shard holds: none where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as f:
            return min((f.get_slice(name).get_shape()[0] for name in f.keys()), default=0)
    except (OSError, SafetensorError):
        return 0


def shard_rows(shard, size, count):
    """The row numbers of a shard, `size` a shard and `count` in all."""
    return range(shard * size, min((shard + 1) * size, count))


def claim(folder):
    """Create `folder`, or raise BadInput if it holds anything: nothing of the user's is written over."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require(all(p.suffix == ".partial" for p in folder.iterdir()), f"{folder} is not empty: choose another --out")
    except OSError as e:
        raise BadInput(f"cannot create the folder {folder}: {e.strerror}") from None


# Where things lie and what they are called, not what they are: another call may say it otherwise.
SPELLING = ("model", "prompts")


def collect(folder, manifest, ranks, make):
    """Fill `folder` with shards: make(rows) returns the tensors {name: (len(rows), ...)} of these
    row numbers, which depend on what `manifest` says. Each rank makes every world-th shard; rows of
    an earlier call stay, also where that was for fewer. BadInput if it holds others, or more."""
    folder, size, count = Path(folder), manifest["shard_size"], manifest["count"]
    fresh = not (folder / "manifest.json").exists()
    if fresh:
        claim(folder)
    ranks.barrier()  # every rank has looked before one writes
    if fresh and ranks.main:
        write_json(folder / "manifest.json", {**manifest, "complete": False})
    ranks.barrier()
    found = read_json(folder / "manifest.json", manifest["kind"], "count")
    check_same(found, manifest, folder)
    ranks.barrier()
    if found["count"] < count and ranks.main:
        write_json(folder / "manifest.json", {**manifest, "complete": False})
    ranks.barrier()  # before a row is added, nobody takes the folder for finished
    with tqdm(total=count, unit="", desc=manifest["kind"], disable=ranks.no_bar) as bar:
        for shard in range(ranks.rank, -(-count // size), ranks.world):
            complete(folder / SHARD.format(shard), shard_rows(shard, size, count), make)
            bar.update(min(ranks.world * size, count - bar.n))
    ranks.barrier()
    if ranks.main:
        write_json(folder / "manifest.json", {**manifest, "complete": True})
    ranks.barrier()


def check_same(found, manifest, folder):
    """Raises BadInput unless the manifest `found` is of these settings, and of no more rows."""
    differing = [k for k in manifest if k != "count" and found.get(k) != manifest[k]]
    said = "; ".join(f"{k}: {found.get(k)} there, {manifest[k]} now" for k in differing)
    require(set(differing) <= set(SPELLING),
            f"{folder} holds {found.get('kind')} of other settings ({said})")
    require(found["count"] <= manifest["count"],
            f"{folder} holds {found['count']} {manifest['kind']}, more than {manifest['count']}: "
            "for fewer choose another --out")


def complete(path, rows, make):
    """Make what the shard at `path` lacks of these rows: all, or after a smaller count the last."""
    there = rows_in(path)
    if there >= len(rows):
        return
    tensors = make(rows[there:])
    if there > 0:
        before = load_file(path)
        tensors = {name: torch.cat([before[name], x.cpu()]) for name, x in tensors.items()}
    write_tensors(path, tensors)


def to_device(x, device):
    """x there. The host goes on at once; from memory that is not pinned it would wait its turn."""
    if torch.device(device).type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


class Rows:
    """A finished collection, read row by row. Raises BadInput unless it is of `kind`, whole, and of this teacher."""
    def __init__(self, folder, kind, teacher, device="cpu"):
        self.folder, self.device, self.files = Path(folder), device, {}
        keys = ("count", "shard_size", "complete", "weights_sha256", "text_sha256", "model")
        m = read_json(self.folder / "manifest.json", kind, *keys)
        self.manifest = m
        require(m.get("kind") == kind, f"{folder} holds {m.get('kind')}, not {kind}")
        require(m["weights_sha256"] == teacher.weights_sha256, f"{folder} was made with {m['model']}, not with {teacher.name}")
        size, count = m["shard_size"], m["count"]
        expected = [len(shard_rows(shard, size, count)) for shard in range(-(-count // size))]
        found = [rows_in(self.folder / SHARD.format(shard)) for shard in range(len(expected))]
        require(m["complete"] and found == expected,
                f"{folder} is half-written or damaged: the command that made it will mend it")

    def __len__(self):
        return self.manifest["count"]

    def content(self):
        """What the rows are, wherever and however they are stored: a part of the manifest."""
        stored = (*SPELLING, "shard_size", "complete")
        return {k: v for k, v in self.manifest.items() if k not in stored}

    def __getitem__(self, rows):
        picked = []  # row numbers → {name: (len(rows), ...)}
        for shard, i in (divmod(row, self.manifest["shard_size"]) for row in rows):
            f = self.files[shard] = self.files.get(shard) or safe_open(self.folder / SHARD.format(shard), "pt")
            picked.append({name: f.get_slice(name)[i:i + 1] for name in f.keys()})
        joined = {name: torch.cat([p[name] for p in picked]) for name in picked[0]}
        # Whole numbers, a pair's prompt, stay here: a row to look up. The cache may be bf16.
        return {name: to_device(x, self.device).float() if x.is_floating_point() else x
                for name, x in joined.items()}


def read_prompts(path):
    """Lines of a plain UTF-8 text file, blank ones left out. Raises BadInput."""
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read prompts from {path}: {getattr(e, 'strerror', None) or 'it is not UTF-8 text'}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    require(prompts, f"{path} holds no prompts: one a line is expected")
    return prompts


class Prompts(Rows):
    """Cached conditioning: prompts[numbers] is {name: (B, ...)}."""
    def __init__(self, folder, teacher, device="cpu"):
        super().__init__(folder, "prompts", teacher, device)
        self.none = Rows(self.folder / "unconditional", "prompts", teacher, device)[[0]]

    def unconditional(self, batch_size):
        return {name: c.expand(batch_size, *c.shape[1:]) for name, c in self.none.items()}


def text_sha256(path, teacher):
    """Hash of the prompts' text, the same for a text file and a folder that `encode` made of it.
    Raises BadInput for one that cannot be used, before anything is written."""
    if Path(path).is_dir():
        return Prompts(path, teacher).manifest["text_sha256"]
    return hashlib.sha256("\n".join(read_prompts(path)).encode()).hexdigest()


def encode_prompts(teacher, path, folder, ranks, batch_size=32):
    """The Prompts of a text file `path`, encoded into `folder`; or of a folder `path` that `encode` made, used as it is."""
    if Path(path).is_dir():
        return Prompts(path, teacher, ranks.device)
    prompts, pipe = read_prompts(path), cache(lambda: teacher.text_pipeline(ranks.device, ranks.frozen_dtype))  # if needed at all
    manifest = {"kind": "prompts", "model": teacher.name, "weights_sha256": teacher.weights_sha256,
                "dtype": str(ranks.frozen_dtype), "text_sha256": text_sha256(path, teacher)}
    with torch.no_grad():
        collect(folder, {**manifest, "count": len(prompts), "shard_size": batch_size}, ranks,
                lambda rows: teacher.encode(pipe(), [prompts[i] for i in rows]))
        collect(Path(folder) / "unconditional", {**manifest, "count": 1, "shard_size": 1}, ranks,
                lambda rows: teacher.unconditional(pipe()))
    return Prompts(folder, teacher, ranks.device)


class Pairs(Rows):
    """ODE pairs and their prompts.

    Raises BadInput if they are of another model, or differ from what the user asked for.
    """

    def __init__(self, folder, teacher, device="cpu", resolution=None, frames=None, guidance=None):
        super().__init__(folder, "pairs", teacher, device)
        self.shape, made_with = tuple(self.manifest["shape"]), self.manifest["guidance"]
        wanted = teacher.latent_shape(resolution, frames) if resolution or frames else self.shape
        require(
            wanted == self.shape,
            f"{folder} holds latents of shape {self.shape}, "
            f"but --resolution and --frames ask for {wanted}",
        )
        require(
            guidance in (None, made_with),
            f"{folder} was made with guidance {made_with}, not {guidance}: it is in the pairs",
        )
        self.prompts = Prompts(self.folder / self.manifest["prompts"], teacher, device)

    def batch(self, numbers):
        """(x_T float32 (B, ...), x_0 float32 (B, ...), conditioning {name: (B, ...)})."""
        rows = self[numbers]
        return rows["x_T"], rows["x_0"], self.prompts[rows["prompt"].tolist()]


def collect_pairs(cfg, teacher, ranks):
    """Teacher samples with the noise they came from: x_T ~ N(0, I), x_0 by the PF-ODE with CFG. Pair i has prompt i mod n."""
    shape, guidance = teacher.latent_shape(cfg.resolution, cfg.frames), teacher.guidance if cfg.guidance is None else cfg.guidance
    out = Path(cfg.out).absolute()
    shards = [out / SHARD.format(shard) for shard in range(-(-cfg.count // cfg.shard_size))]
    new = max(0, cfg.count - sum(rows_in(shard) for shard in shards))
    gigabytes = new * 2 * 4 * float(np.prod(shape)) / 1e9
    free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free / 1e9
    if ranks.main:
        size = "x".join(map(str, shape))
        print(f"{cfg.count} pairs of {size} in {cfg.out}, {new} of them new: "
              f"{gigabytes:.3g} GB, {free:.3g} GB free", flush=True)
    require(gigabytes <= free, f"{new} new pairs do not fit in {cfg.out}")
    text = text_sha256(cfg.prompts, teacher)
    if not (out / "manifest.json").exists():
        claim(out)  # before prompts are encoded
    prompts = encode_prompts(teacher, cfg.prompts, f"{cfg.out.rstrip('/')}-prompts", ranks)
    manifest = {"kind": "pairs", "model": teacher.name, "weights_sha256": teacher.weights_sha256,
                "solver": "first-order PF-ODE: DDIM, or Euler on a flow", "steps": cfg.steps, "guidance": guidance, "seed": cfg.seed,
                "shape": list(shape), "dtype": "float32", "prompts": os.path.relpath(prompts.folder, out),
                "text_sha256": text, "count": cfg.count, "shard_size": cfg.shard_size}
    denoiser = cache(lambda: teacher.denoiser(ranks.device, ranks.frozen_dtype).requires_grad_(False))

    def make(rows):
        x_T, x_0, numbers = [], [], [i % len(prompts) for i in rows]
        for at in range(0, len(rows), cfg.batch_size):
            some = slice(at, at + cfg.batch_size)
            cond, uncond = prompts[numbers[some]], prompts.unconditional(len(rows[some]))
            x_T.append(Draw((cfg.seed, 0), rows[some], ranks.device).normal(shape))
            with torch.no_grad():
                x_0.append(teacher_sample(with_guidance(denoiser(), cond, uncond, guidance), teacher.schedule, x_T[-1], cfg.steps))
        return {"x_T": torch.cat(x_T), "x_0": torch.cat(x_0), "prompt": torch.tensor(numbers)}

    collect(cfg.out, manifest, ranks, make)


# --- A run's folder --------------------------------------------------------------------------------------------------
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
              "accumulate", "gradient_checkpointing", "offload")
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

    def finish(self, student, networks, shape):
        """Write pipeline/, the student (its average, if there is one) for stock diffusers, and say so."""
        for name, average in networks.get("ema", {}).items():
            networks["student"][name].data.copy_(average)
        export_pipeline(student, self.schedule, self.steps, shape, self.folder / "pipeline", write=self.ranks.main)
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


# --- Commands --------------------------------------------------------------------------------------------------------
@dataclass
class EncodeConfig:
    model: str = option("digits", "digits, sdxl, sd3, sd3.5-large, cogvideox-2b, cogvideox-5b, tiny-…, or a pipeline folder")
    random_init: bool = option(False, "random weights instead of the hub's, at full size, and noise for text embeddings")
    prompts: str = option(PROMPTS, "UTF-8 text file, one prompt a line")
    out: str = option("out/prompts", "folder to write")
    batch_size: int = option(32, "prompts encoded together, and stored in one shard")
    DIGITS: ClassVar = {"prompts": DIGITS_PROMPTS}


@dataclass
class PairsConfig:
    model: str = option("digits", "digits, sdxl, sd3, sd3.5-large, cogvideox-2b, cogvideox-5b, tiny-…, or a pipeline folder")
    random_init: bool = option(False, "random weights instead of the hub's, at full size, and noise for text embeddings")
    prompts: str = option(PROMPTS, "UTF-8 text file, one prompt a line, or a folder made by `encode`")
    out: str = option("out/pairs", "folder to write")
    count: int = option(64, "number of pairs; prompts are used again, with other noise, where it "
                            "is more than theirs; pairs that are in --out already stay")
    steps: int = option(50, "PF-ODE steps of the teacher")
    guidance: float | None = option(None, "CFG scale w in u + w (c - u); default: the stock pipeline's for the model")
    seed: int = option(0, "of the noise; pair i depends on seed and i alone")
    resolution: str | None = option(None, "pixels, 1024 or 480x720 (height x width); default: the model's own")
    frames: int | None = option(None, "video frames; default: the model's own")
    batch_size: int = option(8, "pairs sampled together on a rank")
    shard_size: int = option(32, "pairs in a file")
    DIGITS: ClassVar = {"prompts": DIGITS_PROMPTS, "count": 3000, "steps": 28, "guidance": 1.0, "batch_size": 100, "shard_size": 500}


def encode(cfg):
    at_least(1, cfg, "batch_size")
    encode_prompts(load_teacher(cfg.model, cfg.random_init), cfg.prompts, cfg.out, Ranks(), cfg.batch_size)


def pairs(cfg):
    at_least(1, cfg, "count", "steps", "batch_size", "shard_size")
    at_least(0, cfg, "seed", "guidance")
    teacher, ranks = load_teacher(cfg.model, cfg.random_init), Ranks()
    collect_pairs(cfg, teacher, ranks)


if __name__ == "__main__":
    commands = {"encode": (encode, EncodeConfig), "pairs": (pairs, PairsConfig)}
    name = (sys.argv[1:] or ["--help"])[0]
    if name not in commands:
        wrong = f"data.py: {name!r} is no command: there are encode and pairs"
        wrong += did_you_mean(name, commands)
        print(__doc__ if name in ("-h", "--help") else wrong, file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    run(*commands[name], sys.argv[2:], prog=f"data.py {name}", description=__doc__)
