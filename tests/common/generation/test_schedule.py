"""Schedules match the official code row by row; the others only descend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.config import ShiftConfig
from sa3_mlx.common.model.dial import Schedule
from sa3_mlx.common.model.presets import LOGSNR

LOGSNR_RATE1 = ShiftConfig(type="logsnr", start=-6.2, end=2.0, rate=1.0)
FULL = ShiftConfig(type="full", start=0.5, end=1.15, rate=0.0)
FULL_SINE = ShiftConfig(type="full", start=0.5, end=1.15, rate=1.0)
FLUX = ShiftConfig(type="flux", start=1.0, end=6.93, rate=0.0)
NONE = ShiftConfig(type="none", start=0.0, end=0.0, rate=0.0)
SHIFTS = {
    "logsnr rate0": LOGSNR,
    "logsnr rate0 per-element": LOGSNR,
    "logsnr rate1": LOGSNR_RATE1,
    "logsnr1": LOGSNR_RATE1,
    "full": FULL,
    "full sine": FULL_SINE,
    "flux 1..6.93": FLUX,
    "flux": FLUX,
    None: NONE,
}
LENGTHS_OF_BATCH = (100, 323, 3000)


@pytest.mark.parametrize("name", ["tiny-s", "tiny-l"])
def test_every_recorded_schedule_is_matched(golden: Path, name: str):
    cases = json.loads((golden / name / "manifest.json").read_text())["cases"]
    tensors = load_file(golden / name / "schedule.safetensors")
    checked = 0
    for key, case in cases.items():
        if not key.startswith("schedule:") or key.endswith("COLLISION") or case["shift"] == "flux const":
            continue
        expected = tensors[f"{key.split(':')[1]}.sigmas"]
        lengths = LENGTHS_OF_BATCH if "batch" in key else (case.get("L", 500),)
        ours = sigmas(SHIFTS[case["shift"]], case["steps"], case["sigma_max"], lengths)
        np.testing.assert_allclose(ours.reshape(expected.shape), expected, rtol=0, atol=1e-6, err_msg=key)
        checked += 1
    assert checked == 53


@pytest.mark.parametrize("name", ["tiny-s", "tiny-l"])
def test_constant_flux_is_a_flux_shift_with_equal_ends(golden: Path, name: str):
    expected = load_file(golden / name / "schedule.safetensors")["flux_const_8.sigmas"].astype(np.float64)
    t = 0.5
    alpha = expected[4] * (1 - t) / (t * (1 - expected[4]))
    constant = ShiftConfig(type="flux", start=float(alpha), end=float(alpha), rate=0.0)
    np.testing.assert_allclose(sigmas(constant, 8, 1.0, [323])[0], expected, rtol=0, atol=1e-6)


def test_batch_of_steps_plus_one_items_keeps_one_row_per_item(golden: Path):
    """The official code warps element by element when B == steps + 1 [B25]; ours must not."""
    tensors = load_file(golden / "tiny-s" / "schedule.safetensors")
    for key, shift in {"full": FULL, "logsnr1": LOGSNR_RATE1, "flux": FLUX}.items():
        ours = sigmas(shift, 2, 1.0, LENGTHS_OF_BATCH)
        assert ours.shape == (3, 3)
        for row, length in zip(ours, LENGTHS_OF_BATCH, strict=True):
            np.testing.assert_array_equal(row, sigmas(shift, 2, 1.0, [length])[0])
        assert tensors[f"{key}_2_batch3_COLLISION.sigmas"].shape == (3,)


def test_default_eight_steps_are_the_published_numbers():
    expected = [1, 0.994376, 0.984480, 0.957912, 0.890903, 0.745547, 0.512497, 0.273885, 0]
    np.testing.assert_allclose(sigmas(LOGSNR, 8, 1.0, [108])[0], expected, atol=5e-7)


def test_default_schedule_rises_above_a_chosen_level_and_monotone_does_not():
    official = sigmas(LOGSNR, 8, 0.6, [108])[0]
    expected = [0.6, 0.90929, 0.844224, 0.745547, 0.613014, 0.461327, 0.316479, 0.200207, 0]
    np.testing.assert_allclose(official, expected, atol=5e-7)
    ours = sigmas(LOGSNR, 8, 0.6, [108], schedule="monotone")[0]
    assert ours[0] == np.float32(0.6) and ours[-1] == 0 and (np.diff(ours) < 0).all()


@pytest.mark.parametrize("shift", [LOGSNR, LOGSNR_RATE1, FULL, FULL_SINE, FLUX, NONE], ids=lambda s: s.type)
@pytest.mark.parametrize("steps", [1, 2, 8, 50])
@pytest.mark.parametrize(("schedule", "shortest"), [("monotone", 1), ("normalized", 8)])  # a warp with a rate may rise
def test_both_descend_strictly_from_every_level(shift: ShiftConfig, steps: int, schedule: Schedule, shortest: int):
    for level in (0.01, 0.1, 0.12, 0.23, 0.24, 0.5, 0.9, 0.999, 1.0):
        ours = sigmas(shift, steps, level, [shortest, 323, 5000], schedule=schedule)
        assert ours.shape == (3, steps + 1)
        assert (ours[:, 0] == np.float32(level)).all() and (ours[:, -1] == 0).all()
        assert (np.diff(ours, axis=1) < 0).all(), (shift, steps, level, ours)


@pytest.mark.parametrize("shift", [LOGSNR, LOGSNR_RATE1, FULL, FULL_SINE, FLUX, NONE], ids=lambda s: s.type)
@pytest.mark.parametrize("schedule", ["monotone", "normalized"])
def test_all_are_the_default_schedule_without_init_audio(shift: ShiftConfig, schedule: Schedule):
    np.testing.assert_allclose(
        sigmas(shift, 8, 1.0, [108, 3000], schedule=schedule), sigmas(shift, 8, 1.0, [108, 3000]), rtol=0, atol=1e-7
    )


def test_the_normalized_schedule_is_that_of_level_1_scaled():
    whole = sigmas(LOGSNR, 8, 1.0, [108])[0]
    np.testing.assert_allclose(sigmas(LOGSNR, 8, 0.6, [108], schedule="normalized")[0], 0.6 * whole, rtol=1e-6)


def test_each_item_can_have_its_own_level():
    ours = sigmas(LOGSNR, 8, [0.6, 1.0], [108, 323])
    np.testing.assert_array_equal(ours[0], sigmas(LOGSNR, 8, 0.6, [108])[0])
    np.testing.assert_array_equal(ours[1], sigmas(LOGSNR, 8, 1.0, [323])[0])


@pytest.mark.parametrize(
    ("steps", "level", "lengths", "message"),
    [
        (0, 1.0, [5], "steps is 0"),
        (8, 0.0, [5], "sigma_max is 0.0"),
        (8, 1.5, [5], "sigma_max is 1.5"),
        (8, float("nan"), [5], "sigma_max is nan"),
        (8, 1.0, [], "lengths is empty"),
    ],
)
def test_impossible_schedules_are_refused(steps: int, level: float, lengths: list[int], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        sigmas(LOGSNR, steps, level, lengths)
