"""Read frozen dataclasses from JSON and TOML, strictly: every field is there, known and of its type."""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from typing import Any, Literal, Self

import numpy as np

from sa3_mlx.common.terminal import excerpt, one_line

_LETTERS = 80  # of a value in a message
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxlong, _BRIEF.maxother = 3, _LETTERS, _LETTERS, _LETTERS


class ConfigError(ValueError):
    """Report a value that cannot be; the message is one line with the field, the value and what is allowed."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def quoted(value: object) -> str:
    """Return a value for a message: as Python writes it, in one line, the middle or the end left out where it is
    long."""
    try:
        return excerpt(one_line(_BRIEF.repr(value)), _LETTERS)
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of thousands of digits"


def is_finite(value: object) -> bool:
    """Tell whether a value is a number, True and False aside, that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def listed(names: Iterable[object]) -> str:
    """Return names for a message: the first ones, in one line."""
    words = [one_line(excerpt(str(name))) for name in names]
    return ", ".join(words[:8]) + (f", and {len(words) - 8} more" if len(words) > 8 else "")


def reason(error: BaseException) -> str:
    """Return what an error of a library says, in one line, its end left out where it is long."""
    return excerpt(one_line(str(error)), 200) or type(error).__name__


@dataclass(frozen=True, kw_only=True)
class Config:
    """Read and write the fields of a dataclass strictly; everything that is stored as JSON or TOML derives from it.

    Fields are numbers, text, bool, Literal, tuples, other Configs, None in a union with one of these, dictionaries with
    whatever JSON has, and arrays, which are not stored: ``to_dict`` leaves them out and ``from_dict`` finds them as
    arrays among the data.
    """

    @classmethod
    def from_dict(cls, data: object, *, where: str = "config") -> Self:
        """Read a table; a field that has a default may be missing. What is read already is returned as it is.

        Raises ConfigError, one line that begins with ``where`` and the field, for an unknown key, a missing key and a
        value of a wrong type.
        """
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected an object, got {type(data).__name__}")
        hints, needed = _hints(typing.cast(Any, cls))
        unknown = sorted(map(str, data.keys() - hints.keys()))
        missing = sorted(needed - data.keys())
        require(not unknown, f"{where}: unknown field(s) {listed(unknown)}; allowed: {', '.join(hints)}")
        require(not missing, f"{where}: missing field(s) {', '.join(missing)}")
        values = {name: _parse(hint, data[name], f"{where}.{name}") for name, hint in hints.items() if name in data}
        try:
            return cls(**values)
        except ConfigError as error:  # of values that do not fit each other, or a range
            raise ConfigError(f"{where}: {error}") from error

    def take_plain(self) -> None:
        """Turn what programs pass, numpy scalars and lists, into numbers and tuples; for ``__post_init__``."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """Return plain JSON types, tuples as lists; without ``defaults``, fields at their default are left out."""
        pairs = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return {
            field.name: _stored(value, defaults=defaults)
            for field, value in pairs
            if not isinstance(value, np.ndarray) and (defaults or value != field.default)
        }


def plain(value: object) -> Any:
    """Return numpy scalars as Python's numbers and lists as tuples, also inside of tuples; all else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        return value.item()
    return tuple(plain(item) for item in value) if isinstance(value, list | tuple) else value


@functools.cache
def _hints(kind: type[Config]) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the type of every field, and the fields that have no default."""
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    needed = (field.name for field in fields if field.default is MISSING and field.default_factory is MISSING)
    return {field.name: hints[field.name] for field in fields}, frozenset(needed)


def _stored(value: object, *, defaults: bool) -> Any:
    if isinstance(value, Config):
        return value.to_dict(defaults=defaults)
    if isinstance(value, tuple):
        return [_stored(item, defaults=defaults) for item in value]
    return value


def _parse(hint: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # at most one tuple among its types, and one other
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        listed = isinstance(value, list | tuple)
        chosen = next((option for option in options if (typing.get_origin(option) is tuple) == listed), options[0])
        return _parse(chosen, value, where)
    if origin is Literal:
        if not any(value == argument and type(value) is type(argument) for argument in arguments):
            raise ConfigError(f"{where}: got {quoted(value)}, allowed: {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _parse_tuple(arguments, value, where)
    if origin is np.ndarray:
        require(isinstance(value, np.ndarray), f"{where}: expected an array, got {type(value).__name__}")
        return value
    if isinstance(hint, type) and issubclass(hint, Config):
        return hint.from_dict(value, where=where)
    if hint is float and type(value) is int and is_finite(value):
        return float(value)
    kind = origin or hint
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected {kind.__name__}, got {quoted(value)}")
    if isinstance(value, float) and not is_finite(value):
        raise ConfigError(f"{where}: must be finite, got {value!r}")
    if isinstance(value, int):
        require(value.bit_length() < 64, f"{where}: must be below 2^63, got {quoted(value)}")
    return value


def _parse_tuple(arguments: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    """Read ``tuple[item, ...]`` or a tuple of one type with a fixed length, such as ``tuple[float, float]``."""
    require(isinstance(value, list | tuple), f"{where}: expected a list, got {quoted(value)}")
    values = typing.cast(list[object], value)
    if arguments[-1] is not Ellipsis:
        require(len(values) == len(arguments), f"{where}: expected {len(arguments)} values, got {quoted(value)}")
    return tuple(_parse(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(values))
