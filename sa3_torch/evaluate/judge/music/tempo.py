"""Find the tempo of a loop or a piece by signal processing: the period at which its onsets repeat best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.measures.spectra import Float, mel_filters, mono

SAMPLE_RATE = 44_100
WINDOW, HOP, BANDS = 1024, 256, 24
RATE = SAMPLE_RATE / HOP  # frames a second
SLOWEST, FASTEST, STEP = 56.0, 192.0, 0.25  # bpm
_BEATS = 8  # periods whose multiples count
TOLERANCE = 0.02
NEAR = 0.12  # tempos that compete with the asked one: others are read as half or three halves of the beats
CLEAR = 0.05  # of the mean autocorrelation


def onsets(audio: NDArray[np.floating]) -> Float:
    """Return how much louder each of 24 mel bands gets from frame to frame: (frames, 24), 172 frames a second."""
    signal = np.pad(mono(audio), WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(signal, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)) ** 2
    mel = power @ mel_filters(BANDS, WINDOW, SAMPLE_RATE, 40.0)
    level = np.log10(np.maximum(mel / max(float(mel.max()), 1e-12), 1e-6))
    return np.maximum(np.diff(level, axis=0, prepend=level[:1]), 0)


def scores(audio: NDArray[np.floating]) -> tuple[Float, Float]:
    """Return tempos in bpm and how well the onsets repeat at each: the mean autocorrelation at multiples of a beat."""
    envelope = onsets(audio).sum(axis=1)
    envelope = envelope - envelope.mean()
    size = 1 << (2 * len(envelope) - 1).bit_length()
    spectrum = np.fft.rfft(envelope, size)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2, size)[: len(envelope)]
    counts = np.arange(len(envelope), 0, -1)
    correlation = correlation / max(float(correlation[0]), 1e-12) * len(envelope) / counts  # unbiased
    tempos = np.arange(SLOWEST, FASTEST + STEP, STEP)
    found = np.zeros(len(tempos))
    longest = int(0.85 * len(envelope))  # the last lags rest on few frames
    for i, bpm in enumerate(tempos):
        lags = np.arange(1, _BEATS + 1) * 60 / bpm * RATE
        lags = lags[lags < longest]
        if len(lags):
            found[i] = np.interp(lags, np.arange(len(correlation)), correlation).mean()
    return tempos, found


def tempo_of(audio: NDArray[np.floating]) -> float:
    """Return the tempo in bpm between 56 and 192 at which (L,) or (L, channels) repeats best, 0 for silence."""
    tempos, found = scores(audio)
    return float(tempos[int(found.argmax())]) if found.max() > 0 else 0.0


def keeps_tempo(audio: NDArray[np.floating], bpm: float) -> bool:
    """Return whether, of the tempos within 12 % of ``bpm``, the best is clear and within 2 % of it."""
    tempos, found = scores(audio)
    near = np.flatnonzero(np.abs(tempos / bpm - 1) <= NEAR)
    best = near[int(found[near].argmax())]
    return bool(found[best] >= CLEAR and abs(tempos[best] / bpm - 1) <= TOLERANCE)
