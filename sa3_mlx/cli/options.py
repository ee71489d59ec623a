"""Options that several commands share: a decorator adds a group of them, ``gather`` returns it as a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.memory import parse_size
from sa3_mlx.common.model.precision import DTYPES, TEXT_DTYPES
from sa3_mlx.common.model.sampling import SAMPLER_NAMES

from .adapters import LoraFile, parse_lora

Command = TypeVar("Command", bound=Callable[..., Any])
Group = TypeVar("Group")
_PREFIX = "sa3."
FORMATS: tuple[Subtype, ...] = get_args(Subtype)
DEVICES = ("auto", "cpu", "cuda", "mps")


def _keep(ctx: click.Context, param: click.Parameter, value: object) -> object:
    ctx.meta[f"{_PREFIX}{param.name}"] = value
    return value


_option = partial(click.option, callback=_keep, expose_value=False)


def gather(ctx: click.Context, kind: type[Group]) -> Group:
    """The values of one group of options."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: ctx.meta[_PREFIX + name] for name in names})


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    model: str | None
    backend: str
    device: str


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BackendOptions):
    dtype: str
    text_dtype: str
    compiled: bool
    lora: tuple[LoraFile, ...]
    lora_merged: bool


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    max_memory: int | None  # bytes


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """None stands for the model's own default."""

    steps: int | None
    sampler: str | None
    guidance: float | None
    apg: float
    rescale: float
    interval: tuple[float, float]
    norm_threshold: float
    negative: str | None
    seed: int | None
    batch: int
    head_room: float | None
    decode_noise: bool


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    out: Path | None
    format: Subtype | None
    peak: float | None
    spectrogram: Path | None
    play: bool
    force: bool
    quiet: bool


@dataclass(frozen=True, kw_only=True)
class PasteOptions:
    crossfade_ms: float
    no_paste: bool


def _stack(command: Command, options: list[Callable[[Command], Command]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def backend_options(command: Command) -> Command:
    return _stack(
        command,
        [
            _option("--model", metavar="NAME|PATH", help="Installed model or folder. Default: see 'sa3 models'."),
            _option("--backend", type=click.Choice(["auto", "mlx", "torch"]), default="auto", show_default=True),
            _option(
                "--device",
                type=click.Choice(DEVICES),
                default="auto",
                show_default=True,
                help="Of PyTorch; auto is cuda where there is one, else cpu. MLX chooses its own.",
            ),
        ],
    )


def model_options(command: Command) -> Command:
    return _stack(
        command,
        [
            backend_options,
            _option(
                "--dtype",
                type=click.Choice(DTYPES),
                default="auto",
                show_default=True,
                help="Of the diffusion transformer; auto is float32 on a CPU, float16 on a GPU.",
            ),
            _option(
                "--text-dtype",
                type=click.Choice(TEXT_DTYPES),
                default="auto",
                show_default=True,
                help="Of the text encoder; auto is float32 on a CPU, the file's own on a GPU.",
            ),
            _option(
                "--compile",
                "compiled",
                is_flag=True,
                help="PyTorch: compile the sampling step and the decoder; pays from the second sound on.",
            ),
            click.option(
                "--lora",
                multiple=True,
                metavar="FILE[:STRENGTH[:FROM-TO]]",
                callback=_parse_lora,
                expose_value=False,
                help="Adapter; can be repeated. FROM-TO are the times in which it is on, 1 is "
                "noise, 0 the end: 0.5-1 is the first half.",
            ),
            _option(
                "--lora-merged",
                is_flag=True,
                help="Put adapters into the weights: a little faster; layers of a quantized model take full size.",
            ),
        ],
    )


def _parse_lora(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[LoraFile, ...]:
    try:
        files = tuple(parse_lora(text) for text in values)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    ctx.meta[f"{_PREFIX}{param.name}"] = files
    return files


def _parse_memory(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        size = None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    ctx.meta[f"{_PREFIX}{param.name}"] = size
    return size


def memory_options(command: Command) -> Command:
    return click.option(
        "--max-memory",
        metavar="SIZE",
        callback=_parse_memory,
        expose_value=False,
        help="Such as 6GB, for the model's arrays: predict their peak; free parts, choose chunks and, where a type is "
        "auto, 16 bits to stay below, or refuse. An estimate with PyTorch, enforced on CUDA alone.",
    )(command)


def sampling_options(command: Command) -> Command:
    return _stack(
        command,
        [
            _option("--seed", type=int, help="Random if not given; always printed."),
            _option(
                "--batch",
                type=click.IntRange(1, 64),
                default=1,
                show_default=True,
                help="Files to make, with seeds SEED, SEED+1, ...",
            ),
            _option("--steps", type=int, help="Sampling steps. Default: 8, for base models 50."),
            _option("--sampler", type=click.Choice(SAMPLER_NAMES), help="Default: pingpong, for base models euler."),
            _option("--guidance", type=float, help="Guidance scale. Default: 1 (off), for base models 7."),
            _option(
                "--apg", type=float, default=1.0, show_default=True, help="0 plain guidance, 1 orthogonal part alone."
            ),
            _option("--rescale", type=float, default=0.0, show_default=True, help="0..1, guards guided levels."),
            _option(
                "--interval",
                type=(float, float),
                default=(0.0, 1.0),
                show_default=True,
                metavar="LOW HIGH",
                help="Times (1 noise, 0 data) in which guidance is on.",
            ),
            _option("--norm-threshold", type=float, default=0.0, show_default=True, help="Limits guidance; 0 is off."),
            _option("--negative", metavar="PROMPT", help="What to steer away from; needs guidance."),
            _option(
                "--head-room", type=float, metavar="SECONDS", help="Made beyond the end, then cut. Default: model's."
            ),
            _option("--decode-noise", is_flag=True, help="Decode with the noise of the official decoder."),
        ],
    )


def output_options(command: Command) -> Command:
    return _stack(
        command,
        [
            _option(
                "--out",
                "-o",
                type=click.Path(path_type=Path, allow_dash=True),
                help=".wav, .flac, or - for WAV on a pipe. Default: from prompt and seed.",
            ),
            _option(
                "--format", type=click.Choice(FORMATS), help="Sample format. Default: pcm16, or what keeps the input."
            ),
            _option("--peak", type=float, metavar="DB", help="Scale louder audio down to this peak, such as -1."),
            _option("--spectrogram", type=click.Path(path_type=Path), metavar="PNG", help="Draw one too."),
            _option("--play", is_flag=True, help="Play the result, from its first decoded part on where a player can."),
            *_common(),
        ],
    )


def _common() -> list[Callable[[Any], Any]]:
    return [
        _option("--force", is_flag=True, help="Replace existing files."),
        _option("--quiet", "-q", is_flag=True, help="No progress; print files and seeds alone."),
        click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
    ]


def common_options(command: Command) -> Command:
    """--force, --quiet and --debug alone."""
    return _stack(command, _common())


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    force: bool
    quiet: bool


def paste_options(command: Command) -> Command:
    return _stack(
        command,
        [
            _option("--crossfade-ms", type=float, default=20.0, show_default=True, help="Inside the made region."),
            _option("--no-paste", is_flag=True, help="The model's audio as it is; kept parts are then not exact."),
        ],
    )


def given(ctx: click.Context, name: str) -> bool:
    """Whether the user gave this option, whatever its value."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def debug_option(command: Command) -> Command:
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(command)


def parse_region(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[tuple[float, float | None], ...]:
    """Texts "START:END" -> (start, end) in seconds; an empty START is 0, an empty END None, the end of the clip.

    Raises click.BadParameter.
    """
    regions = []
    for text in value:
        start, colon, end = text.partition(":")
        try:
            regions.append((float(start or "0"), float(end) if end.strip() else None))
        except ValueError:
            colon = ""
        if not colon:
            raise click.BadParameter(f"{text!r}: expected START:END in seconds, such as 1.5:3 or 2:", ctx, param)
    return tuple(regions)
