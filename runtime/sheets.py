"""Pictures by which a run is followed: samples/<iteration>.png and -batch.png, GIFs of videos."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ode import Draw, student_sample, teacher_sample, with_guidance
from runtime import curves
from runtime.files import aside
from runtime.optimize import exchanged

STAGE = 3  # of the seeds' keys: other random numbers than training's (0 to 2)
IMAGES = 8  # in a sheet
VIDEOS = 2
FRAMES = 8  # of a video's, in its strip
SMALLEST = 128  # pixels along a side, to which small pictures are enlarged
GIF_HEIGHT = 320  # pixels at most: a GIF of full size would be tens of megabytes


class Sheets:
    """The sheets of a run, in each the same prompts and the same noise: any two of them compare.

    Column i has prompt i, over again where there are fewer, and noise that depends on the run's
    seed and i alone. Each rank makes its share of the columns, `each` at a time, as many as
    training takes: a sheet costs steps x columns passes of the student, its first in a process
    teacher_steps x columns of the teacher, twice that with guidance. `prompts` is a data.Prompts.
    """

    def __init__(self, here, student, teacher, prompts, shape, guidance, teacher_steps, each):
        self.here = here
        self.student = student
        self.teacher = teacher
        self.prompts = prompts
        self.shape = shape  # of one latent
        self.guidance = guidance
        self.teacher_steps = teacher_steps
        self.each = each
        self.columns = most_columns(shape)
        self.of_teacher = None  # its latents, (columns, ...): made once

    @torch.no_grad()
    def draw(self, iteration, networks):
        """samples/<iteration>.png, and curves.png: what the exported sampler makes, all its steps.

        By the student's average where `networks` has one, which is what is exported. Below it the
        teacher's images from the same noise. To be called on every rank; rank 0 writes.
        """
        average = networks.get("ema")
        in_place = exchanged(average, networks["student"]) if average else nullcontext()
        with in_place:
            of_student = self.sampled(self.by_student)  # (columns, ...)
        if self.of_teacher is None:
            self.of_teacher = self.sampled(self.by_teacher)
        if not self.here.ranks.main:
            return
        who = "student's average" if average else "student"
        rows = {
            f"{who}, {plural(self.here.steps)}": of_student,
            f"teacher, {plural(self.teacher_steps)}, guidance {self.guidance:g}": self.of_teacher,
        }
        captions = self.prompts.texts(self.prompt_of(range(self.columns)))
        self.write(iteration, "", f"iteration {iteration}", captions, rows)
        folder = self.here.folder
        curves.draw([folder], folder / "curves.png")

    @torch.no_grad()
    def batch(self, iteration, rows):
        """samples/<iteration>-batch.png of the training batch.

        rows: this rank's latents {label: (B, ...)}, and their times "t", (B,). No network runs for
        it, only the VAE. To be called on every rank; rank 0 writes.
        """
        joined = self.here.ranks.joined
        rows = {name: joined(x.detach())[: self.columns].cpu() for name, x in rows.items()}
        captions = [f"t = {time:.0f}" for time in rows.pop("t").tolist()]
        if self.here.ranks.main:
            title = f"iteration {iteration}, training batch"
            self.write(iteration, "-batch", title, captions, rows)

    def prompt_of(self, columns):
        return [i % len(self.prompts) for i in columns]

    def sampled(self, sampler):
        """The latents of all columns, (columns, ...) on the CPU, of sampler(conditioning, draw)."""
        ranks = self.here.ranks
        share = -(-self.columns // ranks.world)
        # The last rank's are columns again where they do not come out even: all ranks take part in
        # each pass of a sharded network.
        mine = [(ranks.rank * share + i) % self.columns for i in range(share)]
        parts = []
        for at in range(0, share, self.each):
            some = mine[at : at + self.each]
            draw = Draw((self.here.cfg.seed, STAGE), some, ranks.device)
            parts.append(sampler(self.prompts[self.prompt_of(some)], draw))  # (each, ...)
        return ranks.joined(torch.cat(parts))[: self.columns].cpu()

    def by_student(self, cond, draw):
        """The exported sampler's x_0, (B, ...)."""

        def predict(x, t):
            return self.student(x, t, cond)[0]

        def fresh():
            return draw.normal(self.shape)

        schedule = self.here.schedule
        times = schedule.timesteps(self.here.steps)[:-1].to(draw.device)  # (steps,)
        return student_sample(predict, schedule, fresh(), times, fresh)

    def by_teacher(self, cond, draw):
        """The teacher's x_0, (B, ...), from the noise that the student starts from."""
        x_T = draw.normal(self.shape)  # (B, ...)
        uncond = self.prompts.unconditional(len(x_T))
        guided = with_guidance(self.teacher, cond, uncond, self.guidance)
        schedule = self.here.family.schedule_at(self.shape)
        return teacher_sample(guided, schedule, x_T, self.teacher_steps)

    def write(self, iteration, kind, title, captions, rows):
        """samples/<iteration><kind>.png of {label: latents}; of videos also a GIF.

        The VAE is loaded for this and dropped again.
        """
        family = self.here.family
        vae = decoder(family, self.shape, self.here.ranks.device)
        shown = {label: decoded(family, vae, z) for label, z in rows.items()}
        folder = self.here.folder / "samples"
        folder.mkdir(exist_ok=True)
        name = f"{iteration:06d}{kind}"
        is_video = len(self.shape) == 4
        picture = (
            strips(title, captions, shown) if is_video else first_frames(title, captions, shown)
        )
        with aside(folder / f"{name}.png") as partial:
            picture.save(partial, format="PNG")
        if self.here.board:
            self.here.board.picture(f"samples{kind}", picture, iteration)
        if is_video:
            frames = moving(title, captions, shown)
            with aside(folder / f"{name}.gif") as partial:
                save_gif(frames, partial, family.fps)


def most_columns(shape):
    """How many images, or videos, of this latent shape a sheet has."""
    return VIDEOS if len(shape) == 4 else IMAGES


def decoder(family, shape, device):
    """The VAE for pictures of latents of this shape: float32, so that no digit is lost.

    But bf16 on a GPU for videos, which are decoded whole: CogVideoX's would take 32 GB.
    """
    is_video = len(shape) == 4
    in_half = is_video and device.type == "cuda"
    return family.vae(device, torch.bfloat16 if in_half else torch.float32)


def plural(steps):
    return "1 step" if steps == 1 else f"{steps} steps"


def decoded(family, vae, latents):
    """Latents (N, ...) → (N, frames, H, W, 3) uint8; an image is a video of one frame."""
    device = next(vae.parameters()).device
    x = torch.cat([family.decode(vae, one.to(device)).float().cpu() for one in latents.split(1)])
    if x.ndim == 4:  # (N, 3, H, W)
        x = x.unsqueeze(2)  # (N, 3, 1, H, W)
    return x.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


# --- Layout ---------------------------------------------------------------------------------------
# Videos are (N, frames, H, W, 3) uint8, an image is (H, W, 3) uint8.


def first_frames(title, captions, rows):
    """A sheet of images: a row for each {label: videos of one frame}, captions above columns."""
    return grid(title, captions, {label: list(videos[:, 0]) for label, videos in rows.items()})


def strips(title, captions, rows):
    """A sheet of videos: under each caption a strip of frames for each {label: videos}."""
    blocks = []
    for i, caption in enumerate(captions):
        block = {}
        for label, videos in rows.items():
            frames = videos[i]  # (frames, H, W, 3)
            chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
            block[label] = list(frames[chosen])
        blocks.append(grid(title if i == 0 else "", [caption], block))
    height = sum(block.height for block in blocks)
    sheet = Image.new("RGB", (blocks[0].width, height), "white")
    y = 0
    for block in blocks:
        sheet.paste(block, (0, y))
        y += block.height
    return sheet


def moving(title, captions, rows):
    """The frames of a GIF: each a sheet of that frame of every video, captions above columns."""
    count = min(videos.shape[1] for videos in rows.values())
    frames = []
    for k in range(count):
        shown = {label: [low(frame) for frame in videos[:, k]] for label, videos in rows.items()}
        frames.append(grid(title, captions, shown))
    return frames


def save_gif(frames, path, fps):
    """Write PIL images as a GIF, over and over again, so many a second but for rounding.

    Its file counts hundredths of a second: 8 a second are shown at 8.3, 16 at 16.7, 24 at 25.
    """
    ms = 10 * round(100 / fps)  # of a frame
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=ms, loop=0)


def low(image):
    """The image, made smaller if it is higher than a GIF's may be."""
    height, width = image.shape[:2]
    if height <= GIF_HEIGHT:
        return image
    size = (round(width * GIF_HEIGHT / height), GIF_HEIGHT)
    return np.asarray(Image.fromarray(image).resize(size, Image.LANCZOS))


def grid(title, captions, rows):
    """One picture: a row for each {label: [image]}, all of one size, with gutters between them.

    The title stands in the corner, labels on the left; a caption stands above as many columns as
    come out even. The size depends on the sizes and numbers of images and on the captions alone.
    """
    images = next(iter(rows.values()))
    enlarge = max(1, -(-SMALLEST // images[0].shape[0]))
    height, width = (n * enlarge for n in images[0].shape[:2])
    size = min(max(width // 10, 13), 40)  # of the letters, in pixels
    gutter = size // 2
    margin = 9 * size
    line = round(1.25 * size)
    span = len(images) // len(captions)  # columns under a caption
    room = span * (width + gutter) - gutter  # pixels of a caption
    wrapped = [wrap(caption, room, size) for caption in captions]
    top = max(3, *map(len, wrapped)) * line + 2 * gutter

    total = (margin + len(images) * (width + gutter), top + len(rows) * (height + gutter))
    sheet = Image.new("RGB", total, "white")
    pen = ImageDraw.Draw(sheet)

    def write(x, y, lines, color):
        for i, words in enumerate(lines):
            pen.text((x, y + i * line), words, fill=color, font=font(size))

    write(gutter, gutter, wrap(title, margin - 2 * gutter, size), "#c00000")
    for i, lines in enumerate(wrapped):
        x = margin + i * span * (width + gutter)
        write(x, top - gutter - len(lines) * line, lines, "black")
    for r, (label, images) in enumerate(rows.items()):
        y = top + r * (height + gutter)
        write(gutter, y, wrap(label, margin - 2 * gutter, size, most=6), "black")
        for i, image in enumerate(images):
            tile = Image.fromarray(image).resize((width, height), Image.NEAREST)
            sheet.paste(tile, (margin + i * (width + gutter), y))
    return sheet


@cache
def font(size):
    """A font that every matplotlib has, and that knows more letters than PIL's own."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def wrap(text, room, size, most=5):
    """The text's lines, at most so many, each of at most `room` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    return [cut(words, room, size) for words in lines]


def cut(words, room, size):
    """The words, ended by … where they are longer than `room` pixels."""
    if font(size).getlength(words) <= room:
        return words
    words = words.removesuffix(" …")
    while words and font(size).getlength(f"{words}…") > room:
        words = words[:-1]
    return f"{words}…"
