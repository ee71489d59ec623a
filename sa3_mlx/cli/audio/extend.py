"""Continue an audio file: ``sa3 extend``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.long import LongOptions
from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import OutputOptions, PasteOptions
from sa3_mlx.cli.options.sampling import SamplingOptions
from sa3_mlx.cli.run import Task
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.request import Inpaint
from sa3_mlx.common.model.lengths import seconds_to_samples

from .long import ending, resumed, run_any
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
    long: LongOptions,
    paste: PasteOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
    memory: MemoryOptions,
    output: OutputOptions,
) -> None:
    """Continue INPUT, which stays exactly as it is, to a length of SECONDS; or make what comes before it.

    \b
    sa3 extend intro.wav "piano note C4" --seconds 4 --out longer.wav
    sa3 extend intro.wav "brown noise" --seconds 1800 --seed 7 --out river.flac
    sa3 extend song.wav "piano note C4" --before 1 --out opening.wav

    What is longer than the model's clips is made in windows, each hearing the end of what is there. They stay beside
    the file until it is whole: after an interruption the same command goes on.
    """
    if (seconds is None) == (before is None):
        raise click.UsageError("give either --seconds, to go on after INPUT, or --before")
    found = find_model(model.name, generates=True)
    if seconds is None:
        assert before is not None
        check_made(before, found.config)
        source = SourceFile.read(input_file, found.config, whole=True)
        source = source.after(seconds_to_samples(before, found.config.sample_rate), found.config)
        whole, form = source.seconds, long.form(source.seconds, found.config)
        wanted, kept = source.prompt(prompt, quiet=output.quiet), Inpaint(audio=source.audio, regions=((0.0, before),))
    else:
        whole, form = seconds, long.form(seconds, found.config)
        source = SourceFile.read(input_file, found.config, seconds, sampling.head_room, end=form is not None)
        kept = source.continued(seconds)
        wanted = source.prompt(sampling.opening(prompt), quiet=output.quiet)
    request = replace(
        resumed(sampling, form, output.out).request(wanted, whole, found.config),
        inpaint=kept,
        crossfade_ms=paste.crossfade(),
        long=form,
    )
    made = ending(request, source, found.config)
    tagged = None if made is request else request
    run_any(Task("extend", (made,), found, model, memory, output, source, whole=tagged), long.drift)
