"""Finish rendered audio (samples, 2): where it begins and ends, its colour, its level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sa3_torch.train.data.clip_cache import SAMPLE_RATE

Float = NDArray[np.float32]
LONGEST = 11.6  # seconds of a clip
SHORTEST = 0.3
_ONSET, _TAIL = 10 ** (-45 / 20), 10 ** (-75 / 20)  # of the peak
_LEAD = int(0.002 * SAMPLE_RATE)
_LOUDEST_DB, _QUIETEST_DB = -1.0, -12.0
_TILT_DB = 1.5  # an octave


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Say what is kept: from the onset or from the given start, ``seconds`` at most, or ``exact`` ones.

    ``fade``: "in" or "out" over the whole clip. ``silence``: what is silent at the end is kept.
    """

    seconds: float
    onset: bool = False
    exact: bool = False
    fade: str | None = None
    silence: bool = False


def finish(audio: NDArray[np.floating], ending: Ending, rng: np.random.Generator) -> NDArray[np.float16]:
    """Cut, colour a little and set the peak between -12 and -1 dBFS. Raises ValueError for silence."""
    loud = np.maximum(np.abs(audio[:, 0]), np.abs(audio[:, 1]))
    peak = float(loud.max())
    if peak < 1e-5:
        raise ValueError("nothing sounds")
    start = max(0, int(np.argmax(loud > peak * _ONSET)) - _LEAD) if ending.onset else 0
    stop = min(start + round(ending.seconds * SAMPLE_RATE), len(audio))
    wanted = max(stop - start, int(SHORTEST * SAMPLE_RATE))
    if ending.exact:
        wanted = round(ending.seconds * SAMPLE_RATE)
    elif not ending.silence:
        heard = np.flatnonzero(loud[start:stop] > peak * _TAIL)
        stop = start + min(int(heard[-1]) + 1 + SAMPLE_RATE // 50, stop - start)
        wanted = max(stop - start, int(SHORTEST * SAMPLE_RATE))
    cut = np.pad(audio[start:stop].T.astype(np.float32), ((0, 0), (0, wanted - (stop - start))))
    cut = _tilted(cut, rng) * _edges(wanted, ending)
    level = 10 ** (rng.uniform(_QUIETEST_DB, _LOUDEST_DB) / 20)
    return np.ascontiguousarray((cut * (level / np.abs(cut).max())).T, dtype=np.float16)


def _edges(samples: int, ending: Ending) -> Float:
    """Return the gain that opens within a millisecond and closes within 3 (exact loops) or 30 ms, and the fade."""
    gain = np.ones(samples, dtype=np.float32)
    opening, closing = SAMPLE_RATE // 1000, int((0.003 if ending.exact else 0.03) * SAMPLE_RATE)
    gain[:opening] = np.linspace(0, 1, opening)
    gain[-closing:] *= np.linspace(1, 0, closing)
    if ending.fade is not None:
        ramp = np.linspace(0, 1, samples) ** 1.5
        gain *= ramp if ending.fade == "in" else ramp[::-1]
    return np.asarray(gain, dtype=np.float32)


def _tilted(audio: Float, rng: np.random.Generator) -> Float:
    """Make takes of (2, samples) differ: tilt the spectrum around 1 kHz by up to 1.5 dB an octave, within 6 dB."""
    slope = rng.uniform(-_TILT_DB, _TILT_DB)
    size = 1 << (audio.shape[1] - 1).bit_length()
    f = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    gain = 10 ** (np.clip(slope * np.log2(np.maximum(f, 20.0) / 1000), -6, 6) / 20)
    spectrum = np.fft.rfft(audio, size) * gain.astype(np.float32)
    return np.asarray(np.fft.irfft(spectrum, size)[:, : audio.shape[1]], dtype=np.float32)
