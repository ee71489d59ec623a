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
from sa3_mlx.common.generation.request import Inpaint, LongForm
from sa3_mlx.common.generation.request import extend as continuation
from sa3_mlx.common.model.lengths import seconds_to_samples

from .source import INPUT, PROMPT, SourceFile, check_made


@click.command(cls=TypedCommand)
@INPUT
@PROMPT
@click.option("--seconds", type=float, help="Length of the whole, INPUT included.")
@click.option("--before", type=float, help="In place of --seconds: so many seconds that lead up to INPUT.")
def extend(
    input_file: Path,
    prompt: str | None,
    seconds: float | None,
    before: float | None,
    paste: PasteOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
    memory: MemoryOptions,
    output: OutputOptions,
) -> None:
    """Continue INPUT, which stays exactly as it is, to a length of SECONDS; or make what comes before it.

    \b
    sa3 extend intro.wav "piano note C4" --seconds 4 --out longer.wav
    sa3 extend song.wav "piano note C4" --before 1 --out opening.wav
    """
    if (seconds is None) == (before is None):
        raise click.UsageError("give either --seconds, to go on after INPUT, or --before")
    found = find_model(model.name, generates=True)
    if seconds is None:
        assert before is not None
        check_made(before, found.config)
        source = SourceFile.read(input_file, found.config, whole=True)
        source = source.after(seconds_to_samples(before, found.config.sample_rate), found.config)
        request = replace(
            sampling.request(source.prompt(prompt, quiet=output.quiet), source.seconds, found.config),
            inpaint=Inpaint(audio=source.audio, regions=((0.0, before),)),
            crossfade_ms=paste.crossfade(),
            long=LongForm() if source.seconds > found.config.max_seconds else None,
        )
        run(Task("extend", (request,), found, model, memory, output, source))
        return
    source = SourceFile.read(input_file, found.config, seconds, sampling.head_room)
    if source.seconds >= seconds:
        raise ValueError(f"extend to {seconds:g} s: {input_file} has {source.seconds:.3f} s; ask for a longer clip")
    wanted = source.prompt(sampling.opening(prompt), quiet=output.quiet)
    request = replace(
        sampling.request(wanted, seconds, found.config),
        inpaint=continuation(source.audio, seconds, found.config),
        crossfade_ms=paste.crossfade(),
    )
    run(Task("extend", (request,), found, model, memory, output, source))
