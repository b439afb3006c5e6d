"""A real teacher in the box: a latent diffusion model of scikit-learn's handwritten digits, its measure and its experiment.

    python toy/digits.py train && python toy/digits.py samples      # toy/digits-teacher/ and its samples anew, seeded: minutes
    python toy/digits.py eval out/adp out/adm --out out/eval        # table and picture of any number of runs, beside the teacher
    python toy/digits.py diagnose out/adp                           # what D learns of a student that rests
    python toy/digits.py steps out/adm                              # what each step of a student makes
    python toy/digits.py noises out/adp out/adm                     # how much the measure owes to one set of noises
    python toy/digits.py speeds && python toy/digits.py search && python toy/digits.py experiment && python toy/digits.py ablations
    python toy/digits.py readme && python toy/digits.py picture     # the README's tables and pictures: hours

Images are the 1,797 scans of 8x8 pixels that scikit-learn carries (UCI Optical Recognition of Handwritten Digits, E. Alpaydin and
C. Kaynak, CC BY 4.0); 300 of them are held out of all training.
"""

import argparse
import csv
import hashlib
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import adm
import adp
import data
from families import load_teacher, tiny
from models import LatentDiscriminator, load_denoiser, make_roles
from ode import Draw, T, student_sample, teacher_sample, with_guidance
from runtime.files import claim, file_sha256, read_json, write_json
from runtime.folder import starting_point
from runtime.script import quiet, run
from runtime.settings import BadInput, require

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

TEACHER, RESULTS = Path(__file__).with_name("digits-teacher"), Path(__file__).with_name("results")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = (*(f"a handwritten {name}" for name in NAMES), "a handwritten digit")


@cache
def scans():
    """((1497, 3, 8, 8) float32 in [−1, 1], (1497,) labels) to train on, and as much of the 300 held out: 30 of each digit."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, 8, 8) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held = torch.cat([order[labels[order] == digit][:30] for digit in range(10)])
    rest = order[~torch.isin(order, held)]
    return (images[rest], labels[rest]), (images[held], labels[held])


# --- The teacher -----------------------------------------------------------------------------------------------------

def autoencoder(images, iterations=1200, batch_size=64):
    """AutoencoderKL of 8x8 pixels ↔ one 8x8 latent, trained on L2 and a small KL; its latents are scaled to mean 0 and std 1."""
    vae = AutoencoderKL(block_out_channels=(16,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
                        layers_per_block=1, norm_num_groups=4, latent_channels=1, sample_size=8, mid_block_add_attention=False,
                        use_quant_conv=False, use_post_quant_conv=False)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in tqdm(range(iterations), "VAE", disable=None):
        x = images[torch.randint(len(images), (batch_size,))]  # (B, 3, 8, 8)
        posterior = vae.encode(x).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, x) + 1e-4 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    return vae.eval().requires_grad_(False)


def embed(pipe, prompts, length=None):
    """Conditioning of n prompts: {"prompt_embeds": (n, L, 32), "pooled": (n, 32)}; length: T5's tokens, default its tokenizer's."""
    length = length or pipe.tokenizer_3.model_max_length
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), None, None, device="cpu", max_sequence_length=length,
                                              do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled": pooled}


def train(seed=0, iterations=4000, batch_size=64, rate=2e-3):
    """Make toy/digits-teacher/: VAE, then an SD3 transformer by rectified flow in its latents, then an ordinary pipeline folder."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    (images, labels), _ = scans()
    vae = autoencoder(images)
    latents = (vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor  # (1497, 1, 8, 8)
    words = ("a", "handwritten", *NAMES, "digit")
    clip = tiny.clip_tokenizer(words, max_length=5)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=4, attention_head_dim=20, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=80, pooled_projection_dim=32, pos_embed_max_size=4)
    def text():  # twice the usual initial weights: else random encoders give digits embeddings that hardly differ
        return tiny.clip_text(vocab_size=len(clip), initializer_factor=2.0)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae,
        text_encoder=text(), tokenizer=clip, text_encoder_2=text(), tokenizer_2=clip, text_encoder_3=tiny.t5(),
        tokenizer_3=tiny.t5_tokenizer(4, words))
    pipe.text_encoder.requires_grad_(False), pipe.text_encoder_2.requires_grad_(False), pipe.text_encoder_3.requires_grad_(False)
    short, long = (embed(pipe, (*PROMPTS, ""), length) for length in (None, 256))
    for module in transformer.modules():  # as DiT: blocks begin as the identity, the output as zero
        for name in ("norm1", "norm1_context"):
            if hasattr(module, name):
                torch.nn.init.zeros_(getattr(module, name).linear.weight)
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)

    optimizer = torch.optim.AdamW(transformer.parameters(), rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    averaged = torch.optim.swa_utils.AveragedModel(transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    for iteration in tqdm(range(iterations), "transformer", disable=None):
        rows = torch.randint(len(images), (batch_size,))
        u = torch.rand(batch_size)
        number = torch.where(u < 0.1, 11, torch.where(u < 0.3, 10, labels[rows]))  # 10% empty, 20% "a handwritten digit"
        t = torch.sigmoid(torch.randn(batch_size))  # (B,) as SD3's training times
        x_0, eps = latents[rows], torch.randn(batch_size, 1, 8, 8)
        x_t = (1 - t).view(-1, 1, 1, 1) * x_0 + t.view(-1, 1, 1, 1) * eps
        # One batch in 25 has the 256 tokens of T5 that the stock pipeline pads to when it is not told otherwise.
        cond, few = (long, slice(0, batch_size // 4)) if iteration % 25 == 0 else (short, slice(None))
        v = transformer(hidden_states=x_t[few], timestep=1000 * t[few], encoder_hidden_states=cond["prompt_embeds"][number[few]],
                        pooled_projections=cond["pooled"][number[few]], return_dict=False)[0]
        loss = F.mse_loss(v, (eps - x_0)[few])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        decay.step()
        averaged.update_parameters(transformer)
    transformer.load_state_dict(averaged.module.state_dict())
    pipe.save_pretrained(TEACHER)
    print(f"{TEACHER}: {(time.perf_counter() - began) / 60:.1f} minutes, loss of the last batch {loss.item():.3f}")


# --- The measure -----------------------------------------------------------------------------------------------------
# Images are (N, 64) float64 in pixel units of 0 to 16. Distances are taken in the first 30 principal components of the training scans.
METRICS = ("fd_teacher", "fd_real", "coverage", "density", "precision", "diversity", "class_tv", "accuracy")
LABELS = np.arange(600) % 10  # of the samples: 600 with the class prompts, then 600 with "a handwritten digit"
NUMBERS = [*LABELS.tolist(), *[10] * 600]  # among PROMPTS


def pixels(images):
    """(N, 3, 8, 8) in [−1, 1] → (N, 64), as a picture of 8 bits would have it."""
    return (images.clamp(-1, 1).add(1).mul(127.5).round().double().mean(1).flatten(1) / 255 * 16).numpy()


@cache
def features():
    """(the principal components, a classifier), scikit-learn's, fitted to the training scans."""
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC
    (images, labels), _ = scans()
    return PCA(30).fit(pixels(images)), SVC(gamma=0.001, C=10).fit(pixels(images), labels.numpy())


def frechet(x, y):
    """Fréchet distance of the Gaussians fitted to (N, D) and (M, D): |μ − μ'|² + tr(C + C' − 2 (C C')^½)."""
    a, b = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * roots.sum())


def neighbourhoods(real, fake, k=5):
    """Of (N, D), (M, D), by balls to the k-th neighbour: coverage and density (Naeem et al. 2020), precision (Kynkäänniemi et al. 2019)."""
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    radius = torch.cdist(real, real).kthvalue(k + 1).values  # (N,), the nearest being the point itself
    inside = torch.cdist(fake, real) < radius  # (M, N)
    return inside.any(0).double().mean().item(), inside.sum(1).double().mean().item() / k, inside.any(1).double().mean().item()


def spread(x, labels):
    """Mean distance between two samples (N, D) of the same class, averaged over the classes."""
    return float(np.mean([torch.pdist(torch.as_tensor(x[labels == label])).mean() for label in np.unique(labels)]))


def histogram(x):
    """(10,) shares of the digits among images, by the classifier."""
    return np.bincount(features()[1].predict(x), minlength=10) / len(x)


def measure(x, labels, teacher, unprompted=None):
    """{metric: float} of images `x` (N, 64), N a multiple of 300, drawn with the class prompts `labels` (N,), against the 300 scans held
    out and against `teacher`, as many images as NUMBERS; class_tv from `unprompted` (M, 64), drawn with "a handwritten digit".

    Coverage, density and precision are means over blocks of 300 samples, since they depend on the number.
    """
    pca, classifier = features()
    real, real_labels = pixels(scans()[1][0]), scans()[1][1].numpy()
    z, z_real = pca.transform(x), pca.transform(real)
    both = x if unprompted is None else np.concatenate([x, unprompted])  # (N + M, 64): the more, the lower the distance's bias
    blocks = [neighbourhoods(z_real, block) for block in np.split(z, len(z) // len(z_real))]
    coverage, density, precision = np.mean(blocks, 0).tolist()
    shift = None if unprompted is None else histogram(unprompted) - histogram(teacher[len(LABELS):])
    return {"fd_teacher": frechet(pca.transform(both), pca.transform(teacher[:len(both)])), "fd_real": frechet(z, z_real),
            "coverage": coverage, "density": density, "precision": precision, "diversity": spread(z, labels) / spread(z_real, real_labels),
            "class_tv": None if shift is None else float(np.abs(shift).sum() / 2),
            "accuracy": float((classifier.predict(x) == labels).mean())}


def judge(x, teacher):
    """`measure` of images x (1200, 64) of NUMBERS, against the teacher's reference of the same."""
    return measure(x[:len(LABELS)], LABELS, teacher["reference"], x[len(LABELS):])


@torch.no_grad()
def sample(family, denoiser, schedule, steps, key, numbers, guidance=None, batch_size=100, upto=None):
    """Images (N, 64) of PROMPTS[numbers], from noises that depend on `key` alone: by the student's sampler (what its step number
    `upto` makes of them, by default the last), or with `guidance` by the teacher's PF-ODE."""
    (cond, vae), images = opened(family), []
    times = schedule.timesteps(steps)[:-1][:upto]
    for at in tqdm(range(0, len(numbers), batch_size), f"{steps} steps", disable=None, leave=False):
        some = numbers[at:at + batch_size]
        draw = Draw((key, 4), range(at, at + len(some)))
        here, none = ({name: c[rows] for name, c in cond.items()} for rows in (some, [len(PROMPTS)] * len(some)))
        x_T = draw.normal(family.latent_shape())
        if guidance is None:
            z = student_sample(lambda x, t: denoiser(x, t, here)[0], schedule, x_T, times, lambda: draw.normal(family.latent_shape()))
        else:
            z = teacher_sample(with_guidance(denoiser, here, none, guidance), schedule, x_T, steps)
        images.append(family.decode(vae, z))
    return pixels(torch.cat(images))


@cache
def opened(family):
    """(conditioning {name: (12, ...)} of PROMPTS and then of the empty prompt, the VAE): read once, not while a sample is timed."""
    with torch.no_grad():
        return family.encode(family.text_pipeline(), [*PROMPTS, ""]), family.vae()


def open_run(folder, family):
    """(denoiser, its Schedule, number of steps) of an adp.py or adm.py run."""
    schedule, pipeline = starting_point(str(folder), family, 0)
    return load_denoiser(family, folder=pipeline), schedule, len(read_json(Path(folder) / "config.json", "run", "student")["student"]["times"])


# --- eval ------------------------------------------------------------------------------------------------------------
GUIDANCE = 1.0  # the CFG scale that is distilled: the default of data.py, adp.py and adm.py for this teacher
SAMPLES = RESULTS / "digits-teacher.safetensors"  # of the teacher, which cost minutes
KINDS = {  # {name: (key of the noises, steps, CFG scale)}; students are drawn from the noises of key 0
    "reference": (1, 28, GUIDANCE), "teacher, 1 step": (0, 1, GUIDANCE), "teacher, 1 step, CFG 2": (0, 1, 2.0),
    "teacher, 28 steps": (0, 28, GUIDANCE), "teacher, 28 steps, CFG 2": (0, 28, 2.0)}


def teacher_samples(family):
    """{name: (1200, 64)} of NUMBERS, from the file that `samples` makes. Raises BadInput if it belongs to another teacher."""
    with safe_open(SAMPLES, "pt") as f:
        require(f.metadata() == {"weights_sha256": family.weights_sha256},
                f"{SAMPLES} belongs to another teacher: make it anew with `python toy/digits.py samples`")
        return {name: f.get_tensor(name).double().numpy() for name in KINDS}


def samples():
    """Write the teacher's samples by which students are measured: 28 steps, and by the same noises as theirs at two CFG scales."""
    family = load_teacher("digits")
    denoiser = load_denoiser(family)
    made = {name: sample(family, denoiser, family.schedule, steps, key, NUMBERS, w) for name, (key, steps, w) in KINDS.items()}
    save_file({name: torch.tensor(x, dtype=torch.float16) for name, x in made.items()}, SAMPLES,
              {"weights_sha256": family.weights_sha256})
    describe()


def fingerprint():
    """One SHA-256 of all files of toy/digits-teacher/ but its README."""
    files = [f for f in sorted(TEACHER.rglob("*")) if f.is_file() and f.name != "README.md"]
    return hashlib.sha256("".join(f"{f.relative_to(TEACHER)} {file_sha256(f)}\n" for f in files).encode()).hexdigest()


def describe():
    """Write toy/digits-teacher/README.md, with the folder's fingerprint and the teacher's metrics."""
    teacher = teacher_samples(load_teacher("digits"))
    rows = {name: judge(x, teacher) for name, x in teacher.items() if name != "reference"}
    (TEACHER / "README.md").write_text(ABOUT.format(sha256=fingerprint(), table="\n".join(table(rows))))


def table(rows):
    """Lines of a Markdown table of {name: {column: number or None}}."""
    lines = ["| | " + " | ".join(next(iter(rows.values()))) + " |", "| --- " * (len(next(iter(rows.values()))) + 1) + "|"]
    for name, row in rows.items():
        cells = ("–" if v is None else str(v) if isinstance(v, int) else f"{v:.3g}" for v in row.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


ABOUT = """# A latent diffusion model of handwritten digits

An ordinary `StableDiffusion3Pipeline` of 0.9 million parameters: VAE (8x8 pixels, one latent channel), SD3 transformer (4 blocks, width
80), frozen text encoders of random weights. Made by

    python toy/digits.py train && python toy/digits.py samples

with seed 0: 4,000 iterations of batch 64, 7.1 minutes by the clock on one thread (`OMP_NUM_THREADS=1`, AMD EPYC). Same machine, same
thread count: the same weights, as a second run from a fresh clone showed, file by file.

SHA-256 of the folder's other files, as `fingerprint()` in toy/digits.py has it: `{sha256}`

    pipe = diffusers.DiffusionPipeline.from_pretrained("toy/digits-teacher")
    image = pipe("a handwritten three", num_inference_steps=28, guidance_scale=2.0, height=8, width=8, max_sequence_length=4).images[0]

Prompts: "a handwritten zero" to "a handwritten nine", "a handwritten digit", and the empty one. `max_sequence_length=4` is how many
T5 tokens it was mostly trained with; the pipeline's default of 256 was seen in one batch of 25 and works too.

{table}

Against held-out scans and against other samples of the teacher (28 steps, no CFG): see `measure` in toy/digits.py.

Data: the 1,797 scans in scikit-learn, from the UCI machine learning repository's *Optical Recognition of Handwritten Digits*
(E. Alpaydin, C. Kaynak, 1998, doi 10.24432/C50P49), CC BY 4.0; 300 of them were held out.
"""


def evaluate(runs, out):
    """Table (printed, and as table.md and table.json) and picture (samples.png) of runs of adp.py or adm.py in the folder `out`."""
    family = load_teacher("digits")
    teacher, students = teacher_samples(family), {str(run): open_run(run, family) for run in runs}
    claim(Path(out))
    opened(family)
    images, labels = scans()[0]
    some = np.concatenate([np.flatnonzero(labels == digit)[:60] for digit in range(10)]).reshape(10, 60).T.flatten()
    rows = {"scans of the training set": {**measure(pixels(images[some]), LABELS, teacher["reference"]), "nfe": None, "ms": None}}
    shown, denoiser = {"held-out scans": some_scans()}, load_denoiser(family)
    drawn = {name: (denoiser, family.schedule, steps, w) for name, (_, steps, w) in KINDS.items() if name != "reference"}
    drawn |= {name: (*network, None) for name, network in students.items()}
    for name, (network, schedule, steps, w) in drawn.items():
        x = teacher[name] if name in teacher else sample(family, network, schedule, steps, 0, NUMBERS)
        began = time.perf_counter()
        sample(family, network, schedule, steps, 0, NUMBERS[:100], w)
        ms = 1000 * (time.perf_counter() - began) / 100
        rows[name] = {**judge(x, teacher), "nfe": steps * (2 if w not in (None, 1) else 1), "ms": ms}
        shown[name] = x[:20]
    lines = table(rows)
    print("\n".join(lines))
    (Path(out) / "table.md").write_text("\n".join(lines) + "\n")
    write_json(Path(out) / "table.json", rows)
    sheet(shown, Path(out) / "samples.png")


def some_scans():
    """(20, 64): two held-out scans of each digit, in the order of LABELS."""
    images, labels = scans()[1]
    return pixels(images)[np.argsort(labels.numpy(), kind="stable").reshape(10, 30)[:, :2].T.flatten()]


def sheet(rows, path):
    """A picture with one row of images for each {label: (N, 64)}, the same prompts and noises in the same columns."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(11, 0.62 * len(rows)), squeeze=False)
    for axis, (label, x) in zip(axes[:, 0], rows.items()):
        axis.imshow(np.concatenate(list(np.pad(x.reshape(-1, 8, 8), ((0, 0), (0, 0), (0, 1)))), 1), cmap="gray_r", vmin=0, vmax=16)
        axis.set_xticks([]), axis.set_yticks([])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)



# --- The experiment --------------------------------------------------------------------------------------------------
# Every method has SECONDS of iterations on one thread; in adp+… a tenth of them are ADP's. The learning rate of its student is the
# best of RATES by Fréchet distance to the teacher's samples, tried on another seed for 0.3 of the time (the start that adp+… have
# from ADP is whole there). The recipe was chosen on further seeds, from 10 on.
HOME = Path("out/digits")
SECONDS, RATES, SEEDS, SEARCH_SEED = 240, (3e-6, 1e-5, 3e-5, 1e-4), (0, 1, 2), 100
ADP_FIRST = "adp.py --ema 0"  # so short that an average would still be its start
METHODS = {"mse": "adp.py --loss mse", "adp": "adp.py", "dmd": "adm.py --loss dmd --student-steps 1", "adm": "adm.py --student-steps 1",
           "adp+dmd": "adm.py --loss dmd --student-steps 1", "adp+adm": "adm.py --student-steps 1",
           "dmd, 4 steps": "adm.py --loss dmd --student-steps 4", "adm, 4 steps": "adm.py --student-steps 4"}
ABLATIONS = (  # method, flags that differ, and the rate if that differs
    ("adm, 4 steps", "--fake-samples each", None), ("dmd, 4 steps", "--fake-samples each", None), ("adp+adm", "--ema 0", None),
    ("adp+adm", "--ema 0", 1e-5), ("adp+adm", "", 1e-5))
STAGE_2 = {"one step, from ADP": ("adp+adm", "adp+dmd"), "one step, from the teacher": ("adm", "dmd"),
           "four steps, from the teacher": ("adm, 4 steps", "dmd, 4 steps")}


def execute(line):
    """Run this command line of adp.py or adm.py in this process, unless that has been done. Returns (its folder, its log's rows)."""
    _, script, *argv = line.split()
    out = Path(argv[-1])
    if not (out / "pipeline").exists():
        shutil.rmtree(out, ignore_errors=True)  # broken off
        module = {"adp.py": adp, "adm.py": adm}[script]
        run(module.main, module.Config, argv, prog=script)
    return out, read_log(out)


def line(flags, out, seed, iterations, rate=None, init=None):
    """The command line of a run, which keeps eight checkpoints."""
    more = f" --pairs {HOME}/pairs --mse-iterations {iterations * 3 // 4}" if "adp.py" in flags else ""
    more += f" --lr-{'mse' if 'mse' in flags else 'student'} {rate:g}" if rate else ""
    more += f" --init {init}" if init else ""
    more += f" --checkpoint-every {-(-iterations // 8)} --keep-checkpoints 8 --sample-every 0"
    return f"python {flags} --iterations {iterations} --seed {seed}{more} --out {HOME / out}"


def trial(method, seed, rate, plan, share=1.0, more=""):
    """One run of a method in SECONDS, of which its last stage has this share, measured: a row of digits.json. plan: what `speeds`
    and `search` found; more: flags of that stage that differ."""
    flags, seconds, init, todo = METHODS[method], SECONDS, None, []
    if method.startswith("adp+"):
        init, seconds = HOME / f"adp-first-{seed}", 0.9 * SECONDS
        todo.append(line(ADP_FIRST, init.name, seed, round(SECONDS / 10 / plan["seconds"]["adp.py"]), plan["rates"]["adp"]))
    out = "-".join(f"{method} {seed} {rate:g} {share:g} {more}".replace(",", "").split())
    todo.append(line(f"{flags} {more}".strip(), out, seed, round(seconds * share / plan["seconds"][flags]), rate, init))
    done = [execute(each) for each in todo]
    family = load_teacher("digits")
    x = sample(family, *open_run(done[-1][0], family), 0, NUMBERS)
    rows = [row for _, log in done for row in log]
    return {"method": method, "seed": seed, **judge(x, teacher_samples(family)),
            "seconds": round(sum(float(row["seconds"]) for row in rows), 1), "iterations": len(rows), "rate": rate,
            "command": " && ".join(todo)}


def curve(row):
    """[[iteration, fd_teacher, coverage], …] of a trial's last run: at its start and at its checkpoints, the last of which is its end;
    of the average of the student's weights, where there is one."""
    family, run_folder = load_teacher("digits"), Path(row["command"].split()[-1])
    teacher, (network, schedule, steps) = teacher_samples(family), open_run(run_folder, family)
    init = read_json(run_folder / "config.json", "run", "config")["config"]["init"]

    def point(iteration, denoiser):
        now = judge(sample(family, denoiser, schedule, steps, 0, NUMBERS), teacher)
        return [iteration, now["fd_teacher"], now["coverage"]]
    points = [point(0, load_denoiser(family) if init == "teacher" else open_run(init, family)[0])]
    for checkpoint in sorted((run_folder / "checkpoints").iterdir()):
        average = checkpoint / "ema.safetensors"
        read_weights(network.own_parameters(), average if average.exists() else checkpoint / "student.safetensors")
        points.append(point(int(checkpoint.name), network))
    return points


def read_weights(parameters, file):
    """Fill {name: parameter} from a checkpoint's file."""
    saved = load_file(file)
    for name, p in parameters.items():
        p.data.copy_(saved[f"weight/{name}"])


def read_log(run_folder):
    """The rows of a run's log.csv."""
    with open(run_folder / "log.csv") as f:
        return list(csv.DictReader(f))


def speeds():
    """results/digits-search.json: seconds an iteration of each kind, one kind after the other; and the pairs, if there are none."""
    if not (HOME / "pairs").exists():
        run(data.pairs, data.PairsConfig, ["--out", f"{HOME}/pairs"], prog="data.py pairs")
    plan = {"seconds": {}, "trials": [], "rates": {}}
    for flags in dict.fromkeys(METHODS.values()):
        _, log = execute(line(flags, f"speed-{len(plan['seconds'])}", SEARCH_SEED, 40))
        taken = [float(row["seconds"]) for row in log]
        early, late = np.median(taken[10:30]), np.median(taken[30:])  # ADP's regression, three quarters of it, and its adversaries
        plan["seconds"][flags] = float(0.75 * early + 0.25 * late)
    write_json(RESULTS / "digits-search.json", plan)


def search(*methods):
    """Adds to results/digits-search.json the best rate of these methods (default: all): from 1e-5 down RATES, or else up, as long as
    it gets better."""
    for method in methods or METHODS:
        plan, trials = read_json(RESULTS / "digits-search.json", "speeds", "seconds"), {}

        def distance(i):
            trials[i] = trial(method, SEARCH_SEED, RATES[i], plan, 0.3)
            return trials[i]["fd_teacher"]
        start = RATES.index(1e-5)
        best = distance(start)
        for way in (range(start - 1, -1, -1), range(start + 1, len(RATES))):
            for i in way:
                if distance(i) > best:
                    break
                best = trials[i]["fd_teacher"]
            if best < trials[start]["fd_teacher"]:
                break
        plan = read_json(RESULTS / "digits-search.json", "speeds", "seconds")  # two searches may go side by side
        plan["trials"] += trials.values()
        plan["rates"][method] = min(trials.values(), key=lambda row: row["fd_teacher"])["rate"]
        write_json(RESULTS / "digits-search.json", plan)


def experiment(*seeds):
    """results/digits.json: every method with these seeds (default: all), beside what is there of others."""
    for seed in [int(seed) for seed in seeds] or SEEDS:
        for method in METHODS:
            keep(method, seed, RESULTS / "digits.json")


def ablations(*seeds):
    """results/digits-ablations.json: each of ABLATIONS likewise."""
    for seed in [int(seed) for seed in seeds] or SEEDS:
        for method, more, rate in ABLATIONS:
            keep(method, seed, RESULTS / "digits-ablations.json", more, rate)


def keep(method, seed, path, more="", rate=None):
    """Run a trial in full, at its method's rate unless another is given, and put its row into the json file, in the place of one like it."""
    plan = read_json(RESULTS / "digits-search.json", "search", "rates")
    row = trial(method, seed, rate or plan["rates"][method], plan, more=more) | {"flags": more}
    row["curve"] = curve(row)

    def kind(row):
        return row["method"], row["seed"], row["flags"], row["rate"]
    runs = read_json(path, "results", "runs")["runs"] if path.exists() else []
    write_json(path, {"runs": [r for r in runs if kind(r) != kind(row)] + [row]})


# --- The diagnosis ---------------------------------------------------------------------------------------------------
VARIANTS = {  # of adm.py's flags, beside the recipe's
    "paper: Δt = T/64, no damping": "--dt 0.015625 --damping 0", "the same, β1 = 0": "--dt 0.015625 --damping 0 --beta1 0",
    "the same, heads' rate 1e-3": "--dt 0.015625 --damping 0 --lr-heads 1e-3", "Δt = T/64": "--dt 0.015625",
    "Δt = T/4, no damping": "--damping 0", "recipe: Δt = T/4": "", "Δt = T/2": "--dt 0.5"}


def diagnose(init, iterations=200):
    """What the heads have learnt of a student that rests (adm.py in its warm-up throughout), for each of VARIANTS: the margin
    E[D(x_real) − D(x_fake)], D's accuracy, and the cosine of its gradient in x̂_0 with the score difference that DMD reads off."""
    family, rows = load_teacher("digits"), {}
    for name, flags in VARIANTS.items():
        out = f"{HOME}/diagnosis-{len(rows)}"
        run_folder, _ = execute(f"python adm.py --init {init} --student-steps 1 --iterations {iterations} --warmup {iterations} {flags} "
                                f"--checkpoint-every {iterations} --sample-every 0 --out {out}")
        rows[name] = alignment(run_folder, family, SimpleNamespace(**read_json(run_folder / "config.json", "run", "config")["config"]))
    print("\n".join(table(rows)))
    write_json(RESULTS / "digits-diagnosis.json", {"init": str(init), "iterations": iterations, "variants": rows})


def alignment(folder, family, cfg, batch_size=200):
    """{margin, accuracy, cosine} of a finished run's heads, on samples of its student."""
    schedule, pipeline = starting_point(cfg.init, family, 0)
    teacher, student, fake = make_roles(family, ("student", "fake"))
    student.load(pipeline)
    discriminator = LatentDiscriminator(teacher, cfg.head_width)
    newest = max((folder / "checkpoints").iterdir())
    read_weights(fake.own_parameters(), newest / "fake.safetensors")
    read_weights(dict(discriminator.heads.named_parameters()), newest / "heads.safetensors")
    draw = Draw((cfg.seed, 5), range(batch_size))
    cond = {name: c[draw.integers(len(PROMPTS))] for name, c in opened(family)[0].items()}
    x_T, line = draw.normal(family.latent_shape()), family.schedule
    with torch.no_grad():
        x0_hat = student_sample(lambda x, t: student(x, t, cond)[0], schedule, x_T, schedule.timesteps(1)[:-1], None)
        t = draw.uniform((cfg.t_min + cfg.dt) * T, cfg.t_max * T)  # (B,)
        s, x_t = t - cfg.dt * T, line.add_noise(x0_hat, draw.normal(family.latent_shape()), t)
        out_real, out_fake = teacher(x_t, t, cond)[0], fake(x_t, t, cond)[0]
        x_real, x_fake = (line.pf_ode_step(x_t, out, t, s) for out in (out_real, out_fake))
        difference = line.to_x0_eps(x_t, out_real, t)[0] - line.to_x0_eps(x_t, out_fake, t)[0]
        real = discriminator.logits(discriminator.features(x_real, s, cond))  # (B,)
    x_fake.requires_grad_()  # its gradient is x̂_0's up to a factor, as straight-through has it
    logits = discriminator.logits(discriminator.features(x_fake, s, cond))
    gradient, = torch.autograd.grad(logits.sum(), x_fake)
    return {"margin": (real - logits).mean().item(), "accuracy": ((real > 0).float() + (logits < 0).float()).mean().item() / 2,
            "cosine": F.cosine_similarity(gradient.flatten(1), difference.flatten(1)).mean().item()}


def readme():
    """Prints the README's tables of results/digits.json: mean and range over seeds, after the teacher's own rows; then where ADM and
    DMD started and where each ended, seed by seed."""
    runs, names = read_json(RESULTS / "digits.json", "results", "runs")["runs"], METRICS[:-1]
    print("| method | " + " | ".join(names) + " | iterations |\n" + "| --- " * (len(names) + 2) + "|")
    teacher = teacher_samples(load_teacher("digits"))
    for name in ("teacher, 28 steps", "teacher, 1 step"):
        row = judge(teacher[name], teacher)
        print(f"| {name} | " + " | ".join(f"{row[n]:.3g}" for n in names) + " | |")
    for method in METHODS:
        mine = [r for r in runs if r["method"] == method]
        cells = [[r[name] for r in mine] for name in names]
        print(f"| {method} | " + " | ".join(f"{np.mean(c):.3g} ({min(c):.3g}–{max(c):.3g})" for c in cells)
              + f" | {mine[0]['iterations']} |")
    print("\n| fd_teacher; coverage, of each seed | start | ADM | DMD |\n" + "| --- " * 4 + "|")
    for title, methods in STAGE_2.items():
        both = [[r["curve"] for r in sorted(runs, key=lambda r: r["seed"]) if r["method"] == method] for method in methods]
        points = [[each[0] for each in both[0]], *([each[-1] for each in one] for one in both)]
        cells = [f"{', '.join(f'{p[1]:.1f}' for p in some)}; {', '.join(f'{p[2]:.3f}' for p in some)}" for some in points]
        print(f"| {title} | {' | '.join(cells)} |")


def picture():
    """results/digits.png: held-out scans, the teacher, and the experiment's students of seed 0; results/digits-curves.png."""
    family = load_teacher("digits")
    teacher = teacher_samples(family)
    runs = read_json(RESULTS / "digits.json", "results", "runs")["runs"]
    rows = {"held-out scans": some_scans(), **{name: teacher[name][:20] for name in ("teacher, 28 steps", "teacher, 1 step")}}
    for row in sorted(runs, key=lambda row: list(METHODS).index(row["method"])):
        if row["seed"] == 0:
            rows[row["method"]] = sample(family, *open_run(row["command"].split()[-1], family), 0, NUMBERS[:20])
    sheet(rows, RESULTS / "digits.png")
    curves(runs, judge(teacher["teacher, 28 steps"], teacher))


def curves(runs, teacher):
    """results/digits-curves.png: fd_teacher and coverage along stage 2, one line a seed, dashed what the teacher's own samples have."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 5), sharex=True, sharey="row")
    for column, (title, methods) in zip(axes.T, STAGE_2.items()):
        for run in runs:
            if run["method"] in methods:
                iterations, *measured = np.array(run["curve"]).T  # (n,), [(n,), (n,)]
                first = run["seed"] == min(r["seed"] for r in runs if r["method"] == run["method"])
                for axis, values in zip(column, measured):
                    axis.plot(iterations / iterations[-1], values, color=("C3", "C0")[methods.index(run["method"])], lw=1.2, marker=".",
                              ms=4, label=run["method"] if first else None)
        for axis, name in zip(column, ("fd_teacher", "coverage")):
            axis.axhline(teacher[name], color="black", lw=0.8, ls="--", label="teacher, 28 steps")
        column[0].set_title(title, fontsize=10), column[0].set_yscale("log"), column[0].legend(fontsize=8)
        column[1].set_xlabel("share of the stage's iterations")
    axes[0, 0].set_ylabel("fd_teacher (less is nearer)"), axes[1, 0].set_ylabel("coverage")
    figure.savefig(RESULTS / "digits-curves.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def steps_apart(run_folder):
    """Prints what each step of a run's student makes, measured as if it were the last: one f_ψ for all steps learns their mixture."""
    family = load_teacher("digits")
    teacher, student = teacher_samples(family), open_run(run_folder, family)
    steps = student[-1]
    print("\n".join(table({f"step {k} of {steps}": judge(sample(family, *student, 0, NUMBERS, upto=k), teacher) for k in range(1, steps + 1)})))


def noises(*runs):
    """Prints fd_teacher and coverage of runs on five sets of noises, mean ± standard deviation: how far the one set of `eval` goes."""
    family = load_teacher("digits")
    teacher = teacher_samples(family)
    for run_folder in runs:
        student = open_run(run_folder, family)
        rows = [judge(sample(family, *student, key, NUMBERS), teacher) for key in (0, 2, 3, 4, 5)]  # 1 is the reference's
        cells = (f"{name} {np.mean([r[name] for r in rows]):.4g} ± {np.std([r[name] for r in rows], ddof=1):.2g}"
                 for name in ("fd_teacher", "coverage"))
        print(run_folder, *cells, sep="   ")


COMMANDS = {"train": train, "samples": samples, "eval": evaluate, "diagnose": diagnose, "steps": steps_apart, "noises": noises,
            "speeds": speeds, "search": search, "experiment": experiment, "ablations": ablations, "readme": readme, "picture": picture}


def main(name="--help", *arguments):
    if name in ("-h", "--help"):
        return print(__doc__)
    require(name in COMMANDS, f"{name!r} is no command: there are {', '.join(COMMANDS)}")
    if name == "eval":
        parser = argparse.ArgumentParser(prog="digits.py eval")
        parser.error = lambda message: require(False, message)
        parser.add_argument("runs", nargs="*")
        parser.add_argument("--out", default="out/digits-eval")
        return evaluate(**vars(parser.parse_args(arguments)))
    COMMANDS[name](*arguments)


if __name__ == "__main__":
    quiet()
    try:
        main(*sys.argv[1:])
    except BadInput as e:
        print(f"digits.py: {e}", file=sys.stderr)
        sys.exit(2)
