"""Continue an audio file: ``sa3 extend``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import OutputOptions, PasteOptions
from sa3_mlx.cli.options.sampling import SamplingOptions
from sa3_mlx.cli.run import Task, run
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.request import extend as continuation

from .source import INPUT, PROMPT, SourceFile


@click.command(cls=TypedCommand)
@INPUT
@PROMPT
@click.option("--seconds", type=float, required=True, help="Length of the whole, INPUT included.")
def extend(
    input_file: Path,
    prompt: str | None,
    seconds: float,
    paste: PasteOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
    memory: MemoryOptions,
    output: OutputOptions,
) -> None:
    """Continue INPUT, which stays exactly as it is, to a length of SECONDS.

    \b
    sa3 extend intro.wav "piano note C4" --seconds 4 --out longer.wav
    """
    found = find_model(model.name, generates=True)
    source = SourceFile.read(input_file, found.config, seconds, sampling.head_room)
    if source.seconds >= seconds:
        raise ValueError(f"extend to {seconds:g} s: {input_file} has {source.seconds:.3f} s; ask for a longer clip")
    wanted = source.prompt(prompt, quiet=output.quiet)
    request = replace(
        sampling.request(wanted, seconds, found.config),
        inpaint=continuation(source.audio, seconds, found.config),
        crossfade_ms=paste.crossfade(),
    )
    run(Task("extend", (request,), found, model, memory, output, source))
