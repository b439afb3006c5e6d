"""How good a student's images are, beside its teacher's of the same prompts and noise.

    python tools/score.py out/images/student out/images/teacher --out out/scores

The folders are those of tools/sample.py, any number of students and the teacher's last: one row of
the table each. Metrics (--metrics):

    clip       100 cos of CLIP's features of image and prompt (higher is better)
    pick       PickScore: a CLIP that learnt which image people prefer, its logit scale · cos
    diversity  mean distance 1 - cos between images of one prompt, in the features of --features
    distance   the same between a student's image and the teacher's of the same prompt and noise
    frechet    Fréchet distance of the features' Gaussians, to the teacher's images or to --real
    hps        100 HPSv2, another such CLIP; its package is optional: off by default
    lpips      diversity by LPIPS, the paper's; needs `pip install lpips`, and is off by default

What stands in brackets is a 95% interval over prompts: had they been others of their kind. table.md
and table.json have the same numbers, sheet.png the images of the same prompts side by side. Of a
video eight frames count, by their mean.
"""

import importlib.util
import statistics
import sys
import textwrap
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from runtime.files import aside, claim, read_json, write_json
from runtime.flags import option, words
from runtime.lines import Lines
from runtime.script import run
from runtime.settings import BadInput, at_least, did_you_mean, require
from tools import metrics

# {metric: (its column's title, with an arrow to where better is)}
METRICS = {
    "clip": "CLIP ↑",
    "pick": "PickScore ↑",
    "hps": "HPSv2 ↑",
    "diversity": "diversity ↑",
    "distance": "distance ↓",
    "frechet": "Fréchet ↓",
    "lpips": "LPIPS diversity ↑",
}
OF_FEATURES = {"diversity", "distance", "frechet"}
# {metric that takes an optional package: (the package, how to have it)}
PACKAGES = {
    "hps": ("hpsv2", "pip install --no-deps hpsv2, then as tools/README.md says"),
    "lpips": ("lpips", "pip install lpips"),
}
HPS = "v2.0"  # of its two: what the paper reports of SDXL is near the package's v2.0, not its v2.1
FRAMES = 8  # of a video (ours)
WIDTH = 10.8  # inches of the sheet, without its labels
ROW = {"file": str, "prompt": str, "seed": int, "steps": int, "seconds": float}  # of a manifest

# What the paper reports (arXiv 2507.18569); of its metrics we have no MPS.
PAPER_COLUMNS = ("CLIP", "Pick", "HPSv2", "MPS", "LPIPS diversity")
PAPER = {
    "sdxl": {
        "ADD, 1 step (512 pixels)": (35.0088, 22.1524, 27.0971, 10.4340, 0.6071),
        "LCM, 1 step": (28.4669, 20.1267, 23.8246, 4.8134, 0.6257),
        "Lightning, 1 step": (33.4985, 21.9194, 27.1557, 10.2285, 0.6707),
        "DMD2, 1 step": (35.2153, 22.0978, 27.4523, 10.6947, 0.6715),
        "DMDX, 1 step": (35.2557, 22.2736, 27.7046, 11.1978, 0.7156),
        "SDXL-Base, 50 NFE": (35.0309, 22.2494, 27.3743, 10.7042, 0.6936),
    },
    "sd3": {
        "TSCD, 4 steps": (34.02, 21.97, 27.27, 10.86),
        "PCM, 4 steps": (33.50, 21.97, 27.37, 10.57),
        "Flash, 4 steps": (34.40, 22.09, 27.26, 10.66),
        "ADM, 4 steps": (34.9076, 22.5471, 28.4492, 11.9543),
        "SD3-Medium, 50 NFE": (34.7633, 22.2961, 27.9733, 11.3652),
    },
    "sd3.5-large": {
        "LADD, 4 steps": (34.7395, 22.3958, 27.4923, 11.4372),
        "ADM, 4 steps": (34.9730, 22.8842, 27.7331, 12.2350),
        "SD3.5-Large, 50 NFE": (34.9668, 22.5087, 27.9688, 11.5826),
    },
}


@dataclass
class Config:
    folders: list = words(
        "folders of tools/sample.py: those of students, and last the teacher's",
        "FOLDER",
        "what to score",
    )
    prompts: str | None = option(
        None,
        "UTF-8 text file: only the images of these prompts; default: all that the folders have",
        "what to score",
    )
    metrics: str = option(
        "clip,pick,diversity,distance,frechet",
        f"any of {', '.join(METRICS)}, with commas between",
        "how to score",
    )
    clip: str = option(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "CLIP of the CLIP score: an id on the hub or a folder (ours: the paper's is not known to "
        "us)",
        "how to score",
    )
    pick: str = option("yuvalkirstain/PickScore_v1", "CLIP of PickScore, likewise", "how to score")
    features: str = option(
        "facebook/dinov2-large",
        "DINOv2, CLIP or another vision model with a pooled output, likewise: its features are "
        "those of diversity, distance and frechet (ours)",
        "how to score",
    )
    real: str | None = option(
        None,
        "folder of images to take frechet's distance to; default: the teacher's",
        "how to score",
    )
    batch_size: int = option(16, "images at a time", "memory")
    out: str = option("out/scores", "folder to write; must be empty", "output")


# --- Images ---------------------------------------------------------------------------------------


class Sampled:
    """A folder of tools/sample.py: its manifest's rows, of some prompts or of all.

    Raises BadInput where it is unfinished, damaged, or an image is missing or truncated.
    """

    def __init__(self, folder, wanted=None):
        self.folder = Path(folder)
        m = read_json(self.folder / "manifest.json", "images of sample.py", "kind", "complete")
        whole = m["kind"] == "images" and m["complete"] is True
        require(whole, f"{folder} is not finished: the command that made it goes on")
        try:
            self.rows = [{key: kind(row[key]) for key, kind in ROW.items()} for row in m["images"]]
            self.teacher = str(m["teacher"])
        except (KeyError, TypeError, ValueError):
            raise BadInput(
                f"{folder} holds no images of sample.py: its manifest is damaged"
            ) from None
        if wanted is not None:
            there = {row["prompt"] for row in self.rows}
            lacking = [prompt for prompt in wanted if prompt not in there]
            require(not lacking, f"{folder} has no image of the prompt {lacking[:1]}")
            self.rows = [row for row in self.rows if row["prompt"] in set(wanted)]
        require(self.rows, f"{folder} holds no images")
        self.pictures = [self.paths_of(row["file"]) for row in self.rows]
        for path in sum(self.pictures, []):
            check_whole(path)

    def paths_of(self, file):
        """The image's file, or those of a video's frames that are looked at."""
        path = self.folder / Path(file).name  # of this folder, whatever the manifest says
        if not path.is_dir():
            return [path]
        frames = sorted(path.glob("*.png"))
        require(frames, f"{path} holds no frames")
        chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round()
        return [frames[int(n)] for n in chosen]

    @property
    def texts(self):
        return [row["prompt"] for row in self.rows]

    def numbers(self):
        """(N,) int64: which of the different prompts, in their order, each image is of."""
        different = {text: n for n, text in enumerate(dict.fromkeys(self.texts))}
        return torch.tensor([different[text] for text in self.texts])


def check_whole(path):
    """Raises BadInput where a picture is missing, truncated or none."""
    try:
        with Image.open(path) as image:
            image.verify()  # a PNG's checksums; others are read when they are needed
    except (OSError, SyntaxError, ValueError) as e:
        why = "missing" if isinstance(e, FileNotFoundError) else "truncated, or no picture"
        raise BadInput(f"{path} is {why}") from None


def loaded(path):
    """The picture as PIL has it, RGB. Raises BadInput."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        raise BadInput(f"{path} is truncated, or no picture") from None


def check_match(student, teacher):
    """Raises BadInput unless both are of the same prompts and seeds, image by image."""
    a, b = ([(row["prompt"], row["seed"]) for row in s.rows] for s in (student, teacher))
    both = f"{student.folder} and {teacher.folder} do not match"
    require(len(a) == len(b), f"{both}: {len(a)} images and {len(b)}")
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        require(one == other, f"{both}: image {i} is of {one}, the other of {other} (prompt, seed)")


def images_in(folder):
    """The images in a folder, each a list of one path. Raises BadInput."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    folder = Path(folder)
    require(folder.is_dir(), f"--real {folder}: no such folder")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds)
    require(len(found) > 1, f"--real {folder}: at least two images are needed, {' '.join(kinds)}")
    for path in found:
        check_whole(path)
    return [[path] for path in found]


# --- Networks -------------------------------------------------------------------------------------


def fetched(setting, name, load):
    """What `load` returns. Raises BadInput where the hub or the folder has no such network."""
    try:
        return load()
    except Exception as e:  # the hub has many errors, transformers others
        said = f"{type(e).__name__}: {' '.join(str(e).split()).split('. ')[0][:200]}"
        advice = "" if setting == "metrics" else "; a local folder will do"
        raise BadInput(f"--{setting} {name}: cannot be loaded ({said}){advice}") from None


class Vision:
    """A vision model and its preprocessing: pictures → features, (N, D) float32 on the CPU."""

    def __init__(self, setting, name, device, batch_size, kinds=None):
        self.device = device
        self.batch_size = batch_size
        kind = fetched(setting, name, lambda: transformers.AutoConfig.from_pretrained(name))
        right = kinds is None or kind.model_type in kinds
        require(right, f"--{setting} {name}: a {kind.model_type}, not a {kinds}")
        load = transformers.AutoModel.from_pretrained
        both = fetched(setting, name, lambda: load(name, output_loading_info=True))
        model, info = both
        require(not info["missing_keys"], f"--{setting} {name}: its weights are incomplete")
        self.model = model.float().to(device).eval().requires_grad_(False)
        load = transformers.AutoImageProcessor.from_pretrained
        self.processor = fetched(setting, name, lambda: load(name))
        self.is_clip = isinstance(model, transformers.CLIPModel)
        blank = Image.new("RGB", (64, 64))  # whether it takes pictures at all
        fetched(setting, name, lambda: self.of_images([blank]))

    @torch.no_grad()
    def of_images(self, images):
        """(B, D) float32 features of PIL images, on the CPU."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return self.embedded(pixels.to(self.device)).float().cpu()

    def features(self, pictures, lengths_of_one):
        """(N, D) of N lists of paths: of one picture each, or of frames, whose mean it is.

        lengths_of_one: scale a picture's features to length 1 first.
        """
        flat = [path for paths in pictures for path in paths]
        starts = range(0, len(flat), self.batch_size)
        found = []
        for at in tqdm(starts, "features", disable=None, leave=False):
            images = [loaded(path) for path in flat[at : at + self.batch_size]]
            found.append(self.of_images(images))  # (B, D)
        x = torch.cat(found)
        if lengths_of_one:
            x = metrics.unit(x)
        parts = x.split([len(paths) for paths in pictures])
        return torch.stack([part.mean(0) for part in parts])  # (N, D)

    def embedded(self, pixels):
        if self.is_clip:
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            return self.model.visual_projection(pooled)
        return self.model(pixel_values=pixels).pooler_output


class Clip(Vision):
    """A CLIP, of which texts have features too."""

    def __init__(self, setting, name, device, batch_size):
        super().__init__(setting, name, device, batch_size, "clip")
        load = transformers.CLIPTokenizer.from_pretrained
        self.tokenizer = fetched(setting, name, lambda: load(name))
        # Without its file transformers makes one that knows no words.
        knows = len(self.tokenizer) > len(self.tokenizer.all_special_tokens)
        require(knows, f"--{setting} {name}: its tokenizer is missing")

    @torch.no_grad()
    def of_texts(self, texts):
        """(N, D) features, cut to as many tokens as the model takes."""
        different = list(dict.fromkeys(texts))
        most = self.model.config.text_config.max_position_embeddings
        how = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}
        found = []
        for at in range(0, len(different), self.batch_size):
            tokens = self.tokenizer(different[at : at + self.batch_size], **how).to(self.device)
            pooled = self.model.text_model(**tokens).pooler_output
            found.append(self.model.text_projection(pooled).float().cpu())  # (B, D)
        x = dict(zip(different, torch.cat(found), strict=True))
        return torch.stack([x[text] for text in texts])

    def scores(self, sampled, scale):
        """(N,) scale · cos of each image and its prompt."""
        images = self.features(sampled.pictures, lengths_of_one=True)
        return scale * metrics.alignment(images, self.of_texts(sampled.texts))


# --- Scores ---------------------------------------------------------------------------------------


def with_interval(values):
    """The table's cell of values (P,): their mean and its interval; None of no values."""
    if not len(values):
        return None
    return {"value": values.mean().item(), "interval": metrics.mean_interval(values)}


def clip_cells(network, folders, scale):
    """{folder: cell} of scale · cos, for each of the folders."""
    cells = {}
    for s in folders:
        cells[s] = with_interval(metrics.by_prompt(network.scores(s, scale), s.numbers()))
    return cells


def feature_cells(network, folders, chosen, real):
    """{metric: {folder: cell}} of those in OF_FEATURES that are chosen."""
    features = {s: network.features(s.pictures, lengths_of_one=False) for s in folders}
    teacher = folders[-1]
    cells = {metric: {} for metric in METRICS if metric in chosen}
    if "diversity" in cells:
        for s, x in features.items():
            cells["diversity"][s] = with_interval(metrics.pairwise(x, s.numbers()))
    if "distance" in cells:
        for s in folders[:-1]:
            values = metrics.apart(features[s], features[teacher])
            cells["distance"][s] = with_interval(metrics.by_prompt(values, s.numbers()))
    if "frechet" in cells:
        y = network.features(real, lengths_of_one=False) if real else features[teacher]
        for s in folders if real else folders[:-1]:
            partners = real is None
            interval = metrics.frechet_interval(features[s], y, s.numbers(), partners)
            value = metrics.frechet(features[s], y)
            cells["frechet"][s] = {"value": value, "interval": interval}
    return cells


def hps_scores(paths, prompt):
    """[100 HPSv2] of pictures of one prompt, by the optional package.

    It fetches two CLIPs the first time, and reads one of them in each call.
    """
    import hpsv2

    pictures = [loaded(path) for path in paths]
    return [100 * float(x) for x in hpsv2.score(pictures, prompt, hps_version=HPS)]


def hps_cells(folders):
    """{folder: cell} of the mean HPSv2 of the images of a prompt, of videos frame by frame."""
    cells = {}
    for s in folders:
        numbers = s.numbers()
        means = []
        for p in tqdm(numbers.unique().tolist(), "HPSv2", disable=None, leave=False):
            of_it = torch.nonzero(numbers == p).flatten().tolist()
            flat = [path for i in of_it for path in s.pictures[i]]
            means.append(statistics.mean(hps_scores(flat, s.texts[of_it[0]])))
        cells[s] = with_interval(torch.tensor(means))
    return cells


def lpips_network():
    """The optional package's; it fetches AlexNet the first time."""
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def lpips_cells(network, folders, device):
    """{folder: cell} of the mean LPIPS between the images of a prompt."""
    cells = {}
    for s in folders:
        numbers = s.numbers()
        means = []
        for p in tqdm(numbers.unique().tolist(), "LPIPS", disable=None, leave=False):
            of_it = [s.pictures[i] for i in torch.nonzero(numbers == p).flatten().tolist()]
            # Of videos frame by frame.
            x = [torch.stack([in_one(path) for path in paths]).to(device) for paths in of_it]
            with torch.no_grad():
                pairs = [network(a, b).mean() for a, b in combinations(x, 2)]
            if pairs:
                means.append(torch.stack(pairs).mean().cpu())
        cells[s] = with_interval(torch.stack(means) if means else torch.empty(0))
    return cells


def in_one(path):
    """A picture as (3, H, W) in [−1, 1], of 64 pixels at least: AlexNet takes no fewer."""
    image = loaded(path)
    size = [max(64, side) for side in image.size]
    x = torch.from_numpy(np.array(image.resize(size)))  # (H, W, 3) uint8
    return x.permute(2, 0, 1) / 127.5 - 1


def scored(cfg, chosen, folders, real):
    """{metric: {folder: cell or None}}, in the order of METRICS."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = (device, cfg.batch_size)
    # All of them before anything is computed: what is missing is said at once.
    clip = Clip("clip", cfg.clip, *about) if "clip" in chosen else None
    pick = Clip("pick", cfg.pick, *about) if "pick" in chosen else None
    vision = Vision("features", cfg.features, *about) if OF_FEATURES & chosen else None
    if "lpips" in chosen:
        network = fetched("metrics", "lpips", lpips_network).to(device)
    if "hps" in chosen:
        one = folders[0]
        fetched("metrics", "hps", lambda: hps_scores(one.pictures[0], one.texts[0]))

    cells = {}
    if clip:
        cells["clip"] = clip_cells(clip, folders, 100)
    if pick:
        cells["pick"] = clip_cells(pick, folders, pick.model.logit_scale.exp().item())
    if "hps" in chosen:
        cells["hps"] = hps_cells(folders)
    if vision:
        cells |= feature_cells(vision, folders, OF_FEATURES & chosen, real)
    if "lpips" in chosen:
        cells["lpips"] = lpips_cells(network, folders, device)
    return cells


# --- What is written ------------------------------------------------------------------------------


def table(names, folders, cells):
    """{name: {column: value}}, json's, of each folder."""
    rows = {}
    for name, s in zip(names, folders, strict=True):
        rows[name] = {
            "images": len(s.rows),
            "prompts": len(set(s.texts)),
            "steps": s.rows[0]["steps"],
            "seconds": statistics.median(row["seconds"] for row in s.rows),
        }
        rows[name] |= {metric: found.get(s) for metric, found in cells.items()}
    return rows


def as_text(cell):
    """A cell of the table: a number, or a value with its interval."""
    if cell is None:
        return "–"
    if not isinstance(cell, dict):
        return f"{cell:.4g}"
    text = f"{cell['value']:.4g}"
    if cell["interval"]:
        low, high = cell["interval"]
        text += f" [{low:.4g}, {high:.4g}]"
    return text


def markdown(rows, notes, paper):
    """Lines of table.md: ours, what its columns mean, and the paper's rows."""
    columns = list(next(iter(rows.values())))
    titles = [METRICS.get(column, column) for column in columns]
    lines = [f"| | {' | '.join(titles)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(as_text(cell) for cell in row.values())} |")
    lines += ["", *(f"- {note}" for note in notes)]
    if paper:
        said = "The paper's (arXiv 2507.18569), on its own prompts and networks: not measured here"
        lines += ["", f"{said}, to be compared with care.", ""]
        lines += [f"| the paper's | {' | '.join(PAPER_COLUMNS)} |"]
        lines += ["| --- " * (len(PAPER_COLUMNS) + 1) + "|"]
        for name, row in paper.items():
            cells = [f"{number:g}" for number in row] + ["–"] * (len(PAPER_COLUMNS) - len(row))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def notes_on(cfg, cells, folders):
    """Sentences under the table: by what each column was measured, and what is missing."""
    said = {
        "clip": f"clip: 100 cos by {cfg.clip}",
        "pick": f"pick: by {cfg.pick}",
        "hps": f"hps: 100 HPSv2, {HPS}",
        "diversity": f"diversity: 1 - cos of images of a prompt, features of {cfg.features}",
        "distance": f"distance: 1 - cos to the teacher's image of that noise, {cfg.features}",
        "frechet": f"frechet: to {cfg.real or folders[-1].folder}, features of {cfg.features}",
        "lpips": "lpips: diversity, AlexNet",
    }
    notes = [said[metric] for metric in cells]
    notes.append("in brackets: 95% over prompts, resampled; seconds: of one image, the median")
    if any(None in found.values() for found in cells.values()):
        notes.append("no diversity: it takes several images of a prompt, sample.py --count")
    return notes


def sheet(names, folders):
    """A Figure: a row for each folder, a column for each of the first prompts."""
    small = max(loaded(folders[0].pictures[0][0]).size) < 128
    side = 0.9 if small else 1.8  # inches: few pixels that are large hide what they show
    texts = list(dict.fromkeys(folders[0].texts))[: round(WIDTH / side)]
    figure = Figure(figsize=(1.6 + side * len(texts), 0.8 + side * len(folders)))
    axes = figure.subplots(len(folders), len(texts), squeeze=False)
    for row, name, s in zip(axes, names, folders, strict=True):
        steps = s.rows[0]["steps"]
        label = "\n".join(textwrap.wrap(name, 16, break_on_hyphens=False))
        label += f"\n{steps} step{'s' * (steps != 1)}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
        for axis, text in zip(row, texts, strict=True):
            paths = s.pictures[s.texts.index(text)]
            image = np.asarray(loaded(paths[len(paths) // 2]))  # of a video a frame in the middle
            axis.imshow(image, interpolation="nearest" if small else "antialiased")
            axis.set(xticks=[], yticks=[])
    for axis, text in zip(axes[0], texts, strict=True):
        axis.set_title("\n".join(textwrap.wrap(text, round(14 * side))[:4]), fontsize=8)
    figure.supxlabel("in each column: the same prompt and the same noise", fontsize=9)
    figure.tight_layout()
    return figure


def names_of(folders):
    """The folders' names, or their paths where two have one name."""
    names = [s.folder.resolve().name for s in folders]
    return names if len(set(names)) == len(names) else [str(s.folder) for s in folders]


# --- The script -----------------------------------------------------------------------------------


def check(cfg):
    """The set of metrics asked for. Raises BadInput for what cannot be, before images are read."""
    at_least(1, cfg, "batch_size")
    chosen = [name.strip() for name in cfg.metrics.split(",")]
    for name in chosen:
        known = f"there are {', '.join(METRICS)}{did_you_mean(name, METRICS)}"
        require(name in METRICS, f"--metrics {name}: unknown; {known}")
    for name in chosen:
        if name in PACKAGES:
            package, how = PACKAGES[name]
            there = importlib.util.find_spec(package)
            require(there, f"--metrics {name} needs the optional package {package}: {how}")
    require(len(cfg.folders) > 1, "two folders at least: a student's images, and the teacher's")
    require(len(set(cfg.folders)) == len(cfg.folders), "the same folder twice")
    return set(chosen)


def main(cfg):
    chosen = check(cfg)
    wanted = list(Lines(cfg.prompts)) if cfg.prompts else None
    folders = [Sampled(folder, wanted) for folder in cfg.folders]
    teacher = folders[-1]
    for student in folders[:-1]:
        check_match(student, teacher)
    if "frechet" in chosen:
        require(len(teacher.rows) > 1, "frechet: at least two images are needed")
    real = images_in(cfg.real) if cfg.real else None
    out = Path(cfg.out)
    claim(out)

    cells = scored(cfg, chosen, folders, real)
    names = names_of(folders)
    rows = table(names, folders, cells)
    notes = notes_on(cfg, cells, folders)
    paper = PAPER.get(teacher.teacher, {})
    lines = markdown(rows, notes, paper)
    of_paper = {name: dict(zip(PAPER_COLUMNS, row, strict=False)) for name, row in paper.items()}
    with aside(out) as partial:  # all or nothing: half of it would be in a second call's way
        partial.mkdir()
        (partial / "table.md").write_text("\n".join(lines) + "\n")
        write_json(partial / "table.json", {"rows": rows, "notes": notes, "the paper's": of_paper})
        sheet(names, folders).savefig(partial / "sheet.png", dpi=110)
    print("\n".join(lines))
    print(f"{out}: table.md, table.json, sheet.png")


if __name__ == "__main__":
    run(main, Config, description=__doc__, usage="%(prog)s FOLDER FOLDER … [flags]")
