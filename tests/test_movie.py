"""The pictures that move: frames of a recording, recordings of real runs, and what is committed."""

import re
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, call
from PIL import Image

import data
import families
import toy.digits_experiment as digits
import toy.run as toy
from toy import movie
from toy.digits_samples import RESULTS, open_run

torch.set_num_threads(1)  # matrices are small: more threads only wait for each other

TINY = {
    "mixture": "ring4-rare",
    "seeds": 1,
    "iterations": 8,
    "width": 16,
    "head_width": 8,
}
MILLISECONDS = [150, 150, 2000]
LIMIT = 3e6  # bytes of a picture


def frames_of(path):
    """(pictures (frames, h, w, 3), milliseconds of each) of a GIF."""
    frames, durations = [], []
    with Image.open(path) as image:
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.stack(frames), durations


def small_film(updates):
    """Of points that go out to four modes, or in one method stay; (4, frames, 50, 2)."""
    rng = np.random.default_rng(0)
    modes = 4 * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    target = 100 * modes[rng.integers(4, size=50)]  # (50, 2)
    points = np.linspace(0, 1, len(updates))[:, None, None] * target  # (frames, 50, 2)
    return {
        "updates": np.array(updates),
        "stage_1": np.array(updates[1]),
        "points": np.stack([0 * points, points, points, points]),
        "tv": rng.random((4, len(updates))),
        "covered": rng.integers(5, size=(4, len(updates))),
        "target": target,
        "target_tv": np.array(0.01),
        "modes": modes,
    }


def test_a_small_recording_moves(tmp_path):
    path = tmp_path / "training.gif"
    movie.draw(movie.training(small_film([0, 10, 1000])), path)
    frames, durations = frames_of(path)
    assert durations == MILLISECONDS and path.stat().st_size <= LIMIT
    _, height, width, _ = frames.shape
    panels = [int(width * i / 5) for i in range(6)]
    inside = slice(int(0.15 * height), int(0.75 * height))
    for i, (left, right) in enumerate(zip(panels, panels[1:], strict=False)):
        panel = frames[:, inside, left:right]
        moves = [not np.array_equal(panel[0], other) for other in panel[1:]]
        assert moves == [i > 1] * 2, i  # the teacher and the method that stays do not
    white = (frames == 255).all(3).mean()
    assert 0.5 < white < 1


def test_a_small_recording_of_digits_moves(tmp_path):
    rng = np.random.default_rng(0)

    def images(*shape):
        return rng.integers(256, size=(*shape, 14, 32, 32), dtype=np.uint8)

    film = {
        "teacher": images(),
        "start": images(),
        "updates_1": np.array([10]),
        "images_1": images(1),
        "updates_2": np.array([20]),
        "images_2": images(3, 1),
    }
    path = tmp_path / "digits.gif"
    movie.draw(movie.digits_training(film), path)
    frames, durations = frames_of(path)
    assert durations == MILLISECONDS and path.stat().st_size <= LIMIT
    students = ([film["start"]] * 3, [film["images_1"][0]] * 3, film["images_2"][:, 0])
    for frame, rows in zip(frames, students, strict=True):
        expected = movie.sheet([film["teacher"], *rows]).astype(int)  # (h, w)
        height, width = expected.shape
        left, below = movie.CORNER
        shown = frame[len(frame) - below - height : len(frame) - below, left : left + width]
        assert np.abs(shown - expected[..., None]).max() < 255 / 31  # one of its 32 greys


def test_recorded_students_are_trained_as_the_experiments(tmp_path):
    """After each update they are where toy/run.py's `train` has them, at high rates."""
    path = tmp_path / "movie.npz"
    cfg = toy.Config(**TINY)
    rates = dict.fromkeys(toy.RATES, 0.03)
    curve = []

    def spy(curves, student, **_):
        x = toy.emitted(student, curves.times, movie.noises(curves.seeds))  # (SAMPLES, 2)
        curve.append(movie.hundredths(x.detach()[: movie.POINTS]))
        curves.points[0].append({})

    with mock.patch.object(toy, "TEACHER", 5), mock.patch.object(movie, "SAMPLES", 1000):
        movie.record(path, cfg, rates)
        world = toy.World(cfg)
        with mock.patch.object(toy, "SAMPLES", 1000), mock.patch.object(toy.Curves, "add", spy):
            for method in movie.PANELS:
                toy.train(cfg, method, world, rates)
    film = np.load(path)
    assert film["updates"].tolist() == list(range(9)) and film["stage_1"] == 6
    assert film["points"].shape == (4, 9, movie.POINTS, 2)
    assert np.array_equal(film["points"][:, 1:].reshape(32, movie.POINTS, 2), curve)
    start, end = film["points"][:, 0], film["points"][:, -1]
    assert (start == start[0]).all() and not any(np.array_equal(x, start[0]) for x in end)
    # One noise ends where it ended: the teacher's points are those of its ODE pairs' mixture.
    off = np.linalg.norm(film["target"][:, None] / 100 - film["modes"], axis=2).min(1)
    assert (off < 4 * 0.3).mean() > 0.99
    frames = list(movie.training(film))
    assert len(frames) == 9


def test_recorded_digits_are_those_of_the_runs(tmp_path):
    """In the last frame, what a run exported; in stage 1, one student for all rows."""
    few = ("--out", tmp_path / "pairs", "--count", 32, "--steps", 2)
    call(data.pairs, data.PairsConfig, *few)
    path = tmp_path / "film.npz"
    short = {"HOME": tmp_path, "FIRST": 4, "ITERATIONS": 2, "WARMUP": 1}
    with mock.patch.multiple(digits, **short):
        movie.record_digits(path)
    film = np.load(path)
    assert film["updates_1"].tolist() == [1, 2, 3, 4] and film["updates_2"].tolist() == [1, 2]
    assert film["images_1"].shape == (4, 14, 32, 32)
    assert film["images_2"].shape == (3, 2, 14, 32, 32)
    family = families.load_teacher("digits")
    last = film["images_1"][-1], *film["images_2"][:, -1]
    for name, images in zip(("adp", *movie.ROWS), last, strict=True):
        exported = movie.drawn(family, *open_run(tmp_path / f"movie-{name}", family))
        assert np.array_equal(images, exported), name
    assert not np.array_equal(film["start"], film["images_1"][-1])
    assert not np.array_equal(film["images_2"][0], film["images_2"][1])
    assert len(list(movie.digits_training(film))) == 1 + 4 + 2


@pytest.mark.parametrize(
    "recording, pictures, name",
    [
        ("movie.npz", movie.training, "training.gif"),
        ("digits-movie.npz", movie.digits_training, "digits-training.gif"),
    ],
)
def test_committed_pictures_are_what_is_drawn_of_the_committed_recordings(
    tmp_path, recording, pictures, name
):
    """But for what another machine's rounding may do to an edge; a letter is black on white."""
    again = tmp_path / name
    movie.draw(pictures(np.load(RESULTS / recording)), again)
    frames, durations = frames_of(RESULTS / name)
    drawn, durations_again = frames_of(again)
    assert len(frames) > 30 and durations == durations_again
    for frame, other in zip(frames, drawn, strict=True):
        assert np.abs(frame.astype(int) - other).max() <= 64
    assert (RESULTS / name).stat().st_size <= LIMIT


def test_every_picture_of_the_results_is_shown_somewhere():
    """A picture that no page links to is one that nobody keeps up to date."""
    shown = set()
    for page in ROOT.glob("**/*.md"):
        links = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", page.read_text())
        shown |= {(page.parent / (one or other)).resolve() for one, other in links}
    pictures = [p for p in RESULTS.iterdir() if p.suffix in (".png", ".gif", ".webp")]
    assert len(pictures) > 5
    for picture in pictures:
        assert picture.resolve() in shown, picture.name
