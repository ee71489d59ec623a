"""Make regions of an audio file again: ``sa3 inpaint``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import OutputOptions, PasteOptions
from sa3_mlx.cli.options.regions import WantedRegion, parse_region, to_patches
from sa3_mlx.cli.options.sampling import SamplingOptions
from sa3_mlx.cli.run import Task, run
from sa3_mlx.cli.typed import Parsed, TypedCommand
from sa3_mlx.common.generation.request import InitAudio, Inpaint
from sa3_mlx.common.model.dial import Schedule

from .source import INPUT, PROMPT, SCHEDULE, STRENGTH, SourceFile, chosen_level


@click.command(cls=TypedCommand)
@INPUT
@PROMPT
@click.option(
    "--region",
    "regions",
    multiple=True,
    required=True,
    metavar="START:END[=PROMPT]",
    type=Parsed(parse_region),
    help="Seconds to make again, without END to the clip's end; can be repeated. After them may stand what this region "
    'has of its own: "0.5:0.8 strength=0.4 seed=7 =snare drum".',
)
@click.option(
    "--feather",
    type=float,
    default=0.0,
    metavar="SECONDS",
    help="Fade regions in: at their edges less is new. Example: 0.2. Default: 0, all of a region is.",
)
@click.option("--noise-level", type=float, help="Start from what is there, so far away; default: from nothing.")
@STRENGTH
@SCHEDULE
@click.option("--seconds", type=float, help="Length. Default: that of INPUT.")
def inpaint(
    input_file: Path,
    prompt: str | None,
    regions: tuple[WantedRegion, ...],
    feather: float,
    noise_level: float | None,
    strength: float | None,
    schedule: Schedule,
    seconds: float | None,
    paste: PasteOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
    memory: MemoryOptions,
    output: OutputOptions,
) -> None:
    """Make regions of INPUT again; all other samples stay exactly as they are.

    \b
    sa3 inpaint song.wav "snare drum" --region 0.5:0.8 --region 2: --out fixed.wav
    sa3 inpaint song.wav --region "0.5:0.8=snare drum" --region "2:2.5 strength=0.4 =kick drum" --out two.wav
    """
    found = find_model(model.name, generates=True)
    source = SourceFile.read(input_file, found.config, seconds, sampling.head_room)
    level = chosen_level(noise_level, strength, schedule, found.config)
    length = source.length(seconds, found)
    wanted = source.prompt(sampling.opening(prompt), quiet=output.quiet)
    patches, level = to_patches(regions, length, level, found.config)
    request = replace(
        sampling.request(wanted, length, found.config),
        init=None if level is None else InitAudio(audio=source.audio, noise_level=level),
        inpaint=Inpaint(audio=source.audio, regions=patches, feather_seconds=feather),
        schedule=schedule,
        crossfade_ms=paste.crossfade(),
    )
    run(Task("inpaint", (request,), found, model, memory, output, source))
