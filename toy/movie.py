"""Pictures that move: students while they train, from the same noises in every frame.

    python toy/movie.py record           # results/movie.npz: minutes
    python toy/movie.py draw             # results/training.gif, from it alone
    python toy/movie.py record-digits    # results/digits-movie.npz: a quarter of an hour, four runs
    python toy/movie.py draw-digits      # results/digits-training.gif, from it alone

On the mixture: one step, from the teacher's weights, one seed, the rates of toy/run.py. A point has
the colour of the mode to which the teacher's ODE carries its noise. On digits: the students of
toy/digits.py's experiment, seed 0, at the rates of its search.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

# So that `python toy/movie.py` finds the project.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toy.digits_experiment as digits
import toy.run as toy
from families import load_teacher
from models import load_denoiser
from runtime import curves
from runtime.files import aside, read_json
from runtime.script import in_one_line, plain_parser, quiet
from toy.digits_measure import NUMBERS
from toy.digits_report import SHOWN
from toy.digits_samples import GUIDANCE, RESULTS, open_run, sample
from toy.gmm import mode_tv, modes_covered
from toy.plot import LOOK

MOVIE = RESULTS / "movie.npz"
DIGITS_MOVIE = RESULTS / "digits-movie.npz"
SMALL = {"fontsize": 9}

# --- On the mixture -------------------------------------------------------------------------------

PANELS = ("dmd", "adm-paper", "adm-recipe", "adp+adm-paper")  # methods
FRAMES = 40  # after the first
POINTS = 600  # that are drawn
SAMPLES = 50_000  # of which modes and TV are measured
HUES = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf"]


class Film(toy.Curves):
    """In place of a training curve: samples of one seed's student, from its start on."""

    def __init__(self, world, total, *times):
        super().__init__(world, total, *times)
        self.wanted = updates_of(total)
        self.points, self.tv, self.covered = [], [], []  # of a frame each
        self.add(world.start)

    @torch.no_grad()
    def add(self, student, **_):
        x = toy.emitted(student, self.times, noises(self.seeds))  # (SAMPLES, 2)
        self.points.append(hundredths(x[:POINTS]))
        self.tv.append(mode_tv(self.plane, x))
        self.covered.append(modes_covered(self.plane, x))


def updates_of(iterations):
    """After how many updates there is a frame: evenly spaced by their square roots.

    The earlier, the more often.
    """
    return sorted({round(iterations * (i / FRAMES) ** 2) for i in range(FRAMES + 1)})


def noises(seeds):
    """The same for every frame; what it draws first is x_T, (SAMPLES, 2)."""
    return toy.Noise((9,), seeds, SAMPLES)


def hundredths(x):
    return (100 * x).round().short().numpy()


def record(path=MOVIE, cfg=None, rates=toy.RATES):
    """Trains the students and writes what `training` draws."""
    cfg = cfg or toy.Config(seeds=1, first_seed=20)
    world = toy.World(cfg)
    films = [toy.trained(cfg, method, world, rates, Film)[1] for method in PANELS]
    target = world.solved(noises(world.seeds).normal((2,)))  # (SAMPLES, 2)
    write(
        path,
        points=[film.points for film in films],  # (methods, frames, POINTS, 2)
        tv=[film.tv for film in films],  # (methods, frames)
        covered=[film.covered for film in films],  # (methods, frames)
        updates=updates_of(cfg.iterations),  # (frames,)
        stage_1=round(cfg.adp_share * cfg.iterations),  # how many of DMDX's updates are ADP's
        target=hundredths(target[:POINTS]),  # (POINTS, 2)
        target_tv=mode_tv(world.plane, target),
        modes=world.plane.means,  # (K, 2)
    )


def training(film):
    """Yields pictures (h, w, 3) of what `record` wrote."""
    updates, modes = film["updates"], film["modes"]
    target = film["target"] / 100  # (POINTS, 2)
    nearest = np.linalg.norm(target[:, None] - modes, axis=2).argmin(1)  # (POINTS,)
    colours = [HUES[k % len(HUES)] for k in nearest]
    figure = Figure(figsize=(8.3, 2.4), dpi=200)
    axes = figure.subplots(1, 1 + len(PANELS))
    figure.subplots_adjust(0.003, 0.2, 0.997, 0.91, wspace=0.03)
    limit = 1.3 * np.abs(modes).max()
    clouds = []
    titles = ["teacher, 64 steps", *(LOOK[method][0] for method in PANELS)]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])
        axis.set_title(title, pad=3, **SMALL)
        clouds.append(axis.scatter(*target.T, s=5, c=colours, lw=0))
    axes[0].set_xlabel(f"{len(modes)} modes, TV {film['target_tv']:.3f}", **SMALL)
    figure.text(0.003, 0.03, "students of one step, one seed, the same noises", **SMALL)
    bar = figure.add_axes((0.42, 0.03, 0.39, 0.035))
    bar.set(xlim=(0, updates[-1]), ylim=(0, 1), xticks=[], yticks=[])
    (done,) = bar.barh(0.5, 0, 1, color="0.4")
    said = figure.text(0.997, 0.03, "", ha="right", **SMALL)
    for i, update in enumerate(updates):
        seen = (film[name][:, i] for name in ("points", "covered", "tv"))  # (methods, ...) each
        for axis, cloud, points, covered, tv in zip(axes[1:], clouds[1:], *seen, strict=True):
            cloud.set_offsets(points / 100)
            axis.set_xlabel(f"{covered} of {len(modes)} modes, TV {tv:.3f}", **SMALL)
        stage = "ADP" if update <= film["stage_1"] else "ADM as published"
        axes[-1].set_title(f"DMDX: {stage}", pad=3, **SMALL)
        done.set_width(update)
        said.set_text(f"{update:,} of {updates[-1]:,} updates")
        yield pixels(figure)


# --- On digits ------------------------------------------------------------------------------------

ROWS = ("adp+adm-recipe", "adp+dmd", "adp+step")  # methods
COLUMNS = [NUMBERS[i] for i in SHOWN[:14]]  # prompts: of each digit, then "a handwritten digit"
OF_STAGE = 15  # frames
CORNER = 176, 34  # of the images, in pixels from the left and from below


def record_digits(path=DIGITS_MOVIE):
    """Trains the students and writes what `digits_training` draws."""
    digits.pairs()
    rates = read_json(digits.SEARCH_JSON, "search", "rates")["rates"]
    family = load_teacher("digits")
    flags = f"{digits.ADP_FIRST} {digits.pairs_and_regression(digits.FIRST)}"
    updates_1, images_1 = filmed_digits(family, "movie-adp", flags, digits.FIRST)
    rows = []
    for method in ROWS:
        how = f"{digits.HOME}/movie-adp", 1, digits.ITERATIONS, digits.WARMUP, rates[method]
        flags = f"{digits.METHODS[method]} {digits.second_stage(*how)}"
        rows.append(filmed_digits(family, f"movie-{method}", flags, digits.ITERATIONS))
    teacher = load_denoiser(family)
    write(
        path,
        teacher=drawn(family, teacher, family.schedule, 28, GUIDANCE),  # (14, 32, 32)
        start=drawn(family, teacher, family.schedule, 1),  # (14, 32, 32)
        updates_1=updates_1,  # (frames of stage 1,)
        images_1=images_1,  # (frames of stage 1, 14, 32, 32)
        updates_2=rows[0][0],  # (frames of stage 2,)
        images_2=[images for _, images in rows],  # (rows, frames of stage 2, 14, 32, 32)
    )


def filmed_digits(family, name, flags, updates):
    """(updates, images of each) at checkpoints of a run: of the student's average, if it has one.

    updates: how many there are of the student, at the end of the run.
    """
    every = max(1, updates // OF_STAGE)
    kept = f"--checkpoint-every {every} --keep-checkpoints 1000 --sample-every 0"
    folder = digits.execute(f"python {flags} {kept} --seed 0 --out {digits.HOME}/{name}")
    student, schedule, steps = open_run(folder, family)
    warmup = len(curves.read(folder)["iteration"]) - updates
    done, images = [], []
    for iteration in digits.at_checkpoints(folder, student):
        if iteration > warmup:
            done.append(iteration - warmup)
            images.append(drawn(family, student, schedule, steps))
    return done, images


def drawn(family, denoiser, schedule, steps, guidance=None):
    """Images of COLUMNS, from the same noises whoever draws them: bytes (14, 32, 32)."""
    x = sample(family, denoiser, schedule, steps, 0, COLUMNS, guidance)  # (14, 3, 32, 32)
    return x.mean(1).clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()


def digits_training(film):
    """Yields pictures (h, w, 3) of what `record_digits` wrote."""
    figure = Figure(figsize=(8.3, 2.45), dpi=1140 / 8.3)
    above = '"a handwritten zero" to "nine", then "a handwritten digit"; the same noises'
    figure.text(0.998, 0.985, above, ha="right", va="top", **SMALL)
    labels = ("teacher, 28 steps\nwith guidance", *(LOOK[method][0] for method in ROWS))
    for row, label in enumerate(labels):
        figure.text(0.002, 0.8 - 0.2 * row, label, va="center", **SMALL)
    said = figure.text(0.998, 0.025, "", ha="right", **SMALL)
    shown = figure.figimage(np.zeros((1, 1)), *CORNER, cmap="gray", vmin=0, vmax=255)

    of_adp = [[images] * len(ROWS) for images in (film["start"], *film["images_1"])]
    stages = (
        ("ADP", (0, *film["updates_1"]), of_adp),
        ("second stage", film["updates_2"], film["images_2"].swapaxes(0, 1)),
    )
    for stage, updates, frames in stages:
        for update, rows in zip(updates, frames, strict=True):
            said.set_text(f"{stage}: {update} of {updates[-1]} updates")
            shown.set_data(sheet([film["teacher"], *rows]))
            yield pixels(figure)


def sheet(rows):
    """Images (rows, 14, 32, 32) side by side at twice their size: bytes (h, w)."""
    lines = []
    for images in rows:
        framed = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=255)  # (14, 34, 34)
        gap = np.full((34, 6), 255, np.uint8)
        lines.append(np.concatenate([*framed[:10], gap, *framed[10:]], 1))
    return np.concatenate(lines).repeat(2, 0).repeat(2, 1)


# --- Files ----------------------------------------------------------------------------------------


def write(path, **arrays):
    with aside(path) as partial, open(partial, "wb") as f:
        np.savez_compressed(f, **arrays)


def pixels(figure):
    """(h, w, 3) bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw(frames, path):
    """Writes a GIF of pictures (h, w, 3), the last of which stays for two seconds."""
    black, white = np.zeros(3), np.ones(3)
    greys = np.linspace(black, white, 32)  # (32, 3)
    tints = [np.linspace(to_rgb(hue), white, 12, endpoint=False) for hue in HUES]  # (12, 3) each
    colours = np.concatenate([greys, *tints])  # (128, 3)
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * colours).round().astype(np.uint8).tobytes())
    how = {"palette": palette, "dither": Image.Dither.NONE}
    first, *more = [Image.fromarray(frame).quantize(**how) for frame in frames]
    milliseconds = [150] * len(more) + [2000]
    with aside(path) as partial:
        first.save(partial, "GIF", save_all=True, append_images=more, duration=milliseconds, loop=0)


def draw_mixture():
    """results/training.gif, from what was recorded alone."""
    draw(training(np.load(MOVIE)), RESULTS / "training.gif")


def draw_digits():
    """results/digits-training.gif, from what was recorded alone."""
    draw(digits_training(np.load(DIGITS_MOVIE)), RESULTS / "digits-training.gif")


COMMANDS = {
    "record": record,
    "draw": draw_mixture,
    "record-digits": record_digits,
    "draw-digits": draw_digits,
}


def main():
    parser = plain_parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    with in_one_line("movie.py"):
        COMMANDS[parser.parse_args().command]()


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)  # matrices are small: more threads only wait for each other
    main()
