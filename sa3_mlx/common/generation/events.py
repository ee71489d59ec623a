"""Describe what a run yields on its way and returns at its end, and where its noise comes from.

Shapes: B batch, T latent frames, C latent channels, L samples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.delivery.chain import deliver
from sa3_mlx.common.delivery.settings import Delivery
from sa3_mlx.common.files.audio import usual_subtype, write_audio
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.version import version

from .frames import FrameSeed
from .noise import NoiseStream, noise
from .plan import Plan
from .regions import Seam
from .request import Item, Request

REQUEST_TAGS = "sa3-request/1"  # format of the tags of a file that a program saved
Latents = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Conditioned:
    """Tell that prompts and given audio are encoded; sampling comes next."""

    frames: int  # T that the model runs on
    valid: tuple[int, ...]  # of them, per item
    sigmas: NDArray[np.float32]  # (B, steps + 1) times of all steps, from 1, noise, to 0


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """Tell that step ``index`` of ``steps`` is done.

    ``denoised`` (B, T, C), an array of the backend, is what the model expected of the end at the start of this step;
    frames beyond an item's valid ones mean nothing.
    """

    index: int
    steps: int
    denoised: Any


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Tell that all steps are done, or launched, and the DiT freed if nothing stays."""

    fetch: Callable[[], Latents]

    @property
    def latents(self) -> Latents:
        """Return the end (B, T, C): see ``denoised``. A device that computes by itself is waited for here."""
        return self.fetch()


@dataclass(frozen=True, kw_only=True)
class AudioChunk:
    """Give finished samples of one item from ``start`` on; an item's chunks, joined, are its audio."""

    item: int  # place in the batch
    start: int  # sample of the clip
    audio: Audio  # (n, channels)


@dataclass(frozen=True, kw_only=True, repr=False)
class Generation:
    """Hold the result, one entry per item; audio is not clamped to [-1, 1]. Notebooks show it with players."""

    request: Request  # what was asked for
    audio: tuple[Audio, ...]  # (L, channels)
    sample_rate: int  # Hz
    seeds: tuple[int, ...]  # of the noise
    latents: tuple[Latents, ...]  # (T of the item, C), its valid frames
    seams: tuple[tuple[Seam, ...], ...]  # empty without kept audio
    clipped_share: tuple[float, ...]  # share of sample frames beyond full scale, 0..1
    timings: Mapping[str, float]  # seconds by stage: text, encode, sample, decode; loading of weights included
    ways: Mapping[str, str]  # by which the bits may differ from those of the usual ways, see ``choices.py``

    def save(
        self, path: str | Path, item: int = 0, *, subtype: Subtype | None = None, delivery: Delivery | None = None
    ) -> Path:
        """Write the audio of one item as .wav, .flac, .mp3, .ogg, .opus or .m4a, with the request in its tags.

        Returns the path. An existing file is replaced. ``subtype``: of the samples; None is the usual one of the
        extension. ``delivery``: loudness, rate, fades and the like; None leaves the sound as it is.
        Raises ValueError for an item that is not there, an extension or a subtype, OSError where the disk refuses.
        """
        path = Path(path)
        if not 0 <= item < len(self.audio):
            raise ValueError(f"item is {item}: there are {len(self.audio)}, counted from 0")
        tags = {"format": REQUEST_TAGS, "sa3": version(), "item": item, "request": self.request.to_dict()}
        if self.ways:
            tags["ways"] = dict(self.ways)
        subtype = subtype or usual_subtype(path)
        wanted = (delivery or Delivery()).for_file(subtype, self.sample_rate)
        if delivery is not None:
            wanted.check(len(self.audio[item]) / self.sample_rate, subtype, kept=bool(self.seams))
            tags["delivery"] = wanted.to_dict(defaults=False)
        sound = deliver(self.audio[item], self.sample_rate, wanted, clips=subtype != "float")
        write_audio(path, sound.audio, sound.sample_rate, subtype, comment=json.dumps(tags))
        return path

    def __repr__(self) -> str:
        lengths = ", ".join(f"{len(audio) / self.sample_rate:.2f} s" for audio in self.audio)
        return f"Generation({len(self.audio)} x audio at {self.sample_rate} Hz: {lengths})"

    def _repr_html_(self) -> str:
        """Return a player and a picture for every item; IPython asks for it."""
        from .notebook import html

        def caption(number: int) -> str:
            item, seconds = self.request.items[number], len(self.audio[number]) / self.sample_rate
            return f"{item.prompt or 'no prompt'} (seed {item.seed}, {seconds:.2f} s)"

        clips = ((caption(number), audio, self.request.made(number)) for number, audio in enumerate(self.audio))
        return html(clips, self.sample_rate)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Give the result; this is the last event."""

    generation: Generation


@dataclass(frozen=True, kw_only=True)
class WindowMade:
    """Tell that a window of a long piece is done."""

    index: int
    windows: int  # of the piece
    latents: Latents  # (frames, C) that it adds
    resumed: bool  # it was made by an earlier run


@dataclass(frozen=True, kw_only=True)
class PieceFinished:
    """Tell that a long piece is done; this is its last event. Its audio came in AudioChunks and is held nowhere."""

    request: Request
    seams: tuple[Seam, ...]  # with what is kept around it
    timings: Mapping[str, float]  # as those of a ``Generation``
    ways: Mapping[str, str]


Event = Conditioned | Stepped | Sampled | AudioChunk | Finished | WindowMade | PieceFinished


class NoiseSource(Protocol):
    """Draw standard normals of one item for one purpose: frames ``start .. start + frames`` -> (frames, channels).

    They come as ``Latents``, or, from a source that draws on a device, as an array of the twin whose device that is.
    """

    def __call__(self, item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> Any: ...


@dataclass(frozen=True)
class SeededNoise:
    """Draw noise from seeds, the usual way: an item's depends on its seed and on nothing else."""

    seeds: Sequence[int]

    def __call__(self, item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> Any:
        return noise(self.seeds[item], purpose, frames, channels, start=start)


@dataclass(frozen=True)
class PatchedNoise(SeededNoise):
    """Draw noise from seeds, in some frames of an item from others."""

    own: Sequence[Sequence[FrameSeed]]  # of every item

    def __call__(self, item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> Any:
        drawn = noise(self.seeds[item], purpose, frames, channels, start=start)
        for part in self.own[item]:
            first, last = max(part.start, start), start + frames
            last = last if part.stop is None else min(part.stop, last)
            if first < last:
                found = noise(part.seed, purpose, last - first, channels, start=first)
                drawn[first - start : last - start] = found
        return drawn


@dataclass(frozen=True)
class TurnedNoise:
    """Turn the noise of items towards that of other seeds: by a spread of 0 to 1 on the quarter circle between both.

    Both are independent normals, so at every point of the way the numbers are independent normals too, frame by frame
    as the contract of noise.py wants it; on many numbers that is spherical interpolation.
    """

    source: NoiseSource
    items: Sequence[Item]

    def __call__(self, item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> Any:
        drawn, turned = self.source(item, purpose, frames, channels, start), self.items[item]
        if turned.toward is None or not turned.spread:
            return drawn
        other = noise(turned.toward, purpose, frames, channels, start=start)
        if turned.spread == 1:
            return other
        angle = turned.spread * np.pi / 2
        return (np.cos(angle) * drawn + np.sin(angle) * other).astype(np.float32)


def host_noise(request: Request, plan: Plan | None = None) -> NoiseSource:
    """Return the noise of a request's seeds, drawn by numpy; frames that have their own are those of a plan."""
    seeds = [item.seed for item in request.items]
    seeded = SeededNoise(seeds) if plan is None or not any(plan.seeds) else PatchedNoise(seeds, plan.seeds)
    return TurnedNoise(seeded, request.items) if any(item.spread for item in request.items) else seeded


def batch_of(source: NoiseSource, purpose: NoiseStream, shape: tuple[int, ...], channels: int) -> Latents:
    """Draw noise of every item from frame 0 on, shape (B, T) -> (B, T, channels)."""
    items, frames = shape
    return np.stack([source(item, purpose, frames, channels, 0) for item in range(items)])


class Stopwatch:
    """Add up seconds by stage: ``with watch("text"): ...``. What a caller does between events does not count.

    ``mark`` reads a clock, ``between`` turns two readings into seconds. A device that computes by itself marks the
    moment when it comes to that place of its work, which is read when all is done: nothing waits while stages run.
    """

    def __init__(
        self,
        *stages: str,
        mark: Callable[[], Any] = time.perf_counter,
        between: Callable[[Any, Any], float] = lambda start, stop: stop - start,
    ) -> None:
        self._spans: dict[str, list[tuple[Any, Any]]] = {stage: [] for stage in stages}
        self._settled = dict.fromkeys(stages, 0.0)
        self._mark, self._between = mark, between

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of every stage until now."""
        spans = self._spans.items()
        return {stage: self._settled[stage] + sum(self._between(*span) for span in own) for stage, own in spans}

    def settle(self) -> None:
        """Add up until now and hold no single span, so that a long piece holds no more than a short one."""
        self._settled = self.seconds
        self._spans = {stage: [] for stage in self._spans}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._mark()
        try:
            yield
        finally:
            self._spans[stage].append((start, self._mark()))

    def each(self, stage: str, made: Iterable[T]) -> Iterator[T]:
        """Yield what an iterator makes, and add the seconds that it takes to make each."""
        items = iter(made)
        while True:
            with self(stage):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
