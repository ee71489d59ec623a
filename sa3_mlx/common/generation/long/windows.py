"""Divide a long piece into windows, and say what each of them is asked for.

All numbers are latent frames of the whole piece. The windows before the last have one length and one overlap, so a
longer piece with the same seed has them too; the last one ends with the piece and keeps what it has to. Where something
follows the piece, the last window leads to it: it keeps frames at both ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sa3_mlx.common.generation.regions import to_regions
from sa3_mlx.common.generation.request import Inpaint, Item, LongForm, Request, TimedPrompt, per_item
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import (
    effective_frames,
    length_multiple,
    longest,
    samples_to_seconds,
    seconds_to_samples,
)
from sa3_mlx.common.schema import is_finite, quoted

PIECE_MAX = 86_400.0  # seconds: a day
WINDOW_MIN = 16  # frames
OVERLAP_MAX = 0.75  # of a window
MADE_MAX = 0.75  # of a clip, in the middle of what is kept
_WHOLE_SECONDS = 60.0  # a model of longer clips makes windows of half of them, so that none of them has to end


@dataclass(frozen=True, kw_only=True)
class Window:
    """Describe one run of the model."""

    index: int
    start: int  # its first frame
    kept: int  # of its frames, what is there already; 0 of the first window of a piece made from nothing
    frames: int  # all of them; the rest is made
    after: int  # of its frames, what is there already at its end
    request: Request  # what the model makes: one clip without kept audio
    declared: Request  # the same with the duration that the model is told

    @property
    def stop(self) -> int:
        """Return the frame after its last."""
        return self.start + self.frames

    @property
    def made(self) -> int:
        """Count the frames that it adds."""
        return self.frames - self.kept - self.after


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Hold the windows of a piece."""

    windows: tuple[Window, ...]
    audible: int  # frames that cover the audio
    samples: int  # of the audio

    @property
    def frames(self) -> int:
        """Return the frames of all windows, joined: ``audible`` and the head room of the last one."""
        return self.windows[-1].stop


def window_frames(request: Request, config: ModelConfig) -> int:
    """Return the frames of every window. Raises ValueError for a length that the model cannot make."""
    diffusion, multiple = config.require_diffusion(), length_multiple(config.same)
    given = None if request.long is None else request.long.window_seconds
    if given is None:
        whole = config.max_seconds <= _WHOLE_SECONDS
        frames = diffusion.max_frames if whole else diffusion.max_frames // 2
    else:
        frames = effective_frames(_seconds(given, "window"), config)
    frames -= frames % multiple
    if not WINDOW_MIN <= frames <= diffusion.max_frames or (given is not None and given > config.max_seconds):
        least = WINDOW_MIN * config.same.samples_per_latent / config.sample_rate
        raise ValueError(f"window is {given} s: {config.name} makes windows of {least:.2f} to {longest(config)}")
    return frames


def overlap_frames(request: Request, config: ModelConfig) -> int:
    """Return the frames that a window keeps of the one before. Raises ValueError for too few and too many."""
    window = window_frames(request, config)
    given = None if request.long is None else request.long.overlap_seconds
    if given is None:
        return window // 4
    frame = config.same.samples_per_latent / config.sample_rate
    frames = round(_seconds(given, "overlap") / frame) if given < config.max_seconds else window
    most = int(OVERLAP_MAX * window)
    if not 1 <= frames <= most:
        raise ValueError(
            f"overlap is {given:g} s: for windows of {window * frame:.2f} s allowed are {frame:.3f} to "
            f"{most * frame:.2f} s"
        )
    return frames


def around_samples(request: Request, config: ModelConfig) -> int:
    """Return the samples of the one run that makes short regions of long audio."""
    usual, given = config.require_diffusion().head_room_seconds, request.head_room_seconds
    ratio = config.same.samples_per_latent
    room = -(-seconds_to_samples(usual if given is None else given, config.sample_rate) // ratio)
    return max(1, config.require_diffusion().max_frames - room) * ratio


def by_windows(request: Request, config: ModelConfig) -> bool:
    """Tell whether a request is made in windows: every long one but that of regions that one run can make.

    One region that goes on to the end, that is too long for one run, or for which windows are described, is.
    """
    if request.long is None or request.inpaint is None:
        return request.long is not None
    inpaints = per_item(request.inpaint, Inpaint, "inpaint", request)
    regions = to_regions(inpaints[0].spans, config.sample_rate) if inpaints else ()
    if len(regions) != 1:
        return False
    region, total = regions[0], seconds_to_samples(request.items[0].seconds, config.sample_rate)
    too_long = region.stop - region.start > MADE_MAX * around_samples(request, config)
    return request.long != LongForm() or region.stop >= total or too_long


def run_frames(request: Request, config: ModelConfig) -> int:
    """Return the frames of the runs of the model in which a long request is made: of windows, or of one clip."""
    windows = by_windows(request, config)
    return window_frames(request, config) if windows else config.require_diffusion().max_frames


def check_long(request: Request, config: ModelConfig) -> None:
    """Raise ValueError, one line, for a long piece that cannot be made; its clip was checked but for the length."""
    assert request.long is not None
    if len(request.items) != 1:
        raise ValueError(f"a long piece is made by itself: {len(request.items)} clips were asked for; ask for one")
    if request.init is not None:
        raise ValueError("a long piece is not made from init audio: leave it out")
    anchor, seconds = request.long.anchor, request.items[0].seconds
    if not is_finite(anchor) or not 0 <= anchor <= 1:
        raise ValueError(f"anchor is {quoted(anchor)}: allowed are 0 to 1")
    if seconds > PIECE_MAX:
        raise ValueError(f"seconds is {seconds:g}: a piece has at most {PIECE_MAX:g}; make several")
    overlap_frames(request, config)
    if not by_windows(request, config):
        if request.long != LongForm():
            raise ValueError("window, overlap and anchor are for one region: leave them out with several")
        return
    size = window_frames(request, config)
    if effective_frames(seconds, config) + head_room_frames(request, config) <= size:
        window = size * config.same.samples_per_latent / config.sample_rate
        raise ValueError(
            f"{seconds:g} s fit into one window of {window:.2f} s: leave out window, overlap and "
            "anchor, or ask for more"
        )


def layout(request: Request, config: ModelConfig, *, before: int = 0, after: int = 0) -> Layout:
    """Divide a piece into windows; its first frames, ``before``, and its last, ``after``, are there already.

    Raises ValueError as ``check_long``.
    """
    spans = _spans(request, config, before, after)
    room, item = 0 if after else head_room_frames(request, config), request.items[0]
    windows, made = list[Window](), before
    for index, (start, frames) in enumerate(spans):
        ends = index == len(spans) - 1 and not after
        own = _seconds_of(frames - room if ends else frames, config)
        part = replace(
            request,
            items=(item_between(item, _seconds_of(start, config), own, _seconds_of(1, config)),),
            inpaint=None,
            long=None,
            head_room_seconds=_seconds_of(room, config) if ends else 0.0,
        )
        told = own if ends else config.max_seconds  # so that none of them comes to an end
        windows.append(
            Window(
                index=index,
                start=start,
                kept=max(0, made - start),
                frames=frames,
                after=after if index == len(spans) - 1 else 0,
                request=part,
                declared=replace(part, items=(replace(part.items[0], seconds=told),)),
            )
        )
        made = start + frames
    return Layout(
        windows=tuple(windows),
        audible=effective_frames(item.seconds, config),
        samples=seconds_to_samples(item.seconds, config.sample_rate),
    )


def item_between(item: Item, start: float, seconds: float, frame: float) -> Item:
    """Return what is asked for in the part of a clip that begins at ``start`` and lasts so many ``seconds``.

    A prompt that begins in its first frame, of ``frame`` seconds, holds from its beginning.
    """
    changes = [(0.0, item.prompt), *((later.start, later.prompt) for later in item.prompts_over_time)]
    first = [prompt for time, prompt in changes if time < start + frame][-1]
    inside = [(time, prompt) for time, prompt in changes if start + frame <= time < start + seconds]
    later = tuple(TimedPrompt(start=time - start, prompt=prompt) for time, prompt in inside)
    return replace(item, prompt=first, seconds=seconds, prompts_over_time=later)


def _spans(request: Request, config: ModelConfig, before: int, after: int) -> Sequence[tuple[int, int]]:
    """Return start and length of all windows: the last one keeps an overlap, where it has to more, and what follows."""
    size, overlap = window_frames(request, config), overlap_frames(request, config)
    end, multiple = effective_frames(request.items[0].seconds, config), length_multiple(config.same)

    def until(end: int) -> Sequence[tuple[int, int]]:
        last = end - size
        if last <= 0:
            return [(0, min(size, -(-end // multiple) * multiple))]
        return [(start, size) for start in (*range(0, last, size - overlap), last)]

    if not after:
        return until(end + head_room_frames(request, config))
    *_, last = until(end)
    reach = last[0] + overlap if last[0] else 0
    return [*(until(reach) if reach > before else ()), last]


def head_room_frames(request: Request, config: ModelConfig) -> int:
    """Return the frames that the last window makes beyond the end, at most half of what it makes."""
    usual, given = config.require_diffusion().head_room_seconds, request.head_room_seconds
    samples = seconds_to_samples(usual if given is None else given, config.sample_rate)
    most = (window_frames(request, config) - overlap_frames(request, config)) // 2
    return min(samples // config.same.samples_per_latent, most)


def _seconds_of(frames: int, config: ModelConfig) -> float:
    return samples_to_seconds(frames * config.same.samples_per_latent, config.sample_rate)


def _seconds(value: float, name: str) -> float:
    if not is_finite(value) or value <= 0:
        raise ValueError(f"{name} is {quoted(value)}: expected seconds above 0")
    return value
