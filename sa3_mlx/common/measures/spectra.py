"""Measure spectra and their distances, in numpy. Audio is (L,) or (L, channels), float."""

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
