"""The dial of strengths: what it allows, and that it makes equal steps of what was measured."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sa3_mlx.assets import DEMO
from sa3_mlx.common.measures.strength import LEVELS, fit
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.dial import SCHEDULES, Dial
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.schema import ConfigError

EVEN = tuple(n / 10 for n in range(1, 11))
DIAL = Dial(official=EVEN, normalized=EVEN, monotone=(*EVEN[1:9], 0.95, 1.0))


@pytest.mark.parametrize("strength", [0.05, 0.1, 0.55, 1, np.float64(0.3)])
def test_an_even_dial_changes_nothing(strength: float):
    assert DIAL.noise_level(strength, "official") == pytest.approx(float(strength))


def test_between_notches_it_is_straight():
    assert DIAL.noise_level(0.05, "monotone") == pytest.approx(0.1)
    assert DIAL.noise_level(1.0, "monotone") == 1.0


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), float("inf"), True, "half", None])
def test_other_strengths_are_refused(strength: float):
    with pytest.raises(ValueError, match=r"strength is .*: allowed is above 0 and up to 1"):
        DIAL.noise_level(strength, "official")


@pytest.mark.parametrize(
    "levels",
    [EVEN[:9], (*EVEN, 1.0), (*EVEN[:9], 0.95), (0.0, *EVEN[1:]), (0.2, 0.1, *EVEN[2:]), (0.1, 0.1, *EVEN[2:])],
)
def test_other_dials_are_refused(levels: tuple[float, ...]):
    with pytest.raises(ConfigError, match=r"dial\.normalized: expected 10 rising noise levels"):
        Dial(official=EVEN, normalized=levels, monotone=EVEN)


def test_it_belongs_to_the_model():
    config = dataclasses.replace(PRESETS["first"], dial=DIAL)
    assert ModelConfig.from_dict(config.to_dict(defaults=False)) == config
    assert config.noise_level(0.3) == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="medium has no dial for strength: run 'sa3 calibrate'"):
        PRESETS["medium"].noise_level(0.3)


def test_the_demo_has_one():
    dial = ModelConfig.load(DEMO).dial
    assert dial is not None
    assert all(0 < dial.noise_level(0.3, name) < dial.noise_level(0.8, name) < 1 for name in SCHEDULES)


def test_fitting_inverts_what_was_measured():
    levels = np.array(LEVELS)
    dial = fit({"official": levels, "normalized": levels**2, "monotone": np.minimum(1, 2 * levels)})
    np.testing.assert_allclose(dial.official, EVEN, atol=1e-4)
    np.testing.assert_allclose(np.interp(dial.normalized, [0, *levels], [0, *levels**2]), EVEN, atol=1e-3)
    np.testing.assert_allclose(dial.monotone[:9], np.array(EVEN[:9]) / 2, atol=1e-3)


def test_fitting_rises_where_the_measure_does_not():
    ragged = np.array([0, 0.1, -0.2, 0.3, 0.2, 0.2, 0.5, 0.4, 0.6, 0.8, 0.7, 0.9, 0.85, 1.0])
    dial = fit(dict.fromkeys(SCHEDULES, ragged))
    assert (np.diff(dial.official) > 0).all()
