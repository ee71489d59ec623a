"""The score of a joint: one half for a joint like any other point, 0 for one that sticks out."""

from __future__ import annotations

import numpy as np
import pytest

from sa3_mlx.common.measures.seam import MEASURES, joint, seam

RATE = 22_050


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (2 * RATE, 2)).astype(np.float32)


def test_joints_of_noise_are_points_like_others() -> None:
    found = [joint(noise(seed), RATE) for seed in range(40)]
    assert 0.3 < np.median([one.score for one in found]) < 0.7
    for number in range(len(MEASURES)):
        assert 0.3 < np.median([one.shares[number] for one in found]) < 0.7


def tone(periods: float) -> np.ndarray:
    time = np.arange(RATE) / RATE
    return (0.3 * np.sin(2 * np.pi * periods * time) + 0.1 * np.sin(2 * np.pi * 331 * time))[:, None]


@pytest.mark.parametrize(
    ("audio", "measure"),
    [
        (tone(440.5), "step"),  # half a period is missing
        (noise(1) * np.linspace(1, 0.1, 2 * RATE)[:, None], "level"),
        (np.concatenate([noise(1)[:RATE] * 0.02, noise(2)[:RATE]])[::-1], "level"),
        (
            np.cumsum(noise(3), axis=0) * np.linspace(0, 0.1, 2 * RATE)[:, None]
            + noise(4) * np.linspace(1, 0, 2 * RATE)[:, None],
            "spectrum",
        ),
        (np.roll(noise(5) * np.exp(-np.arange(2 * RATE) / 4000)[:, None], 0, axis=0), "onset"),
    ],
)
def test_what_sticks_out_is_named(audio: np.ndarray, measure: str) -> None:
    found = joint(audio, RATE)
    assert found.score <= 0.02 and found.shares[MEASURES.index(measure)] <= 0.02, found


def test_a_whole_number_of_periods_joins() -> None:
    assert joint(tone(440), RATE).shares[MEASURES.index("step")] > 0.1


def test_scores_do_not_depend_on_loudness() -> None:
    loud, soft = joint(noise(7), RATE), joint(noise(7) * 0.5, RATE)
    assert loud.shares == pytest.approx(soft.shares, abs=0.03)


def test_short_audio_is_refused() -> None:
    with pytest.raises(ValueError, match="too few to compare a joint with"):
        joint(noise(1)[:100], RATE)


def test_a_seam_inside_is_compared_with_the_sound_from_end_to_end() -> None:
    """As smooth as any other point, or rougher than all of them; the ends do not touch."""
    found = [seam(noise(seed), RATE, RATE) for seed in range(40)]
    assert 0.3 < np.median([one.score for one in found]) < 0.7
    sound = np.concatenate([noise(1)[:RATE] * 0.1, noise(2)[:RATE]])
    rough = seam(sound, RATE, RATE)
    assert rough.score == 0 and rough.values[1] == pytest.approx(20, abs=1)
    rising = np.linspace(-0.5, 0.5, 2 * RATE)[:, None] + noise(3) * 0.01
    assert seam(rising, RATE, RATE).shares[0] > 0.01 and joint(rising, RATE).shares[0] < 0.01


def test_a_place_near_an_end_is_refused() -> None:
    for place in (100, 2 * RATE - 100):
        with pytest.raises(ValueError, match=rf"place {place} of 44100 samples: allowed are 1102 to 42998"):
            seam(noise(1), place, RATE)
