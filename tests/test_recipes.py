"""Recipes and flags: what a model's run is like where no flag says otherwise."""

import re
from dataclasses import fields

import pytest
from conftest import call, config, refused

import adm
import adp
import data
from families import HUB, recipes
from runtime.ranks import Ranks

CONFIGS = {
    "adm": (adm.Config, adm.check),
    "adp": (adp.Config, adp.check),
    "pairs": (data.PairsConfig, None),
    "encode": (data.EncodeConfig, None),
}


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_recipe_has_meaning(stage):
    kind, check = CONFIGS[stage]
    names = {f.name for f in fields(kind)}
    for model, settings in kind.RECIPES.items():
        assert settings.keys() <= names, (model, settings.keys() - names)
        cfg = config(kind, "--model", model)
        assert {name: getattr(cfg, name) for name in settings} == settings
        if check:
            check(cfg)


@pytest.mark.parametrize("stage", ["adm", "adp"])
@pytest.mark.parametrize("model", HUB)
def test_a_real_models_run_needs_no_flags_on_one_gpu_or_eight(model, stage, monkeypatch):
    """The paper's tuning and thousands of iterations; the same global batch on any hardware."""
    cfg = config(CONFIGS[stage][0], "--model", model)
    assert cfg.iterations >= 8000 and cfg.gradient_checkpointing
    assert (cfg.lora_rank > 0) == (model == "sd3")
    batches = []
    for world in (1, 2, 8):
        seen = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            ranks = Ranks.__new__(Ranks)
            ranks.rank, ranks.world = rank, world
            parts = ranks.mine(cfg.batch_size, cfg.accumulate, cfg.samples)
            assert {len(part) for part in parts} == {cfg.samples}
            seen += [sample for part in parts for sample in part]
        batches.append(sorted(seen))
    assert batches[0] == batches[1] == batches[2] == list(range(cfg.batch_size))


def test_accumulate_says_more_than_samples_and_a_small_batch_is_taken_at_once():
    ranks = Ranks.__new__(Ranks)
    ranks.rank, ranks.world = 0, 2
    assert ranks.mine(8, None, None) == [range(4)]
    assert ranks.mine(8, None, 2) == [range(2), range(2, 4)]
    assert ranks.mine(8, 4, 2) == [range(i, i + 1) for i in range(4)]
    assert ranks.mine(4, None, 8) == [range(2)]


def test_samples_that_do_not_divide_are_refused(capsys, few_prompts, tmp_path):
    flags = ["--model", "tiny-sd3", "--prompts", few_prompts, "--out", tmp_path / "out"]
    line = refused(capsys, adm.main, adm.Config, *flags, "--batch-size", 4, "--samples", 3)
    assert "--batch-size 4: no multiple of 1 ranks x --samples 3" in line
    assert not (tmp_path / "out").exists()


def test_the_papers_settings_for_the_digits_too():
    recipe, paper = config(adm.Config), config(adm.Config, "--paper")
    assert (recipe.dt, recipe.damping, recipe.warmup) == (0.25, 0.1, 60)
    assert (paper.dt, paper.damping, paper.warmup, paper.ema) == (1 / 64, 0, 0, 0)
    assert (paper.fake_gradient, paper.fake_samples, paper.head_width) == ("exact", "each", 256)
    assert paper.iterations == recipe.iterations and paper.prompts == recipe.prompts
    assert config(adm.Config, "--paper", "--dt", 0.5).dt == 0.5  # a flag is a flag
    defaults = {f.name: f.default for f in fields(adm.Config)}
    off = {name: value for name, value in recipes.ADM_PAPER.items() if defaults[name] != value}
    assert off == {}, "the script's defaults are the paper's"


@pytest.mark.parametrize("stage", CONFIGS)
def test_help_has_each_flag_once_with_the_values_that_hold(stage, capsys):
    kind, _ = CONFIGS[stage]
    for model in ("digits", "sd3"):
        with pytest.raises(SystemExit) as e:
            call(print, kind, "--model", model, "--help")
        shown = capsys.readouterr().out
        assert e.value.code == 0 and "memory:" in shown or stage in ("pairs", "encode")
        for f in fields(kind):
            flag = "--" + f.name.replace("_", "-")
            assert len(re.findall(rf"^  {flag}[ ,\n]", shown, re.M)) == 1, flag
        text = " ".join(shown.split())
        paper = getattr(kind, "PAPER", {})
        for name, value in kind.RECIPES.get(model, {}).items():
            if isinstance(value, float | int) and not isinstance(value, bool):
                end = ")"
                if name in paper:
                    said = "none" if paper[name] is None else paper[name]
                    end = ", as the paper)" if paper[name] == value else f"; the paper: {said})"
                assert f"(default: {value}{end}" in text, name


def test_help_says_what_differs_from_the_paper(capsys):
    def shown(*flags):
        with pytest.raises(SystemExit):
            call(print, adm.Config, *flags, "--help")
        return " ".join(capsys.readouterr().out.split())

    recipe, paper = shown(), shown("--paper")
    assert "a fraction of T (default: 0.25; the paper: 0.015625)" in recipe
    assert "a fraction of T (default: 0.015625, as the paper)" in paper
    differing = len(re.findall("; the paper: ", recipe))
    assert differing == 7 and "; the paper: " not in paper  # warm-up, Δt, damping ... of the digits
