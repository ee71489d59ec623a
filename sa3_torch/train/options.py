"""Options that all training commands share: a decorator adds them, ``RunOptions.given`` returns their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, file_okay=False)
_PREFIX = "sa3.train."


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run goes, with which settings."""

    out: Path
    settings: str
    changes: tuple[str, ...]
    threads: int | None

    @classmethod
    def given(cls) -> Self:
        """Those of the command that runs now."""
        meta = click.get_current_context().meta
        return cls(**{field.name: meta[_PREFIX + field.name] for field in fields(cls)})


def _keep(ctx: click.Context, param: click.Parameter, value: object) -> object:
    ctx.meta[f"{_PREFIX}{param.name}"] = value
    return value


_option = partial(click.option, callback=_keep, expose_value=False)


def run_options(*, settings: str = "demo") -> Callable[[Command], Command]:
    """--out, --settings with this preset as default, --set and --threads; see ``RunOptions.given``."""
    options = [
        _option("--out", type=FOLDER, required=True, help="Run folder; an unfinished run in it goes on."),
        _option("--settings", default=settings, show_default=True, help="Preset name or .toml file."),
        _option("--set", "changes", multiple=True, metavar="KEY=VALUE",
                help="Change one setting, e.g. train.steps=100."),
        _option("--threads", type=click.IntRange(1), default=None, help="CPU threads."),
    ]  # fmt: skip

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
