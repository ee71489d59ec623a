"""Convert between seconds, samples and latent frames; no other place does [B25, B31, B32].

Seconds become samples by ``int(seconds * sample_rate)`` in Python floats, as in the official code.
R is ``config.same.samples_per_latent`` (4096 in the released models).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .config import ModelConfig, SAMEConfig

SAMPLES_MAX = 2**53  # up to here every number of samples is a float
_OFFICIAL_CHUNK_PATCHES = 32  # default ``chunk_size`` of the official encoder configurations [B31]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Hold the lengths of a batch: frames are shared, the other fields have one entry per item."""

    frames: int  # T, latent frames that the model runs on
    effective: tuple[int, ...]  # L, frames of the asked duration; the schedule and nothing else depends on it [B25]
    valid: tuple[int, ...]  # frames that count as valid in the padding mask: duration and head-room [B32]
    output_samples: tuple[int, ...]  # samples of audio to return


def seconds_to_samples(seconds: float, sample_rate: int) -> int:
    """Return whole samples. Raises ValueError for a time that no audio has: not finite, or beyond ``SAMPLES_MAX``."""
    samples = seconds * sample_rate
    if not abs(samples) <= SAMPLES_MAX:
        raise ValueError(f"{seconds:g} s: no audio has this length; give seconds")
    return int(samples)


def samples_to_seconds(samples: int, sample_rate: int) -> float:
    """Return the shortest time that ``seconds_to_samples`` turns back into exactly ``samples``."""
    seconds = samples / sample_rate
    while seconds_to_samples(seconds, sample_rate) < samples:
        seconds = math.nextafter(seconds, math.inf)
    return seconds


def longest(config: ModelConfig) -> str:
    """Return the longest clip of a model, for people: rounded down, so that it can be asked for."""
    return f"{math.floor(config.max_seconds * 100) / 100:.2f} s"


def samples_to_frames(samples: int, same: SAMEConfig) -> int:
    """Return the latent frames that cover ``samples``."""
    return -(-samples // same.samples_per_latent)


def effective_frames(seconds: float, config: ModelConfig) -> int:
    """Return L, frames of a duration without head-room, at least 1 [B25]."""
    return max(1, samples_to_frames(seconds_to_samples(seconds, config.sample_rate), config.same))


def length_multiple(same: SAMEConfig) -> int:
    """Return how many frames a clip has a multiple of [B31]: 2 in all released models."""
    if same.attention == "chunked":
        return same.span
    return max(1, _OFFICIAL_CHUNK_PATCHES // same.stride)


def clip_lengths(seconds: Sequence[float], config: ModelConfig, head_room_seconds: float) -> Lengths:
    """Return the lengths of a batch of durations [B31, B32]. The frame count is capped at the model's ``max_frames``.

    Durations are not checked here, ``request.validate`` does. Raises ValueError for an autoencoder by itself.
    """
    if config.diffusion is None:
        raise ValueError(
            f"{config.name} is an autoencoder alone: it has no clip length; use a model with a diffusion part"
        )
    ratio = config.same.samples_per_latent
    samples = seconds_to_samples(max(seconds) + head_room_seconds, config.sample_rate)
    multiple = length_multiple(config.same)
    frames = -(-samples_to_frames(samples, config.same) // multiple) * multiple
    frames = max(1, min(frames, config.diffusion.max_frames))
    head_room = seconds_to_samples(head_room_seconds, config.sample_rate) // ratio
    effective = tuple(effective_frames(item, config) for item in seconds)
    return Lengths(
        frames=frames,
        effective=effective,
        valid=tuple(min(item + head_room, frames) for item in effective),
        output_samples=tuple(seconds_to_samples(item, config.sample_rate) for item in seconds),
    )
