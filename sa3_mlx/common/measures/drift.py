"""Measure how a long piece drifts: level, spectral centroid and statistics of the latents, span by span.

What is held are sums for each span, so a piece of hours is measured while it is made. Audio is float (n, channels),
latents are (n, C).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .spectra import WINDOW, mono

SPAN_SECONDS = 60.0
_SILENCE_DB = -120.0


@dataclass(frozen=True, kw_only=True)
class DriftRow:
    """Describe one span of a piece."""

    start: float  # seconds
    level_db: float  # RMS, a full-scale square wave has 0
    centroid_hz: float  # mean frequency by power; 0 in silence
    mean: float  # of all latents
    spread: float  # of the latents: mean over channels of their standard deviation
    moved: float  # distance of the channels' means and spreads to those of the first span, RMS over both


class DriftMeter:
    """Take a piece's audio and latents as they come."""

    def __init__(self, sample_rate: int, samples_per_latent: int, span_seconds: float = SPAN_SECONDS) -> None:
        self._rate, self._ratio, self._seconds = sample_rate, samples_per_latent, span_seconds
        self._blocks: dict[int, NDArray[np.float64]] = {}  # squares, samples, power, power times Hz
        self._sums: dict[int, NDArray[np.float64]] = {}  # (3, C): frames, sums, sums of squares
        self._rest, self._samples, self._frames = np.zeros(0), 0, 0

    def add_audio(self, audio: NDArray[np.floating]) -> None:
        """Take the next samples; they are measured in whole windows of a spectrum."""
        signal = np.concatenate([self._rest, mono(audio)])
        whole = len(signal) // WINDOW
        blocks, self._rest = signal[: whole * WINDOW].reshape(whole, WINDOW), signal[whole * WINDOW :]
        spans = self._spans(self._samples + np.arange(whole) * WINDOW)
        self._samples += whole * WINDOW
        power = np.abs(np.fft.rfft(blocks * np.hanning(WINDOW + 1)[:-1], axis=1)) ** 2
        frequencies = np.fft.rfftfreq(WINDOW, 1 / self._rate)
        for span in np.unique(spans):
            own = spans == span
            heard = power[own].sum(axis=0)
            sums = (blocks[own] ** 2).sum(), own.sum() * WINDOW, heard.sum(), heard @ frequencies
            self._blocks[span] = self._blocks.get(span, 0.0) + np.array(sums, np.float64)

    def add_latents(self, latents: NDArray[np.floating]) -> None:
        """Take the next frames."""
        values = latents.astype(np.float64)
        spans = self._spans((self._frames + np.arange(len(values))) * self._ratio)
        self._frames += len(values)
        for span in np.unique(spans):
            own = values[spans == span]
            sums = np.stack([np.full(own.shape[1], float(len(own))), own.sum(axis=0), (own**2).sum(axis=0)])
            self._sums[span] = self._sums.get(span, 0.0) + sums

    def rows(self, most: int | None = None) -> list[DriftRow]:
        """Return the spans in their order, joined so that there are at most so many."""
        count = max(self._blocks, default=-1) + 1
        together = 1 if most is None else max(1, -(-count // most))
        rows, first = list[DriftRow](), None
        for start in range(0, count, together):
            span = range(start, start + together)
            audio = sum((self._blocks[one] for one in span if one in self._blocks), np.zeros(4))
            frames, total, squares = sum((self._sums[one] for one in span if one in self._sums), np.zeros((3, 1)))
            mean = total / np.maximum(frames, 1)
            spread = np.sqrt(np.maximum(squares / np.maximum(frames, 1) - mean**2, 0))
            found = np.stack(np.broadcast_arrays(mean, spread))
            first = found if first is None else first
            rows.append(self._row(start, audio, found, float(np.sqrt(((found - first) ** 2).mean()))))
        return rows

    def _row(self, span: int, audio: NDArray[np.float64], latents: NDArray[np.float64], moved: float) -> DriftRow:
        squares, samples, power, weighted = audio
        level = 10 * math.log10(squares / samples) if squares > 0 else _SILENCE_DB
        return DriftRow(
            start=span * self._seconds,
            level_db=max(_SILENCE_DB, level),
            centroid_hz=float(weighted / power) if power > 0 else 0.0,
            mean=float(latents[0].mean()),
            spread=float(latents[1].mean()),
            moved=moved,
        )

    def _spans(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = (samples // round(self._seconds * self._rate)).astype(np.int64)
        return found
