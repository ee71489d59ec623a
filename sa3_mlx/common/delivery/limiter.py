"""Hold peaks below a ceiling without a click: the gain goes down before a peak and comes back after it.

Audio is float32 (L, channels), full scale 1.0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.audio_file import Audio

from .loudness import envelope, true_peak_db

CEILING = 0.977  # of the samples, -0.20 dB
WINDOW_MS = 5.8  # around a peak
_CORRECTIONS = 8  # of what the gain adds between samples
_NEAR_DB = 0.01


def limit(audio: Audio, sample_rate: int, ceiling: float) -> Audio:
    """Return audio with no sample above ``ceiling``; what is further than a window from a peak stays as it is."""
    limited = _limited(audio, np.abs(audio).max(axis=1), sample_rate, ceiling)
    return np.clip(limited, -np.float32(ceiling), np.float32(ceiling))  # of the last bit


def limit_true_peak(audio: Audio, sample_rate: int, ceiling_db: float) -> Audio:
    """Return audio whose true peak is ``ceiling_db`` or below, and within 0.01 dB of it where it was above."""
    if true_peak_db(audio) <= ceiling_db:
        return audio
    heights, aim, limited = envelope(audio), ceiling_db, audio
    for _ in range(_CORRECTIONS):
        limited = _limited(audio, heights, sample_rate, 10 ** (aim / 20))
        excess = true_peak_db(limited) - ceiling_db
        if -_NEAR_DB <= excess <= 0:
            return limited
        aim -= excess
    return (limited * np.float32(10 ** (-max(0.0, excess) / 20))).astype(np.float32)


def _limited(audio: Audio, heights: NDArray[np.float32], sample_rate: int, ceiling: float) -> Audio:
    """Return audio times the highest smooth gain that brings ``heights`` (L,) to at most ``ceiling``."""
    half = max(1, round(WINDOW_MS / 2000 * sample_rate))
    needed = np.minimum(1.0, ceiling / np.maximum(heights.astype(np.float64), 1e-12))
    lowest = _sliding_minimum(needed, half)
    gain = _average(_average(np.pad(lowest, half, mode="edge"), half + 1), half + 1)  # no value of it is above needed
    far = _sliding_minimum(lowest, half) == 1.0  # from all peaks: the sums of the averages round
    return (audio * np.where(far, 1.0, gain)[:, None]).astype(np.float32)


def _sliding_minimum(values: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """Return the minimum of every value and ``half`` values to each side, by doubling."""
    window, width = np.pad(values, half, constant_values=np.inf), 1
    while 2 * width <= 2 * half + 1:
        window = np.minimum(window[:-width], window[width:])
        width *= 2
    rest = 2 * half + 1 - width
    return np.minimum(window[: len(window) - rest], window[rest:])


def _average(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return the means of ``count`` neighbours, as many fewer as do not have them all."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: NDArray[np.float64] = (sums[count:] - sums[:-count]) / count
    return means
