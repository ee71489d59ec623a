"""Measure how well a loop joins itself, or what is kept and what is made in a sound: a joint beside points elsewhere.

Four measures say how much changes at a point: the step of samples, level, spectrum and onset. Each is read at the joint
and at points all over the sound, so that what counts as smooth is the sound: a drum loop changes at every stroke.

Audio is (L, channels) or (L,), float; a loop goes round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .spectra import LOG_FLOOR, Float, mel_filters

POINTS = 100  # inside of a loop
_LEVEL_MS, _SPECTRUM_MS, _ONSET_MS, _STEP_MS = 50.0, 46.0, 12.0, 10.0  # on each side of a point
_BANDS = 40
_SILENCE = 1e-6  # of a full scale of 1: what is softer is no sound
MEASURES = ("step", "level", "spectrum", "onset")


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Report how a sound joins itself; a share says how many points inside are at least as rough, ties half.

    The joint of a good loop is one point among many: its shares are about one half in the middle of many loops, and
    0 says that nothing inside is as rough.
    """

    score: float  # share by whichever measure sticks out most at a point
    shares: tuple[float, ...]  # 0 to 1, in the order of ``MEASURES``
    values: tuple[float, ...]  # at the joint: step as a multiple of its surroundings, dB, and twice log10 of amplitudes


def joint(audio: NDArray[np.floating], sample_rate: int) -> Joint:
    """Measure the joint of a loop between the last sample and the first one.

    Raises ValueError for audio of less than a fifth of a second, which has no inside.
    """
    _check(audio, sample_rate)
    return _compared(audio, np.arange(POINTS + 1) * len(audio) // (POINTS + 1), sample_rate)


def seam(audio: NDArray[np.floating], place: int, sample_rate: int) -> Joint:
    """Measure the joint before sample ``place`` of a sound that does not go round, beside points from end to end.

    Raises ValueError as ``joint``, and for a place that is nearer to an end than a measure looks.
    """
    _check(audio, sample_rate)
    edge = round(_LEVEL_MS * sample_rate / 1000)
    if not edge <= place <= len(audio) - edge:
        raise ValueError(f"seam: place {place} of {len(audio)} samples: allowed are {edge} to {len(audio) - edge}")
    points = edge + (np.arange(POINTS) + 0.5) * (len(audio) - 2 * edge) / POINTS
    return _compared(audio, np.concatenate([[place], points.astype(np.int64)]), sample_rate)


def _check(audio: NDArray[np.floating], sample_rate: int) -> None:
    if len(audio) < sample_rate / 5:
        raise ValueError(f"seam: {len(audio)} samples are too few to compare a joint with; at least 0.2 s are needed")


def _compared(audio: NDArray[np.floating], places: NDArray[np.int64], sample_rate: int) -> Joint:
    """Compare the first of some places with the others."""
    signal = audio.astype(np.float64).reshape(len(audio), -1)
    values = np.stack([_step(signal, places, sample_rate), *_changes(signal, places, sample_rate)])  # (4, K + 1)
    inside = values[:, 1:]
    ranks = np.stack([_share(row, own) for row, own in zip(inside, values, strict=True)])  # (4, K + 1), 0 is roughest
    worst = -ranks.min(axis=0)
    return Joint(
        score=float(_share(worst[1:], worst[:1])[0]),
        shares=tuple(float(share) for share in ranks[:, 0]),
        values=tuple(float(value) for value in values[:, 0]),
    )


def _share(inside: Float, values: Float) -> Float:
    """Return for each value the share of points inside that are rougher, and half of those that are equal."""
    rougher = (inside[None] > values[:, None]).mean(axis=1) + 0.5 * (inside[None] == values[:, None]).mean(axis=1)
    return np.asarray(rougher)


def _windows(signal: Float, places: NDArray[np.int64], ms: float, sample_rate: int) -> tuple[Float, Float]:
    """Return what lies before and after each place, going round: (K, window, channels) each."""
    window = max(2, round(ms * sample_rate / 1000))
    around = signal[(places[:, None] + np.arange(-window, window)) % len(signal)]
    return around[:, :window], around[:, window:]


def _step(signal: Float, places: NDArray[np.int64], sample_rate: int) -> Float:
    """Return by how much the bend of the waveform at a place exceeds that of its surroundings (K,)."""
    bend = np.abs(np.roll(signal, -1, axis=0) - 2 * signal + np.roll(signal, 1, axis=0)).max(axis=1)
    before, after = _windows(bend[:, None], places, _STEP_MS, sample_rate)
    here = np.maximum(before[:, -1, 0], after[:, 0, 0])  # of the samples on both sides
    around = np.sqrt(np.mean(np.concatenate([before[:, :-1], after[:, 1:]], axis=1) ** 2, axis=(1, 2)))
    return np.asarray(here / np.maximum(around, _SILENCE))


def _changes(signal: Float, places: NDArray[np.int64], sample_rate: int) -> tuple[Float, Float, Float]:
    """Return how level (dB), spectrum and, upwards in a shorter time, loudness of bands change (K,) each."""
    levels = [
        10 * np.log10(np.mean(part**2, axis=(1, 2)) + _SILENCE)
        for part in _windows(signal, places, _LEVEL_MS, sample_rate)
    ]
    mono = signal.mean(axis=1, keepdims=True)
    before, after = (_bands(part[..., 0], sample_rate) for part in _windows(mono, places, _SPECTRUM_MS, sample_rate))
    earlier, later = (_bands(part[..., 0], sample_rate) for part in _windows(mono, places, _ONSET_MS, sample_rate))
    return (
        np.abs(levels[1] - levels[0]),
        np.asarray(np.abs(after - before).mean(axis=1)),
        np.asarray(np.maximum(later - earlier, 0).mean(axis=1)),
    )


def _bands(parts: Float, sample_rate: int) -> Float:
    """Return log10 of mel amplitudes (K, bands) of windows (K, window)."""
    window = parts.shape[1]
    hann = np.hanning(window + 2)[1:-1]
    amplitudes = np.abs(np.fft.rfft(parts * hann, axis=1)) * (2 / hann.sum())
    return np.asarray(np.log10(np.maximum(amplitudes @ mel_filters(_BANDS, window, sample_rate, 60.0), LOG_FLOOR)))
