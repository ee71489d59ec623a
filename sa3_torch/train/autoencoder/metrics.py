"""Measure how well an autoencoder gives audio back, in numpy. Audio is (L,) or (L, channels), float, 44.1 kHz.

Log-mel distance by itself flatters dead models: read it beside SI-SDR, spectral convergence and the effective rank.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.measures.spectra import LOG_FLOOR, spectrogram

BANDS_HZ = (0, 200, 400, 800, 1600, 3200, 6400, 22_050)


def si_sdr(reference: NDArray[np.floating], estimate: NDArray[np.floating]) -> float:
    """Return the scale-invariant signal-to-distortion ratio in dB over all samples and channels.

    -inf for a silent estimate, inf for a scaled copy. Raises ValueError when the reference is silent.
    """
    r, e = reference.astype(np.float64).ravel(), estimate.astype(np.float64).ravel()
    energy = float(r @ r)
    if energy == 0:
        raise ValueError("SI-SDR needs a reference that is not silent")
    target = (float(e @ r) / energy) * r
    signal, rest = float(target @ target), float((e - target) @ (e - target))
    if signal == 0:
        return -np.inf
    return np.inf if rest == 0 else 10 * float(np.log10(signal / rest))


def sdr_by_band(
    reference: NDArray[np.floating], estimate: NDArray[np.floating], sample_rate: int
) -> dict[str, float | None]:
    """Return the signal-to-distortion ratio in dB by octave up to 6.4 kHz, and of both channels' sum and difference.

    By the spectrum of the whole. None where the reference has less than a millionth of its energy; 0 is as bad as
    silence.
    """
    r, e = (audio.astype(np.float64).reshape(len(audio), -1) for audio in (reference, estimate))
    pairs = {"mid": (r.sum(axis=1), e.sum(axis=1))}
    if r.shape[1] == 2:
        pairs["side"] = (r[:, 0] - r[:, 1], e[:, 0] - e[:, 1])
    spectra, frequencies = [np.fft.rfft(x, axis=0) for x in (r, e)], np.fft.rfftfreq(len(r), 1 / sample_rate)
    for low, high in pairwise(BANDS_HZ):
        inside = (frequencies >= low) & (frequencies < high)
        pairs[f"{low:g}-{high:g} Hz"] = (spectra[0][inside], spectra[1][inside])
    least = {name: 1e-6 * _energy(r if name in ("mid", "side") else spectra[0]) for name in pairs}
    return {name: _ratio(*pair) if _energy(pair[0]) > least[name] else None for name, pair in pairs.items()}


def _energy(x: NDArray[Any]) -> float:
    return float(np.sum(np.abs(x) ** 2))


def _ratio(reference: NDArray[Any], estimate: NDArray[Any]) -> float:
    error = _energy(reference - estimate)
    return np.inf if error == 0 else 10 * float(np.log10(_energy(reference) / error))


def spectral_convergence(reference: NDArray[np.floating], estimate: NDArray[np.floating]) -> float:
    """Return the relative L2 distance of the STFT amplitudes: 0 equal, 1 as bad as silence."""
    r, e = spectrogram(reference), spectrogram(estimate)
    return float(np.linalg.norm(r - e) / max(float(np.linalg.norm(r)), 1e-12))


def multi_stft(reference: NDArray[np.floating], estimate: NDArray[np.floating]) -> float:
    """Return spectral convergence plus mean difference of ln amplitudes, the mean over windows of 512, 1024
    and 2048."""
    found = []
    for window in (512, 1024, 2048):
        r, e = (spectrogram(audio, window, window // 4) for audio in (reference, estimate))
        logarithms = np.abs(np.log(np.maximum(r, LOG_FLOOR)) - np.log(np.maximum(e, LOG_FLOOR))).mean()
        found.append(np.linalg.norm(r - e) / max(float(np.linalg.norm(r)), 1e-12) + logarithms)
    return float(np.mean(found))


def stereo_correlation(audio: NDArray[np.floating]) -> float:
    """Correlate the two channels (L, 2), without removal of means: 1 mono, -1 opposite; 0 where one is silent."""
    left, right = audio.astype(np.float64).T
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale > 0 else 0.0


def r_squared(target: NDArray[np.floating], estimate: NDArray[np.floating]) -> float | None:
    """Return the share of the variance of (rows, n), about the mean of each column, that is explained.

    None for a variance below 1e-10.
    """
    t, e = target.astype(np.float64), estimate.astype(np.float64)
    variance = float(np.square(t - t.mean(axis=0)).sum())
    return 1 - float(np.square(t - e).sum()) / variance if variance > 1e-10 * t.size else None


def kurtosis(values: NDArray[np.floating]) -> float:
    """Return the fourth moment over the squared variance, of all numbers together: 3 for normal ones."""
    centred = values.astype(np.float64) - values.mean()
    return float(np.mean(centred**4) / max(float(np.mean(centred**2)) ** 2, 1e-12))


def effective_rank(latents: NDArray[np.floating]) -> float:
    """Return exp(entropy of the normalised covariance eigenvalues) of latents (frames, C): 1 to C."""
    values = np.maximum(np.linalg.eigvalsh(np.cov(latents.astype(np.float64), rowvar=False)), 0)
    if values.sum() == 0:
        return 1.0
    p = values / values.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
