"""Configurations are strict, and what only other checkpoints of the family vary has the released values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sa3_mlx import assets
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.schema import ConfigError
from tests.support.foreign.official_checkpoint import TINY_VARIED
from tests.support.tiny import TINY

CONFIG = TINY["tiny-s"]
VARIED = replace(TINY_VARIED, sampling=Sampling(sampler="dpmpp", steps=3, guidance=Guidance(scale=2.0)))


def _written(folder: Path, config: ModelConfig) -> dict[str, Any]:
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    assert ModelConfig.load(folder) == config
    return json.loads(config.to_json())


def test_released_values_are_left_out_and_come_back(tmp_path: Path) -> None:
    """Files that were written before these fields existed have the same text."""
    for config in (*PRESETS.values(), *TINY.values()):
        data = _written(tmp_path, config)
        assert "ff_mult" not in data["same"] and ("sampling" in data) == (config.sampling is not None)
        assert config.same.ff_mult == 3
        if config.diffusion is not None:
            assert "ff_mult" not in data["diffusion"]["dit"] and "seconds_max" not in data["diffusion"]
            assert (config.diffusion.dit.ff_mult, config.diffusion.seconds_max) == (4, 384.0)
    demo = Path(assets.__file__).parent / "demo"
    assert ModelConfig.load(demo).to_json() == (demo / CONFIG_FILE).read_text(encoding="utf-8")


def test_other_values_are_written(tmp_path: Path) -> None:
    data = _written(tmp_path, VARIED)
    assert data["same"]["ff_mult"] == 2 and data["diffusion"]["dit"]["ff_mult"] == 3
    assert data["diffusion"]["seconds_max"] == 47.5
    assert data["sampling"] == {"sampler": "dpmpp", "steps": 3, "guidance": {"scale": 2.0}}


def test_feed_forwards_have_the_configured_width() -> None:
    shapes = expected_tensors(VARIED)
    assert shapes["dit.layers.0.ff.proj_in.weight"] == (2 * 3 * 128, 128)
    assert shapes["same.decoder.layers.0.ff.proj_out.weight"] == (64, 2 * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"same": {"ff_mult": 0}}, "SAMEConfig.ff_mult: must be positive, got 0"),
        ({"same": {"ff_mult": 2.5}}, "config.same.ff_mult: expected int, got 2.5"),
        ({"diffusion": {"seconds_max": -1}}, "DiffusionConfig.seconds_max: must be positive, got -1"),
        ({"diffusion": {"seconds_max": None}}, "config.diffusion.seconds_max: expected float, got None"),
        ({"same": {"width": None}}, "config.same.width: expected int, got None"),
        ({"same": {"kernel": 3}}, "config.same: unknown field(s) kernel"),
        ({"same": {"stride": 10_000}}, "config.same: same.span: "),
        ({"same": {"stride": 10**6}}, "config.same: SAMEConfig.stride: must be at most 16384, got 1000000"),
        ({"same": {"span": 10**18}}, "config.same: SAMEConfig.span: must be at most 16384, got 1000000000000000000"),
        ({"diffusion": {"max_frames": 2**62}}, "config.diffusion: DiffusionConfig.max_frames: must be at most 1048576"),
        ({"same": {"span": 10**1000}}, "config.same.span: must be below 2^63, got 1000000"),
        ({"diffusion": {"seconds_max": 10**400}}, "config.diffusion.seconds_max: expected float, got 1000000"),
        ({"same": {"attention": "chunked\n" * 10_000}}, "config.same.attention: got 'chunked\\nchunked"),
        ({"same": {"kernel\n" * 10_000: 3}}, "config.same: unknown field(s) kernel kernel"),
    ],
)
def test_impossible_values_are_one_line(change: dict[str, dict[str, Any]], message: str) -> None:
    data = CONFIG.to_dict()
    for name, fields in change.items():
        data[name] |= fields
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(data)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("examples", [["a"] * 33, [""], ["two\nlines"], ["x" * 201]])
def test_examples_are_a_few_lines(examples: list[str]) -> None:
    with pytest.raises(ConfigError, match="examples"):
        ModelConfig.from_dict({**PRESETS["first"].to_dict(), "examples": examples})
