"""Prompts at scale: text files of any length, room for their embeddings, --embed live."""

import hashlib
import re
import shutil
import tracemalloc

import pytest
import torch
from conftest import call, refused, same_log, tree
from torch.testing import assert_close

import adm
import adp
import data
import families
from runtime import rows
from runtime.lines import Lines
from runtime.rows import Rows
from runtime.settings import BadInput
from sizing import count

SD3 = ["--model", "tiny-sd3"]
SMALL = ["--batch-size", 2, "--head-width", 8, "--sample-every", 0]


# --- A text file ----------------------------------------------------------------------------------


def test_many_lines_are_not_in_memory(tmp_path):
    """20 bytes a line at most, of 60 in the file; a line comes when it is asked for."""
    path = tmp_path / "prompts.txt"
    many = 200_000
    text = "a photograph of red fox number {}, in the snow at dawn"
    path.write_text("\n".join(text.format(i) for i in range(many)))
    tracemalloc.start()
    lines = Lines(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20 * many
    assert len(lines) == many and lines[many - 1] == text.format(many - 1)


def test_lines_are_stripped_and_blank_ones_left_out(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff a red fox\r\n\n \t\nein Fluß\n\na bowl\tof soup".encode())
    lines = Lines(path)
    texts = ["a red fox", "ein Fluß", "a bowl\tof soup"]
    assert list(lines) == texts and len(lines) == 3
    assert lines.sha256 == hashlib.sha256("\n".join(texts).encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a red fox\n\ntwo dogs\nein Flu\xdf\n", "line 4 of {} is damaged: it is not UTF-8 text"),
        (b"a red fox\ntwo\0dogs\n", "line 2 of {} is damaged: it has control characters"),
        (b"\n \n", "{} holds no prompts"),
    ],
)
def test_a_damaged_line_is_named_by_its_number(content, said, tmp_path, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_bytes(content)
    line = refused(capsys, adm.main, adm.Config, *SD3, "--prompts", path, "--out", out)
    assert said.format(path) in line and not out.exists()


def test_a_file_that_is_written_to_meanwhile_is_not_read_at_its_old_places(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red fox\ntwo dogs\n")
    lines = Lines(path)
    path.write_text("a bowl of soup\ntwo dogs\n")
    with pytest.raises(BadInput, match="was written to"):
        lines[1]


# --- Room for embeddings --------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["digits", *families.TINY])
def test_encode_says_how_large_the_folder_will_be(model, few_prompts, tmp_path, capsys):
    out = tmp_path / "prompts"
    flags = ["--model", model, "--prompts", few_prompts, "--out", out]
    call(data.encode, data.EncodeConfig, *flags)
    said = capsys.readouterr().out
    assert "4 encoded prompts" in said and "4 of them new" in said
    expected = float(re.search(r"new: (\S+) GB", said)[1]) * 1e9  # bytes, to three digits
    (shard,) = out.glob("*.safetensors")
    header = 2000  # bytes at most
    assert 0.995 * expected <= shard.stat().st_size <= 1.005 * expected + header
    call(data.encode, data.EncodeConfig, *flags)
    assert "0 of them new: 0 GB" in capsys.readouterr().out


def test_embeddings_that_do_not_fit_on_the_disk_are_refused(tmp_path, capsys):
    """Of the real sd3: 5.5 MB a prompt on a CPU. Live, they need no disk."""
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    shape = families.load_teacher("sd3", random_init=True).cond_shapes()
    row = 4 * sum(torch.Size(s).numel() for s in shape.values())
    prompts = shutil.disk_usage(tmp_path).free // row + 10
    path.write_text("a red fox\n" * prompts)
    flags = ["--model", "sd3", "--random-init", "--prompts", path, "--out", out]
    line = refused(capsys, data.encode, data.EncodeConfig, *flags)
    assert f"{prompts} new encoded prompts do not fit in {out}" in line
    assert "--embed live" in line and not out.exists()
    line = refused(capsys, adm.main, adm.Config, *flags)
    assert "do not fit" in line and not out.exists()


def test_more_shards_than_may_be_open_are_read(few_prompts, tmp_path, teachers, monkeypatch):
    """One prompt a shard; never more than two files open, and each row is its own."""
    monkeypatch.setattr(rows, "OPEN", 2)
    out = tmp_path / "prompts"
    flags = [*SD3, "--prompts", few_prompts, "--batch-size", 1, "--out", out]
    call(data.encode, data.EncodeConfig, *flags)
    prompts = data.Prompts(out, teachers["tiny-sd3"])
    order = [3, 0, 1, 2, 3, 0]
    together = prompts[order]
    assert len(prompts.files) == 2
    for i, number in enumerate(order):
        assert_close(together["pooled"][[i]], prompts[[number]]["pooled"], atol=0, rtol=0)


# --- Live -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", families.TINY)
def test_live_is_cached_to_rounding(model, encoded, few_prompts, teachers):
    family = teachers[model]
    cached = data.Prompts(encoded[model], family)
    live = data.LivePrompts(family, Lines(few_prompts), torch.device("cpu"), torch.float32)
    assert len(live) == len(cached) == 4
    numbers = [3, 0, 3]
    assert_close(live[numbers], cached[numbers], atol=1e-5, rtol=1e-5)
    assert_close(live.unconditional(2), cached.unconditional(2), atol=1e-5, rtol=1e-5)
    assert live.texts(numbers) == cached.texts(numbers) == ["ein Fluß", "a red fox", "ein Fluß"]
    assert not any(c.requires_grad for c in live[numbers].values())


def test_a_live_run_is_the_cached_one_and_resumes_bitwise(few_prompts, tmp_path):
    """With TTUR, whose rounds see other prompts; nothing encoded is left on the disk."""
    flags = [*SD3, *SMALL, "--prompts", few_prompts, "--ttur", 2, "--checkpoint-every", 1]
    for name, how in (("cached", []), ("live", ["--embed", "live"])):
        call(adm.main, adm.Config, *flags, *how, "--iterations", 2, "--out", tmp_path / name)
    same_log(tmp_path / "cached", tmp_path / "live", atol=1e-4, rtol=1e-3)
    assert (tmp_path / "cached" / "prompts").is_dir()
    assert not (tmp_path / "live" / "prompts").exists()

    again = shutil.copytree(tmp_path / "live", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "000002")
    resume = [*flags, "--iterations", 2, "--out", again, "--resume"]
    call(adm.main, adm.Config, *resume, "--embed", "live")
    same_log(tmp_path / "live", again, atol=0, rtol=0)
    last = "checkpoints/000002"
    assert tree(tmp_path / "live" / last) == tree(again / last)

    shutil.rmtree(again / "checkpoints" / "000002")
    call(adm.main, adm.Config, *resume)  # where the embeddings come from may change
    same_log(tmp_path / "live", again, atol=1e-4, rtol=1e-3)


def test_pairs_and_adp_go_live_too(few_prompts, tmp_path, teachers, capsys):
    family = teachers["tiny-sd3"]
    made = {}
    for how in ("cached", "live"):
        out = tmp_path / how
        flags = [*SD3, "--prompts", few_prompts, "--count", 5, "--steps", 2, "--embed", how]
        call(data.pairs, data.PairsConfig, *flags, "--out", out)
        made[how] = Rows(out, "pairs", family)[range(5)]
    assert_close(made["live"], made["cached"], atol=1e-4, rtol=1e-4)
    copy = tmp_path / "live-prompts.txt"
    assert copy.read_bytes() == few_prompts.read_bytes()
    assert not (tmp_path / "live-prompts").exists()

    runs = {}
    for name, how in (("cached", "cached"), ("live", "live"), ("live", "cached")):
        runs[name, how] = tmp_path / f"adp-{name}-{how}"
        flags = [*SD3, *SMALL, "--iterations", 2, "--mse-iterations", 1, "--no-pixel"]
        flags += ["--pairs", tmp_path / name, "--embed", how, "--out", runs[name, how]]
        call(adp.main, adp.Config, *flags)
    for other in list(runs.values())[1:]:
        same_log(runs["cached", "cached"], other, atol=1e-4, rtol=1e-3)

    copy.write_text("a red fox\n")
    flags = [*SD3, "--pairs", tmp_path / "live", "--embed", "live", "--out", tmp_path / "new"]
    line = refused(capsys, adp.main, adp.Config, *flags)
    assert "are not the prompts" in line and not (tmp_path / "new").exists()
    flags = [*SD3, "--prompts", few_prompts, "--count", 6, "--steps", 2, "--embed", "live"]
    before = tree(tmp_path / "live")
    line = refused(capsys, data.pairs, data.PairsConfig, *flags, "--out", tmp_path / "live")
    assert "holds other prompts" in line and tree(tmp_path / "live") == before


def test_embeddings_are_not_encoded_live(encoded, tmp_path, capsys):
    folder, out = encoded["tiny-sd3"], tmp_path / "out"
    flags = [*SD3, "--prompts", folder, "--embed", "live", "--out", out]
    line = refused(capsys, adm.main, adm.Config, *flags)
    assert f"--embed live is for a text file: {folder} holds embeddings" in line
    assert not out.exists()
    line = refused(capsys, data.encode, data.EncodeConfig, *SD3, "--prompts", folder, "--out", out)
    assert "a folder, not a text file" in line and not out.exists()


# --- Their memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("sdxl", 123_060_480 + 694_659_840),
        ("sd3", 123_650_304 + 694_659_840 + 4_762_310_656),
        ("cogvideox-5b", 4_762_310_656),
        ("wan-1.3b", 5_680_910_336),
        ("flux-dev", 123_060_480 + 4_762_310_656),
    ],
)
def test_text_encoders_are_the_published_ones(model, parameters):
    family = families.load_teacher(model, random_init=True)
    assert sum(p.numel() for e in family.text_encoders() for p in e.parameters()) == parameters


def test_the_plan_counts_what_live_encoders_hold(teachers):
    """In bf16, each rank its part."""
    family = teachers["tiny-sd3"]
    pipe = family.text_pipeline(dtype=torch.bfloat16)
    parts = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    held = sum(p.nbytes for part in parts for p in part.parameters())
    assert count.part([p for e in family.text_encoders() for p in e.parameters()], 1) == held
