"""Strict, frozen dataclasses that are read from JSON and TOML: every field is there, known and of its type."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Self


class ConfigError(ValueError):
    """A configuration that no model can have; the message names the field, the value and what is allowed."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configurations: strict ``from_dict`` and ``to_dict``.

    ``from_dict`` raises ConfigError for an unknown key, a missing key and a value of the wrong type, naming it. A
    table with default None, which switches something on, may be missing.
    """

    @classmethod
    def from_dict(cls, data: object, *, where: str = "config") -> Self:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected an object, got {type(data).__name__}")
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        unknown = sorted(set(data) - set(names))
        optional = {field.name for field in fields if field.default is None and _is_table(hints[field.name])}
        missing = sorted(set(names) - optional - set(data))
        require(not unknown, f"{where}: unknown field(s) {', '.join(map(str, unknown))}; allowed: {', '.join(names)}")
        require(not missing, f"{where}: missing field(s) {', '.join(missing)}")
        return cls(**{name: _parse(hints[name], data[name], f"{where}.{name}") for name in names if name in data})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _is_table(hint: Any) -> bool:
    """Whether a field of type ``Config | None`` is described."""
    return any(isinstance(inner, type) and issubclass(inner, Config) for inner in typing.get_args(hint))


def _parse(hint: Any, value: object, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _parse(next(a for a in typing.get_args(hint) if a is not type(None)), value, where)
    if origin is Literal:
        allowed = typing.get_args(hint)
        require(value in allowed, f"{where}: got {value!r}, allowed: {', '.join(map(repr, allowed))}")
        return value
    if origin is tuple:  # tuple[item, ...]
        require(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_parse(item, v, f"{where}[{i}]") for i, v in enumerate(typing.cast(list[object], value)))
    if isinstance(hint, type) and issubclass(hint, Config):
        return hint.from_dict(value, where=where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    require(type(value) is hint, f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    if isinstance(value, float):
        require(math.isfinite(value), f"{where}: must be finite, got {value!r}")
    return value
