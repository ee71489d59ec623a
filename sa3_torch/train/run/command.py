"""Options that all training commands share: a decorator adds them, ``RunOptions.given`` returns their values."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, file_okay=False)


class _ModelFolder(click.ParamType):
    """The folder of an installed model or of a path; the program's context knows what is installed."""

    name = "NAME|PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ARG002
        assert ctx is not None
        find: Callable[[str], Path] | None = ctx.find_root().obj  # None where a command runs outside of the program
        return Path(value) if find is None else find(str(value))


MODEL = _ModelFolder()
DRY_RUN = "sa3.train.dry_run"
DRY_RUN_HELP = "Print parameters, memory, data and speed, and start and write nothing."


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a plan is asked for."""

    processes: int
    device: str | None
    timed: bool


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run goes, with which settings. ``dry_run``: only its plan is wanted, ``out`` is gone afterwards."""

    out: Path
    settings: str
    changes: tuple[str, ...]
    threads: int | None
    dry_run: DryRun | None

    @classmethod
    def given(cls) -> Self:
        """Those of the command that runs now. Raises click.UsageError for options that do not go together."""
        ctx = click.get_current_context()
        meta = ctx.meta
        out, dry_run = meta["sa3.train.out"], None
        details = DryRun(
            processes=meta["sa3.train.processes"], device=meta["sa3.train.device"], timed=meta["sa3.train.timed"]
        )
        if meta[DRY_RUN]:
            if "WORLD_SIZE" in os.environ:
                raise click.UsageError("--dry-run plans for several processes by --processes N, without torchrun", ctx)
            out, dry_run = Path(ctx.with_resource(TemporaryDirectory())), details
        elif details != DryRun(processes=1, device=None, timed=False):
            raise click.UsageError("--processes, --device and --time are for --dry-run alone", ctx)
        elif out is None:
            raise click.UsageError("give the folder of the run, --out RUN, or --dry-run", ctx)
        return cls(
            out=out,
            settings=meta["sa3.train.settings"],
            changes=meta["sa3.train.changes"],
            threads=meta["sa3.train.threads"],
            dry_run=dry_run,
        )


def _keep(ctx: click.Context, param: click.Parameter, value: object) -> object:
    ctx.meta[f"sa3.train.{param.name}"] = value
    return value


def _keep_dry_run(ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
    """It may stand before the stage's name too."""
    ctx.meta[DRY_RUN] = value or ctx.meta.get(DRY_RUN, False)
    return value


_option = partial(click.option, callback=_keep, expose_value=False)


def run_options(*, settings: str = "demo") -> Callable[[Command], Command]:
    """--out, --settings with this preset as default, --set, --threads and --dry-run; see ``RunOptions.given``."""
    options = [
        _option("--out", type=FOLDER, help="Run folder; an unfinished run in it goes on."),
        _option("--settings", default=settings, show_default=True, help="Preset name or .toml file."),
        _option(
            "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=100."
        ),
        _option("--threads", type=click.IntRange(1), default=None, help="CPU threads."),
        click.option("--dry-run", is_flag=True, callback=_keep_dry_run, expose_value=False, help=DRY_RUN_HELP),
        _option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Of the dry run."),
        _option("--device", metavar="CHIP", help="Of the dry run, such as H200. Default: this machine's."),
        _option("--time", "timed", is_flag=True, help="In the dry run, time a few steps on this machine."),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
