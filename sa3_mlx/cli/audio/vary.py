"""Make a variation of an audio file: ``sa3 vary``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import OutputOptions
from sa3_mlx.cli.options.sampling import SamplingOptions
from sa3_mlx.cli.run import Task, run
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.request import InitAudio
from sa3_mlx.common.model.dial import Schedule

from .source import INPUT, PROMPT, SCHEDULE, STRENGTH, SourceFile, chosen_level

USUAL_LEVEL = 0.6


@click.command(cls=TypedCommand)
@INPUT
@PROMPT
@click.option("--noise-level", type=float, help=f"Above 0 to 1: how far from INPUT. Default: {USUAL_LEVEL:g}.")
@STRENGTH
@SCHEDULE
@click.option("--seconds", type=float, help="Length. Default: that of INPUT.")
def vary(
    input_file: Path,
    prompt: str | None,
    noise_level: float | None,
    strength: float | None,
    schedule: Schedule,
    seconds: float | None,
    sampling: SamplingOptions,
    model: ModelOptions,
    memory: MemoryOptions,
    output: OutputOptions,
) -> None:
    """Make a variation of INPUT, towards PROMPT.

    \b
    sa3 vary take.wav "marimba note A4" --noise-level 0.7 --out marimba.wav
    sa3 vary take.wav "marimba note A4" --strength 0.3 --schedule normalized --out close.wav
    """
    found = find_model(model.name, generates=True)
    level = chosen_level(noise_level, strength, schedule, found.config)
    source = SourceFile.read(input_file, found.config, seconds, sampling.head_room)
    wanted = source.prompt(sampling.opening(prompt), quiet=output.quiet)
    request = replace(
        sampling.request(wanted, source.length(seconds, found), found.config),
        init=InitAudio(audio=source.audio, noise_level=USUAL_LEVEL if level is None else level),
        schedule=schedule,
    )
    run(Task("vary", (request,), found, model, memory, output, source))
