"""Read frozen dataclasses from JSON and TOML, strictly: every field is there, known and of its type."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import MISSING, dataclass
from typing import Any, Literal, Self

import numpy as np


class ConfigError(ValueError):
    """Report a value that cannot be; the message is one line with the field, the value and what is allowed."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Read and write the fields of a dataclass strictly; everything that is stored as JSON or TOML derives from it.

    Fields are numbers, text, bool, Literal, tuples, other Configs, None in a union with one of these, and arrays, which
    are not stored: ``to_dict`` leaves them out and ``from_dict`` finds them as arrays among the data.
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
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        unknown = sorted(set(data) - set(names))
        missing = sorted({field.name for field in fields if field.default is MISSING} - set(data))
        require(not unknown, f"{where}: unknown field(s) {', '.join(map(str, unknown))}; allowed: {', '.join(names)}")
        require(not missing, f"{where}: missing field(s) {', '.join(missing)}")
        return cls(**{name: _parse(hints[name], data[name], f"{where}.{name}") for name in names if name in data})

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
        require(value in arguments, f"{where}: got {value!r}, allowed: {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _parse_tuple(arguments, value, where)
    if origin is np.ndarray:
        require(isinstance(value, np.ndarray), f"{where}: expected an array, got {type(value).__name__}")
        return value
    if isinstance(hint, type) and issubclass(hint, Config):
        return hint.from_dict(value, where=where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    require(type(value) is hint, f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    if isinstance(value, float):
        require(math.isfinite(value), f"{where}: must be finite, got {value!r}")
    return value


def _parse_tuple(arguments: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    """Read ``tuple[item, ...]`` or a tuple of one type with a fixed length, such as ``tuple[float, float]``."""
    require(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
    values = typing.cast(list[object], value)
    if arguments[-1] is not Ellipsis:
        require(len(values) == len(arguments), f"{where}: expected {len(arguments)} values, got {value!r}")
    return tuple(_parse(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(values))
