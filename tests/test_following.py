"""What a run is followed by: sheets that compare, curves, lines of progress."""

import fcntl
import importlib.util
import io
import os
import re
import shutil
import struct
import termios
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, ended, read_log, refused, same_log, script, start, tree
from diffusers import DiffusionPipeline
from PIL import Image

import adm
import adp
import data
import models
import tools.curves
from ode import Draw, teacher_sample, with_guidance
from runtime import curves, sheets
from runtime.lines import Lines
from runtime.optimize import exchanged
from runtime.progress import Progress
from runtime.settings import BadInput

MODEL = "tiny-sdxl"
STEPS = 2  # of the student
SEED = 5
TENSORBOARD = bool(importlib.util.find_spec("tensorboard"))


def adm_run(encoded, out, *flags):
    """A run of two iterations, in which the student moves and has an average."""
    args = ["--model", MODEL, "--prompts", encoded[MODEL], "--out", out, "--seed", SEED]
    args += ["--iterations", 2, "--batch-size", 2, "--accumulate", 2, "--head-width", 8]
    args += ["--student-steps", STEPS, "--lr-student", 1e-2, "--ema", 0.5, "--checkpoint-every", 1]
    call(adm.main, adm.Config, *args, *flags)


@pytest.fixture(scope="module")
def drawn():
    """What `grid` was given while `followed` was made."""
    return []


@pytest.fixture(scope="module")
def followed(tmp_path_factory, encoded, drawn):
    """A run with a sheet after each of its iterations."""
    out = tmp_path_factory.mktemp("followed") / "run"
    grid = sheets.grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheets, "grid", lambda *args: drawn.append(args) or grid(*args))
        adm_run(encoded, out, "--sample-every", 1)
    return out


def sheet(folder, name):
    return np.asarray(Image.open(folder / "samples" / f"{name}.png").convert("RGB")).astype(int)


def tile(picture, row, column, rows=2, columns=sheets.IMAGES):
    """The image (128, 128, 3) in this place: tiles stand at the right and at the bottom."""
    pitch = 128 + 6
    y = picture.shape[0] - (rows - row) * pitch
    x = picture.shape[1] - (columns - column) * pitch
    return picture[y : y + 128, x : x + 128]


def enlarged(image):
    """An image (64, 64, 3) as a tile."""
    return image.repeat(2, 0).repeat(2, 1).astype(int)


# --- Sheets ---------------------------------------------------------------------------------------


def test_a_sheet_shows_what_the_exported_pipeline_makes(followed, few_prompts):
    """The stock pipeline from the same noise, in all its steps: the average's, after the last one.

    Column 5 is the second prompt again, with noise of its own.
    """
    pipe = DiffusionPipeline.from_pretrained(followed / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    prompts = Lines(few_prompts)
    picture = sheet(followed, "000002")
    for column in (0, 5):
        draw = Draw((SEED, 3), [column])
        how = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "np"}
        how["latents"] = draw.normal((4, 32, 32))  # (1, 4, 32, 32)
        how["generator"] = draw.generators[0]
        (image,) = pipe(prompts[column % 4], **how).images  # (64, 64, 3) in [0, 1]
        apart = np.abs(tile(picture, 0, column) - enlarged((image * 255).round()))
        assert apart.max() <= 2


def test_below_it_stands_the_teacher_from_the_same_noise(followed, encoded, teachers):
    family = teachers[MODEL]
    prompts = data.Prompts(encoded[MODEL], family)
    denoiser = models.load_denoiser(family)
    with torch.no_grad():
        guided = with_guidance(denoiser, prompts[[2]], prompts.unconditional(1), family.guidance)
        x_T = Draw((SEED, 3), [2]).normal((4, 32, 32))  # (1, 4, 32, 32)
        x_0 = teacher_sample(guided, family.schedule, x_T, 4)
        (image,) = family.decode(family.vae(), x_0)  # (3, 64, 64)
    image = image.clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(tile(sheet(followed, "000001"), 1, 2) - enlarged(image)).max() <= 2


def test_two_sheets_of_a_run_flip(followed):
    """Of one size; nothing but the title and the student's images moves."""
    a, b = sheet(followed, "000001"), sheet(followed, "000002")
    assert a.shape == b.shape
    changed = (a != b).any(-1)  # (H, W)
    for column in range(sheets.IMAGES):
        assert tile(a, 0, column).std() > 1
        assert (tile(a, 0, column) != tile(b, 0, column)).any()
    top = a.shape[0] - 2 * (128 + 6)
    student = np.zeros_like(changed)
    student[top : top + 128, -8 * (128 + 6) :] = True
    title = np.zeros_like(changed)
    title[:top, : a.shape[1] - 8 * (128 + 6)] = True
    assert changed[title].any()
    assert not changed[~(student | title)].any()


def test_captions_are_the_prompts_and_ts(followed, drawn):
    """Of the batch's sheet the times, all micro-batches of it."""
    _, _, (title, captions, rows), (of_batch, times, batch) = drawn
    fox, dogs, soup, river = "a red fox", "two dogs on a hill", "a bowl of soup", "ein Fluß"
    assert captions == 2 * [fox, dogs, soup, river]
    assert title == "iteration 2"
    assert list(rows) == ["student's average, 2 steps", "teacher, 4 steps, guidance 5"]
    assert of_batch == "iteration 2, training batch"
    assert re.fullmatch("student, step [12] of 2", list(batch)[0])
    assert list(batch)[1:] == ["teacher's x_0", "fake score's x_0"]
    assert [len(images) for images in batch.values()] == [2, 2, 2]
    assert all(re.fullmatch(r"t = \d+", time) for time in times) and len(set(times)) == 2


def test_sheets_do_not_disturb_training(followed, encoded, tmp_path):
    adm_run(encoded, tmp_path / "out", "--sample-every", 0)
    same_log(followed, tmp_path / "out", atol=0, rtol=0)
    checkpoints = [tree(run / "checkpoints") for run in (followed, tmp_path / "out")]
    assert checkpoints[0] == checkpoints[1]
    assert not (tmp_path / "out" / "samples").exists()


def test_a_resumed_run_draws_the_same_sheet(followed, encoded, tmp_path):
    shutil.copytree(followed, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "000002")
    shutil.rmtree(tmp_path / "out" / "samples")
    adm_run(encoded, tmp_path / "out", "--sample-every", 1, "--resume")
    drawn = tree(tmp_path / "out" / "samples")
    assert sorted(drawn) == ["000002-batch.png", "000002.png"]
    before = tree(followed / "samples")
    assert all(before[name] == content for name, content in drawn.items())


@pytest.mark.skipif(not TENSORBOARD, reason="the optional tensorboard is not here")
def test_tensorboard_has_the_log_and_the_sheets(followed, encoded, tmp_path):
    """From when it is asked for; of iteration 4, which comes twice, the second, without a sheet."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    shutil.copytree(followed, out)
    flags = ("--iterations", 4, "--tensorboard", "--resume")
    adm_run(encoded, out, *flags, "--sample-every", 1)
    shutil.rmtree(out / "checkpoints" / "000004")
    adm_run(encoded, out, *flags, "--sample-every", 0)
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    log = read_log(out)
    numbers = log.pop("iteration")
    assert sorted(events.Tags()["scalars"]) == sorted(log)
    for name, column in log.items():
        rows = zip(numbers, column, strict=True)
        given = [(i, x) for i, x in rows if i > 2 and x is not None]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(i, pytest.approx(x, rel=1e-6)) for i, x in given], name
    for tag, kind in (("samples", ""), ("samples-batch", "-batch")):
        found = events.Images(tag)
        assert [event.step for event in found] == [3]
        shown = Image.open(io.BytesIO(found[0].encoded_image_string)).convert("RGB")
        assert (np.asarray(shown) == sheet(out, f"000003{kind}")).all()


@pytest.mark.skipif(TENSORBOARD, reason="the optional tensorboard is here")
def test_tensorboard_is_asked_for_before_anything_is_loaded_or_written(capsys, tmp_path):
    for stage in (adm, adp):
        flags = ("--model", "no-such-model", "--tensorboard", "--out", tmp_path / "out")
        assert "pip install tensorboard" in refused(capsys, stage.main, stage.Config, *flags)
    assert not (tmp_path / "out").exists()


def test_weights_are_exchanged_and_back_bit_for_bit():
    p = torch.nn.Parameter(torch.tensor([0.1, 0.2]))
    average = {"p": torch.tensor([3.0, 4.0])}
    with pytest.raises(KeyError), exchanged(average, {"p": p}):
        assert p.tolist() == [3, 4]
        raise KeyError
    assert torch.equal(p.detach(), torch.tensor([0.1, 0.2]))
    assert average["p"].tolist() == [3, 4]


def test_a_video_has_strips_and_a_gif(tmp_path):
    """The last frame is in the strip, and every frame in the GIF."""
    videos = np.zeros((2, 9, 8, 8, 3), np.uint8)  # (N, frames, H, W, 3)
    videos[:, 8] = 200
    rows = {"student": videos, "teacher": videos}
    strips = np.asarray(sheets.strips("iteration 1", ["a fox", "a dog"], rows))
    for row in (0, 1):
        assert (tile(strips, row, 7) == 200).all()
        assert (tile(strips, row, 0) == 0).all()
    frames = sheets.moving("iteration 1", ["a fox", "a dog"], rows)
    assert len(frames) == 9
    first, last = np.asarray(frames[0]), np.asarray(frames[8])
    assert (tile(first, 1, 1, columns=2) == 0).all() and (tile(last, 1, 1, columns=2) == 200).all()


def test_prompts_of_an_earlier_version_are_numbered(encoded, few_prompts, teachers, tmp_path):
    """And encoding goes on where it was, and knows them from then on."""
    folder = tmp_path / "prompts"
    shutil.copytree(encoded[MODEL], folder)
    path = folder / "manifest.json"
    path.write_text(re.sub(r',\s*"texts": \[.*?\]', "", path.read_text(), flags=re.DOTALL))
    assert data.Prompts(folder, teachers[MODEL]).texts([0, 2]) == ["prompt 1", "prompt 3"]
    call(
        data.encode, data.EncodeConfig, "--model", MODEL, "--prompts", few_prompts, "--out", folder
    )
    assert data.Prompts(folder, teachers[MODEL]).texts([0, 2]) == ["a red fox", "a bowl of soup"]


def test_a_long_caption_is_cut_and_none_is_too_wide():
    lines = sheets.wrap("word " * 60 + "x" * 100, 128, 13)
    assert len(lines) == 5 and lines[-1].endswith("…")
    (word,) = sheets.wrap("x" * 100, 128, 13)
    assert word.endswith("…")
    assert max(sheets.font(13).getlength(line) for line in [*lines, word]) <= 128


# --- Curves ---------------------------------------------------------------------------------------

LOG = """iteration,loss_generator,loss_fake,d_accuracy,grad_norm_student,skipped,seconds
1,0.5,2.0,0.5,,0,0.1
2,-0.5,nan,0.75,1.5,1,0.1
3,0.1,0.5,0.25,0.5,0,0.2
"""


def log_of(folder, text=LOG):
    folder.mkdir()
    (folder / "log.csv").write_text(text)
    return folder


def test_a_run_has_its_curves(followed):
    assert Image.open(followed / "curves.png").size[0] > 1000


def test_curves_of_two_runs_are_in_one_picture(tmp_path):
    runs = [log_of(tmp_path / "a"), log_of(tmp_path / "b", LOG.replace("d_accuracy", "x0_std"))]
    figure = curves.draw(runs, tmp_path / "curves.png")
    panels = {axis.get_title(loc="left").split(" ")[0]: axis for axis in figure.axes}
    columns = ("loss_generator", "d_accuracy", "loss_fake", "grad_norm_student", "x0_std")
    assert set(columns) <= set(panels)
    assert panels["loss_fake"].get_yscale() == "log"
    assert panels["loss_generator"].get_yscale() == "linear"

    def drawn(name, color):
        lines = panels[name].get_lines()
        return [line.get_ydata() for line in lines if line.get_color() == color]

    faint, mean = drawn("loss_generator", "C0")
    assert faint.tolist() == mean.tolist() == [0.5, -0.5, 0.1]
    assert len(drawn("loss_generator", "C1")) == 2
    assert len(drawn("d_accuracy", "C0")) == 2 and not drawn("d_accuracy", "C1")
    ticks = [line for line in panels["seconds"].get_lines() if line.get_color() == "red"]
    assert [line.get_xdata().tolist() for line in ticks] == [[2], [2]]
    (legend,) = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    words = [text.get_text() for text in legend.get_texts()]
    assert any(word.endswith("/a") for word in words) and "an update was skipped" in words


def test_the_average_leaves_out_what_is_missing():
    y = np.array([1.0, 2.0, np.nan, 4.0, np.inf])
    mean = curves.smooth(y, 3)
    assert mean[[0, 1, 3]].tolist() == [1.5, 1.5, 4.0]
    assert np.isnan(mean[[2, 4]]).all()
    assert curves.smooth(np.arange(5.0), 5)[2] == 2
    assert curves.window_of(300) == 11 and curves.window_of(10) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        LOG.splitlines()[0],
        LOG + "4,one,,,,0,1\n",
        "a,b\n1,2\n",
        "\0",
        LOG + "4,0.1\n" + LOG[-20:],
    ],
)
def test_a_damaged_log_is_refused(tmp_path, text):
    with pytest.raises(BadInput, match="log.csv is missing, empty or damaged"):
        curves.read(log_of(tmp_path / "run", text))


def test_a_row_that_was_cut_off_is_left_out(tmp_path):
    log = curves.read(log_of(tmp_path / "run", LOG + "4,0.1"))
    assert log["iteration"].tolist() == [1, 2, 3]


def test_the_command_draws_any_number_of_runs(tmp_path):
    run = log_of(tmp_path / "run")
    done = script(tmp_path, "tools/curves.py", run, tmp_path / "run", "--out", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_the_command_writes_nothing_over(tmp_path, capsys, monkeypatch):
    run = log_of(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for words in (["run", "--out", "run/log.csv"], ["none"], ["run", "--outt", "a.png"], []):
        with pytest.raises(SystemExit) as e:
            tools.curves.main(words)
        assert e.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (run / "log.csv").read_text() == LOG
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- Progress -------------------------------------------------------------------------------------


def rows(*numbers):
    """Rows of a log; of the first the student has no loss yet."""
    found = []
    for i in numbers:
        loss = None if i == 1 else float(i)
        found.append({"iteration": i, "loss_generator": loss, "d_accuracy": 0.5, "skipped": i == 3})
    return found


def test_where_stderr_is_no_terminal_there_are_lines(capsys):
    cfg = SimpleNamespace(loss="adm", iterations=5, log_every=2)
    progress = Progress(cfg, 0, main=True)
    for row in rows(1, 2, 3, 4, 5):
        progress.show(row)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    shape = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  adm %s/5  \S+ (it/s|s/it)  ETA \d\d:\d\d  %s"
    said = {
        "2": r"loss_generator 2  d_accuracy 0\.5",
        "4": r"loss_generator 3\.5  d_accuracy 0\.5  skipped 1",  # means since the line before
        "5": r"loss_generator 5  d_accuracy 0\.5",
    }
    assert len(lines) == len(said)
    for line, (done, figures) in zip(lines, said.items(), strict=True):
        assert re.fullmatch(shape % (done, figures), line), line


@pytest.mark.parametrize("log_every, main", [(0, True), (1, False)])
def test_silence_where_it_is_asked_for_and_on_other_ranks(capsys, log_every, main):
    cfg = SimpleNamespace(loss="adm", iterations=2, log_every=log_every)
    progress = Progress(cfg, 0, main)
    for row in rows(1, 2):
        progress.show(row)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_bar_has_the_figures(monkeypatch):
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))  # lines, columns
    with open(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        progress = Progress(SimpleNamespace(loss="adm", iterations=3, log_every=1), 1, main=True)
        for row in rows(2, 3):
            progress.show(row)
        progress.close()
    parts = []
    with suppress(OSError):  # the terminal's end
        while True:
            parts.append(os.read(master, 100_000))
    os.close(master)
    said = b"".join(parts).decode()
    assert "3/3" in said and "loss_generator=3, d_accuracy=0.5, skipped=1" in said
    assert "ETA" not in said


def test_a_run_says_how_far_it_is(encoded, tmp_path):
    """A real one, whose stderr is a file: once an iteration, each with what log.csv has."""
    out = tmp_path / "out"
    args = ["--model", "tiny-sd3", "--prompts", encoded["tiny-sd3"], "--out", out]
    args += ["--iterations", 2, "--batch-size", 2, "--head-width", 8, "--student-steps", 1]
    args += ["--sample-every", 0, "--log-every", 1]
    codes, (said,) = ended(*start(tmp_path, adm.main, adm.Config, args))
    assert codes == [0]
    losses = [f"loss_generator {x:.3g}" for x in read_log(out)["loss_generator"]]
    lines = [line for line in said.splitlines() if " ETA " in line]
    assert len(lines) == 2
    assert all(loss in line for line, loss in zip(lines, losses, strict=True))
