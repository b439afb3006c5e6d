"""Images by the digits teacher and by its students, and the teacher's that all are measured by."""

from functools import cache, partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from families import load_teacher
from models import load_denoiser
from ode import Draw, student_sample, teacher_sample, with_guidance
from runtime.files import read_json
from runtime.folder import starting_point
from runtime.settings import require
from toy.claims import markdown
from toy.digits_measure import LABELS, NUMBERS, look, measure, shares
from toy.digits_teacher import ANY_DIGIT, NAMES, PROMPTS, write_readme

RESULTS = Path(__file__).with_name("results")

STAGE = 4  # of the noises' keys: other random numbers than in training
GUIDANCE = 2.0  # CFG that is distilled: the default of data.py, adp.py and adm.py for this teacher
SAMPLES = RESULTS / "digits-teacher.safetensors"  # what the CLIP sees of the teacher's: minutes
REFERENCE = "reference"
# {name: (key of the noises, steps, CFG scale)}. Students are drawn from the noises of key 0.
KINDS = {
    REFERENCE: (1, 28, GUIDANCE),
    "teacher, 1 step": (0, 1, GUIDANCE),
    "teacher, 4 steps": (0, 4, GUIDANCE),
    "teacher, 28 steps": (0, 28, GUIDANCE),
    "teacher, 28 steps, no CFG": (0, 28, 1.0),
}


@torch.no_grad()
def sample(family, denoiser, schedule, steps, key, numbers, guidance=None, batch_size=100):
    """Images (N, 3, 32, 32) of PROMPTS[numbers], from noises that depend on `key` alone.

    By the student's sampler, or with `guidance` by the teacher's PF-ODE.
    """
    cond, vae = opened(family)
    times = schedule.timesteps(steps)[:-1]  # (steps,)
    images = []
    starts = range(0, len(numbers), batch_size)
    for at in tqdm(starts, f"{steps} steps", disable=None, leave=False):
        some = numbers[at : at + batch_size]
        draw = Draw((key, STAGE), range(at, at + len(some)))
        fresh = partial(draw.normal, family.latent_shape())
        here = {name: c[some] for name, c in cond.items()}  # (B, ...) each
        x_T = fresh()  # (B, 4, 8, 8)
        if guidance is None:
            predict = with_guidance(denoiser, here, None, 1)  # plainly conditional
            z = student_sample(predict, schedule, x_T, times, fresh)
        else:
            none = {name: c[[len(PROMPTS)] * len(some)] for name, c in cond.items()}
            predict = with_guidance(denoiser, here, none, guidance)
            z = teacher_sample(predict, schedule, x_T, steps)
        images.append(family.decode(vae, z))  # (B, 3, 32, 32)
    return torch.cat(images)


@cache
def opened(family):
    """(conditioning {name: (16, ...)} of PROMPTS and then of the empty prompt, the VAE).

    They are read once.
    """
    with torch.no_grad():
        return family.encode(family.text_pipeline(), [*PROMPTS, ""]), family.vae()


def open_run(folder, family):
    """(denoiser, its Schedule, number of steps) of an adp.py or adm.py run."""
    schedule, pipeline = starting_point(str(folder), family, family.schedule, 0)
    student = read_json(Path(folder) / "config.json", "run", "student")["student"]
    return load_denoiser(family, folder=pipeline), schedule, len(student["times"])


def of_teacher(family, name, numbers):
    """Images (N, 3, 32, 32) of the teacher's of this name in KINDS."""
    key, steps, guidance = KINDS[name]
    denoiser = load_denoiser(family)
    return sample(family, denoiser, family.schedule, steps, key, numbers, guidance)


def judge(images, teacher):
    """`measure` of images (1000, 3, 32, 32) of NUMBERS; teacher: what `teacher_samples` returns."""
    return measure(look(images), teacher[REFERENCE])


def teacher_samples(family):
    """{name in KINDS: (1000, 32)} of NUMBERS, what the CLIP sees: from the file of `samples`.

    Raises BadInput if it belongs to another teacher.
    """
    advice = "make it anew with `python toy/digits.py samples`"
    with safe_open(SAMPLES, "pt") as f:
        of_this_teacher = f.metadata() == {"weights_sha256": family.weights_sha256}
        require(of_this_teacher, f"{SAMPLES} belongs to another teacher: {advice}")
        return {name: f.get_tensor(name) for name in KINDS}


def samples():
    """Write the teacher's samples by which students are measured, and then its README."""
    family = load_teacher("digits")
    made = {name: look(of_teacher(family, name, NUMBERS)) for name in KINDS}  # (1000, 32) each
    save_file(made, SAMPLES, {"weights_sha256": family.weights_sha256})
    write_readme(f"{teacher_table(family)}\n\n{histogram(family)}")


def histogram(family):
    """A table: which digits the teacher draws where it is asked for any, in percent."""
    teacher = teacher_samples(family)
    rows = [(f'"{PROMPTS[ANY_DIGIT]}"', *NAMES)]
    for name in ("teacher, 28 steps", "teacher, 28 steps, no CFG"):
        percent = 100 * shares(teacher[name][len(LABELS) :])  # (10,)
        rows.append((name, *(f"{x:.0f}" for x in percent.tolist())))
    return markdown(rows)


def teacher_table(family):
    """The table in the teacher's README: its own metrics."""
    teacher = teacher_samples(family)
    rows = {name: measure(z, teacher[REFERENCE]) for name, z in teacher.items()}
    del rows[REFERENCE]
    return table(rows)


def table(rows):
    """A Markdown table of {name: {column: float}}, to three digits."""
    cells = [("", *next(iter(rows.values())))]
    for name, row in rows.items():
        cells.append((name, *(f"{value:.3g}" for value in row.values())))
    return markdown(cells)
