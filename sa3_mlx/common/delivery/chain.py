"""Carry a ``Delivery`` out: piece by piece where that can be, on the whole sound else.

Audio is float32 (L, channels), full scale 1.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from sa3_mlx.common.files.audio import apply_peak, peak_db, resampled_length
from sa3_mlx.common.files.audio_file import Audio

from .limiter import CEILING, limit, limit_true_peak
from .loudness import loudness_lufs, true_peak_db
from .settings import Delivery

_SILENT = 10 ** (-60 / 20)
_KEPT_SECONDS = 0.01  # before the first sound and after the last
_NEAR_LU = 0.02
_TRIES = 24  # to find the gain before a limiter
_GAIN_MAX_DB = 60.0


@dataclass(frozen=True)
class Delivered:
    """Hold a finished sound, and what there is to say about it."""

    audio: Audio
    sample_rate: int
    start: float  # seconds that were cut before it
    notes: tuple[str, ...]


class DeliveryStream:
    """Change rate and fade the ends of a sound that comes in pieces; joined, they have the bits of one piece."""

    def __init__(self, delivery: Delivery, samples: int, channels: int, sample_rate: int) -> None:
        """Begin a sound of ``samples`` in all at ``sample_rate`` Hz."""
        self.sample_rate = delivery.rate or sample_rate
        self.samples = resampled_length(samples, sample_rate, self.sample_rate)
        self._left, self._given, self._soxr = samples, 0, None
        if self.sample_rate != sample_rate:
            self._soxr = soxr.ResampleStream(sample_rate, self.sample_rate, channels, dtype="float32", quality="VHQ")
        fades = (delivery.fade_in, delivery.fade_out)
        self._fade_in, self._fade_out = (min(self.samples, round(fade * self.sample_rate)) for fade in fades)

    def take(self, audio: Audio) -> Audio:
        """Take the next samples and return those that are finished, maybe none."""
        self._left -= len(audio)
        if self._soxr is not None:
            audio = self._soxr.resample_chunk(audio, last=self._left <= 0)
        start, stop = self._given, self._given + len(audio)
        self._given = stop
        if start < self._fade_in or stop > self.samples - self._fade_out:
            place = np.arange(start, stop, dtype=np.float64) + 0.5
            gain = _rise(place, self._fade_in) * _rise(self.samples - place, self._fade_out)
            audio = (audio * gain[:, None]).astype(np.float32)
        return audio


def _rise(place: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Return a raised cosine from 0 to 1 over ``length`` samples, 1 from there on."""
    gain: NDArray[np.float64] = 0.5 - 0.5 * np.cos(np.pi * np.clip(place / max(1e-9, length), 0, 1))
    return gain


def deliver(audio: Audio, sample_rate: int, delivery: Delivery, *, clips: bool) -> Delivered:
    """Finish a whole sound; ``clips``: the samples of its file end at full scale.

    Raises ValueError where nothing is left at the new rate.
    """
    notes, start = list[str](), 0
    if delivery.trim_silence:
        start, stop = _sounding(audio, sample_rate)
        if start == stop:
            notes.append("all of it is below -60 dB: no silence was trimmed")
            start, stop = 0, len(audio)
        audio = audio[start:stop]
    stream = DeliveryStream(delivery, len(audio), audio.shape[1], sample_rate)
    if not stream.samples:
        raise ValueError(f"{len(audio)} samples at {sample_rate} Hz are less than one at {stream.sample_rate} Hz")
    audio = stream.take(audio)
    audio, said = _levelled(audio, stream.sample_rate, delivery, clips=clips)
    return Delivered(audio, stream.sample_rate, start / sample_rate, (*notes, *said))


def _sounding(audio: Audio, sample_rate: int) -> tuple[int, int]:
    """Return where sound begins and ends, in samples, with a little around it; equal where there is none."""
    loud = np.flatnonzero((np.abs(audio) >= _SILENT).any(axis=1))
    if not len(loud):
        return 0, 0
    kept = round(_KEPT_SECONDS * sample_rate)
    return max(0, int(loud[0]) - kept), min(len(audio), int(loud[-1]) + 1 + kept)


def _levelled(audio: Audio, sample_rate: int, wanted: Delivery, *, clips: bool) -> tuple[Audio, list[str]]:
    """Bring a sound to its loudness and below its ceiling, and say what that came to."""
    target = wanted.loudness_lufs
    if target is None:
        made = _below(audio, sample_rate, wanted, clips=clips)
        return made, _said(audio, made, None, wanted)
    first = loudness_lufs(audio, sample_rate)
    if not math.isfinite(first):
        made = _below(audio, sample_rate, wanted, clips=clips)
        return made, [
            "loudness: shorter than 0.4 s or too quiet to be measured; no gain",
            *_said(audio, made, None, wanted),
        ]
    gain = target - first
    made, reached = audio, first
    for _ in range(_TRIES):
        louder = _times(audio, gain)
        made = _below(louder, sample_rate, wanted, clips=clips)
        before, reached = reached, loudness_lufs(made, sample_rate)
        missing = target - reached
        limited = wanted.limit or (wanted.safe and made is not louder)
        if abs(missing) <= _NEAR_LU or not limited or abs(reached - before) < _NEAR_LU / 10 or gain > _GAIN_MAX_DB:
            break
        gain += missing
    return made, _said(louder, made, reached, wanted)


def _times(audio: Audio, gain_db: float) -> Audio:
    return (audio * np.float32(10 ** (gain_db / 20))).astype(np.float32)


def _below(audio: Audio, sample_rate: int, wanted: Delivery, *, clips: bool) -> Audio:
    """Bring peaks below the ceiling, by a limiter where one is wanted; the same array where none is above it."""
    true_peak, peak = wanted.true_peak_db, wanted.peak_db
    if wanted.limit and true_peak is not None:
        return limit_true_peak(audio, sample_rate, true_peak)
    if wanted.limit or (wanted.safe and clips):
        ceiling = (CEILING if wanted.limit else 1.0) if peak is None else 10 ** (peak / 20)
        if np.abs(audio).max(initial=0.0) <= ceiling:
            return audio
        return limit(audio, sample_rate, CEILING if peak is None else ceiling)
    if true_peak is not None:
        excess = true_peak_db(audio) - true_peak
        return audio if excess <= 0 else _times(audio, -excess)
    return audio if peak is None else apply_peak(audio, peak)


def _said(audio: Audio, made: Audio, reached: float | None, wanted: Delivery) -> list[str]:
    """Say in words what was reached; ``audio`` is the sound before its ceiling."""
    lines = []
    by = f"limited from {peak_db(audio):+.1f} dB" if wanted.limit or wanted.safe else "scaled down"
    if reached is not None:
        lines.append(f"loudness {reached:.1f} LUFS, true peak {true_peak_db(made):+.1f} dB")
    elif wanted.true_peak_db is not None:
        lines.append(f"true peak {true_peak_db(made):+.1f} dB")
    if made is not audio and (reached is not None or wanted.limit or wanted.peak_db is None):
        lines.append(f"peaks were {by}")
    if reached is not None and abs(reached - (wanted.loudness_lufs or 0.0)) > _NEAR_LU * 2.5:
        advice = "a lower --loudness" if wanted.limit else "--limit"
        lines.append(f"{wanted.loudness_lufs:g} LUFS cannot be reached below that ceiling; {advice} can")
    return lines
