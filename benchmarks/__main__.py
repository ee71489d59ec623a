"""``python -m benchmarks``: measurements of quality. The last line of every command is one line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.adherence import Generates, measure
from sa3_mlx.spec.request import defaults

ROWS = ("class", "notes_class", "notes_pitch", "notes_instrument", "chords_class", "chords_name", "drums_class",
        "noises_class")  # fmt: skip


def open_pipeline(folder: Path, backend: str) -> Generates:
    """The pipeline of the chosen twin."""
    if backend == "torch":
        from sa3_torch.pipeline import Pipeline as TorchPipeline

        return TorchPipeline.load(folder)
    from sa3_mlx.pipeline import Pipeline as MlxPipeline

    return MlxPipeline.load(folder)


@click.group()
def main() -> None:
    """Measurements of sa3."""


@main.command()
@click.argument("model", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True, help="Sounds per prompt.")
@click.option("--steps", type=click.IntRange(1), default=None, help="Default: the model's.")
@click.option("--sampler", default=None, help="Default: the model's.")
@click.option("--guidance", type=float, default=None, help="Default: the model's.")
@click.option("--data-seed", type=int, default=0, show_default=True, help="Seed of `sa3 train render`.")
def adherence(
    model: Path,
    backend: str,
    seeds: int,
    steps: int | None,
    sampler: str | None,
    guidance: float | None,
    data_seed: int,
) -> None:
    """Share of held-out prompts of the demo sounds that a judge hears as asked."""
    pipeline = open_pipeline(model, backend)
    usual = defaults(pipeline.config)
    result = measure(
        pipeline, data_seed=data_seed, seeds=seeds, steps=steps or usual.steps, sampler=sampler or usual.sampler,
        guidance=usual.guidance_scale if guidance is None else guidance,
    )  # fmt: skip
    for name in ROWS:
        click.echo(f"{name:18} {100 * result[name]:5.1f} %")
    click.echo(f"{'cents, median':18} {result['cents_median']:5.1f}")
    click.echo(json.dumps({"model": pipeline.config.name, "backend": backend, **result}))


if __name__ == "__main__":
    main()
