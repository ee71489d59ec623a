"""Make a loop of so many bars: ``sa3 loop``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.choice import BEST_OF, single
from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import OutputOptions
from sa3_mlx.cli.options.sampling import SamplingOptions
from sa3_mlx.cli.run import Task, run
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.generation.loop import BPM_MAX, BPM_MIN, Loop, Way, loop_seconds
from sa3_mlx.common.installed import Model
from sa3_mlx.common.measures.tempo import MISSING, has_librosa, named_bpm
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import longest
from sa3_mlx.common.schema import is_finite, quoted
from sa3_mlx.common.terminal import say


@click.command(cls=TypedCommand)
@click.argument("prompt")
@click.option("--bpm", type=float, help="Tempo, 20 to 400. Default: the one that PROMPT names; else it is put there.")
@click.option("--bars", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--beats-per-bar", type=click.IntRange(1, 16), default=4, show_default=True)
@click.option(
    "--way",
    type=click.Choice(get_args(Way)),
    default="seam",
    show_default=True,
    help="seam: the joint is made anew; turn: the loop turns while it is made, for even sounds; cut: as it is.",
)
@click.option(
    "--tries",
    type=BEST_OF,
    default=1,
    show_default=True,
    help="Make so many with seeds SEED, SEED+1, ... and keep the best, as --best-of of generate does.",
)
def loop(
    prompt: str,
    bpm: float | None,
    bars: int,
    beats_per_bar: int,
    way: Way,
    tries: int,
    sampling: SamplingOptions,
    model: ModelOptions,
    memory: MemoryOptions,
    output: OutputOptions,
) -> None:
    """Make a loop from PROMPT, exactly as long as its bars, whose end leads into its beginning.

    \b
    sa3 loop "snare drum" --bpm 120 --bars 2 --out snare.wav
    sa3 loop "hi-hat" --bpm 174 --bars 2 --tries 4 --seed 7 --out hat.wav

    The score of its joint says how many points inside of it are rougher: about half of them is as good as any.
    """
    found = find_model(model.name, generates=True)
    tempo = chosen_bpm(prompt, bpm)
    seconds = seconds_of(tempo, bars, beats_per_bar, found.config)
    if sampling.head_room is not None:
        raise click.UsageError("a loop has no end: leave out --head-room")
    text = with_tempo(prompt, tempo, found)
    several = replace(sampling, batch=sampling.batch * tries)
    requests = tuple(
        replace(request, loop=Loop(bpm=tempo, beats=bars * beats_per_bar, way=way))
        for request in single(several.requests([text], seconds, found.config))
    )
    if not has_librosa() and not output.quiet:
        say(f"note: {MISSING}")
    run(Task("loop", requests, found, model, memory, output, best_of=tries))


def chosen_bpm(prompt: str, bpm: float | None) -> float:
    """Return the tempo that was given or named. Raises ValueError for none, for two, and for one out of range."""
    named = named_bpm(prompt)
    if bpm is None and named is None:
        raise ValueError("the tempo is missing: give --bpm, or name it in the prompt, as in 'breakbeat, 120 bpm'")
    if bpm is not None and named is not None and bpm != named:
        raise ValueError(f"the prompt says {named:g} bpm, --bpm says {bpm:g}: leave one of them out")
    tempo = named if bpm is None else bpm
    assert tempo is not None
    if not is_finite(tempo) or not BPM_MIN <= tempo <= BPM_MAX:
        raise ValueError(f"bpm is {quoted(tempo)}: allowed are {BPM_MIN:g} to {BPM_MAX:g}")
    return tempo


def with_tempo(prompt: str, bpm: float, model: Model) -> str:
    """Return the prompt with the tempo named in it, unless it is, or the model does not know what bpm are."""
    if named_bpm(prompt) is not None or open_tokenizer(model.folder, model.config).unknown("bpm"):
        return prompt
    return f"{prompt}, {bpm:g} bpm"


def seconds_of(bpm: float, bars: int, beats_per_bar: int, config: ModelConfig) -> float:
    """Return the length of a loop. Raises ValueError, with what fits, for one that is too long for the model."""
    seconds = loop_seconds(bpm, bars * beats_per_bar, config.sample_rate)
    if seconds > config.max_seconds:
        bar = seconds / bars
        fits = math.floor(config.max_seconds / bar)
        least = math.ceil(bpm * seconds / config.max_seconds)
        ways = [f"--bars {fits}"] if fits else []
        ways += [f"--bpm {least} or more"] if least <= BPM_MAX else []
        advice = " or ".join(ways) or "fewer --beats-per-bar"
        raise ValueError(
            f"bars are {bars} of {beats_per_bar} beats at {bpm:g} bpm, {seconds:.2f} s: {config.name} makes up to "
            f"{longest(config)}; {advice} fits"
        )
    return seconds
