"""tools/score.py: each metric falls where images get worse, its mathematics, tables, mistakes.

Judged by the CLIP of the digits, of transformers' own classes. Students, as their damage, are kinds
of the digits teacher's images.
"""

import importlib.util
import json
import math
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import call, refused
from PIL import Image, ImageFilter
from transformers import BitImageProcessor, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from families import tiny
from tools import metrics, sample, score
from toy.digits_clip import CLIP
from toy.digits_teacher import PROMPTS, held_out

DIGITS = PROMPTS[:10]
EACH = 6  # images of a prompt


# --- What is scored, and by what ------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    """The folder of a CLIP that tells a digit from its prompt."""
    return CLIP


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """{name: folder}: the teacher in 8 steps, a student that is good, and three that are not."""
    home = tmp_path_factory.mktemp("images")
    (home / "prompts.txt").write_text("\n".join(DIGITS))
    common = ["--pipeline", "digits", "--prompts", home / "prompts.txt", "--batch-size", 60]
    common += ["--count", EACH * len(DIGITS)]
    for name, steps in (("teacher", 8), ("student", 4)):
        call(sample.main, sample.Config, *common, "--steps", steps, "--out", home / name)
    changed(home, "shuffled", lambda pictures: pictures[3:] + pictures[:3])
    blur = ImageFilter.GaussianBlur(1)
    changed(home, "blurred", lambda pictures: [p.filter(blur) for p in pictures])
    changed(home, "collapsed", lambda pictures: pictures[:1] * len(pictures))
    return {p.name: p for p in home.iterdir()}


def changed(home, name, change):
    """A copy of the student's folder with other pictures in its files."""
    shutil.copytree(home / "student", home / name)
    paths = sorted((home / name).glob("*.png"))
    pictures = [Image.open(p).convert("RGB") for p in paths]
    for picture, path in zip(change(pictures), paths, strict=True):
        picture.save(path)


def flags(clip):
    return ["--clip", clip, "--pick", clip, "--features", clip]


@pytest.fixture(scope="module")
def scores(clip, images, tmp_path_factory):
    """The folder with the scores of the students and their teacher."""
    out = tmp_path_factory.mktemp("scores") / "out"
    order = ("student", "shuffled", "blurred", "collapsed", "teacher")
    folders = [images[name] for name in order]
    call(score.main, score.Config, *folders, *flags(clip), "--out", out)
    return out


@pytest.fixture(scope="module")
def rows(scores):
    return json.loads((scores / "table.json").read_text())["rows"]


def values(rows, metric):
    return {name: row[metric]["value"] for name, row in rows.items() if row[metric]}


# --- Each metric means something ------------------------------------------------------------------


def test_clip_score_falls_with_what_a_prompt_no_longer_says(rows):
    found = values(rows, "clip")
    assert found["student"] > 1.2 * found["blurred"]
    assert found["student"] > 2 * found["shuffled"]
    assert found["student"] > 2 * found["collapsed"]
    assert abs(found["student"] - found["teacher"]) < 0.2 * found["teacher"]


def test_pick_score_falls_likewise(rows):
    found = values(rows, "pick")
    for bad in ("blurred", "shuffled", "collapsed"):
        assert found["student"] > 1.2 * found[bad], bad


def test_diversity_falls_where_images_of_a_prompt_are_one(rows):
    found = values(rows, "diversity")
    assert found["collapsed"] == pytest.approx(0, abs=1e-5)
    assert found["student"] > 1e-3
    assert found["blurred"] < found["student"] < found["shuffled"] * 1.5


def test_distance_to_the_teacher_grows_with_every_damage(rows):
    found = values(rows, "distance")
    assert found.keys() == {"student", "shuffled", "blurred", "collapsed"}
    for bad in ("blurred", "shuffled", "collapsed"):
        assert found[bad] > 2 * found["student"], bad


def test_frechet_distance_grows_with_blur_and_collapse(rows):
    """It sees no prompts: of shuffled images it is the same."""
    found = values(rows, "frechet")
    assert found["blurred"] > 2 * found["student"]
    assert found["collapsed"] > 10 * found["student"]
    assert found["shuffled"] == pytest.approx(found["student"], rel=1e-3)


@pytest.mark.skipif(not importlib.util.find_spec("lpips"), reason="the optional lpips is not here")
def test_lpips_falls_where_images_of_a_prompt_are_one(images, tmp_path):
    folders = [images[name] for name in ("student", "collapsed", "teacher")]
    call(score.main, score.Config, *folders, "--metrics", "lpips", "--out", tmp_path / "out")
    found = values(json.loads((tmp_path / "out" / "table.json").read_text())["rows"], "lpips")
    assert found["collapsed"] == 0 < 0.01 < found["student"]


HPSV2 = """
import torch
import transformers

model = transformers.CLIPModel.from_pretrained({folder!r}).eval()
tokenizer = transformers.CLIPTokenizer.from_pretrained({folder!r})
processor = transformers.CLIPImageProcessor.from_pretrained({folder!r})

def score(imgs_path, prompt, hps_version="v2.0"):
    inputs = tokenizer([prompt], return_tensors="pt")
    inputs |= processor(images=imgs_path, return_tensors="pt")
    with torch.no_grad():
        cosines = model(**inputs).logits_per_image[:, 0] / model.logit_scale.exp()
    return list(cosines.numpy())
"""


def test_hps_is_what_the_package_says_of_each_prompts_images(
    clip, images, rows, tmp_path, monkeypatch
):
    """A package of that call and our CLIP, so that its column is that of the CLIP score: the
    true one has networks of gigabytes.
    """
    (tmp_path / "hpsv2.py").write_text(HPSV2.format(folder=str(clip)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hpsv2", raising=False)
    names = ("student", "shuffled", "teacher")
    folders = [images[name] for name in names]
    call(score.main, score.Config, *folders, "--metrics", "hps", "--out", tmp_path / "out")
    found = values(json.loads((tmp_path / "out" / "table.json").read_text())["rows"], "hps")
    assert found == {name: pytest.approx(rows[name]["clip"]["value"], rel=1e-4) for name in names}
    assert "| HPSv2 ↑ |" in (tmp_path / "out" / "table.md").read_text()


# --- Their mathematics ----------------------------------------------------------------------------


def test_frechet_is_that_of_two_gaussians():
    """Of diagonal ones it is known: |μ − μ'|² + Σ (σ − σ')²."""
    noise = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double()
    noise = (noise - noise.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T)).T)
    x = noise * torch.tensor([1.0, 2.0, 3.0])
    y = noise * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([0.0, 1.0, 2.0])
    assert metrics.frechet(x, y) == pytest.approx(5 + 1 + 0 + 4, rel=1e-6)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-8)
    turn = torch.linalg.qr(torch.arange(9.0).reshape(3, 3) + torch.eye(3))[0].double()
    assert metrics.frechet(x @ turn, y @ turn) == pytest.approx(10, rel=1e-6)


def test_frechet_takes_fewer_images_than_features():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert metrics.frechet(x, x + 1) == pytest.approx(40, rel=1e-6)


def test_pairwise_is_the_mean_over_pairs_of_a_prompt():
    """Prompt 0: right angles; prompt 1: one image, which is no pair; prompt 2: opposite ones."""
    x = torch.tensor([[2.0, 0], [1, 1], [0, 3.0], [0, 1.0], [0, -2.0]])
    prompts = torch.tensor([0, 1, 0, 2, 2])
    assert metrics.pairwise(x, prompts).tolist() == pytest.approx([1, 2])


def test_a_mean_is_over_prompts_not_images():
    values = torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert metrics.by_prompt(values, torch.tensor([0, 0, 0, 1])).tolist() == [1, 5]


def test_an_interval_covers_the_mean_as_often_as_it_says():
    """Of 200 samples of 40 prompts about 95% of the intervals do; one prompt has none."""
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)).double()
    intervals = [metrics.mean_interval(values) for values in x]
    covered = np.mean([low < 0 < high for low, high in intervals])
    assert 0.9 < covered < 0.98
    assert metrics.mean_interval(torch.tensor([3.0])) is None


def test_frechets_interval_knows_partners():
    """Resampled together, images that are the teacher's own are at no distance."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    prompts = torch.arange(60) % 20
    low, high = metrics.frechet_interval(x, x, prompts, partners=True)
    assert low == 0 and high < 1e-6
    _, high = metrics.frechet_interval(x, x, prompts, partners=False)
    assert high > 0.01
    assert metrics.frechet_interval(x, x, 0 * prompts, partners=True) is None


def test_clip_score_is_transformers_own(clip, images, rows):
    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPImageProcessor.from_pretrained(clip)
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    paths = sorted(images["student"].glob("*.png"))
    pixels = processor([Image.open(p) for p in paths], return_tensors="pt")["pixel_values"]
    tokens = tokenizer(list(DIGITS), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image  # (60, 10)
        pick = logits[torch.arange(60), torch.arange(60) % 10].mean().item()
        scale = model.logit_scale.exp().item()
    found = rows["student"]
    assert found["pick"]["value"] == pytest.approx(pick, rel=1e-4)
    assert found["clip"]["value"] == pytest.approx(100 * pick / scale, rel=1e-4)


# --- What is written ------------------------------------------------------------------------------


def test_the_table_says_what_by_what(scores, rows, clip):
    text = (scores / "table.md").read_text()
    assert "CLIP ↑" in text and str(clip) in text and "paper" not in text
    low, high = rows["student"]["clip"]["interval"]
    assert low < rows["student"]["clip"]["value"] < high
    assert rows["teacher"]["steps"] == 8 and rows["student"]["images"] == 60
    assert rows["teacher"]["distance"] is None and rows["teacher"]["frechet"] is None


def test_the_sheet_has_a_row_for_each_folder(scores):
    sheet = Image.open(scores / "sheet.png").convert("L")
    assert sheet.width > 800 and sheet.height > 5 * 90
    assert np.asarray(sheet).std() > 40


def again(images, clip, out, *more, names=("student", "teacher")):
    """The rows of another call on these folders."""
    folders = [images[name] for name in names]
    call(score.main, score.Config, *folders, *flags(clip), *more, "--out", out)
    return json.loads((out / "table.json").read_text())


def test_only_the_prompts_asked_for(clip, images, tmp_path):
    (tmp_path / "two.txt").write_text("a handwritten two\na handwritten six\n")
    few = ("--prompts", tmp_path / "two.txt", "--metrics", "clip")
    row = again(images, clip, tmp_path / "out", *few)["rows"]["student"]
    assert (row["images"], row["prompts"]) == (12, 2) and "frechet" not in row


def test_the_papers_rows_stand_beside_its_models(clip, images, tmp_path):
    """Where the manifest says that the teacher is one of the paper's."""
    teacher = tmp_path / "images" / "teacher"
    shutil.copytree(images["teacher"], teacher)
    m = json.loads((teacher / "manifest.json").read_text())
    (teacher / "manifest.json").write_text(json.dumps(m | {"teacher": "sdxl"}))
    more = ("--metrics", "clip")
    found = again({**images, "teacher": teacher}, clip, tmp_path / "out", *more)
    assert found["the paper's"]["DMDX, 1 step"]["CLIP"] == 35.2557
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| DMDX, 1 step | 35.2557 |" in text and "not measured here" in text


def test_frechet_to_real_images(clip, images, tmp_path):
    """Also the teacher has a distance then, and blurred images a greater one."""
    real = tmp_path / "real"
    real.mkdir()
    drawn, _ = held_out()  # (500, 3, 32, 32)
    for i, x in enumerate(drawn[::6]):
        grey = x.add(1).mul(127.5).byte().permute(1, 2, 0).numpy()
        Image.fromarray(grey).save(real / f"{i}.png")
    more = ("--metrics", "frechet", "--real", real)
    names = ("student", "blurred", "teacher")
    found = values(again(images, clip, tmp_path / "out", *more, names=names)["rows"], "frechet")
    assert 0.1 < found["teacher"] < found["blurred"] / 2
    assert found["student"] < found["blurred"] / 2


def test_features_of_dinov2_and_a_video(images, few_prompts, tmp_path):
    """A video counts by the mean of its frames, a prompt of one video has no diversity."""
    backbone = tmp_path / "dinov2"
    tiny.dinov2().save_pretrained(backbone)
    BitImageProcessor(size={"shortest_edge": 112}, crop_size=112).save_pretrained(backbone)
    common = ["--pipeline", "tiny-cogvideox-2b", "--prompts", few_prompts, "--guidance", 1]
    common += ["--frames", 9, "--resolution", 64, "--count", 2]
    folders = [tmp_path / "student", tmp_path / "teacher"]
    for steps, out in zip((1, 2), folders, strict=True):
        call(sample.main, sample.Config, *common, "--steps", steps, "--out", out)
    how = ("--metrics", "diversity,distance,frechet", "--features", backbone)
    call(score.main, score.Config, *folders, *how, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    row = found["rows"]["student"]
    assert row["diversity"] is None and row["distance"]["value"] > 0
    assert any("several images" in note for note in found["notes"])
    frames = score.Sampled(folders[0]).pictures[0]
    assert len(frames) == 8 and frames[0].name == "000.png" and frames[-1].name == "008.png"
    vision = score.Vision("features", str(backbone), "cpu", 3)
    one = vision.features([frames], lengths_of_one=False)
    each = vision.features([[frame] for frame in frames], lengths_of_one=False)
    torch.testing.assert_close(one[0], each.mean(0), atol=1e-5, rtol=1e-4)
    assert not math.isnan(row["frechet"]["value"])


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.fixture
def damaged(images, tmp_path):
    """A copy of the student's folder, to damage."""
    folder = tmp_path / "damaged"
    shutil.copytree(images["student"], folder)
    return folder


@pytest.fixture
def said(capsys, images, tmp_path):
    """The line that a call with these folders and flags prints; it writes nothing."""

    def say(*args, folders=("student", "teacher")):
        where = [images.get(name, name) for name in folders]
        line = refused(capsys, score.main, score.Config, *where, *args, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
        return line

    return say


def test_an_image_that_is_missing_or_truncated(said, damaged):
    path = damaged / "000004.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "000004.png is truncated" in said(folders=(damaged, "teacher"))
    path.unlink()
    assert "000004.png is missing" in said(folders=(damaged, "teacher"))


def test_manifests_that_do_not_match(said, damaged):
    path = damaged / "manifest.json"
    m = json.loads(path.read_text())
    m["images"][7]["seed"] = 1234
    path.write_text(json.dumps(m))
    line = said(folders=(damaged, "teacher"))
    assert "do not match: image 7" in line and "1234" in line
    m["images"] = m["images"][:5]
    path.write_text(json.dumps(m))
    assert "5 images and 60" in said(folders=(damaged, "teacher"))


def test_a_folder_that_is_unfinished_or_none(said, damaged, tmp_path):
    path = damaged / "manifest.json"
    m = json.loads(path.read_text())
    path.write_text(json.dumps(m | {"complete": False, "images": []}))
    assert "not finished" in said(folders=(damaged, "teacher"))
    path.write_text(json.dumps(m | {"images": ["what"]}))
    assert "manifest is damaged" in said(folders=(damaged, "teacher"))
    m["images"][3]["seconds"] = "long"
    path.write_text(json.dumps(m))
    assert "manifest is damaged" in said(folders=(damaged, "teacher"))
    assert "manifest.json is missing" in said(folders=(tmp_path / "nowhere", "teacher"))
    assert "two folders at least" in said(folders=("student",))
    assert "two folders at least" in said(folders=())


def test_metrics_that_cannot_be(said):
    line = said("--metrics", "clip,frehcet")
    assert "frehcet: unknown" in line and "did you mean frechet?" in line
    for metric, (package, how) in score.PACKAGES.items():
        if not importlib.util.find_spec(package):
            line = said("--metrics", f"clip,{metric}")
            assert f"--metrics {metric} needs" in line and "pip install" in how and how in line


def test_networks_that_cannot_be_had(said, clip, tmp_path):
    assert "--clip nobody/nothing: cannot be loaded" in said("--clip", "nobody/nothing")
    tiny.dinov2().save_pretrained(tmp_path / "dinov2")
    line = said("--metrics", "pick", "--pick", tmp_path / "dinov2")
    assert "a dinov2, not a clip" in line
    tiny.clip_text(vocab_size=10).save_pretrained(tmp_path / "text")
    shutil.copy(clip / "preprocessor_config.json", tmp_path / "text")
    line = said("--metrics", "distance", "--features", tmp_path / "text")
    assert f"--features {tmp_path / 'text'}: cannot be loaded" in line
    wordless = tmp_path / "wordless"
    shutil.copytree(clip, wordless, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "its tokenizer is missing" in said("--metrics", "clip", "--clip", wordless)
    half = tmp_path / "half"
    shutil.copytree(clip, half)
    model = CLIPModel.from_pretrained(clip)
    kept = {n: x for n, x in model.state_dict().items() if "visual_projection" not in n}
    model.save_pretrained(half, state_dict=kept)
    assert "its weights are incomplete" in said("--metrics", "clip", "--clip", half)


def test_prompts_and_real_images_that_are_not_there(said, tmp_path):
    (tmp_path / "foxes.txt").write_text("a red fox\n")
    assert "no image of the prompt" in said("--prompts", tmp_path / "foxes.txt")
    assert "no such folder" in said("--real", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "at least two images" in said("--real", tmp_path / "empty")


def test_a_full_disk_leaves_no_half_of_the_scores(clip, images, tmp_path, capsys):
    """Room for the tables, none for the sheet: the same call does it when there is more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(SystemExit) as e:
            again(images, clip, tmp_path / "out", "--metrics", "clip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.code == 1 and "File too large" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]
    again(images, clip, tmp_path / "out", "--metrics", "clip")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_scores_are_not_written_over(capsys, images, clip, scores):
    before = {p.name: p.read_bytes() for p in scores.iterdir()}
    folders = [images["student"], images["teacher"]]
    line = refused(capsys, score.main, score.Config, *folders, *flags(clip), "--out", scores)
    assert "not empty" in line
    assert before == {p.name: p.read_bytes() for p in scores.iterdir()}
