"""``sa3 generate``: text to audio."""

from __future__ import annotations

import math
from pathlib import Path

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options import (
    MemoryOptions,
    ModelOptions,
    OutputOptions,
    SamplingOptions,
    gather,
    memory_options,
    model_options,
    output_options,
    sampling_options,
)
from sa3_mlx.cli.run import Job, batch_seeds, read_prompts, run
from sa3_mlx.common.model.config import ModelConfig

_USUAL_SECONDS = 10.0


@click.command()
@click.argument("prompt", required=False)
@click.option("--seconds", type=float, help="Length. Default: 10, or the longest that a smaller model makes.")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="One prompt per line, in place of PROMPT; - reads standard input.",
)
@sampling_options
@model_options
@memory_options
@output_options
@click.pass_context
def generate(ctx: click.Context, prompt: str | None, seconds: float | None, prompt_file: Path | None) -> None:
    """Make audio from PROMPT.

    \b
    sa3 generate "piano note A4" --seconds 2 --out piano.wav
    sa3 generate "snare drum" --seconds 1 --batch 4 --seed 7 --out snare.flac
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give either a PROMPT or --prompt-file", ctx)
    options, sampling = gather(ctx, ModelOptions), gather(ctx, SamplingOptions)
    model = find_model(options.model, generates=True)
    prompts = (prompt,) if prompt is not None else tuple(read_prompts(prompt_file or Path()))
    if not prompts:
        raise ValueError(f"{prompt_file}: no prompt in it; write one per line")
    output = gather(ctx, OutputOptions)
    run(
        Job(
            command="generate",
            model=model,
            options=options,
            sampling=sampling,
            output=output,
            prompts=prompts,
            seconds=default_seconds(model.config) if seconds is None else seconds,
            seeds=batch_seeds(sampling, len(prompts)),
            format=output.format or "pcm16",
            max_memory=gather(ctx, MemoryOptions).max_memory,
        )
    )


def default_seconds(config: ModelConfig) -> float:
    """Ten seconds, or what is left of the model's maximum, in whole seconds where it has any."""
    longest = min(_USUAL_SECONDS, config.max_seconds)
    return float(math.floor(longest)) if longest >= 1 else longest
