"""Masks follow the official nearest-frame rule; kept samples are really kept and the seams are smooth."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from sa3_mlx.common.generation.regions import Region, generated_frames, keep_frames, paste_back, to_regions

RATE = 8000


def _sound(samples: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.1, (samples, 2)).astype(np.float32)


@pytest.mark.parametrize("name", ["tiny-s", "tiny-l"])
def test_masks_of_whole_runs_match_the_official_code(golden: Path, name: str):
    cases = json.loads((golden / name / "manifest.json").read_text())["cases"]
    tensors = load_file(golden / name / "e2e.safetensors")
    for case in ("inpaint", "inpaint_multi", "continue", "inpaint_plus_init", "inpaint_cfg_neg"):
        arguments = cases[f"e2e:{case}"]["kwargs"]
        start, end = arguments["inpaint_mask_start_seconds"], arguments["inpaint_mask_end_seconds"]
        starts, ends = (start, end) if isinstance(start, list) else ([start], [end])
        regions = to_regions(list(zip(starts, ends, strict=True)), RATE)
        expected = tensors[f"{case}.in_local_add_cond"][0, 0]
        ours = keep_frames(regions, int(arguments["duration"] * RATE), len(expected), 512)
        np.testing.assert_array_equal(ours, expected, err_msg=case)
        assert 0 < ours.sum() < len(ours)
    mask = tensors["inpaint_nomask.in_local_add_cond"][0, 0]  # no mask given: everything is generated [B34]
    np.testing.assert_array_equal(keep_frames(to_regions([(0, 3)], RATE), 3 * RATE, len(mask), 512), mask)


def test_a_frame_follows_its_first_sample():
    np.testing.assert_array_equal(keep_frames([Region(4, 5)], 99, 5, 4), [1, 0, 1, 1, 1])
    np.testing.assert_array_equal(keep_frames([Region(5, 8)], 99, 5, 4), [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(keep_frames([Region(3, 9)], 16, 5, 4), [1, 0, 0, 1, 0])
    for start, stop in ((4, 5), (5, 8), (3, 9), (0, 1), (1, 40)):
        made = 11 - keep_frames([Region(start, stop)], 44, 11, 4).sum()
        assert generated_frames(Region(start, stop), 4) == made


def test_regions_are_sorted_and_touching_ones_joined():
    assert to_regions([(2, 3), (0.5, 1), (1, 1.5)], 10) == (Region(5, 15), Region(20, 30))
    assert to_regions([], 10) == ()


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([(1, 1)], "region 1:1: is empty"),
        ([(2, 1)], "region 2:1: is empty"),
        ([(-0.5, 1)], "starts before the clip"),
        ([(0, 2), (1, 3)], "region 1:3: overlaps"),
        ([(0, float("inf"))], "must be finite"),
        ([(float("nan"), 2)], "must be finite"),
        ([(1, 1.00001)], "is empty"),
    ],
)
def test_impossible_regions_are_refused(regions: list[tuple[float, float]], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        to_regions(regions, RATE)


@pytest.mark.parametrize("crossfade_ms", [0.0, 1.0, 20.0, 1000.0])
@pytest.mark.parametrize(
    "regions", [(Region(2000, 3000),), (Region(0, 100), Region(101, 150), Region(7000, 8000)), (Region(0, 8000),), ()]
)
def test_kept_samples_are_bit_exact_for_every_crossfade(crossfade_ms: float, regions: tuple[Region, ...]):
    source, generated = _sound(8000, 1), _sound(8000, 2)
    result, seams = paste_back(generated, source, regions, RATE, crossfade_ms)
    inside = np.zeros(8000, dtype=bool)
    for region in regions:
        inside[region.start : region.stop] = True
    assert result[~inside].tobytes() == source[~inside].tobytes()
    assert result.dtype == np.float32 and result.shape == generated.shape
    assert len(seams) == sum((r.start > 0) + (r.stop < 8000) for r in regions)
    if crossfade_ms == 0:
        assert result[inside].tobytes() == generated[inside].tobytes()


def test_crossfade_keeps_the_power_and_lies_inside_the_region():
    source, generated = _sound(400_000, 1), _sound(400_000, 2)
    result, seams = paste_back(generated, source, [Region(50_000, 350_000)], RATE, 12_500)
    fade = result[50_000:150_000].astype(np.float64)
    for part in np.split(fade, 5):
        assert abs(np.mean(part**2) / 0.01 - 1) < 0.03
    np.testing.assert_array_equal(result[150_000:250_000], generated[150_000:250_000])
    assert [seam.crossfade_samples for seam in seams] == [100_000, 100_000]
    np.testing.assert_allclose(result[50_000], source[50_000], atol=1e-4)
    np.testing.assert_allclose(result[349_999], source[349_999], atol=1e-4)


def test_a_short_region_is_shared_by_its_two_crossfades():
    _, seams = paste_back(_sound(100, 2), _sound(100, 1), [Region(40, 51)], RATE, 20)
    assert [(seam.sample, seam.side, seam.crossfade_samples) for seam in seams] == [(40, "in", 5), (51, "out", 5)]


def test_a_continuation_joins_without_a_step():
    time = np.arange(12_000)[:, None] / RATE
    tone = (0.5 * np.sin(2 * np.pi * 100 * time)).astype(np.float32).repeat(2, axis=1)
    source, generated = tone[:7003], -tone
    result, seams = paste_back(generated, source, [Region(7003, 12_000)], RATE, 20)
    assert result[:7003].tobytes() == source.tobytes() and len(seams) == 1
    hard, _ = paste_back(generated, source, [Region(7003, 12_000)], RATE, 0)
    largest = float(np.abs(np.diff(tone, axis=0)).max())
    assert np.abs(np.diff(result, axis=0)).max() < 2 * largest
    assert np.abs(np.diff(hard, axis=0)).max() > 4 * largest


def test_seams_report_the_level_difference():
    source, generated = _sound(8000, 1), 2 * _sound(8000, 2)
    _, seams = paste_back(generated, source, [Region(3000, 5000)], RATE, 10)
    for seam in seams:
        assert abs(seam.level_difference_db - 6.02) < 1
    _, (seam,) = paste_back(np.zeros_like(source), source, [Region(3000, 8000)], RATE, 10)
    assert seam.level_difference_db < -90


def test_audio_that_is_neither_kept_nor_generated_is_refused():
    source, generated = _sound(500, 1), _sound(1000, 2)
    with pytest.raises(ValueError, match="sample 500 is neither kept nor generated"):
        paste_back(generated, source, [Region(100, 200)], RATE, 10)
    with pytest.raises(ValueError, match="sample 500 is neither kept nor generated"):
        paste_back(generated, source, [Region(600, 1000)], RATE, 10)
    with pytest.raises(ValueError, match="leaves the clip"):
        paste_back(generated, source, [Region(500, 1001)], RATE, 10)
