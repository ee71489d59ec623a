"""Measure everything that only a Mac can tell, in about ten minutes: ``python -m benchmarks mac``."""

from __future__ import annotations

import getpass
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from benchmarks.options import RESULTS_FOLDER
from benchmarks.speed.machine import busy_cores, describe
from benchmarks.speed.models import find
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.atomic import write_json, write_text
from sa3_mlx.common.version import revision

from . import parts
from .report import markdown

FORMAT = "sa3-mac/1"
T = TypeVar("T")


@click.command(cls=TypedCommand)
@click.option("--model", "name", metavar="NAME|PATH", help="Default: small-music, with random weights if need be.")
@click.option("--energy", is_flag=True, help="Ask for the password of sudo, which powermetrics needs.")
@click.option("--dry-run", is_flag=True, help="Everything, short, with the demo and on any machine: is it in order?")
@RESULTS_FOLDER
def mac(name: str | None, energy: bool, dry_run: bool, results: Path) -> None:
    """Measure this Mac: tests of its GPU, latency before and after tuning, memory, heat, energy.

    Writes one JSON file without personal data and a table to paste into a pull request. Plug the charger in and close
    other programs. Without --energy, power is measured where sudo asks for no password.
    """
    if sys.platform != "darwin" and not dry_run:
        raise click.UsageError("this is no Mac; --dry-run goes through everything on any machine")
    if energy:
        subprocess.run(["sudo", "-v"], check=True)
    extent = parts.SHORT if dry_run else parts.FULL
    model, config = find(name or ("demo" if dry_run else "small-music"))
    machine = describe(extent.backend)
    click.echo(f"{machine.text()}\n{model.name} ({model.weights_text()})", err=True)
    busy = busy_cores() > 0.5
    with parts.own_home():
        result: dict[str, Any] = {
            "format": FORMAT,
            "date": datetime.now(UTC).date().isoformat(),
            "sa3": revision(),
            "machine": machine.to_dict(),
            "model": {"name": model.name, "weights": model.weights, "recipe": model.recipe},
            "short": dry_run,
            "busy": busy,
            "tests": _part("tests of the GPU", lambda: parts.metal_tests(extent)),
            "usual": _part("latency", lambda: parts.latency(model, config, machine, extent, tuned=False)),
            "tuning": _part("tuning", lambda: parts.tune(model, extent)),
            "tuned": _part("latency, tuned", lambda: parts.latency(model, config, machine, extent, tuned=True)),
            "memory": _part("memory", lambda: parts.memory(model, config, extent)),
            "operations": _part("operations", lambda: parts.operations(extent)),
            "sustained": _part("sustained run", lambda: parts.sustained_run(model, config, extent)),
        }
    table = markdown(result)
    check_personal(f"{result}\n{table}")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"mac-{machine.slug()}-{result['date']}{'-short' if dry_run else ''}.json"
    write_json(path, result)
    write_text(path.with_suffix(".md"), table)
    click.echo(table)
    click.echo(f"file   {path}\nfile   {path.with_suffix('.md')}  (for a pull request: both files, this table as text)")


def _part(name: str, measure: Callable[[], T]) -> T:
    """Measure one part and say how long that took."""
    click.echo(f"{name} ...", err=True)
    begin = time.monotonic()
    result = measure()
    click.echo(f"{name}: {time.monotonic() - begin:.0f} s", err=True)
    return result


def check_personal(text: str) -> None:
    """Raise ValueError where a result names the user, the machine or a folder of theirs."""
    names = {"the user": getpass.getuser(), "the machine": platform.node(), "your folder": str(Path.home())}
    for what, word in names.items():
        if len(word) > 3 and word.lower() in text.lower():
            raise ValueError(f"the result names {what}, {word!r}: nothing was written; please report this")
