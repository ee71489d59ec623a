"""Measure loudness, by pyloudnorm, and true peaks, both after ITU-R BS.1770.

Audio is float32 (L, channels), full scale 1.0.
"""

from __future__ import annotations

import functools
import math
import warnings
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.audio import peak_db
from sa3_mlx.common.files.audio_file import Audio

BLOCK_SECONDS = 0.4  # of the gate; shorter sounds have no loudness
OVERSAMPLING = 8  # BS.1770 asks for 4 at least; a limiter would hide peaks between so few
_TAPS, _KAISER = 48, 8.0  # of the filter that finds values between samples
_PIECE_SAMPLES = 1 << 13  # that are oversampled at once


def library() -> ModuleType:
    """Import pyloudnorm. Raises ImportError, one line that says what to install."""
    try:
        import pyloudnorm
    except ImportError as error:
        raise ImportError("--loudness needs the pyloudnorm library: pip install 'sa3[loudness]'") from error
    module: ModuleType = pyloudnorm
    return module


def loudness_lufs(audio: Audio, sample_rate: int) -> float:
    """Return the integrated loudness, -inf where no block of 0.4 s passes the gate."""
    if len(audio) < BLOCK_SECONDS * sample_rate:
        return -math.inf
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = library().Meter(sample_rate).integrated_loudness(audio.astype(np.float64))
    return float(measured) if math.isfinite(measured) else -math.inf


def envelope(audio: Audio) -> NDArray[np.float32]:
    """Return (L,): the highest absolute value of any channel at each sample and up to its neighbours, between samples
    too."""
    taps, found = _taps(), [np.zeros(0, np.float32)]
    padded = np.pad(audio, ((_TAPS // 2, _TAPS // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _TAPS, axis=0)  # L + 1 places: from before the first on
    for start in range(0, len(windows), _PIECE_SAMPLES):
        piece = windows[start : start + _PIECE_SAMPLES]
        between = np.abs(piece.reshape(-1, _TAPS) @ taps).max(axis=1)
        found.append(between.reshape(len(piece), -1).max(axis=1))
    gaps = np.concatenate(found)
    around: NDArray[np.float32] = np.maximum(np.maximum(gaps[:-1], gaps[1:]), np.abs(audio).max(axis=1))
    return around


@functools.cache
def _taps() -> NDArray[np.float32]:
    """Return (taps, values between two samples): a sinc in a Kaiser window, which keeps what is near half the rate."""
    place = np.arange(_TAPS)[:, None] - (_TAPS // 2 - 1) - np.arange(1, OVERSAMPLING)[None, :] / OVERSAMPLING
    window = np.i0(_KAISER * np.sqrt(1 - (2 * place / _TAPS) ** 2)) / np.i0(_KAISER)
    return (np.sinc(place) * window).astype(np.float32)


def true_peak_db(audio: Audio) -> float:
    """Return the highest absolute value between samples too, in dB of full scale, -inf for silence."""
    return peak_db(envelope(audio)) if len(audio) else -math.inf
