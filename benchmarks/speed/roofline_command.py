"""``python -m benchmarks roofline``."""

from __future__ import annotations

import json

import click

from sa3_mlx.cli.models.listing import table
from sa3_mlx.common.chips import Chip
from sa3_mlx.common.model.presets import PRESETS

from .latency_command import parse_lengths
from .roofline import floor, stages


@click.command()
@click.option(
    "--model",
    type=click.Choice([name for name, config in PRESETS.items() if config.diffusion]),
    default="small-music",
    show_default=True,
)
@click.option("--seconds", "lengths", default="5,30,120", show_default=True, callback=parse_lengths, metavar="N,N")
@click.option("--tokens", type=click.IntRange(1), default=24, show_default=True, help="Of the prompt.")
@click.option("--steps", type=click.IntRange(1), help="Default: the model's.")
def roofline(model: str, lengths: tuple[float, ...], tokens: int, steps: int | None) -> None:
    """Least time that a chip's arithmetic and memory allow: modelled, not measured.

    Text encoder and DiT in 16 bits, autoencoder in fp32; the second number computes fp32 products as TF32 where the
    chip can. The last line is JSON.
    """
    config = PRESETS[model]
    count = steps or config.usual_sampling.steps
    rows, floors = [("audio", "stage", "TFLOP", "GB")], []
    for seconds in lengths:
        for stage in stages(config, seconds, tokens=tokens, steps=count):
            size = stage.count.bytes(stage.width) / 1e9
            rows.append((f"{seconds:g} s", stage.name, f"{stage.count.flops / 1e12:.3f}", f"{size:.2f}"))
    click.echo(f"{model}, {count} steps, {tokens} tokens\n{table(rows)}\n")
    lines = [("chip", "GPU cores", *(f"{seconds:g} s" for seconds in lengths), "peaks from")]
    for chip in Chip.load_all():
        cells = []
        for seconds in lengths:
            pair = [floor(config, seconds, chip, tokens=tokens, steps=count, tf32=tf32) for tf32 in (False, True)]
            floors.append({"chip": chip.name, "seconds": seconds, "fp32": pair[0], "tf32": pair[1]})
            cells.append(f"{pair[0]:.3f}" if pair[0] == pair[1] else f"{pair[0]:.3f} / {pair[1]:.3f}")
        lines.append((chip.name, str(chip.gpu_cores or "-"), *cells, chip.source))
    click.echo(f"floors in seconds, modelled\n{table(lines)}")
    click.echo(json.dumps({"model": model, "steps": count, "tokens": tokens, "floors": floors}))
