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

from .long.windows import check_long
from .noise import check_seed
from .regions import first_uncovered, generated_frames, to_regions
from .request import (
    CROSSFADE_MAX_MS,
    HEAD_ROOM_MAX,
    ITEMS_MAX,
    PROMPT_MAX,
    Blend,
    InitAudio,
    Inpaint,
    Item,
    LongForm,
    Request,
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
    for number, init in enumerate(per_item(request.init, InitAudio, "init", request) or ()):
        name = _name("init", number, request.init)
        check_audio(init.audio, f"{name} audio", config.audio_channels)
        if not 0 < _finite(init.noise_level, f"{name} noise level") <= 1:
            raise ValueError(f"{name} noise level is {init.noise_level:g}: allowed is above 0 and up to 1")
    for number, inpaint in enumerate(per_item(request.inpaint, Inpaint, "inpaint", request) or ()):
        _check_inpaint(inpaint, request.items[number], _name("inpaint", number, request.inpaint), config)
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


def _check_sampling(request: Request) -> None:
    if request.head_room_seconds is not None:
        _check_range(request.head_room_seconds, "head room", 0, HEAD_ROOM_MAX, " s")
    if request.crossfade_ms is not None:
        _check_range(request.crossfade_ms, "crossfade", 0, CROSSFADE_MAX_MS, " ms")
    if request.blend not in get_args(Blend):
        raise ValueError(f"blend is {quoted(request.blend)}: allowed are {', '.join(get_args(Blend))}")
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
    regions = to_regions(inpaint.regions, config.sample_rate)
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
