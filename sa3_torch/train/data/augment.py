"""Augmentations of audio crops, as pure functions of (audio, explicit generator); numpy only [T1.2].

Shapes: N samples; a crop is (N, 2) float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.schema import Config, ConfigError

from .clip_cache import SAMPLE_RATE

Crop = NDArray[np.float32]

SILENCE = 1e-3  # a crop whose peak is below -60 dBFS holds nothing to learn from
PER_ITEMS = 16  # chirps are counted per so many crops
TAIL_PATCH = 256  # samples; a silent tail is a whole number of these
CHIRP_HZ = (100.0, 22_000.0)
CHIRP_OCTAVES = (2.0, 6.5)
CHIRP_DB = (-24.0, -6.0)
CHIRP_DITHER = 1e-4


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Config):
    """Settings of what is done to crops besides level and polarity; zeros switch a line off."""

    chirps_per_16: int  # items that are added for every 16 crops
    silence: float  # share of crops that become silence
    tail: float  # share of crops that end in silence ...
    tail_patches: int  # ... of 1 to this many patches of 256 samples
    pan: float  # 0..1: how far mono crops are moved to a side; true stereo is left alone

    def __post_init__(self) -> None:
        for name in ("silence", "tail", "pan"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: allowed is 0 to 1")
        if self.chirps_per_16 < 0 or self.tail_patches < 1:
            raise ConfigError(
                f"chirps_per_16 is {self.chirps_per_16}, tail_patches {self.tail_patches}: at least 0 and 1 are allowed"
            )


NO_AUGMENTATION = AugmentConfig(chirps_per_16=0, silence=0.0, tail=0.0, tail_patches=1, pan=0.0)


def is_silent(audio: Crop) -> bool:
    """Say whether the peak is below -60 dBFS."""
    return not np.abs(audio).max(initial=0.0) >= SILENCE


def draw_gain(rng: np.random.Generator, quietest_db: float) -> float:
    """Draw a factor from 0 dB down to ``quietest_db``, mostly near 0, of random polarity."""
    level = 10 ** (quietest_db * rng.random() ** 2 / 20)
    return level * (1.0 if rng.random() < 0.5 else -1.0)


def pan_mono(audio: Crop, position: float) -> Crop:
    """Move a crop with two equal channels: -1 is left alone, 0 unchanged, 1 only right. True stereo is unchanged."""
    if not position or not np.array_equal(audio[:, 0], audio[:, 1]):
        return audio
    return audio * np.array([min(1.0, 1 - position), min(1.0, 1 + position)], np.float32)


def zero_tail(audio: Crop, patches: int) -> Crop:
    """Make zeros of the last ``patches`` patches of 256 samples, so that padded final chunks are learnt."""
    out = audio.copy()
    out[max(0, len(out) - patches * TAIL_PATCH) :] = 0
    return out


def chirp(rng: np.random.Generator, samples: int) -> Crop:
    """Make an exponential sweep -> (samples, 2), the same on both channels.

    Its start lies log-uniformly in 100 Hz to 22 kHz; it goes 2 to 6.5 octaves up or down, no further than the band's
    edge, at -24 to -6 dB, with a random phase and a dither of 1e-4.
    """
    low, high = (math.log2(hz) for hz in CHIRP_HZ)
    start = rng.uniform(low, high)
    octaves = rng.uniform(*CHIRP_OCTAVES) * (1 if rng.random() < 0.5 else -1)
    end = min(max(start + octaves, low), high)
    level = 10 ** (rng.uniform(*CHIRP_DB) / 20)
    hz = 2 ** np.linspace(start, end, samples)
    phase = 2 * np.pi * (rng.random() + np.cumsum(hz) / SAMPLE_RATE)
    mono = level * np.sin(phase) + CHIRP_DITHER * rng.standard_normal(samples)
    return np.repeat(mono.astype(np.float32)[:, None], 2, axis=1)


def augment(audio: Crop, config: AugmentConfig, rng: np.random.Generator) -> Crop:
    """Pan, silent tail, silence, each as often as ``config`` says. The same number of draws in every case."""
    pan, silence, tail, patches = (
        rng.uniform(-1, 1),
        rng.random(),
        rng.random(),
        rng.integers(1, config.tail_patches + 1),
    )
    if silence < config.silence:
        return np.zeros_like(audio)
    audio = pan_mono(audio, config.pan * float(pan))
    return zero_tail(audio, int(patches)) if tail < config.tail else audio
