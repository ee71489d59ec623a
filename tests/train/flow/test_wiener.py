"""The linear baseline of flow matching: the analytic error on normal data, shrinkage, clips of several lengths."""

from __future__ import annotations

import numpy as np
import pytest

from sa3_torch.train.flow.wiener import Gaussian, WienerBaseline, wiener_error

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def normal(count: int, scale: np.ndarray, seed: int) -> np.ndarray:
    """Samples with covariance Q diag(scale^2) Q^T and mean 0.5, one rotation Q for all seeds."""
    size = len(scale)
    rotation, _ = np.linalg.qr(np.random.default_rng(99).standard_normal((size, size)))
    return 0.5 + (np.random.default_rng(seed).standard_normal((count, size)) * scale) @ rotation.T


@pytest.mark.parametrize("t", TIMES)
def test_error_on_normal_data_is_the_analytic_one(t: float) -> None:
    """Fitted on 20,000 samples, applied to others (measured: within 1.5 %)."""
    scale = np.array([2.0, 1.0, 0.5, 0.1, 0.02])
    fit = Gaussian.fit(normal(20_000, scale, 0))
    z = normal(20_000, scale, 1)
    noise = np.random.default_rng(2).standard_normal(z.shape)
    found = np.square(fit.velocity((1 - t) * z + t * noise, t) - (noise - z)).mean()
    assert found == pytest.approx(wiener_error(scale**2, t), rel=0.03)


def test_error_of_white_data_has_the_known_values() -> None:
    assert [round(wiener_error(np.ones(3), t), 2) for t in TIMES] == [1.22, 1.72, 2.0, 1.72, 1.22]


def test_estimate_is_the_written_formula() -> None:
    """A_t (x - (1 - t) mean) - mean with matrices, for fewer samples than values and for more."""
    for count in (5, 40):
        samples = np.random.default_rng(3).standard_normal((count, 7)) @ np.diag(np.arange(1, 8))
        fit, t = Gaussian.fit(samples), 0.3
        inside = fit.vectors @ np.diag(fit.values - fit.rest) @ fit.vectors.T
        sigma, eye = inside + fit.rest * np.eye(7), np.eye(7)
        plain = np.cov(samples, rowvar=False, ddof=0)
        shrunk = (1 - fit.shrinkage) * plain + fit.shrinkage * np.trace(plain) / 7 * eye
        np.testing.assert_allclose(sigma, shrunk, atol=1e-10)
        a = (t * eye - (1 - t) * sigma) @ np.linalg.inv((1 - t) ** 2 * sigma + t * t * eye)
        x = np.random.default_rng(4).standard_normal((3, 7))
        np.testing.assert_allclose(fit.velocity(x, t), (x - (1 - t) * fit.mean) @ a.T - fit.mean, atol=1e-10)


def test_shrinkage_falls_with_more_samples() -> None:
    scale = np.linspace(1, 3, 20)
    few, many = (Gaussian.fit(normal(count, scale, 0)).shrinkage for count in (15, 5000))
    assert 0 < many < 0.05 < 0.2 < few <= 1


def clips(count: int, seed: int) -> list[np.ndarray]:
    """Clips of 3 to 6 frames of 4 channels whose frames are nearly equal: a clip says more than its frames."""
    random = np.random.default_rng(seed)
    return [
        np.repeat(random.standard_normal((1, 4)), length, axis=0) + 0.05 * random.standard_normal((length, 4))
        for length in random.integers(3, 7, count)
    ]


def padded(latents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    z, valid = np.full((len(latents), 8, 4), 77.0), np.zeros((len(latents), 8), bool)
    for row, clip in enumerate(latents):
        z[row, : len(clip)], valid[row, : len(clip)] = clip, True
    return z, valid


def test_whole_clips_know_more_than_their_frames_and_padding_counts_nothing() -> None:
    train, held_out = clips(400, 0), clips(100, 1)
    z, valid = padded(held_out)
    noise = np.random.default_rng(2).standard_normal(z.shape)
    whole, single = (WienerBaseline(train, scope).errors(z, valid, noise, 0.5) for scope in ("clip", "frame"))
    assert whole.shape == (100,) and whole.mean() < 0.8 * single.mean()
    other = np.where(valid[..., None], z, -5.0)
    np.testing.assert_array_equal(WienerBaseline(train, "clip").errors(other, valid, noise, 0.5), whole)
    zero = WienerBaseline(train, "clip").zero_errors(z, valid, noise)
    assert zero.mean() == pytest.approx(2, rel=0.2) and single.mean() < zero.mean() * 1.01


def test_lengths_with_few_clips_use_the_fit_of_frames() -> None:
    baseline = WienerBaseline([*clips(40, 0), np.ones((9, 4))], "clip")
    assert baseline.fit_of(3) is not None and baseline.fit_of(9) is None
    x = np.random.default_rng(0).standard_normal((9, 4))
    np.testing.assert_allclose(baseline.velocity(x, 0.4), baseline.frame.velocity(x, 0.4))
    assert WienerBaseline(clips(40, 0), "frame").fit_of(3) is None


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="scope is 'song': allowed are clip, frame"):
        WienerBaseline([np.ones((2, 2))], "song")
    with pytest.raises(ValueError, match="no latents"):
        WienerBaseline([], "frame")
    with pytest.raises(ValueError, match="at least 2"):
        Gaussian.fit(np.ones((1, 3)))
