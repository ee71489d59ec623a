"""Measure how well an autoencoder gives audio back, in numpy. Audio is (L,) or (L, channels), float, 44.1 kHz.

Log-mel distance by itself flatters dead models: read it beside SI-SDR, spectral convergence and the effective rank.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

LOG_FLOOR = 1e-5  # of mel amplitudes, for a full scale of 1
MEL_BANDS = 80
WINDOW, HOP = 2048, 512


def mono(audio: NDArray[np.floating]) -> Float:
    """Average channels: (L,) or (L, channels) -> (L,) float64."""
    return audio.astype(np.float64) if audio.ndim == 1 else audio.astype(np.float64).mean(axis=1)


def spectrogram(audio: NDArray[np.floating], window: int = WINDOW, hop: int = HOP) -> Float:
    """Return amplitudes of a Hann-windowed STFT, (frames, window // 2 + 1); a full-scale sine reads about 1."""
    signal = np.pad(mono(audio), window // 2)
    frames = np.lib.stride_tricks.sliding_window_view(signal, window)[::hop]
    hann = np.hanning(window + 1)[:-1]
    return np.asarray(np.abs(np.fft.rfft(frames * hann, axis=1)) * (2 / hann.sum()))


@cache
def mel_filters(bands: int, window: int, sample_rate: int, low_hz: float) -> Float:
    """Return triangular filters (window // 2 + 1, bands) from ``low_hz`` to half the sample rate, each of sum one."""
    edges_mel = np.linspace(2595 * np.log10(1 + low_hz / 700), 2595 * np.log10(1 + sample_rate / 2 / 700), bands + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    f = np.fft.rfftfreq(window, 1 / sample_rate)[:, None]
    rise = (f - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - f) / (edges[2:] - edges[1:-1])
    filters = np.maximum(np.minimum(rise, fall), 0)
    # A filter narrower than a bin takes the bin nearest to its centre.
    empty = np.flatnonzero(filters.sum(axis=0) == 0)
    filters[np.abs(f - edges[1:-1][empty]).argmin(axis=0), empty] = 1
    return np.asarray(filters / filters.sum(axis=0))


def log_mel(audio: NDArray[np.floating], sample_rate: int = 44_100) -> Float:
    """Return log10 of the mel amplitudes, floor 1e-5: (frames, 80)."""
    return np.log10(np.maximum(spectrogram(audio) @ mel_filters(MEL_BANDS, WINDOW, sample_rate, 30.0), LOG_FLOOR))


def log_mel_l1(reference: NDArray[np.floating], estimate: NDArray[np.floating]) -> float:
    """Return the mean absolute difference of the log-mel spectrograms (log10, floor 1e-5, 80 bands); 1 is 20 dB."""
    return float(np.abs(log_mel(reference) - log_mel(estimate)).mean())


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
