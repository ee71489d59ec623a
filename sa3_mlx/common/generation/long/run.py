"""Make a long piece window by window, and decode it as it grows; written once for both twins.

Every window keeps the last latents of what is there, as inpainting does, and makes what follows; nothing is decoded
and encoded again on the way. Noise depends on the seed and the frame of the piece. The joined latents are decoded in
chunks planned for all of them, so the audio is that of decoding them at once. What is held in memory does not grow
with the length.

Shapes: T latent frames of a window, C latent channels, n frames.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_mlx.common.generation.clips import decoder_noise, kept_part
from sa3_mlx.common.generation.events import AudioChunk, Event, Latents, NoiseSource, PieceFinished, WindowMade
from sa3_mlx.common.generation.noise import NoiseStream
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Request, Residency
from sa3_mlx.common.model.chunks import Chunk, chunk_plan, halo, pad_frames

from .between import Between, between
from .piece import within
from .windows import Layout, Window, layout

if TYPE_CHECKING:
    from sa3_mlx.common.generation.pipeline import BasePipeline

    from .store import WindowStore

_LEAST_SPREAD = 1e-3  # of a latent channel, so that none is blown up


@dataclass(frozen=True)
class _Shifted:
    """Draw the noise of a window: that of the piece from its first frame on."""

    source: NoiseSource
    first: int

    def __call__(self, item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> Any:
        return self.source(item, purpose, frames, channels, self.first + start)


class Tail:
    """Hold the last latents of a piece."""

    def __init__(self, channels: int) -> None:
        self._latents, self._start = np.zeros((0, channels), np.float32), 0

    @property
    def stop(self) -> int:
        """Return the frames of the piece until now."""
        return self._start + len(self._latents)

    def add(self, latents: Latents) -> None:
        """Take the next frames (n, C)."""
        self._latents = np.concatenate([self._latents, latents])

    def between(self, start: int, stop: int) -> Latents:
        """Return frames of the piece that were not forgotten."""
        return self._latents[start - self._start : stop - self._start]

    def forget(self, until: int) -> None:
        """Forget frames before this one."""
        if until > self._start:
            self._latents, self._start = self._latents[until - self._start :].copy(), until


@dataclass(frozen=True)
class Anchor:
    """Hold drift: what a window is told of the one before has the statistics of the first window.

    Channel by channel, mean and spread of the window before are led back to those of the first one; ``strength`` is how
    far. What was made stays as it is: only what the next window continues from is moved.
    """

    mean: Latents  # (C,) of the first window
    spread: Latents  # (C,)
    strength: float  # 0..1

    @classmethod
    def of(cls, first: Latents, strength: float) -> Anchor:
        """Measure the first window (T, C)."""
        return cls(first.mean(axis=0), first.std(axis=0), strength)

    def hold(self, told: Latents, before: Latents) -> Latents:
        """Return what the next window is told (n, C), from latents of the window before (T, C)."""
        mean, spread = before.mean(axis=0), np.maximum(before.std(axis=0), _LEAST_SPREAD)
        moved = (told - mean) * (self.spread / spread) + self.mean
        held: Latents = (told + np.float32(self.strength) * (moved - told)).astype(np.float32)
        return held


def run_long(
    pipeline: BasePipeline[Any], request: Request, noise: NoiseSource, residency: Residency, store: WindowStore | None
) -> Generator[Event, None, None]:
    """Yield the events of a piece: those of each window's steps, WindowMade, the AudioChunks that are then whole, and
    PieceFinished.

    Windows that ``store`` has are read from it, others are written to it. With audio that is kept, what is there before
    and after the piece are AudioChunks too.
    """
    if request.inpaint is None:
        parts = layout(request, pipeline.config)
        yield from _run(pipeline, request, parts, None, noise, residency, store)
        return
    found = between(request, pipeline.config)
    made = _run(pipeline, found.request, found.layout(pipeline.config), found, noise, residency, store)
    yield from within(made, found, request)


def _run(
    pipeline: BasePipeline[Any],
    request: Request,
    parts: Layout,
    found: Between | None,
    noise: NoiseSource,
    residency: Residency,
    store: WindowStore | None,
) -> Generator[Event, None, None]:
    """Yield the events of a piece; ``found`` is what it lies between."""
    watch, config = pipeline.stopwatch(), pipeline.config
    tail, anchor = Tail(config.same.latent_channels), None
    chunks, done, paste = iter(_chunks(parts, request, pipeline)), 0, None if found is None else found.paste(config)
    chunk = next(chunks, None)
    try:
        after = tail.between(0, 0)
        if found is not None:
            with watch("encode"):
                encode = partial(pipeline.encode, chunk_frames=request.encode_chunk_frames)
                heard, after = found.encoded(encode, config)
                tail.add(heard)
            if residency != "run":
                pipeline.free("same")
        for window in parts.windows:
            made = None if store is None else store.read(window.index)
            resumed = made is not None
            if made is None:
                told = tail.between(window.start, tail.stop)
                if anchor is not None and anchor.strength:
                    before = tail.between(max(0, tail.stop - window.frames), tail.stop)
                    told = anchor.hold(told, before)
                given = (told, after[: window.after])
                made = yield from _made(pipeline, window, given, _Shifted(noise, window.start), residency, watch)
                if store is not None:
                    store.write(window.index, made)
            _check(made, window, config.same.latent_channels)
            tail.add(made)
            if anchor is None:
                first = tail.between(window.start, tail.stop)
                anchor = Anchor.of(first, 0.0 if request.long is None else request.long.anchor)
            if window.after:
                tail.add(after)
            yield WindowMade(index=window.index, windows=len(parts.windows), latents=made, resumed=resumed)
            while chunk is not None and chunk.stop <= tail.stop:
                with watch("decode"):
                    noises = decoder_noise(noise, 0, chunk, config) if request.decode_noise else ()
                    decoded = pipeline.decode_piece(tail.between(chunk.start, chunk.stop), *noises)
                audio = kept_part(chunk, decoded, config.same.samples_per_latent)[: parts.samples - done]
                audio = audio if paste is None else paste.piece(audio, done)
                yield AudioChunk(item=0, start=done, audio=audio)
                done, chunk = done + len(audio), next(chunks, None)
            if residency != "run":
                pipeline.free("same")
            tail.forget(_needed(parts, window, tail.stop, chunk))
            watch.settle()
        ways = pipeline.choices.differing(pipeline.choices.now())
        seams = () if paste is None else paste.seams()
        yield PieceFinished(request=request, seams=seams, timings=watch.seconds, ways=ways)
    finally:
        if residency != "run":
            pipeline.free(*pipeline.loaded)


def _made(
    pipeline: BasePipeline[Any],
    window: Window,
    given: tuple[Latents, Latents],
    noise: NoiseSource,
    residency: Residency,
    watch: Any,
) -> Generator[Event, None, Latents]:
    """Yield the steps of a window and return the frames that it adds (n, C). ``given``: (kept, C) and (after, C)."""
    planned = plan(window.request, pipeline.config)
    inpaint, stop = None, window.kept + window.made
    if window.kept or window.after:
        keep = np.ones((1, planned.frames), np.float32)
        keep[:, window.kept : stop] = 0
        inpaint = np.zeros((1, planned.frames, pipeline.config.same.latent_channels), np.float32)
        inpaint[0, : window.kept], inpaint[0, stop:] = given
        planned = replace(planned, keep_frames=keep)
    end = yield from pipeline.sampled(window.declared, planned, noise, residency, watch, (None, inpaint))
    with watch("sample"):
        made: Latents = pipeline.fetch(end)[0, window.kept : stop]
    if not np.isfinite(made).all():
        raise ValueError(
            "the model's numbers overflowed in this window; use float32 for the model and the text encoder, or a lower "
            "guidance scale"
        )
    return made


def _chunks(parts: Layout, request: Request, pipeline: BasePipeline[Any]) -> Iterator[Chunk]:
    """Yield the chunks in which the joined latents are decoded, as those of a clip are."""
    same = pipeline.config.same
    frames = min(parts.frames, pad_frames(parts.audible + halo(same, "decode"), same))
    size = request.chunk_frames or pipeline.usual_chunk_frames("decode")
    return (chunk for chunk in chunk_plan(frames, size, same, "decode") if chunk.keep_start < parts.audible)


def _needed(parts: Layout, window: Window, stop: int, chunk: Chunk | None) -> int:
    """Return the first frame that a later window or chunk needs."""
    needed = [stop - window.frames]
    if window.index + 1 < len(parts.windows):
        needed.append(parts.windows[window.index + 1].start)
    if chunk is not None:
        needed.append(chunk.start)
    return max(0, min(needed))


def _check(made: Latents, window: Window, channels: int) -> None:
    expected = (window.made, channels)
    if made.shape != expected or made.dtype != np.float32:
        raise ValueError(
            f"window {window.index}: what was kept of it has the shape {made.shape}, not {expected}; remove it, and it "
            "is made again"
        )
