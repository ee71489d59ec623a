"""Strength and prompts on the command line: the dial of a model, finding it, weights and blends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.assets import DEMO
from sa3_mlx.common.measures.strength import Changes, measure_changes
from sa3_mlx.common.model.config import ModelConfig
from tests.support.command import Run, ok, read, sa3, write_tone

LINES = "\n".join(f"0.2 {word}" for word in ("rain", "bell", "wind", "rain bell"))


def test_a_strength_is_the_noise_level_behind_it(run: Run):
    write_tone(Path("in.wav"), 0.5)
    level = ModelConfig.load(DEMO).noise_level(0.3, "normalized")
    common = ("--model", "demo", "--seed", "1", "--steps", "2", "--schedule", "normalized", "--format", "float")
    ok(run("vary", "in.wav", "snare drum", "--strength", "0.3", "--out", "a.wav", *common))
    ok(run("vary", "in.wav", "snare drum", "--noise-level", str(level), "--out", "b.wav", *common))
    np.testing.assert_array_equal(read("a.wav"), read("b.wav"))
    region = ("--region", "0.1:0.3", "--strength", "0.3")
    ok(run("inpaint", "in.wav", "snare drum", *region, "--out", "c.wav", *common))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", "0"], "strength is 0.0: allowed is above 0 and up to 1"),
        (["--strength", "2"], "strength is 2.0: allowed is above 0 and up to 1"),
        (["--strength", "nan"], "strength is nan: allowed is above 0 and up to 1"),
        (["--strength", "0.5", "--noise-level", "0.5"], "give either --noise-level or --strength"),
        (["--strength", "0.5", "--model", "little"], "little has no dial for strength: run 'sa3 calibrate'"),
        (["--schedule", "linear"], "'linear'"),
        (["--strength", "inf"], "strength is inf: allowed is above 0 and up to 1"),
    ],
)
def test_other_strengths_are_refused(run: Run, words: list[str], message: str):
    write_tone(Path("in.wav"), 0.5)
    result = run("vary", "in.wav", "snare drum", "--out", "v.wav", "--model", "demo", *words)
    assert result.code and message in result.err and result.err.count("\n") == 1, result
    assert not Path("v.wav").exists()


def test_calibrating_gives_a_model_its_dial(
    own_home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    measured: list[Changes] = []

    def measure(*arguments: Any, **more: Any) -> Changes:
        measured.append(measure_changes(*arguments, **more))
        return measured[-1]

    monkeypatch.setattr("sa3_mlx.cli.models.calibrate.measure_changes", measure)
    Path("prompts.txt").write_text(LINES)
    config = own_home / "models" / "little" / "config.json"
    before = config.read_text()
    words = ("calibrate", "little", "--prompts", "prompts.txt")
    seen = ok(sa3(capfd, *words, "--dry-run"))
    assert config.read_text() == before and "dial " in seen.out + seen.err
    same = iter(measured)  # it takes seconds and gives the same again
    monkeypatch.setattr("sa3_mlx.cli.models.calibrate.measure_changes", lambda *_, **__: next(same))
    ok(sa3(capfd, *words))
    stored = ModelConfig.load(config.parent)
    assert stored.dial is not None and replace(stored, dial=None).to_json() == before
    assert json.dumps(stored.dial.to_dict()) in seen.out + seen.err and len(measured) > 1


def test_the_demo_is_not_written_to(run: Run):
    result = run("calibrate", "demo")
    assert result.code and "part of the package" in result.err, result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["(rain:11)"], "the weight of 'rain' at character 1 is 11: allowed are -10 to 10"),
        (["rain (:2)"], "the weight at character 6 has no words"),
        (["(rain:2"], "the '(' at character 1 is not closed"),
        (["rain:2)"], "the weight before character 7 has no '('"),
        (["rain | bell : 1.5"], "the blend at character 15 is 1.5: allowed are 0 to 1"),
        (["rain | : 0.5"], "the blend at character 6 has no text on one side"),
        (["rain", "--blend", "cubic"], "'cubic'"),
        (["rain", "--guidance", "3", "--negative", "(bell:2"], "negative prompt: the '('"),
        (["rain " * 2001], "prompt has 10,005 characters"),
        (["rain", "--negative", "noise"], "guidance scale 1"),
        (["rain", "--prompt-file", "p.txt"], "either"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_at_their_place(
    refused: Callable[..., str], words: list[str], message: str
):
    assert message in refused("generate", *words)
