"""``sa3 vary``, ``sa3 inpaint`` and ``sa3 extend``: audio to audio."""

from __future__ import annotations

from pathlib import Path

import click
import soundfile

from sa3_mlx.spec.audio import read_audio
from sa3_mlx.spec.config import ModelConfig
from sa3_mlx.spec.lengths import samples_to_seconds
from sa3_mlx.spec.request import extend as extend_request
from sa3_mlx.spec.tensorfile import file_hash
from sa3_mlx.spec.wav import Subtype

from .home import find_model
from .job import Job, Source, batch_seeds, run
from .options import (
    MemoryOptions,
    ModelOptions,
    OutputOptions,
    PasteOptions,
    SamplingOptions,
    gather,
    memory_options,
    model_options,
    output_options,
    parse_region,
    paste_options,
    sampling_options,
)

_INPUT = click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path))
_PROMPT = click.argument("prompt", default="")
_MONOTONE = click.option(
    "--monotone", is_flag=True, help="Only ever remove noise. Default: the official schedule, which adds some again."
)
_KEEPING: dict[str, Subtype] = {"PCM_16": "pcm16", "PCM_U8": "pcm16", "PCM_S8": "pcm16", "PCM_24": "pcm24"}


@click.command()
@_INPUT
@_PROMPT
@click.option("--noise-level", type=float, default=0.6, show_default=True, help="Above 0 to 1: how far from INPUT.")
@_MONOTONE
@click.option("--seconds", type=float, help="Length. Default: that of INPUT.")
@sampling_options
@model_options
@memory_options
@output_options
@click.pass_context
def vary(
    ctx: click.Context, input_file: Path, prompt: str, noise_level: float, monotone: bool, seconds: float | None
) -> None:
    """Make a variation of INPUT, towards PROMPT.

    \b
    sa3 vary loop.wav "the same on a marimba" --noise-level 0.7 --out marimba.wav
    """
    model, folder, config, source = _start(ctx, input_file)
    length = samples_to_seconds(len(source.audio), config.sample_rate)
    if seconds is None and length > config.max_seconds:
        raise ValueError(f"{input_file}: {length:.2f} s long, {config.name} makes up to {config.max_seconds:.2f} s; "
                         "give --seconds to use its beginning")  # fmt: skip
    sampling, output = gather(ctx, SamplingOptions), gather(ctx, OutputOptions)
    run(Job(
        command="vary", folder=folder, config=config, model=model, sampling=sampling, output=output, prompts=(prompt,),
        seconds=length if seconds is None else seconds, seeds=batch_seeds(sampling, 1),
        format=output.format or "pcm16", source=source, noise_level=noise_level, monotone=monotone,
        max_memory=gather(ctx, MemoryOptions).max_memory,
    ))  # fmt: skip


@click.command()
@_INPUT
@_PROMPT
@click.option("--region", "regions", multiple=True, required=True, metavar="START:END", callback=parse_region,
              help="Seconds to make anew; can be repeated.")  # fmt: skip
@click.option("--noise-level", type=float, help="Start from what is there, so far away; default: from nothing.")
@_MONOTONE
@click.option("--seconds", type=float, help="Length. Default: that of INPUT.")
@paste_options
@sampling_options
@model_options
@memory_options
@output_options
@click.pass_context
def inpaint(
    ctx: click.Context, input_file: Path, prompt: str, regions: tuple[tuple[float, float], ...],
    noise_level: float | None, monotone: bool, seconds: float | None,
) -> None:  # fmt: skip
    """Make regions of INPUT anew; all other samples stay exactly as they are.

    \b
    sa3 inpaint song.wav "drum fill" --region 3.5:4 --region 7.5:8 --out fixed.wav
    """
    model, folder, config, source = _start(ctx, input_file)
    sampling, output = gather(ctx, SamplingOptions), gather(ctx, OutputOptions)
    exact = exact_format(input_file, config)
    length = samples_to_seconds(len(source.audio), config.sample_rate)
    run(Job(
        command="inpaint", folder=folder, config=config, model=model, sampling=sampling, output=output,
        prompts=(prompt,), seconds=length if seconds is None else seconds, seeds=batch_seeds(sampling, 1),
        format=output.format or _usual_format(exact, output.out), exact=exact, source=source,
        noise_level=noise_level, monotone=monotone, regions=regions, crossfade_ms=_crossfade(ctx),
        max_memory=gather(ctx, MemoryOptions).max_memory,
    ))  # fmt: skip


@click.command()
@_INPUT
@_PROMPT
@click.option("--seconds", type=float, required=True, help="Length of the whole, INPUT included.")
@paste_options
@sampling_options
@model_options
@memory_options
@output_options
@click.pass_context
def extend(ctx: click.Context, input_file: Path, prompt: str, seconds: float) -> None:
    """Continue INPUT, which stays exactly as it is, to a length of SECONDS.

    \b
    sa3 extend intro.wav "slow piano" --seconds 30 --out longer.wav
    """
    model, folder, config, source = _start(ctx, input_file)
    sampling, output = gather(ctx, SamplingOptions), gather(ctx, OutputOptions)
    exact = exact_format(input_file, config)
    run(Job(
        command="extend", folder=folder, config=config, model=model, sampling=sampling, output=output,
        prompts=(prompt,), seconds=seconds, seeds=batch_seeds(sampling, 1),
        format=output.format or _usual_format(exact, output.out), exact=exact, source=source,
        regions=extend_request(source.audio, seconds, config).regions, crossfade_ms=_crossfade(ctx),
        max_memory=gather(ctx, MemoryOptions).max_memory,
    ))  # fmt: skip


def _start(ctx: click.Context, input_file: Path) -> tuple[ModelOptions, Path, ModelConfig, Source]:
    model = gather(ctx, ModelOptions)
    folder, config = find_model(model.model, generates=True)
    return model, folder, config, read_source(input_file, config)


def read_source(path: Path, config: ModelConfig) -> Source:
    """The audio and how the tags name it. Raises FileNotFoundError or ValueError, one line."""
    audio = read_audio(path, config.sample_rate, config.audio_channels)
    return Source(name=path.name if path.is_absolute() else str(path), hash=file_hash(path), audio=audio)


def exact_format(path: Path, config: ModelConfig) -> Subtype:
    """The sample format that holds kept samples exactly: the input's own, float where it was resampled or is float."""
    with soundfile.SoundFile(path) as file:
        same_rate, subtype = file.samplerate == config.sample_rate, str(file.subtype)
    return _KEEPING.get(subtype, "float") if same_rate else "float"


def _usual_format(exact: Subtype, out: Path | None) -> Subtype:
    """The exact one, or the nearest that the kind of file can hold; ``run`` says so."""
    return "pcm24" if exact == "float" and out is not None and out.suffix.lower() == ".flac" else exact


def _crossfade(ctx: click.Context) -> float | None:
    paste = gather(ctx, PasteOptions)
    return None if paste.no_paste else paste.crossfade_ms
