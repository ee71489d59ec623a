"""Say what a job is to do, as it is stored, and turn what clients send into it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sa3_mlx.cli.adapters import LoraFile
from sa3_mlx.cli.audio.generate import default_seconds
from sa3_mlx.cli.audio.long import ending
from sa3_mlx.cli.audio.source import SourceFile
from sa3_mlx.cli.audio.vary import USUAL_LEVEL
from sa3_mlx.cli.options.sampling import SamplingOptions
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.noise import SEED_MAX, random_seed
from sa3_mlx.common.generation.request import ITEMS_MAX, Request
from sa3_mlx.common.installed import Model
from sa3_mlx.common.model.chunks import stream_chunk_frames
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import longest
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.schema import Config, ConfigError, quoted, require

from .store.records import SECONDS_MAX

Kind = Literal["generate", "vary", "inpaint", "extend", "encode", "decode"]
MAKING: tuple[Kind, ...] = ("generate", "vary", "inpaint", "extend")  # with a request, as the commands
PRIORITIES = (-10, 10)


@dataclass(frozen=True, kw_only=True)
class AdapterChoice(Config):
    """Put an adapter of the server's folder on."""

    name: str  # of its file
    strength: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)  # times in which it is on; 1 is noise, 0 the end

    def __post_init__(self) -> None:
        self.take_plain()
        require(-100 <= self.strength <= 100, f"strength is {self.strength:g}: allowed are -100 to 100")
        low, high = self.interval
        require(0 <= low <= high <= 1, f"interval is {low:g}..{high:g}: expected 0 <= FROM <= TO <= 1")

    def file(self, folder: Path) -> LoraFile:
        """Return the file in ``folder``. Raises ConfigError for a name that no file there has."""
        names = adapter_names(folder)
        require(
            self.name in names, f"adapter {quoted(self.name)} is not there; there are: {', '.join(names) or 'none'}"
        )
        return LoraFile(path=folder / self.name, name=self.name, strength=self.strength, interval=self.interval)


def adapter_names(folder: Path) -> list[str]:
    """List the adapter files of a folder, which need not exist."""
    return sorted(path.name for path in folder.glob("*.safetensors")) if folder.is_dir() else []


@dataclass(frozen=True, kw_only=True)
class Order(Config):
    """Ask for a job. What a model makes is a ``Request`` as JSON, complete, without its audio."""

    kind: Kind
    model: str  # installed name
    request: dict[str, Any] | None = None  # of kinds that make sounds
    source: str | None = None  # sound to start from
    near: str | None = None  # sound that these are variations of, made as it was
    adapters: tuple[AdapterChoice, ...] = ()
    priority: int = 0  # higher ones run first
    exact: bool = False  # by itself, in no batch with other jobs: the bits of the command's file

    def __post_init__(self) -> None:
        self.take_plain()
        low, high = PRIORITIES
        require(low <= self.priority <= high, f"priority is {self.priority}: allowed are {low} to {high}")

    def read_request(self, audio: Audio | None) -> Request:
        """Return the request with its audio."""
        return Request.from_dict(self.request, audio=audio)

    @property
    def items(self) -> list[dict[str, Any]]:
        """Return the clips that are made, as JSON."""
        return [] if self.request is None else list(self.request["items"])


def find_kind(given: object, request: dict[str, Any], source: object) -> Kind:
    """Return the kind that was given, or that the request means. Raises ConfigError for an unknown one."""
    if given is not None:
        require(given in get_args(Kind), f"kind is {quoted(given)}: allowed are {', '.join(get_args(Kind))}")
        return given  # type: ignore[return-value]  # just checked
    if request.get("inpaint") is not None:
        return "inpaint"
    return "vary" if request.get("init") is not None or source is not None else "generate"


def complete(
    kind: Kind,
    data: dict[str, Any],
    variations: int,
    model: Model,
    source: SourceFile | None,
    *,
    strength: float | None = None,
    streamed: bool = False,
) -> Request:
    """Return the request that ``data``, JSON of which much may be missing, asks for, checked against the model.

    Missing are filled in as the commands do: the prompt of the source, its length, a random seed, the usual sampling.
    ``strength`` stands for a noise level of ``init``, by the dial of the model; ``streamed``: decode in short chunks.
    Raises ValueError, one line.
    """
    config = model.config
    items = data.get("items") or [{}]
    require(
        isinstance(items, list) and all(isinstance(item, dict) for item in items), "request.items: expected objects"
    )
    items = _varied([_complete_item(item, config, source) for item in items], variations)
    data = {**data, "items": items, "sampling": complete_sampling(data.get("sampling"), config.usual_sampling)}
    if streamed and data.get("chunk_frames") is None:
        data["chunk_frames"] = stream_chunk_frames(config.same)
    audio = None if source is None else source.audio
    if strength is not None:
        require(data.get("init") is None, "strength and request.init say the same: give one of them")
        require(kind in ("vary", "inpaint"), f"kind is {kind}: strength is for vary and inpaint")
        data["init"] = {"noise_level": config.noise_level(strength, data.get("schedule") or Request.schedule)}
    elif kind == "vary" and data.get("init") is None:
        data["init"] = {"noise_level": USUAL_LEVEL}
    request = Request.from_dict(data, audio=audio)
    if kind == "extend" and source is not None:
        request = replace(request, inpaint=source.continued(request.items[0].seconds))
    _check_kind(kind, request)
    _check_long(kind, request, config)
    validate(ending(request, source, config), config)
    return request


def _complete_item(item: dict[str, Any], config: ModelConfig, source: SourceFile | None) -> dict[str, Any]:
    usual = {
        "prompt": "" if source is None else source.made_with or "",
        "seconds": default_seconds(config) if source is None else min(source.seconds, config.max_seconds),
        "seed": random_seed(),
    }
    return usual | {name: value for name, value in item.items() if value is not None}


def _varied(items: list[dict[str, Any]], variations: int) -> list[dict[str, Any]]:
    """Return every item so many times, with seeds that go on from its own."""
    require(1 <= variations <= ITEMS_MAX, f"variations is {variations}: allowed are 1 to {ITEMS_MAX}")
    if variations == 1:
        return items
    for item in items:
        require(type(item["seed"]) is int, f"seed is {quoted(item['seed'])}: expected an integer")
        last = item["seed"] + variations - 1
        require(last <= SEED_MAX, f"seed is {item['seed']}: the last variation would need {last}, above {SEED_MAX}")
    return [{**item, "seed": item["seed"] + number} for item in items for number in range(variations)]


def complete_sampling(given: object, usual: Sampling) -> dict[str, Any]:
    """Return sampling as JSON: what is given, the rest as the commands fill it in; "euler:50:3" is whole."""
    if isinstance(given, str):
        return Sampling.parse(given).to_dict()
    require(given is None or isinstance(given, dict), f"request.sampling: expected an object, got {quoted(given)}")
    found: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    guidance = found.pop("guidance", None)
    wanted: dict[str, Any] = {"scale": guidance} if isinstance(guidance, int | float) else dict(guidance or {})
    for name, known in ((found, Sampling), (wanted, Guidance)):
        unknown = sorted(set(name) - set(known.__dataclass_fields__))
        require(not unknown, f"request.sampling: unknown field(s) {', '.join(unknown)}")
    options = SamplingOptions(
        seed=None,
        batch=1,
        steps=found.get("steps"),
        sampler=found.get("sampler"),
        guidance=wanted.get("scale"),
        apg=wanted.get("apg"),
        rescale=wanted.get("rescale"),
        interval=wanted.get("interval"),
        norm_threshold=wanted.get("norm_threshold"),
        negative=None,
        blend="spherical",
        at=(),
        prompt_fade=Request.prompt_fade_seconds,
        head_room=None,
        decode_noise=False,
    )
    return options.resolved(usual).to_dict()


def _check_long(kind: Kind, request: Request, config: ModelConfig) -> None:
    """Refuse long pieces of edits that do not go on from a sound, and those that a server does not keep."""
    if request.long is not None:
        edited = f"request.long: {kind} takes what fits into a clip of {config.name}, up to {longest(config)}"
        require(kind in ("generate", "extend"), edited)
        seconds = request.items[0].seconds if request.items else 0.0
        longer = f"seconds is {seconds:g}: a server makes up to {SECONDS_MAX:g} s, 'sa3 {kind}' a day"
        require(seconds <= SECONDS_MAX, longer)


def _check_kind(kind: Kind, request: Request) -> None:
    """Refuse a request that is not of its kind."""
    needs = {
        "generate": (False, False),
        "vary": (True, False),
        "inpaint": (request.init is not None, True),
        "extend": (request.init is not None, True),
    }
    if needs[kind] != (request.init is not None, request.inpaint is not None):
        raise ConfigError(
            f"kind is {kind}, which does not fit the request: 'vary' has init, 'inpaint' has inpaint with regions, "
            "'generate' has neither and no source"
        )
