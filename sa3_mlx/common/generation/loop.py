"""Make clips whose end leads into their beginning, in one of two ways.

*seam*: a clip is made as the middle of something longer, rolled by half, so that its ends meet in the middle, and what
is around the joint is made anew with both sides as context; then it is rolled back. The ends that the roll put outside
were neighbours, and all that is kept stays bit for bit, so any number of samples joins exactly.

*turn*: the network sees the loop rolled by another part of it in every evaluation, and its velocity is rolled back, so
no frame is the first or the last one; decoding goes round as well. A loop seldom is a whole number of frames: N frames
are near to it, and the samples that are too many, or too few, are cut out, or said twice, where that is heard least.

Shapes: B batch, N loop frames, C latent channels, L samples of the loop, M samples of its frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.model.chunks import Chunk, chunk_plan, halo, pad_frames
from sa3_mlx.common.model.config import ModelConfig, SAMEConfig
from sa3_mlx.common.model.lengths import Lengths, length_multiple, samples_to_seconds, seconds_to_samples
from sa3_mlx.common.schema import Config

BPM_MIN, BPM_MAX = 20.0, 400.0
BEATS_MAX = 4096  # of a loop
JOINT_SECONDS = 0.5  # made anew around the joint where there is no tempo; else one beat, in any case half of the loop
_GOLDEN = (math.sqrt(5) - 1) / 2  # of the loop, from one turn to the next: they never come near to each other
_LEAST_FRAMES = 8  # of a loop that turns
_FADE_SECONDS = 0.03

Array = TypeVar("Array")
Way = Literal["seam", "turn", "cut"]


@dataclass(frozen=True, kw_only=True)
class Loop(Config):
    """Ask for clips whose end leads into their beginning; their seconds are those of the loop, exactly."""

    bpm: float | None = None  # tempo, BPM_MIN to BPM_MAX, where it has one
    beats: int | None = None  # in the loop, where it has a tempo
    way: Way = "seam"  # "cut" does not join: the middle of something longer, to compare with and to begin with

    def __post_init__(self) -> None:
        self.take_plain()

    def joint(self, seconds: float) -> tuple[float, float]:
        """Return what is made anew of a loop that was rolled by half, from when to when."""
        width = min(JOINT_SECONDS if self.bpm is None else 60 / self.bpm, seconds / 2)
        return (seconds - width) / 2, (seconds + width) / 2


def loop_seconds(bpm: float, beats: int, sample_rate: int) -> float:
    """Return the seconds of exactly round(beats x 60 / bpm x rate) samples."""
    return samples_to_seconds(round(beats * 60 / bpm * sample_rate), sample_rate)


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Say where a loop that turns lies in latent frames."""

    samples: int  # L
    frames: int  # N
    halo: int  # frames of the other end that the decoder needs on each side

    @classmethod
    def of(cls, seconds: float, config: ModelConfig) -> Self:
        """Lay a loop out. Raises ValueError for one that is too short or too long for the model."""
        same, samples = config.same, seconds_to_samples(seconds, config.sample_rate)
        multiple = math.lcm(length_multiple(same), same.frame_multiple)
        frames = multiple * round(samples / (same.samples_per_latent * multiple))
        longest = config.require_diffusion().max_frames // multiple * multiple
        if not _LEAST_FRAMES <= frames <= longest:
            low, high = (end * same.samples_per_latent / config.sample_rate for end in (_LEAST_FRAMES, longest))
            raise ValueError(f"a loop of {seconds:.3f} s: {config.name} turns loops of about {low:.2f} to {high:.2f} s")
        return cls(samples=samples, frames=frames, halo=pad_frames(halo(same, "decode"), same))

    @property
    def heard(self) -> NDArray[np.int32]:
        """Return the frames to decode (N + 2 halo,): the loop, and the other end on each side."""
        return ((np.arange(self.frames + 2 * self.halo) - self.halo) % self.frames).astype(np.int32)

    def lengths(self, items: int) -> Lengths:
        """Return the lengths of a batch of ``items`` such loops."""
        each = (self.frames,) * items
        return Lengths(frames=self.frames, effective=each, valid=each, output_samples=(self.samples,) * items)

    def chunks(self, chunk_frames: int, same: SAMEConfig) -> list[Chunk]:
        """Plan chunks of ``heard`` frames; what is kept of them, joined, is the loop."""
        end, kept = self.halo + self.frames, []
        for chunk in chunk_plan(self.frames + 2 * self.halo, chunk_frames, same, "decode"):
            start, stop = max(chunk.keep_start, self.halo), min(chunk.keep_stop, end)
            if start < stop:
                kept.append(Chunk(chunk.start, chunk.stop, start, stop))
        return kept

    def turning(
        self, velocity: Callable[[Array, NDArray[np.float32]], Array], array: Callable[[NDArray[np.int32]], Any]
    ) -> Callable[[Array, NDArray[np.float32]], Array]:
        """Return a velocity of x (B, N, C), t (B,) that sees x turned further in every evaluation."""
        evaluations = count()

        def turned(x: Any, t: NDArray[np.float32]) -> Any:
            by = round(next(evaluations) * _GOLDEN * self.frames)
            there, back = (((np.arange(self.frames) + turn) % self.frames).astype(np.int32) for turn in (by, -by))
            seen: Any = velocity(x[:, array(there)], t)
            return seen[:, array(back)]

        return turned


def close(audio: Audio, samples: int, sample_rate: int) -> Audio:
    """Return L ``samples`` that go round, of M samples (M, channels) that do.

    The difference is cut out, or said twice, in one crossfade. It lies where both sides differ least, which is where
    they are alike or where nothing sounds; its gains keep the power that the likeness of both sides asks for.
    The first sample stays the first one.
    """
    extra = len(audio) - samples
    if not extra:
        return audio
    fade = max(1, min(round(_FADE_SECONDS * sample_rate), samples // 4))
    after = np.roll(audio, -extra, axis=0)  # what each sample is followed by once the difference is out
    differing = np.square(audio.astype(np.float64) - after).sum(axis=1)
    total = np.cumsum(np.concatenate([[0.0], differing, differing[:fade]]))
    at = int((total[fade : fade + len(audio)] - total[: len(audio)]).argmin())  # the crossfade begins here
    inside = (at + np.arange(fade)) % len(audio)
    mixed = _crossfade(audio[inside].astype(np.float64), after[inside].astype(np.float64))
    first = at + fade + extra  # where the rest begins: it ends where the crossfade begins
    rest = audio[(first + np.arange(samples - fade)) % len(audio)]
    made = np.concatenate([rest, mixed.astype(audio.dtype)])
    begin = -first % len(audio)  # where the first sample came to, unless it was cut out
    return np.roll(made, -begin if begin < len(rest) else 0, axis=0)


def _crossfade(old: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    energy = math.sqrt(float((old**2).sum() * (new**2).sum()))
    alike = min(max(float((old * new).sum()) / energy, 0.0), 1.0) if energy else 1.0
    share = ((np.arange(len(old)) + 0.5) / len(old))[:, None]
    return (old * (1 - share) + new * share) / np.sqrt(share**2 + (1 - share) ** 2 + 2 * alike * share * (1 - share))
