"""Find the pitch of a note and the name of a chord by signal processing, without training.

Notes: YIN (de Cheveigne and Kawahara 2002) on frames of 93 ms, then the energy-weighted median of the frames that are
periodic. Nothing is folded into an octave: an octave error is an error. Chords: semitone-band amplitudes of the whole
clip, matched with the 24 triads and their first harmonics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.measures.spectra import Float, mono
from sa3_torch.train.demo_set.sounds import NAMES

LOWEST_HZ, HIGHEST_HZ = 60.0, 1200.0
FRAME, HOP = 4096, 1024
SILENT = 1e-8  # mean power
PERIODIC = 0.15  # the first dip of the normalised difference below this is the period


@dataclass(frozen=True)
class Pitch:
    """Hold a pitch: ``midi`` is fractional; ``confidence`` is the share of the energy in periodic frames, 0 to 1."""

    midi: float
    confidence: float

    @property
    def hz(self) -> float:
        """Return the pitch in Hz."""
        return float(440 * 2 ** ((self.midi - 69) / 12))


def _yin(
    frame: Float, sample_rate: int, lowest_hz: float = LOWEST_HZ, highest_hz: float = HIGHEST_HZ
) -> tuple[float, float]:
    """Return frequency in Hz and aperiodicity (0 periodic, about 1 noise) of one frame."""
    longest, shortest = int(sample_rate / lowest_hz), int(sample_rate / highest_hz)
    width = len(frame) - longest
    size = 2 * len(frame)
    spectrum = np.fft.rfft(frame, size)
    correlation = np.fft.irfft(spectrum * np.conj(np.fft.rfft(frame[:width], size)), size)[: longest + 1]
    energy = np.concatenate([[0.0], np.cumsum(frame**2)])
    difference = energy[width] + (energy[width : width + longest + 1] - energy[: longest + 1]) - 2 * correlation
    mean = np.cumsum(difference[1:]) / np.arange(1, longest + 1)
    normal = np.concatenate([[1.0], difference[1:] / np.maximum(mean, 1e-12)])
    below = np.flatnonzero(normal[shortest:longest] < PERIODIC)
    lag = shortest + (int(below[0]) if len(below) else int(normal[shortest:longest].argmin()))
    while lag + 1 < longest and normal[lag + 1] < normal[lag]:
        lag += 1
    a, b, c = normal[lag - 1 : lag + 2]
    shift = 0.5 * (a - c) / (a - 2 * b + c) if a - 2 * b + c > 0 else 0.0
    return sample_rate / (lag + float(np.clip(shift, -1, 1))), float(normal[lag])


def _frames(audio: NDArray[np.floating], size: int = FRAME) -> tuple[Float, Float]:
    """Return frames (n, size) of the mono signal, at least one, and their energies (n,)."""
    signal = mono(audio)
    signal = np.pad(signal, (0, max(0, size - len(signal))))
    frames = np.lib.stride_tricks.sliding_window_view(signal, size)[::HOP]
    return frames, (frames**2).sum(axis=1)


def pitch_of(
    audio: NDArray[np.floating],
    sample_rate: int = 44_100,
    *,
    lowest_hz: float = LOWEST_HZ,
    highest_hz: float = HIGHEST_HZ,
    frame: int = FRAME,
) -> Pitch:
    """Find the pitch of a single note in (L,) or (L, channels). Silence and noise give confidence near 0.

    It is searched between two frequencies, in frames of ``frame`` samples, at least two periods of the lowest.
    """
    frames, energies = _frames(audio, frame)
    if energies.max() < SILENT * frame:
        return Pitch(0.0, 0.0)
    chosen = np.flatnonzero(energies > energies.max() * 1e-3)  # within 30 dB of the loudest frame
    estimates = [_yin(frames[i], sample_rate, lowest_hz, highest_hz) for i in chosen]
    midi = np.array([69 + 12 * np.log2(hz / 440) for hz, _ in estimates])
    weight = energies[chosen] * np.array([max(0.0, 1 - aperiodic / 0.5) for _, aperiodic in estimates])
    if weight.sum() == 0:
        return Pitch(float(np.median(midi)), 0.0)
    order = np.argsort(midi)
    middle = int(np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2))
    return Pitch(float(midi[order][middle]), float(weight.sum() / energies[chosen].sum()))


def still_voiced(
    reference: NDArray[np.floating], output: NDArray[np.floating], sample_rate: int = 44_100
) -> float | None:
    """Return the share of the voiced frames of ``reference`` that are voiced in ``output``, over their common length.

    Voiced: aperiodicity below PERIODIC, and in the reference within 30 dB of its loudest frame. None without any.
    """
    length = min(len(reference), len(output))
    frames, energies = _frames(reference[:length])
    loud = np.flatnonzero(energies > max(energies.max() * 1e-3, SILENT * FRAME))
    chosen = [i for i in loud if _yin(frames[i], sample_rate)[1] < PERIODIC]
    if not chosen:
        return None
    frames, energies = _frames(output[:length])
    return float(np.mean([energies[i] > SILENT * FRAME and _yin(frames[i], sample_rate)[1] < PERIODIC for i in chosen]))


def cents_off(audio: NDArray[np.floating], midi: int, sample_rate: int = 44_100) -> float:
    """Return the signed distance in cents from the written pitch; 1200 for an octave too high."""
    return 100 * (pitch_of(audio, sample_rate).midi - midi)


def judge_note(audio: NDArray[np.floating], midi: int, sample_rate: int = 44_100) -> bool:
    """Return whether the pitch is clear (confidence at least 0.3) and lies within 50 cents of ``midi``."""
    pitch = pitch_of(audio, sample_rate)
    return pitch.confidence >= 0.3 and abs(pitch.midi - midi) <= 0.5


def semitones(audio: NDArray[np.floating], sample_rate: int = 44_100) -> Float:
    """Return the peak amplitude in each of 49 semitone bands C3..C7 of the first two seconds; the largest is one."""
    signal = mono(audio)[: 2 * sample_rate]
    size = 1 << 17
    amplitude = np.abs(np.fft.rfft(signal * np.hanning(len(signal)), size))
    f = np.fft.rfftfreq(size, 1 / sample_rate)
    band = np.round(12 * np.log2(np.maximum(f, 1) / 440) + 69).astype(int) - 48
    out = np.zeros(49)
    inside = (band >= 0) & (band < 49)
    np.maximum.at(out, band[inside], amplitude[inside])
    return np.asarray(out / max(out.max(), 1e-12))


def chord_of(audio: NDArray[np.floating], sample_rate: int = 44_100) -> tuple[str, str]:
    """Name a triad whose root lies in C3..B3: root ("C".."B") and quality ("major" or "minor")."""
    bands = np.sqrt(semitones(audio, sample_rate))
    best, answer = -1.0, ("C", "major")
    for root in range(12):
        for quality, third in (("major", 4), ("minor", 3)):
            template = np.zeros(49)
            for interval in (0, third, 7):
                for harmonic, level in ((0, 1.0), (12, 0.7), (19, 0.5), (24, 0.4)):
                    template[root + interval + harmonic] += level
            score = float(bands @ template / (np.linalg.norm(template) * max(float(np.linalg.norm(bands)), 1e-12)))
            if score > best:
                best, answer = score, (NAMES[root], quality)
    return answer
