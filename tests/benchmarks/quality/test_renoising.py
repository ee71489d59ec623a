"""Estimates with new noise in between are ping-pong sampling, and each is judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the measurement needs PyTorch")

from click.testing import CliRunner

from benchmarks.quality.renoising import estimates, renoising
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import ConfigError
from sa3_torch.evaluate.measures.one_step import sample
from sa3_torch.pipeline import Pipeline
from sa3_torch.train.data.clip_cache import ClipSet

ITEMS = [Item(prompt="a bell", seconds=1.0, seed=3), Item(prompt="rain on a roof", seconds=1.7, seed=4)]


def test_one_step_estimates_are_ping_pong(random_models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(random_models["tiny-s"], device="cpu")
    *_, last = estimates(pipeline, Sampling.parse("euler:1:1"), ITEMS, 4)
    request = Request(items=tuple(ITEMS), sampling=Sampling.parse("pingpong:4:1"))
    for found, wanted in zip(last, sample(pipeline, request), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-3)


def test_a_whole_sampler_begins_with_its_own_result(random_models: dict[str, Path]) -> None:
    """Then noise of the next level is added to that, and what comes is another result."""
    pipeline, setting = Pipeline.load(random_models["tiny-s"], device="cpu"), Sampling.parse("dpmpp:3:2:0")
    first, second = estimates(pipeline, setting, ITEMS, 2)
    for found, wanted, later in zip(
        first, sample(pipeline, Request(items=tuple(ITEMS), sampling=setting)), second, strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-3)
        assert float((later - found).abs().max()) > 1e-2
    with pytest.raises(ConfigError, match="pingpong:2:1 adds noise itself, in step 0; choose euler:1:1"):
        next(estimates(pipeline, Sampling.parse("pingpong:2:1"), ITEMS, 2))


def test_the_command(workspace: Path, tmp_path: Path) -> None:
    clips = ClipSet(workspace / "clips").select("validation")
    label, model = clips[0].label, f"{workspace / 'random'}@euler:1:1"
    asked = sum(clip.label == label and bool(clip.captions) for clip in clips)
    common = ["--data", str(workspace / "clips"), "--steps", "3", "--seeds", "1"]
    result = CliRunner().invoke(renoising, [model, *common, "--label", label, "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == data
    (row,) = data["rows"]
    assert data["clips"] == asked > 0 and len(row["heard"]) == len(row["confidence"]) == 3
    assert all(0 <= share <= 1 for share in row["heard"] + row["confidence"])
    refused = CliRunner().invoke(renoising, [model, *common, "--label", "thunder"])
    assert refused.exit_code == 2 and "--label thunder: no held-out clip of that class; there are" in refused.output
    refused = CliRunner().invoke(renoising, ["demo", *common])
    assert refused.exit_code == 2 and "'demo': expected MODEL@SAMPLER:STEPS:GUIDANCE" in refused.output
