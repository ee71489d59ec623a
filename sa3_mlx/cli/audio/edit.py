"""``sa3 vary``, ``sa3 inpaint`` and ``sa3 extend``: audio to audio."""

from __future__ import annotations

from pathlib import Path

import click
import soundfile

from sa3_mlx.cli.home import Model, find_model
from sa3_mlx.cli.options import (
    MemoryOptions,
    ModelOptions,
    OutputOptions,
    PasteOptions,
    SamplingOptions,
    gather,
    given,
    memory_options,
    model_options,
    output_options,
    parse_region,
    paste_options,
    sampling_options,
)
from sa3_mlx.cli.run import Job, Source, batch_seeds, run
from sa3_mlx.common.files.audio import read_audio
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.request import extend as extend_request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import longest, samples_to_seconds

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
    sa3 vary take.wav "marimba note A4" --noise-level 0.7 --out marimba.wav
    """
    options, model, source = _start(ctx, input_file)
    sampling, output = gather(ctx, SamplingOptions), gather(ctx, OutputOptions)
    run(
        Job(
            command="vary",
            model=model,
            options=options,
            sampling=sampling,
            output=output,
            prompts=(prompt,),
            seconds=_length(seconds, source, model),
            seeds=batch_seeds(sampling, 1),
            format=output.format or "pcm16",
            source=source,
            noise_level=noise_level,
            monotone=monotone,
            max_memory=gather(ctx, MemoryOptions).max_memory,
        )
    )


@click.command()
@_INPUT
@_PROMPT
@click.option(
    "--region",
    "regions",
    multiple=True,
    required=True,
    metavar="START:END",
    callback=parse_region,
    help="Seconds to make anew, without END to the clip's end; can be repeated.",
)
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
    ctx: click.Context,
    input_file: Path,
    prompt: str,
    regions: tuple[tuple[float, float | None], ...],
    noise_level: float | None,
    monotone: bool,
    seconds: float | None,
) -> None:
    """Make regions of INPUT anew; all other samples stay exactly as they are.

    \b
    sa3 inpaint song.wav "snare drum" --region 0.5:0.8 --region 2: --out fixed.wav
    """
    options, model, source = _start(ctx, input_file)
    sampling, output = gather(ctx, SamplingOptions), gather(ctx, OutputOptions)
    exact, length = exact_format(input_file, model.config), _length(seconds, source, model)
    run(
        Job(
            command="inpaint",
            model=model,
            options=options,
            sampling=sampling,
            output=output,
            prompts=(prompt,),
            seconds=length,
            seeds=batch_seeds(sampling, 1),
            format=output.format or _usual_format(exact, output.out),
            exact=exact,
            source=source,
            noise_level=noise_level,
            monotone=monotone,
            regions=tuple((start, length if end is None else end) for start, end in regions),
            crossfade_ms=_crossfade(ctx),
            max_memory=gather(ctx, MemoryOptions).max_memory,
        )
    )


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
    sa3 extend intro.wav "piano note C4" --seconds 4 --out longer.wav
    """
    options, model, source = _start(ctx, input_file)
    sampling, output = gather(ctx, SamplingOptions), gather(ctx, OutputOptions)
    exact = exact_format(input_file, model.config)
    run(
        Job(
            command="extend",
            model=model,
            options=options,
            sampling=sampling,
            output=output,
            prompts=(prompt,),
            seconds=seconds,
            seeds=batch_seeds(sampling, 1),
            format=output.format or _usual_format(exact, output.out),
            exact=exact,
            source=source,
            regions=extend_request(source.audio, seconds, model.config).regions,
            crossfade_ms=_crossfade(ctx),
            max_memory=gather(ctx, MemoryOptions).max_memory,
        )
    )


def _start(ctx: click.Context, input_file: Path) -> tuple[ModelOptions, Model, Source]:
    options = gather(ctx, ModelOptions)
    model = find_model(options.model, generates=True)
    return options, model, read_source(input_file, model.config)


def read_source(path: Path, config: ModelConfig) -> Source:
    """The audio and how the tags name it. Raises FileNotFoundError or ValueError, one line."""
    audio = read_audio(path, config.sample_rate, config.audio_channels)
    return Source(path=path, name=path.name if path.is_absolute() else str(path), hash=file_hash(path), audio=audio)


def _length(seconds: float | None, source: Source, model: Model) -> float:
    """The seconds that were asked for, or those of the input. Raises ValueError for an input that is too long."""
    length = samples_to_seconds(len(source.audio), model.config.sample_rate)
    if seconds is None and length > model.config.max_seconds:
        raise ValueError(
            f"{source.path}: {length:.2f} s long, {model.label} makes up to {longest(model.config)}; "
            "give --seconds to use its beginning"
        )
    return length if seconds is None else seconds


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
    if paste.no_paste and given(ctx, "crossfade_ms"):
        raise click.UsageError("--no-paste leaves no seam: --crossfade-ms has no effect beside it", ctx)
    return None if paste.no_paste else paste.crossfade_ms
