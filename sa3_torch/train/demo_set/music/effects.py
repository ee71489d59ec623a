"""Synthesise stereo risers, impacts, textures, signals and noises with numpy: (samples, 2) float64, any level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sa3_torch.train.data.clip_cache import SAMPLE_RATE
from sa3_torch.train.demo_set.synth import coloured_noise

Float = NDArray[np.float64]
Recipe = Callable[[np.random.Generator], Float]


def _time(seconds: float) -> Float:
    return np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _phase(hz: Float) -> Float:
    return 2 * np.pi * np.cumsum(hz) / SAMPLE_RATE


def _swept(noise: Float, low_hz: Float, high_hz: Float) -> Float:
    """Filter noise by a band whose edges (one value a frame of 1024 samples) move, by overlapping windows."""
    size, hop = 2048, 1024
    out = np.zeros(len(noise) + size)
    padded = np.pad(noise, (0, size))
    window, f = np.hanning(size + 1)[:-1], np.fft.rfftfreq(size, 1 / SAMPLE_RATE) + 1e-9
    for i, start in enumerate(range(0, len(noise), hop)):
        k = min(i, len(low_hz) - 1)
        gain = 1 / np.sqrt((1 + (low_hz[k] / f) ** 4) * (1 + (f / high_hz[k]) ** 4))
        frame = np.fft.irfft(np.fft.rfft(padded[start : start + size] * window) * gain, size)
        out[start : start + size] += frame
    return out[: len(noise)]


def _wide(rng: np.random.Generator, make: Callable[[], Float]) -> Float:
    """Mix a shared and two separate versions of a sound to stereo."""
    width = rng.uniform(0.1, 0.9)
    shared, left, right = make(), make(), make()
    return np.stack([(1 - width) * shared + width * side for side in (left, right)], axis=1)


def _panned(rng: np.random.Generator, audio: Float) -> Float:
    angle = rng.uniform(0.15, 0.85) * np.pi / 2
    return np.stack([audio * np.cos(angle), audio * np.sin(angle)], axis=1)


def _rise(rng: np.random.Generator, seconds: float) -> tuple[Float, Float]:
    """Return the growth 0 to 1 over the samples, curved, and over the frames of ``_swept``."""
    curve = np.linspace(0, 1, int(seconds * SAMPLE_RATE)) ** rng.uniform(1.2, 2.5)
    return curve, curve[::1024]


def riser(rng: np.random.Generator) -> Float:
    """Rise: noise that opens, or a detuned tone that climbs, growing louder to a sudden end."""
    seconds = rng.uniform(1.5, 6.0)
    growth, frames = _rise(rng, seconds)
    level = 10 ** (-36 * (1 - growth) / 20)
    if rng.random() < 0.5:
        low, high = rng.uniform(150, 600), rng.uniform(6000, 14000)
        centre = low * (high / low) ** frames
        return level[:, None] * _wide(rng, lambda: _swept(rng.standard_normal(len(growth)), centre / 1.6, centre * 1.6))
    start = rng.uniform(80, 260)
    hz = start * 2 ** (rng.uniform(1.5, 3.5) * growth)
    return level[:, None] * _wide(rng, lambda: _saw(hz * rng.uniform(0.994, 1.006), rng))


def _saw(hz: Float, rng: np.random.Generator) -> Float:
    """Return a sawtooth-like sum of twelve harmonics below 16 kHz."""
    phase = _phase(hz) + rng.uniform(0, 2 * np.pi)
    return np.asarray(sum(np.sin(k * phase) / k * (k * hz < 16_000) for k in range(1, 13)))


def fall(rng: np.random.Generator) -> Float:
    """Fall: a riser backwards, without its silence."""
    return np.ascontiguousarray(riser(rng)[::-1])


def impact(rng: np.random.Generator) -> Float:
    """Strike: a deep falling tone and a burst of noise with a long dark tail."""
    t = _time(rng.uniform(2.0, 4.0))
    end = rng.uniform(30, 50)
    hz = end + rng.uniform(60, 160) * np.exp(-t / rng.uniform(0.03, 0.12))
    boom = np.sin(_phase(hz)) * np.exp(-t / rng.uniform(0.4, 0.9))
    high = np.full(len(t) // 1024 + 1, rng.uniform(800, 3000))
    tail = _wide(rng, lambda: _swept(rng.standard_normal(len(t)), high * 0.05, high))
    return boom[:, None] + rng.uniform(0.05, 0.25) * tail * np.exp(-t / rng.uniform(0.2, 0.7))[:, None]


def drone(rng: np.random.Generator) -> Float:
    """Hum: a low, slowly beating chord of detuned tones."""
    t = _time(rng.uniform(3.0, 9.0))
    root = 440 * 2 ** ((rng.integers(28, 46) - 69) / 12)
    ratios = rng.choice([(1, 2, 3), (1, 1.5, 2), (1, 2, 4), (1, 1.5, 3)])

    def side() -> Float:
        parts = [
            np.sin(_phase(np.full(len(t), root * r * (1 + rng.normal(0, 0.002)))) + rng.uniform(0, 6)) / r**0.8
            for r in ratios
            for _ in range(2)
        ]
        return np.asarray(sum(parts)) * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(0.1, 0.5) * t))

    return _wide(rng, side) * _swell(t, rng)[:, None]


def _swell(t: Float, rng: np.random.Generator) -> Float:
    """Return an envelope that comes and goes within 0.3 to 1 s."""
    rise, end = rng.uniform(0.3, 1.0, 2)
    return np.asarray(np.minimum(1, t / rise) * np.minimum(1, (t[-1] - t) / end))


def _weather(rng: np.random.Generator, low: float, high: float, rate: float, depth: float) -> Float:
    """Return band noise of 3 to 8 s whose level and brightness wander ``rate`` times a second."""
    t = _time(rng.uniform(3.0, 8.0))
    frames = len(t) // 1024 + 1
    slow = np.interp(
        np.arange(frames),
        np.linspace(0, frames, max(4, int(rate * t[-1]) + 2)),
        rng.uniform(0, 1, max(4, int(rate * t[-1]) + 2)),
    )
    shape = 2 ** (depth * (slow - 0.5))
    level = np.interp(np.arange(len(t)) / 1024, np.arange(frames), shape**1.5)
    band = _wide(rng, lambda: _swept(rng.standard_normal(len(t)), low * shape, high * shape))
    return band * (level * _swell(t, rng))[:, None]


def wind(rng: np.random.Generator) -> Float:
    return _weather(rng, rng.uniform(150, 300), rng.uniform(500, 1200), 0.8, 2.2)


def ocean(rng: np.random.Generator) -> Float:
    return _weather(rng, rng.uniform(60, 120), rng.uniform(1500, 4000), 0.35, 2.6)


def rain(rng: np.random.Generator) -> Float:
    """Rain: bright noise and many short drops."""
    base = _weather(rng, 1500, rng.uniform(8000, 12000), 0.2, 0.3)
    drops = np.zeros_like(base)
    click = np.exp(-_time(0.01) / 0.0015)
    for _ in range(int(len(base) / SAMPLE_RATE * rng.uniform(40, 120))):
        start, pan = int(rng.integers(len(base) - len(click))), rng.uniform(0, 1)
        drop = click * np.sin(2 * np.pi * rng.uniform(2500, 7000) * np.arange(len(click)) / SAMPLE_RATE)
        drops[start : start + len(click)] += rng.exponential() * drop[:, None] * np.array([pan, 1 - pan])
    return base / np.abs(base).max() + 0.8 * drops / max(float(np.abs(drops).max()), 1e-9)


def crackle(rng: np.random.Generator) -> Float:
    """Crackle like an old record: clicks of all sizes on a quiet hiss."""
    t = _time(rng.uniform(2.0, 6.0))
    out = 0.01 * rng.standard_normal((len(t), 2))
    for _ in range(int(t[-1] * rng.uniform(15, 60))):
        start, size = int(rng.integers(len(t) - 80)), int(rng.integers(4, 60))
        out[start : start + size] += rng.standard_normal((size, 1)) * rng.exponential(0.4)
    return out


def laser(rng: np.random.Generator) -> Float:
    """Zap: a tone that falls quickly."""
    t = _time(rng.uniform(0.25, 0.9))
    hz = rng.uniform(80, 300) + rng.uniform(1500, 5000) * np.exp(-t / rng.uniform(0.04, 0.2))
    return _panned(rng, _saw(hz, rng) * np.exp(-t / rng.uniform(0.15, 0.4)))


def beep(rng: np.random.Generator) -> Float:
    """Beep: one to four short tones of one pitch."""
    hz, length, gap = rng.uniform(500, 2500), rng.uniform(0.06, 0.25), rng.uniform(0.05, 0.2)
    t = _time(length)
    tone = np.sin(2 * np.pi * hz * t) * np.minimum(1, np.minimum(t, t[-1] - t) / 0.005)
    one = np.concatenate([tone, np.zeros(int(gap * SAMPLE_RATE))])
    return _panned(rng, np.tile(one, int(rng.integers(1, 5))))


def siren(rng: np.random.Generator) -> Float:
    """Wail between two pitches."""
    t = _time(rng.uniform(2.0, 6.0))
    low, ratio, rate = rng.uniform(400, 700), rng.uniform(1.4, 2.0), rng.uniform(0.3, 1.5)
    hz = low * ratio ** (0.5 - 0.5 * np.cos(2 * np.pi * rate * t))
    return _panned(rng, _saw(hz, rng)) * np.minimum(1, (t[-1] - t) / 0.05)[:, None]


def glitch(rng: np.random.Generator) -> Float:
    """Stutter: short pieces of noise and tones, cut hard, on both sides."""
    pieces = []
    for _ in range(int(rng.integers(6, 20))):
        t = _time(rng.uniform(0.01, 0.12))
        tone = np.sign(np.sin(2 * np.pi * rng.uniform(80, 3000) * t))
        sound = (tone, rng.standard_normal(len(t)), np.zeros(len(t)))[int(rng.integers(3))]
        pieces.append(np.stack([sound * p for p in rng.uniform(0.2, 1, 2)], axis=1))
    return np.concatenate([np.ones((64, 2)) * 0.3, *pieces])


def noise(rng: np.random.Generator, colour: str) -> Float:
    """Hiss or rumble steadily, fading or swelling: 0.8 to 6 s of white, pink or brown noise, narrow or wide."""
    seconds = rng.uniform(0.8, 6.0)
    out = _wide(rng, lambda: coloured_noise(rng, colour, seconds).astype(np.float64))
    t = np.linspace(0, 1, len(out))
    slope = -rng.uniform(0, 24) * (np.zeros_like(t), t, 1 - t)[int(rng.integers(3))]
    edges = np.minimum(1, t * seconds / 0.005) * np.clip((1 - t) * seconds / rng.uniform(0.02, 0.3), 0, 1)
    return out * (edges * 10 ** (slope / 20))[:, None]


EFFECTS: dict[str, Recipe] = {
    "riser": riser,
    "fall": fall,
    "impact": impact,
    "drone": drone,
    "wind": wind,
    "ocean": ocean,
    "rain": rain,
    "crackle": crackle,
    "laser": laser,
    "beep": beep,
    "siren": siren,
    "glitch": glitch,
}
