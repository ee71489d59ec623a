"""Synthesise drums and noises with numpy: seeded, no files, no external program.

Every recipe takes a random generator and returns mono float32 at 44.1 kHz whose parameters (pitch, decay, noise,
envelope) vary with the generator, so that no clip can be memorised.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sa3_torch.train.data.clip_cache import SAMPLE_RATE, Audio

Float = NDArray[np.float64]


def _time(seconds: float) -> Float:
    return np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _sweep(t: Float, start_hz: float, end_hz: float, fall_seconds: float) -> Float:
    """Return a sine whose frequency falls exponentially from start to end."""
    phase = end_hz * t + (start_hz - end_hz) * fall_seconds * (1 - np.exp(-t / fall_seconds))
    return np.asarray(np.sin(2 * np.pi * phase))


def _band(rng: np.random.Generator, samples: int, low_hz: float, high_hz: float) -> Float:
    """Return white noise limited to a band with edges of second order, standard deviation one."""
    f = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE) + 1e-9
    gain = 1 / np.sqrt((1 + (low_hz / f) ** 4) * (1 + (f / high_hz) ** 4))
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(samples)) * gain, samples)
    return np.asarray(noise / noise.std())


def kick(rng: np.random.Generator) -> Audio:
    t = _time(0.9)
    body = _sweep(t, rng.uniform(130, 230), rng.uniform(42, 58), rng.uniform(0.015, 0.045))
    out = body * np.exp(-t / rng.uniform(0.09, 0.22))
    out += rng.uniform(0.02, 0.12) * _band(rng, len(t), 800, 6000) * np.exp(-t / 0.003)
    return out.astype(np.float32)


def snare(rng: np.random.Generator) -> Audio:
    t = _time(0.8)
    pitch = rng.uniform(165, 230)
    body = _sweep(t, pitch * 1.4, pitch, 0.01) + 0.6 * np.sin(2 * np.pi * 1.6 * pitch * t)
    rattle = _band(rng, len(t), rng.uniform(900, 1800), rng.uniform(7000, 12000))
    out = 0.5 * body * np.exp(-t / rng.uniform(0.04, 0.09)) + 0.45 * rattle * np.exp(-t / rng.uniform(0.06, 0.14))
    return out.astype(np.float32)


def clap(rng: np.random.Generator) -> Audio:
    t = _time(0.7)
    centre = rng.uniform(1000, 1500)
    noise = _band(rng, len(t), centre * 0.75, centre * 1.6)
    bursts, gap = int(rng.integers(3, 5)), rng.uniform(0.009, 0.013)
    envelope = np.zeros_like(t)
    for k in range(bursts):
        since = t - k * gap
        decay = rng.uniform(0.05, 0.12) if k == bursts - 1 else 0.003
        envelope += np.where(since >= 0, np.exp(-np.maximum(since, 0) / decay), 0.0)
    return np.asarray(noise * envelope, dtype=np.float32)


def _metal(rng: np.random.Generator, t: Float) -> Float:
    """Return six detuned square waves, as in analogue cymbal circuits."""
    base = rng.uniform(0.85, 1.2)
    squares = [np.sign(np.sin(2 * np.pi * base * f * t)) for f in (2050, 3043, 3691, 5225, 5400, 8000)]
    return np.asarray(np.sum(squares, axis=0) / np.sqrt(6))


def _highpass(audio: Float, low_hz: float) -> Float:
    f = np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE) + 1e-9
    return np.asarray(np.fft.irfft(np.fft.rfft(audio) / np.sqrt(1 + (low_hz / f) ** 8), len(audio)))


def hihat(rng: np.random.Generator) -> Audio:
    t = _time(0.4)
    tone = _highpass(_metal(rng, t) + rng.uniform(0.7, 1.5) * rng.standard_normal(len(t)), rng.uniform(6000, 8500))
    return (tone * np.exp(-t / rng.uniform(0.015, 0.045))).astype(np.float32)


def crash(rng: np.random.Generator) -> Audio:
    t = _time(4.0)
    tone = _highpass(0.5 * _metal(rng, t) + 1.2 * rng.standard_normal(len(t)), rng.uniform(2500, 4500))
    decay = rng.uniform(0.45, 0.9)
    return (tone * (0.5 * np.exp(-t / decay) + 0.5 * np.exp(-t / (0.15 * decay)))).astype(np.float32)


def tom(rng: np.random.Generator) -> Audio:
    t = _time(1.2)
    pitch = rng.uniform(85, 190)
    out = _sweep(t, pitch * rng.uniform(1.3, 1.7), pitch, rng.uniform(0.03, 0.08)) * np.exp(-t / rng.uniform(0.15, 0.3))
    out += rng.uniform(0.03, 0.1) * _band(rng, len(t), 300, 3000) * np.exp(-t / 0.02)
    return out.astype(np.float32)


def coloured_noise(rng: np.random.Generator, colour: str, seconds: float) -> Audio:
    """Return white, pink (1/f power) or brown (1/f^2 power) noise above 30 Hz, standard deviation one, no envelope."""
    slope = {"white": 0.0, "pink": 0.5, "brown": 1.0}[colour]
    samples = int(seconds * SAMPLE_RATE)
    f = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum = np.fft.rfft(rng.standard_normal(samples)) * np.maximum(f, 30.0) ** -slope * (f > 20)
    noise = np.fft.irfft(spectrum, samples)
    return np.asarray(noise / noise.std(), dtype=np.float32)


def noise_clip(rng: np.random.Generator, colour: str) -> Audio:
    """Return 0.6 to 3.8 s of noise: steady, fading or swelling, with a 5 ms attack and a soft release."""
    seconds = rng.uniform(0.6, 3.8)
    noise = coloured_noise(rng, colour, seconds)
    t = np.linspace(0, 1, len(noise))
    depth_db = rng.uniform(0, 12)
    level = [np.zeros_like(t), -depth_db * t, -depth_db * (1 - t)][int(rng.integers(3))]
    release = rng.uniform(0.02, 0.3) / seconds
    edges = np.minimum(1, t * seconds / 0.005) * np.clip((1 - t) / release, 0, 1)
    return np.asarray(noise * edges * 10 ** (level / 20), dtype=np.float32)


DRUMS: dict[str, Callable[[np.random.Generator], Audio]] = {
    "kick": kick,
    "snare": snare,
    "clap": clap,
    "hihat": hihat,
    "crash": crash,
    "tom": tom,
}
NOISES = ("white", "pink", "brown")
