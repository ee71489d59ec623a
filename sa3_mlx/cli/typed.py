"""Let a command take groups of options, each as one parameter that is a dataclass."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from functools import cached_property
from typing import Any, get_args

import click
from click.core import ParameterSource

_DEBUG = click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")


class TypedCommand(click.Command):
    """Collect the options that a dataclass declares into one parameter of the command's function.

    Every parameter whose type is a dataclass is such a group: each of its fields is annotated with a ``click.Option``
    of the same name. Groups follow the command's own options, in the order of the signature; ``--debug`` comes last.
    """

    @cached_property
    def groups(self) -> dict[str, type[Any]]:
        """Map the names of such parameters to their types."""
        hints = typing.get_type_hints(self.callback)
        return {name: kind for name, kind in hints.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}

    @cached_property
    def _shared(self) -> list[click.Parameter]:
        hints = [hint for kind in self.groups.values() for hint in _hints(kind).values()]
        return [*(get_args(hint)[1] for hint in hints), _DEBUG]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, those of its groups, --debug and --help."""
        *own, usual = super().get_params(ctx)
        return [*own, *self._shared, usual]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as usual, then put the values of every group together."""
        rest = super().parse_args(ctx, args)
        for name, kind in self.groups.items():
            ctx.params[name] = kind(**{field: ctx.params.pop(field) for field in _hints(kind)})
        return rest


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Return the annotated types of a group's fields, in their order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


class Parsed(click.ParamType):
    """Read an option's text with a function whose ValueError says what is wrong with it."""

    def __init__(self, parse: Callable[[str], object]) -> None:
        self.name = parse.__name__
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed text. Raises click.BadParameter."""
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def given(ctx: click.Context, name: str) -> bool:
    """Return whether the user gave this option, whatever its value."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
