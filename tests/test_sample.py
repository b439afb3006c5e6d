"""tools/sample.py: pictures by seed, what a student says of itself, going on, ranks, mistakes."""

import importlib.util
import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import call, ended, played, refused, script, start
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import families.export
import models
from families.tiny import build
from tools import sample

TEACHER = ("--pipeline", "digits", "--steps", 2, "--batch-size", 4)


@pytest.fixture(scope="module")
def digits_prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "digits.txt"
    path.write_text("a handwritten zero\na handwritten one\na handwritten two\n")
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student of the digits in three steps, exported: steps between which noise is drawn."""
    return exported(tmp_path_factory.mktemp("student") / "pipeline", 3)


@pytest.fixture(scope="module")
def sampled(student, digits_prompts, tmp_path_factory):
    """Five images of three prompts by that student, in one batch."""
    out = tmp_path_factory.mktemp("sampled") / "images"
    draw(out, digits_prompts, "--pipeline", student, "--count", 5, "--batch-size", 5)
    return out


def exported(folder, steps):
    """The digits teacher as its own student in so many steps."""
    family = families.load_teacher("digits")
    denoiser = models.load_denoiser(family)
    shape = family.latent_shape()
    families.export.export_pipeline(denoiser, family.schedule, steps, shape, folder)
    return folder


def draw(out, prompts, *flags):
    call(sample.main, sample.Config, "--prompts", prompts, "--out", out, "--seed", 7, *flags)
    return out


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def pictures(folder):
    """{name: (H, W, 3) float} of a folder's images."""
    paths = sorted(folder.glob("*.png"))
    return {p.name: np.asarray(Image.open(p).convert("RGB"), float) for p in paths}


def assert_same_pictures(a, b):
    """To a level of 255: a batch of another size rounds otherwise."""
    a, b = pictures(a), pictures(b)
    assert a.keys() == b.keys() and a
    assert max(np.abs(a[name] - b[name]).max() for name in a) <= 1


def test_the_manifest_says_how_each_image_was_made(sampled):
    m = manifest(sampled)
    zero, one, two = "a handwritten zero", "a handwritten one", "a handwritten two"
    rows = m["images"]
    assert [row["prompt"] for row in rows] == [zero, one, two, zero, one]
    assert [row["seed"] for row in rows] == [7, 8, 9, 10, 11]
    assert [row["file"] for row in rows] == sorted(pictures(sampled))
    assert all(row["seconds"] > 0 for row in rows)
    assert m["complete"] and m["count"] == 5 and m["teacher"] == "digits"


def test_steps_and_guidance_are_the_students_own(sampled):
    for row in manifest(sampled)["images"]:
        assert (row["steps"], row["guidance"]) == (3, 1.0)
    assert manifest(sampled)["call"]["max_sequence_length"] == 5


def test_an_image_is_that_of_the_stock_call_with_its_seed(student, sampled):
    """Of a student that draws noise between its steps, from what was a batch of five."""
    pipe = DiffusionPipeline.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    how = json.loads((student / "model_index.json").read_text())["_sampling"]
    stock = pipe("a handwritten zero", generator=torch.manual_seed(10), **how).images[0]
    ours = pictures(sampled)["000003.png"]
    assert np.abs(np.asarray(stock, float) - ours).max() <= 1
    # Noise between the steps counts, and is not the noise that the image began with.
    for between in (10, 11):
        torch.manual_seed(between)
        first = torch.Generator().manual_seed(10)
        other = pipe("a handwritten zero", generator=first, **how).images[0]
        assert np.abs(np.asarray(other, float) - ours).max() > 20


def test_a_second_call_goes_on(student, sampled, digits_prompts, tmp_path):
    """It makes what is missing, truncated, or more, in other batches, and leaves the rest."""
    out = tmp_path / "images"
    flags = ("--pipeline", student, "--batch-size", 2)
    draw(out, digits_prompts, *flags, "--count", 4)
    whole = (out / "000003.png").read_bytes()
    (out / "000001.png").unlink()
    (out / "000003.png").write_bytes(whole[:-40])
    kept = (out / "000000.png").stat().st_mtime_ns
    draw(out, digits_prompts, *flags, "--count", 5)
    assert_same_pictures(out, sampled)
    assert (out / "000000.png").stat().st_mtime_ns == kept
    assert [row["seed"] for row in manifest(out)["images"]] == [7, 8, 9, 10, 11]


def test_two_ranks_make_the_same_images(student, sampled, digits_prompts, tmp_path):
    out = tmp_path / "images"
    flags = ["--pipeline", student, "--prompts", digits_prompts, "--seed", 7, "--count", 5]
    args = [*flags, "--batch-size", 2, "--out", out]
    codes, said = ended(*start(tmp_path, sample.main, sample.Config, args, world=2))
    assert codes == [0, 0], said
    assert_same_pictures(out, sampled)
    assert len(manifest(out)["images"]) == 5


def test_student_and_teacher_begin_with_the_same_noise(digits_prompts, tmp_path):
    """In one step the teacher and its copy, whose scheduler is the student's, make the same."""
    student = exported(tmp_path / "pipeline", 1)
    a = draw(tmp_path / "student", digits_prompts, "--pipeline", student)
    plain = ("--pipeline", "digits", "--steps", 1, "--guidance", 1)
    b = draw(tmp_path / "teacher", digits_prompts, *plain)
    assert_same_pictures(a, b)


def test_a_teacher_is_sampled_as_its_pipeline_or_recipe_says(digits_prompts, tmp_path):
    """28 steps are the stock pipeline's, CFG 2 is the recipe's, 5 tokens are the tokenizer's."""
    out = draw(tmp_path / "out", digits_prompts, "--pipeline", "digits", "--count", 1)
    call_made = manifest(out)["call"]
    assert call_made == {
        "num_inference_steps": 28,
        "guidance_scale": 2.0,
        "max_sequence_length": 5,
    }


def test_a_video_is_a_folder_of_frames(few_prompts, tmp_path):
    flags = ("--steps", 1, "--guidance", 1, "--frames", 9, "--resolution", 64, "--count", 1)
    out = draw(tmp_path / "out", few_prompts, "--pipeline", "tiny-cogvideox-2b", *flags)
    frames = sorted((out / "000000").glob("*.png"))
    assert len(frames) == 9 and Image.open(frames[0]).size == (64, 64)
    assert played(out / "000000" / "video.gif") == 9 * 120  # in hundredths of a second
    assert manifest(out)["images"][0]["file"] == "000000"


VIDEO = ("--pipeline", "tiny-cogvideox-2b", "--steps", 1, "--guidance", 1, "--frames", 9)
VIDEO += ("--resolution", 32)
ENCODER = importlib.util.find_spec("imageio_ffmpeg")


@pytest.mark.skipif(not ENCODER, reason="the optional imageio-ffmpeg is not here")
def test_videos_as_vbench_looks_for_them(tmp_path):
    """Five of each prompt, of other seeds; one that is lost is made again, and no other."""
    from imageio_ffmpeg import read_frames

    (tmp_path / "prompts.txt").write_text("a red fox.\na red fox.\nein Fluß, 3D\n")
    out = draw(tmp_path / "out", tmp_path / "prompts.txt", *VIDEO, "--vbench")
    found = {p.name: p for p in (out / "vbench").iterdir()}
    assert len(manifest(out)["images"]) == 10
    names = ("a red fox.", "ein Fluß, 3D")
    assert sorted(found) == sorted(f"{name}-{n}.mp4" for name in names for n in range(5))
    # Video i is of prompt i mod 2 and its number is i // 2: a copy of its frames, but for H.264.
    second = found["ein Fluß, 3D-1.mp4"]
    assert manifest(out)["images"][3]["prompt"] == names[1]
    frames = np.stack(list(pictures(out / "000003").values()))  # (9, H, W, 3)
    about, *read = read_frames(second)
    assert about["fps"] == 8 and about["size"] == (32, 32)
    video = np.stack([np.frombuffer(x, np.uint8) for x in read]).reshape(frames.shape).astype(float)
    other = np.stack(list(pictures(out / "000005").values()))
    assert np.abs(video - frames).mean() < 0.5 * np.abs(video - other).mean()

    kept = found["a red fox.-0.mp4"].stat().st_mtime_ns
    second.unlink()
    draw(out, tmp_path / "prompts.txt", *VIDEO, "--vbench")
    assert second.exists() and found["a red fox.-0.mp4"].stat().st_mtime_ns == kept


@pytest.fixture
def encoder(monkeypatch):
    """In place of imageio-ffmpeg, whether it is here or not: a file of the rate alone."""

    def write_frames(path, size, fps, **how):
        path.write_text(str(fps))
        while True:
            yield

    module = ModuleType("imageio_ffmpeg")
    module.__spec__ = ModuleSpec("imageio_ffmpeg", None)
    module.write_frames = write_frames
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", module)


@pytest.mark.parametrize(
    "model, more, fps, shown",
    [
        ("tiny-cogvideox-2b", {}, 8, 120),
        ("tiny-wan", {}, 16, 60),
        ("tiny-wan", {"expand_timesteps": True}, 24, 40),  # by which Wan 2.2's 5B is known
    ],
)
def test_a_video_has_its_models_rate(encoder, tmp_path, model, more, fps, shown):
    """The GIF's is rounded, for its file counts hundredths of a second."""
    folder = shutil.copytree(build(model), tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **more}))
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    flags = ("--pipeline", folder, *VIDEO[2:], "--vbench", "--count", 1)
    out = draw(tmp_path / "out", tmp_path / "prompts.txt", *flags)
    assert (out / "vbench" / "a red fox-0.mp4").read_text() == str(fps)
    assert played(out / "000000" / "video.gif") == 9 * shown


def test_a_teacher_of_a_size_of_its_own_is_sampled_at_that():
    """Wan 2.2's 5B, whose pipeline's call has Wan 2.1's by default."""
    pipe = DiffusionPipeline.from_pretrained(build("tiny-wan"))
    index = {"_class_name": "WanPipeline", "expand_timesteps": True}
    cfg = sample.Config(pipeline="wan-2.2-5b", resolution="352x640")
    found = sample.call_of(pipe, index, cfg)
    assert found["num_frames"] == 121 and found["guidance_scale"] == 5.0
    assert (found["height"], found["width"]) == (352, 640)  # a flag comes first


# --- Mistakes -------------------------------------------------------------------------------------


def said(capsys, *args):
    return refused(capsys, sample.main, sample.Config, *args)


@pytest.mark.parametrize(
    "prompts, flags, problem",
    [
        ("a fox\na dog/cat\n", VIDEO, "prompt 2 is too long for a file's name, or with a slash"),
        ("ß" * 125 + "\n", VIDEO, "prompt 1 is too long"),
        ("a fox\na dog\n", (*VIDEO, "--count", 5), "--count 5: --vbench wants as many of each"),
    ],
)
def test_what_vbench_cannot_take_is_refused(capsys, tmp_path, prompts, flags, problem):
    (tmp_path / "prompts.txt").write_text(prompts)
    flags = (*flags, "--prompts", tmp_path / "prompts.txt", "--vbench", "--out", tmp_path / "out")
    assert problem in said(capsys, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not ENCODER, reason="the optional imageio-ffmpeg is not here")
def test_vbench_takes_no_images(capsys, digits_prompts, tmp_path):
    flags = ("--prompts", digits_prompts, "--vbench", "--out", tmp_path / "out")
    assert "digits makes images, not videos" in said(capsys, *TEACHER, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(ENCODER, reason="the optional imageio-ffmpeg is here")
def test_vbench_takes_an_optional_package(capsys, tmp_path):
    line = said(capsys, "--pipeline", "no-such-model", "--vbench", "--out", tmp_path / "out")
    assert "pip install imageio-ffmpeg" in line and not (tmp_path / "out").exists()


def test_other_images_in_the_folder_are_left_alone(capsys, sampled, student, digits_prompts):
    before = {p.name: p.read_bytes() for p in sampled.iterdir()}
    flags = ("--prompts", digits_prompts, "--out", sampled, "--seed", 7, "--count", 5)
    line = said(capsys, "--pipeline", student, *flags, "--guidance", 2)
    assert "other settings" in line and "call" in line
    assert "weights_sha256" in said(capsys, *TEACHER, *flags)
    assert before == {p.name: p.read_bytes() for p in sampled.iterdir()}


def test_a_folder_that_holds_something_else_is_left_alone(capsys, digits_prompts, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    line = said(capsys, *TEACHER, "--prompts", digits_prompts, "--out", tmp_path)
    assert "not empty" in line and [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_size_that_is_not_taken_can_be_corrected(capsys, digits_prompts, tmp_path):
    out = tmp_path / "out"
    flags = (*TEACHER, "--prompts", digits_prompts, "--count", 1, "--out", out)
    assert "divisible" in said(capsys, *flags, "--resolution", 7)
    assert "pixels" in said(capsys, *flags, "--resolution", "big")
    call(sample.main, sample.Config, *flags)
    assert len(pictures(out)) == 1


@pytest.mark.parametrize(
    "name, problem",
    [
        (None, "which?"),
        ("no-such-model", "unknown model"),
        ("nobody/no-such-pipeline", "cannot be fetched"),
    ],
)
def test_a_pipeline_that_is_not_there(capsys, tmp_path, name, problem):
    flags = () if name is None else ("--pipeline", name)
    assert problem in said(capsys, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_has_its_own_number_of_steps(capsys, student, tmp_path):
    line = said(capsys, "--pipeline", student, "--steps", 1, "--out", tmp_path / "out")
    assert "student of 3" in line and not (tmp_path / "out").exists()


def test_a_pipeline_without_weights(student, tmp_path):
    """As a user sees it: diffusers' own lines go past what a test catches of stderr."""
    folder = tmp_path / "pipeline"
    shutil.copytree(student, folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    flags = ("--pipeline", folder, "--out", tmp_path / "out")
    done = script(tmp_path, "tools/sample.py", *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "no complete diffusers pipeline" in done.stderr and not (tmp_path / "out").exists()


def fewer(file):
    """Take the first two tensors out of a file of weights."""
    tensors = load_file(file)
    for name in sorted(tensors)[:2]:
        del tensors[name]
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    "part, damage, problem",
    [
        ("model_index.json", Path.unlink, "model_index.json is missing"),
        ("tokenizer", shutil.rmtree, "tokenizer/ is missing"),
        ("tokenizer/tokenizer.json", Path.unlink, "words of tokenizer are missing"),
        ("tokenizer_3/tokenizer.json", Path.unlink, "words of tokenizer_3 are missing"),
        ("vae/diffusion_pytorch_model.safetensors", fewer, "weights of vae are missing"),
        ("text_encoder_3/model.safetensors", fewer, "weights of text_encoder_3 are missing"),
    ],
)
def test_a_pipeline_that_lacks_something(capsys, student, tmp_path, part, damage, problem):
    """Libraries would take random weights, or no words, in place of some of these."""
    folder = tmp_path / "pipeline"
    shutil.copytree(student, folder)
    damage(folder / part)
    assert problem in said(capsys, "--pipeline", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
