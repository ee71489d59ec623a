"""Lead from one audio file to another: ``sa3 bridge``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import OutputOptions, PasteOptions
from sa3_mlx.cli.options.sampling import SamplingOptions
from sa3_mlx.cli.run import Task
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.request import Inpaint, LongForm
from sa3_mlx.common.model.lengths import samples_to_seconds, seconds_to_samples

from .long import run_any
from .source import PROMPT, SourceFile, check_made


@click.command(cls=TypedCommand)
@click.argument("first_file", metavar="FIRST", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("second_file", metavar="SECOND", type=click.Path(path_type=Path))
@PROMPT
@click.option("--seconds", type=float, required=True, help="Length of what is made between them.")
def bridge(
    first_file: Path,
    second_file: Path,
    prompt: str | None,
    seconds: float,
    paste: PasteOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
    memory: MemoryOptions,
    output: OutputOptions,
) -> None:
    """Make what leads from FIRST to SECOND; the result is all of FIRST, the bridge and all of SECOND.

    Both stay exactly as they are. Of long files the model hears what is near the bridge.

    \b
    sa3 bridge verse.wav chorus.wav "piano note C4" --seconds 1 --out song.wav
    """
    found = find_model(model.name, generates=True)
    check_made(seconds, found.config)
    first, second = (SourceFile.read(path, found.config, whole=True) for path in (first_file, second_file))
    rate, start = found.config.sample_rate, len(first.audio)
    samples = seconds_to_samples(seconds, rate)
    source, stop = first.joined(second, samples, found.config), start + samples
    region = (samples_to_seconds(start, rate), samples_to_seconds(stop, rate))
    request = replace(
        sampling.request(source.prompt(prompt, quiet=output.quiet), source.seconds, found.config),
        inpaint=Inpaint(audio=source.audio, regions=(region,)),
        crossfade_ms=paste.crossfade(),
        long=LongForm() if source.seconds > found.config.max_seconds else None,
    )
    run_any(Task("bridge", (request,), found, model, memory, output, source))
