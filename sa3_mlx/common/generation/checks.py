"""Refuse what a model cannot do, one line for each request, without looking at weights."""

from __future__ import annotations

import math
from typing import get_args

from sa3_mlx.common.files.audio import check_audio
from sa3_mlx.common.model.chunks import Direction, check_chunk_frames
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.dial import SCHEDULES
from sa3_mlx.common.model.lengths import longest, seconds_to_samples
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import is_finite, quoted
from sa3_mlx.common.text.prompt import parse_prompt

from .long.around import around
from .long.between import between
from .long.windows import by_windows, check_long
from .loop import BEATS_MAX, BPM_MAX, BPM_MIN, Loop, Ring, Way
from .noise import check_seed
from .regions import first_uncovered, generated_frames, to_regions
from .request import (
    CROSSFADE_MAX_MS,
    FEATHER_MAX,
    HEAD_ROOM_MAX,
    ITEMS_MAX,
    PROMPT_FADE_MAX,
    PROMPT_MAX,
    PROMPTS_MAX,
    Blend,
    InitAudio,
    Inpaint,
    Item,
    LongForm,
    Patch,
    Request,
    TimedPrompt,
    per_item,
)


def validate(request: Request, config: ModelConfig) -> None:
    """Raise ValueError, one line that says what was given and what is allowed, unless the request can be done."""
    config.require_diffusion()
    sampling = request.sampling or config.usual_sampling
    _check_kind(sampling, Sampling, "sampling", 'Sampling(sampler="euler", steps=50) or a text such as "euler:50:3"')
    sampling.check()
    _check_count(request.items)
    for number, item in enumerate(request.items):
        where = f"item {number}: " if len(request.items) > 1 else ""
        _check_item(item, where, sampling, config, long=request.long is not None)
    _check_sampling(request)
    if request.long is not None:
        _check_kind(request.long, LongForm, "long", "LongForm(), or None")
        check_long(request, config)
    inits = per_item(request.init, InitAudio, "init", request)
    for number, init in enumerate(inits or ()):
        name = _name("init", number, request.init)
        check_audio(init.audio, f"{name} audio", config.audio_channels)
        if not 0 < _finite(init.noise_level, f"{name} noise level") <= 1:
            raise ValueError(f"{name} noise level is {init.noise_level:g}: allowed is above 0 and up to 1")
    for number, inpaint in enumerate(per_item(request.inpaint, Inpaint, "inpaint", request) or ()):
        name, level = _name("inpaint", number, request.inpaint), inits[number].noise_level if inits else None
        _check_inpaint(inpaint, request.items[number], name, config)
        for patch in inpaint.patches:
            _check_patch(patch, f"{name} region {patch.start:g}:{patch.end:g}", inpaint, level, config)
        _check_feather(inpaint, request.items[number].seconds, name)
    if request.long is not None and request.inpaint is not None:
        (between if by_windows(request, config) else around)(request, config)
    if request.loop is not None:
        _check_loop(request, request.loop, config)
    sizes: dict[Direction, int | None] = {"decode": request.chunk_frames, "encode": request.encode_chunk_frames}
    for direction, size in sizes.items():
        if size is not None:
            _check_int(size, "chunk_frames", 1, 2**20)
            check_chunk_frames(size, config.same, direction)


def _check_count(items: object) -> None:
    expected = "Item(prompt=..., seconds=..., seed=...)"
    if not isinstance(items, tuple):
        raise ValueError(f"items is {quoted(items)}: expected {expected}, or several in a tuple")
    if not items:
        raise ValueError(f"items is empty: a request needs at least one {expected}")
    if len(items) > ITEMS_MAX:
        raise ValueError(f"items has {len(items):,} entries: allowed are up to {ITEMS_MAX}; make several requests")
    for number, item in enumerate(items):
        _check_kind(item, Item, f"items[{number}]", expected)


def _check_item(item: Item, where: str, sampling: Sampling, config: ModelConfig, *, long: bool) -> None:
    _check_text(item.prompt, f"{where}prompt")
    if item.negative_prompt is not None:
        _check_text(item.negative_prompt, f"{where}negative prompt")
        if sampling.guidance.scale == 1:
            raise ValueError(f"{where}a negative prompt has no effect at guidance scale 1; use a scale such as 4")
    seconds = _finite(item.seconds, f"{where}seconds")
    if not 0 < seconds <= (math.inf if long else config.max_seconds):
        raise ValueError(f"{where}seconds is {seconds:g}: {config.name} makes above 0 to {longest(config)}")
    if not seconds_to_samples(seconds, config.sample_rate):
        raise ValueError(f"{where}seconds is {seconds:g}: that is less than one sample at {config.sample_rate} Hz")
    try:
        check_seed(item.seed)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    _check_prompts_over_time(item, where, config)
    _check_range(item.spread, f"{where}spread", 0, 1)
    if item.toward is None and item.spread:
        raise ValueError(f"{where}spread is {item.spread:g}, but no seed is given towards which: set toward")
    if item.toward is not None:
        try:
            check_seed(item.toward)
        except ValueError as error:
            raise ValueError(f"{where}toward: {error}") from error


def _check_prompts_over_time(item: Item, where: str, config: ModelConfig) -> None:
    expected = "TimedPrompt(start=..., prompt=...), or several in a tuple"
    _check_kind(item.prompts_over_time, tuple, f"{where}prompts_over_time", expected)
    if len(item.prompts_over_time) > PROMPTS_MAX:
        count = len(item.prompts_over_time)
        raise ValueError(f"{where}{count} prompts over time: allowed are up to {PROMPTS_MAX}; make several clips")
    before, least = 0.0, config.same.samples_per_latent / config.sample_rate
    for later in item.prompts_over_time:
        _check_kind(later, TimedPrompt, f"{where}a prompt over time", expected)
        name = f"{where}the prompt at {_finite(later.start, f'{where}start of a prompt'):g} s"
        if not 0 < later.start < item.seconds:
            raise ValueError(f"{name}: allowed are times above 0 and below {item.seconds:g} s, where the clip ends")
        if later.start - before < least:
            gap = later.start - before
            raise ValueError(f"{name}: comes {gap:.3g} s after the one before it; leave at least {least:.3f} s")
        _check_text(later.prompt, name)
        before = later.start


def _check_loop(request: Request, loop: Loop, config: ModelConfig) -> None:
    _check_kind(loop, Loop, "loop", "Loop(bpm=120.0, beats=16), or Loop() without a tempo")
    given: dict[str, object] = {"head room": request.head_room_seconds, "long form": request.long}
    if loop.way != "cut":
        given |= {"init audio": request.init, "inpaint audio": request.inpaint}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"a loop is made from nothing and has no end: leave out {', '.join(wrong)}")
    if loop.way != "cut" and any(item.prompts_over_time for item in request.items):
        raise ValueError("prompts over time do not go round: leave them out of a loop")
    if len({item.seconds for item in request.items}) > 1:
        raise ValueError("loops of one batch have one length; make a request for each length")
    if loop.bpm is not None:
        _check_range(loop.bpm, "bpm", BPM_MIN, BPM_MAX)
    if loop.beats is not None:
        _check_int(loop.beats, "beats", 1, BEATS_MAX)
    if (loop.bpm is None) != (loop.beats is None):
        raise ValueError(f"loop: bpm is {loop.bpm}, beats is {loop.beats}: give both, or none of them")
    if loop.way not in get_args(Way):
        raise ValueError(f"loop way is {quoted(loop.way)}: allowed are {', '.join(get_args(Way))}")
    if loop.way == "turn":
        if request.decode_noise:
            raise ValueError("decode_noise does not go round: leave it out of a loop that turns")
        Ring.of(request.items[0].seconds, config)
    elif loop.way == "seam":
        least = 4 * config.same.samples_per_latent / config.sample_rate
        if request.items[0].seconds < least:
            raise ValueError(f"a loop of {request.items[0].seconds:.3f} s is too short to join: at least {least:.3f} s")


def _check_sampling(request: Request) -> None:
    if request.head_room_seconds is not None:
        _check_range(request.head_room_seconds, "head room", 0, HEAD_ROOM_MAX, " s")
    if request.crossfade_ms is not None:
        _check_range(request.crossfade_ms, "crossfade", 0, CROSSFADE_MAX_MS, " ms")
    if request.blend not in get_args(Blend):
        raise ValueError(f"blend is {quoted(request.blend)}: allowed are {', '.join(get_args(Blend))}")
    _check_range(request.prompt_fade_seconds, "prompt fade", 0, PROMPT_FADE_MAX, " s")
    _check_kind(request.decode_noise, bool, "decode_noise", "True or False")
    if request.schedule not in SCHEDULES:
        raise ValueError(f"schedule is {quoted(request.schedule)}: allowed are {', '.join(SCHEDULES)}")
    if request.schedule != "official" and request.init is None:
        raise ValueError(f"the {request.schedule} schedule is for init audio: without it all schedules are the same")


def _check_inpaint(inpaint: Inpaint, item: Item, name: str, config: ModelConfig) -> None:
    check_audio(inpaint.audio, f"{name} audio", config.audio_channels)
    _check_kind(inpaint.regions, tuple, f"{name} regions", "pairs (start, end) in seconds, such as ((0.5, 0.8),)")
    if not inpaint.regions:
        raise ValueError(f"{name}: no region to generate; give at least one as (start, end) in seconds")
    regions = to_regions(inpaint.spans, config.sample_rate)
    clip = seconds_to_samples(item.seconds, config.sample_rate)
    ratio = config.same.samples_per_latent
    for region in regions:
        text = f"{name} region {region.start / config.sample_rate:.3f}:{region.stop / config.sample_rate:.3f}"
        if region.stop > clip:
            raise ValueError(f"{text}: ends outside the clip of {item.seconds:g} s; end it there or ask for more")
        if not generated_frames(region, ratio):
            shortest = ratio / config.sample_rate
            raise ValueError(f"{text}: too short, no latent frame begins in it; use at least {shortest:.3f} s")
    if first_uncovered(regions, len(inpaint.audio), clip) is not None:
        raise ValueError(
            f"{name}: the audio ends at {len(inpaint.audio) / config.sample_rate:.3f} s and the clip at "
            f"{item.seconds:g} s; add a region from the audio's end to the clip's end, or shorten the clip"
        )


def _check_patch(patch: Patch, name: str, inpaint: Inpaint, level: float | None, config: ModelConfig) -> None:
    """``level``: of the init audio."""
    if patch.prompt is not None:
        _check_text(patch.prompt, f"{name}: prompt")
    if not 0 < _finite(patch.noise_level, f"{name}: noise level") <= 1:
        raise ValueError(f"{name}: noise level is {patch.noise_level:g}: allowed is above 0 and up to 1")
    if patch.noise_level < 1:
        end = len(inpaint.audio) / config.sample_rate
        if seconds_to_samples(patch.end, config.sample_rate) > len(inpaint.audio):
            raise ValueError(f"{name}: noise level {patch.noise_level:g} needs audio there, which ends at {end:.3f} s")
        if level is not None and patch.noise_level > level:
            raise ValueError(
                f"{name}: noise level {patch.noise_level:g} is above {level:g}, at which all starts; raise that one"
            )
    if patch.seed is not None:
        try:
            check_seed(patch.seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _check_feather(inpaint: Inpaint, seconds: float, name: str) -> None:
    feather = inpaint.feather_seconds
    _check_range(feather, f"{name} feather", 0, FEATHER_MAX, " s")
    for start, end in inpaint.spans if feather else ():
        edges = (start > 0) + (end < seconds)
        if feather * edges > end - start:
            raise ValueError(
                f"{name} region {start:g}:{end:g}: a feather of {feather:g} s leaves nothing of it, "
                f"{edges} x {feather:g} s; use up to {(end - start) / edges:g} s"
            )


def _name(name: str, number: int, value: object) -> str:
    return f"{name} {number}" if isinstance(value, tuple) else name


def _check_kind(value: object, kind: type, name: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {quoted(value)}: expected {expected}")


def _check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is {type(text).__name__}: expected text")
    if len(text) > PROMPT_MAX:
        raise ValueError(f"{name} has {len(text):,} characters: allowed are up to {PROMPT_MAX:,}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} is not valid text: its bytes are not UTF-8")
    try:
        parse_prompt(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _finite(value: float, name: str) -> float:
    if not is_finite(value):
        raise ValueError(f"{name} is {quoted(value)}: expected a finite number")
    return value


def _check_range(value: float, name: str, low: float, high: float, unit: str = "") -> None:
    if not low <= _finite(value, name) <= high:
        raise ValueError(f"{name} is {value:g}{unit}: allowed are {low:g} to {high:g}{unit}")


def _check_int(value: int, name: str, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {quoted(value)}: allowed are the integers {low} to {high}")
