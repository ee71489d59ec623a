"""Make audio from a prompt: ``sa3 generate``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.inputs import is_stream, open_stream
from sa3_mlx.cli.notes import suggestions
from sa3_mlx.cli.options.choice import ChoiceOptions, single
from sa3_mlx.cli.options.long import LongOptions
from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import OutputOptions
from sa3_mlx.cli.options.sampling import SamplingOptions
from sa3_mlx.cli.run import Task, run
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.loop import Loop
from sa3_mlx.common.model.config import ModelConfig

from .long import resumed, run_long

PROMPTS_MAX = 1 << 24  # bytes of a file of prompts
_USUAL_SECONDS = 10.0


@click.command(cls=TypedCommand)
@click.argument("prompt", required=False)
@click.option("--seconds", type=float, help="Length. Default: 10, or the longest that a smaller model makes.")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="One prompt per line, in place of PROMPT; - reads standard input.",
)
@click.option("--loopable", is_flag=True, help="Make the end lead into the beginning; 'sa3 loop' counts bars.")
def generate(
    prompt: str | None,
    seconds: float | None,
    prompt_file: Path | None,
    loopable: bool,
    choice: ChoiceOptions,
    long: LongOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
    memory: MemoryOptions,
    output: OutputOptions,
) -> None:
    """Make audio from PROMPT.

    \b
    sa3 generate "piano note A4" --seconds 2 --out piano.wav
    sa3 generate "snare drum" --seconds 1 --batch 4 --seed 7 --out snare.flac
    sa3 generate "brown noise" --seconds 1800 --overlap 1 --seed 7 --out river.flac
    sa3 generate --at 0 "piano note A4" --at 2 "violin note A4" --seconds 4 --out change.wav
    sa3 generate "brown noise" --seconds 3 --loopable --out air.wav
    sa3 generate "snare drum" --seconds 1 --best-of 4 --out best.wav
    sa3 generate "piano note A4" --seconds 2 --seed 7 --variations 4 --spread 0.3 --out near.wav

    A piece that is longer than the model's clips is made in windows, each hearing the end of the one before. They stay
    beside the file until it is whole: after an interruption the same command goes on.
    """
    prompt = sampling.opening(prompt)
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give either a PROMPT or --prompt-file")
    found = find_model(model.name, generates=True)
    if prompt is None and prompt_file is None:
        tried = f"; {found.name} does well: {suggestions(found.config.examples)}" if found.config.examples else ""
        raise click.UsageError(f"give a PROMPT or --prompt-file{tried}")
    prompts = [prompt] if prompt is not None else list(prompts_in(prompt_file or Path()))
    if not prompts:
        raise ValueError(f"{prompt_file}: no prompt in it; write one per line")
    length = default_seconds(found.config) if seconds is None else seconds
    form = long.form(length, found.config)
    sampling = resumed(sampling, form, output.out)
    if form is not None and (loopable or not choice.is_plain):
        raise click.UsageError("a piece in windows is made once: leave out --loopable, --variations and --best-of")
    several = replace(sampling, batch=choice.copies(sampling.batch))
    requests = choice.spread_out(several.requests(prompts, length, found.config))
    best_of = choice.best_of
    if loopable:
        requests = tuple(replace(one, loop=Loop()) for one in (requests if choice.variations else single(requests)))
        best_of = best_of or (None if choice.variations else 1)
    if form is None:
        run(Task("generate", requests, found, model, memory, output, best_of=best_of))
        return
    run_long(
        Task("generate", tuple(replace(one, long=form) for one in requests), found, model, memory, output), long.drift
    )


def default_seconds(config: ModelConfig) -> float:
    """Return ten seconds, or what is left of the model's maximum, in whole seconds where it has any."""
    longest = min(_USUAL_SECONDS, config.max_seconds)
    return float(math.floor(longest)) if longest >= 1 else longest


def prompts_in(path: Path) -> Iterator[str]:
    """Yield one prompt per line of a file, a pipe or, for "-", standard input; without empty lines and those after #.

    Raises FileNotFoundError without the file, ValueError where it is not UTF-8 or more than ``PROMPTS_MAX``.
    """
    if not is_stream(path) and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    with open_stream(path) as file:
        data = file.read(PROMPTS_MAX + 1)
    if len(data) > PROMPTS_MAX:
        raise ValueError(f"{path}: more than {PROMPTS_MAX >> 20} MiB of prompts; split it")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8") from error
    for line in lines:
        if line.strip() and not line.startswith("#"):
            yield line.strip()
