"""``python -m benchmarks report``."""

from __future__ import annotations

from pathlib import Path

import click

from .latency import RESULTS
from .latency_command import parse_lengths
from .report import markdown, put_into


@click.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=RESULTS,
    help="Default: benchmarks/results.",
)
@click.option("--seconds", "lengths", default="5,30,120,380", show_default=True, callback=parse_lengths, metavar="N,N")
@click.option(
    "--into",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Put it between the marks of this file instead of printing it.",
)
def report(results: Path, lengths: tuple[float, ...], into: Path | None) -> None:
    """Markdown: what was measured here, published by others (with sources) and modelled, told apart."""
    table = markdown(results, lengths)
    if into is None:
        click.echo(table, nl=False)
        return
    try:
        text = put_into(into.read_text(encoding="utf-8"), table)
    except ValueError as error:
        raise click.UsageError(f"{into}: {error}") from error
    into.write_text(text, encoding="utf-8")
    click.echo(f"{into} has the table of {results}")
