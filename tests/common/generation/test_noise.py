"""The noise contract: seed, purpose and frame decide a value, nothing else does."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sa3_mlx.common.generation.noise import (
    DECODER_LATENT,
    DECODER_TOKENS,
    INITIAL,
    SEED_MAX,
    NoiseStream,
    batch_noise,
    noise,
    random_seed,
    step,
)

PURPOSES = [INITIAL, step(0), step(1), step(999), DECODER_LATENT, DECODER_TOKENS]


def test_values_are_pinned():
    """A change of these numbers changes every sound that anyone has made from a seed."""
    expected = [[0.00808869581669569, 0.1521921306848526, -0.4468097388744354, -0.1914038062095642]]
    np.testing.assert_allclose(noise(0, INITIAL, 1, 4), expected, rtol=2e-7)
    expected_row = [0.22080855071544647, 0.14386935532093048, 0.20366907119750977]
    np.testing.assert_allclose(noise(SEED_MAX, step(3), 2, 3)[1], expected_row, rtol=2e-7)
    np.testing.assert_allclose(
        noise(1234, DECODER_TOKENS, 1, 2)[0], [1.7334952354431152, -0.01121547818183899], rtol=2e-7
    )


def test_raw_words_are_the_published_philox():
    """Known answer of Philox 4x64-10 (Salmon et al. 2011) for counter 0, key 0; numpy counts up before a block."""
    words = np.random.Philox(counter=2**256 - 1, key=0).random_raw(4)
    assert words.tolist() == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@pytest.mark.parametrize("channels", [1, 3, 4, 6, 16])
def test_longer_noise_begins_with_the_shorter(channels: int):
    np.testing.assert_array_equal(noise(7, INITIAL, 25, channels)[:10], noise(7, INITIAL, 10, channels))


@pytest.mark.parametrize("channels", [1, 6, 16])
def test_a_range_of_frames_can_be_drawn_alone(channels: int):
    np.testing.assert_array_equal(noise(7, INITIAL, 25, channels)[11:], noise(7, INITIAL, 14, channels, start=11))


def test_an_item_does_not_depend_on_its_batch():
    batch = batch_noise([3, 8, 3], step(2), 11, 5)
    np.testing.assert_array_equal(batch[0], noise(3, step(2), 11, 5))
    np.testing.assert_array_equal(batch[0], batch[2])
    assert not np.array_equal(batch[0], batch[1])


def test_purposes_seeds_and_steps_are_independent_streams():
    draws = [noise(seed, purpose, 500, 4).ravel() for seed in (0, 1, SEED_MAX) for purpose in PURPOSES]
    correlation = np.corrcoef(np.stack(draws)) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.12  # 2000 values: standard deviation 0.022


def test_values_are_standard_normal():
    values = noise(11, INITIAL, 4000, 64).astype(np.float64)
    assert values.dtype == np.float64 and np.isfinite(values).all()
    assert abs(values.mean()) < 0.006 and abs(values.std() - 1) < 0.005
    assert abs((values**4).mean() - 3) < 0.05
    assert abs((values > 1.959964).mean() - 0.025) < 0.001
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.006
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.006


def test_no_frames_are_an_empty_array():
    assert noise(0, INITIAL, 0, 5).shape == (0, 5)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "7", None])
def test_a_bad_seed_is_refused(seed: object):
    with pytest.raises(ValueError, match=re.escape(f"seed is {seed!r}: allowed are the integers 0 to")):
        noise(seed, INITIAL, 1, 1)  # type: ignore[arg-type]


def test_impossible_sizes_are_refused():
    for frames, channels, start in ((-1, 4, 0), (3, 0, 0), (3, 4, -1)):
        with pytest.raises(ValueError, match="sizes must be positive"):
            noise(0, NoiseStream(0), frames, channels, start=start)
    with pytest.raises(ValueError, match="step index is -1"):
        step(-1)


def test_random_seeds_are_allowed_and_differ():
    seeds = {random_seed() for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed <= SEED_MAX for seed in seeds)
