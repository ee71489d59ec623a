"""Describe what a user asks for, and read and write it as JSON.

``validate`` in checks.py refuses what cannot be done; ``plan`` in plan.py works out the rest.

Shapes: L samples; audio is float32 (L, channels) at the model's sample rate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import numpy as np

from sa3_mlx.common.files.audio import check_audio
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.objects import parse_object
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.dial import Schedule
from sa3_mlx.common.model.lengths import samples_to_seconds, seconds_to_samples
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import Config, ConfigError, is_finite, quoted, require

from .loop import Loop

ITEMS_MAX = 256  # clips of one request
PROMPT_MAX = 10_000  # characters; models read about the first thousand
HEAD_ROOM_MAX = 60.0
CROSSFADE_MAX_MS = 1000.0
DEFAULT_CROSSFADE_MS = 20.0
PROMPTS_MAX = 64  # over the time of one clip
PROMPT_FADE_MAX = 30.0
DEFAULT_PROMPT_FADE = 0.2
FEATHER_MAX = 30.0


# How long weights stay in memory: "run" from their first use on, for further runs too; "phase" until the run needs the
# part no more; "step" as "phase", and the blocks of the DiT, one by one, only while a step computes with them.
Residency = Literal["run", "phase", "step"]
Blend = Literal["spherical", "linear"]


@dataclass(frozen=True, kw_only=True)
class TimedPrompt(Config):
    """Ask for something else from a time on."""

    start: float  # seconds, inside the clip
    prompt: str  # as that of an ``Item``

    def __post_init__(self) -> None:
        self.take_plain()


@dataclass(frozen=True, kw_only=True)
class Item(Config):
    """Describe one clip of a batch."""

    prompt: str  # what to make, at most PROMPT_MAX characters, see text/prompt.py; "" leaves it to the model
    seconds: float  # length, above 0 and up to the model's ``max_seconds``
    seed: int  # of the noise, 0 to SEED_MAX: equal seeds give equal sounds
    negative_prompt: str | None = None  # steers away from it; needs a guidance scale other than 1
    prompts_over_time: tuple[TimedPrompt, ...] = ()  # what ``prompt`` gives way to, in the order of time
    toward: int | None = None  # seed of other noise, to which that of ``seed`` is turned by ``spread``
    spread: float = 0.0  # 0 is the noise of ``seed``, 1 that of ``toward``

    def __post_init__(self) -> None:
        self.take_plain()


@dataclass(frozen=True, kw_only=True)
class InitAudio(Config):
    """Start from this audio and noise instead of noise only; ``noise_level`` 1 forgets it, near 0 keeps it [B30]."""

    audio: Audio  # (L, channels), floats; not stored
    noise_level: float  # above 0 and up to 1

    def __post_init__(self) -> None:
        self.take_plain()
        object.__setattr__(self, "audio", _float32(self.audio))


@dataclass(frozen=True, kw_only=True)
class Patch(Config):
    """Generate a region in its own way."""

    start: float  # seconds
    end: float
    prompt: str | None = None  # None: the prompt of that time
    noise_level: float = 1.0  # above 0 and up to 1: how far from what is there; 1 forgets it
    seed: int | None = None  # None: that of the item

    def __post_init__(self) -> None:
        self.take_plain()


@dataclass(frozen=True, kw_only=True)
class Inpaint(Config):
    """Generate the regions, (start, end) in seconds or a ``Patch``, of this audio and keep the rest [B34]."""

    audio: Audio  # (L, channels), floats; not stored
    regions: tuple[tuple[float, float] | Patch, ...]  # inside the clip, not overlapping
    feather_seconds: float = 0.0  # over which the noise level rises at the edges, inside of the regions

    def __post_init__(self) -> None:
        self.take_plain()
        object.__setattr__(self, "audio", _float32(self.audio))

    @property
    def spans(self) -> tuple[tuple[float, float], ...]:
        """Return (start, end) of every region."""
        return tuple((region.start, region.end) if isinstance(region, Patch) else region for region in self.regions)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """Return every region as a ``Patch``."""
        given = self.regions
        return tuple(one if isinstance(one, Patch) else Patch(start=one[0], end=one[1]) for one in given)

    @property
    def is_soft(self) -> bool:
        """Tell whether noise levels differ from frame to frame."""
        return self.feather_seconds > 0 or any(patch.noise_level < 1 for patch in self.patches)


@dataclass(frozen=True, kw_only=True)
class LongForm(Config):
    """Make a piece of any length in windows that overlap, each continuing the one before; see ``long``."""

    window_seconds: float | None = None  # of a run of the model; None: half of its longest clip, or a short one whole
    overlap_seconds: float | None = None  # that a window keeps of the one before; None: a quarter of it
    anchor: float = 0.0  # 0..1, how far what a window continues from is led back to statistics of the first window

    def __post_init__(self) -> None:
        self.take_plain()


Given = TypeVar("Given", InitAudio, Inpaint)


@dataclass(frozen=True, kw_only=True)
class Request(Config):
    """Ask for a batch of clips. ``init`` and ``inpaint`` are shared by all items, or a tuple with one for each item.

    Lists stand for tuples, one ``Item`` for a batch of one, and "euler:50:3" for a ``Sampling``.
    """

    items: tuple[Item, ...]  # 1 to ITEMS_MAX clips
    sampling: Sampling | None = None  # None: the usual one of the model
    init: InitAudio | tuple[InitAudio, ...] | None = None  # audio to start from
    inpaint: Inpaint | tuple[Inpaint, ...] | None = None  # audio to keep, but for regions
    schedule: Schedule = "official"  # how times descend from the init noise level, see ``Schedule`` [B23]
    head_room_seconds: float | None = None  # None: the model's own [B31]
    crossfade_ms: float | None = DEFAULT_CROSSFADE_MS  # None: no paste-back, the model's audio as it is
    blend: Blend = "spherical"  # how "piano | violin : 0.3" goes from one text to the other
    prompt_fade_seconds: float = DEFAULT_PROMPT_FADE  # in which one prompt goes over into the next, at most
    loop: Loop | None = None  # clips that join themselves; all of one length, without audio to start from or to keep
    decode_noise: bool = False  # the two noise terms of the official decoder [B47]
    chunk_frames: int | None = None  # latent frames per decoded chunk; None: the backend's choice
    encode_chunk_frames: int | None = None  # latent frames per encoded chunk; None: the backend's choice
    long: LongForm | None = None  # None: clips that the model makes in one run

    def __post_init__(self) -> None:
        self.take_plain()
        if isinstance(self.items, Item):
            object.__setattr__(self, "items", (self.items,))
        if isinstance(self.sampling, str):
            object.__setattr__(self, "sampling", Sampling.parse(self.sampling))

    @classmethod
    def from_dict(cls, data: object, *, where: str = "request", audio: Audio | Sequence[Audio] | None = None) -> Self:
        """Read what ``to_dict`` gives, which has no audio; a field that has a default may be missing.

        ``audio`` (L, channels), or one for each item, goes into ``init`` and ``inpaint`` where the data has them.
        Raises ConfigError, one line that names the field. What a model allows is for ``validate`` to say.
        """
        if isinstance(data, dict):
            data = _with_schedule(data)
            given = {name: data[name] for name in ("init", "inpaint") if data.get(name) is not None}
            data = data | {name: _with_audio(entry, audio, f"{where}.{name}") for name, entry in given.items()}
        return super().from_dict(data, where=where)

    @classmethod
    def from_json(cls, text: str, *, audio: Audio | Sequence[Audio] | None = None) -> Self:
        """Read the text of ``to_json``. Raises ConfigError, one line."""
        return cls.from_dict(parse_object(text, "request"), audio=audio)

    def made(self, item: int) -> tuple[tuple[float, float], ...]:
        """Return the parts (start, end) of a clip, in seconds, that are made where the rest is kept; else none."""
        inpaints = per_item(self.inpaint, Inpaint, "inpaint", self)
        return () if inpaints is None else inpaints[item].spans

    def to_json(self) -> str:
        """Return the request as JSON, without audio."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


def _with_schedule(data: dict[str, Any]) -> dict[str, Any]:
    """Translate the switch ``monotone`` of earlier files, where it is there and nothing else says so."""
    if type(data.get("monotone")) is not bool or "schedule" in data:
        return data
    kept = {name: value for name, value in data.items() if name != "monotone"}
    return kept | {"schedule": "monotone" if data["monotone"] else "official"}


def _with_audio(stored: object, audio: Audio | Sequence[Audio] | None, where: str) -> object:
    """Put the audio into what is stored of a source, or into that of each item."""
    if audio is None:
        raise ConfigError(f"{where}: its audio is missing, which is not stored with a request")
    count = len(stored) if isinstance(stored, list) else None if isinstance(audio, np.ndarray) else len(audio)
    if count is None:
        return _joined(stored, audio, where)
    entries: list[Any] = stored if isinstance(stored, list) else [stored] * count
    audios = [audio] * count if isinstance(audio, np.ndarray) else audio
    require(len(audios) == count, f"{where}: has {count} entries, {len(audios)} audios are given")
    return [_joined(*pair, f"{where}[{number}]") for number, pair in enumerate(zip(entries, audios, strict=True))]


def _joined(entry: object, audio: object, where: str) -> object:
    if not isinstance(entry, dict):
        return entry  # which is refused with the words for its type
    require("audio" not in entry, f"{where}: unknown field(s) audio, which is not stored with a request")
    return {**entry, "audio": audio}


def extend(audio: Audio, seconds: float, config: ModelConfig) -> Inpaint:
    """Return the ``Inpaint`` that keeps all of ``audio`` (L, channels) and generates from its end to ``seconds``.

    Raises ValueError when the clip would not get longer.
    """
    check_audio(audio, "extend", config.audio_channels)
    end = samples_to_seconds(len(audio), config.sample_rate)
    if not is_finite(seconds):
        raise ValueError(f"seconds is {quoted(seconds)}: expected a finite number")
    if not seconds_to_samples(seconds, config.sample_rate) > len(audio):
        raise ValueError(f"extend to {seconds:g} s: the audio has {end:.3f} s already; ask for a longer clip")
    return Inpaint(audio=audio, regions=((end, seconds),))


def per_item(
    value: Given | tuple[Given, ...] | None, kind: type[Given], name: str, request: Request
) -> tuple[Given, ...] | None:
    """Return one value for every item: the tuple itself, or a shared value repeated.

    Raises ValueError for a tuple of another length and for values of another type.
    """
    if value is None:
        return None
    values = value if isinstance(value, tuple) else (value,) * len(request.items)
    if len(values) != len(request.items):
        raise ValueError(f"{name} has {len(values)} entries for {len(request.items)} items: give one, or one per item")
    for entry in values:
        if not isinstance(entry, kind):
            raise ValueError(f"{name} is {type(entry).__name__}: expected {kind.__name__}")
    return values


def _float32(audio: Audio) -> Audio:
    """Return audio of other floats, as most libraries read it, in ours; anything else is refused by ``validate``."""
    return audio.astype(np.float32, copy=False) if isinstance(audio, np.ndarray) and audio.dtype.kind == "f" else audio
