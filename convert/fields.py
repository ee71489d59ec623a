"""Read a foreign JSON object so that no field goes unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sa3_mlx.common.schema import ConfigError, is_finite, listed, quoted

_REQUIRED: Any = object()


@contextmanager
def about(label: str) -> Iterator[None]:
    """Put the name of what is read before the words of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error


class Fields:
    """Hand out the fields of a JSON object one by one; ``done`` refuses whatever was not asked for.

    Every problem is a ConfigError that names the field by its full path.
    """

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected an object, got {type(data).__name__}")
        self.where = where
        self._data: dict[str, Any] = data
        self._seen: set[str] = set()

    def optional(self, name: str, kind: type) -> Any:
        """Return the value of a field, None when it is absent or null."""
        self._seen.add(name)
        return None if self._data.get(name) is None else self.take(name, kind)

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return the value of a field, of this type (int is accepted for float); ``default`` when it is absent."""
        self._seen.add(name)
        if name not in self._data:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where}.{name}: missing")
            return default
        value = self._data[name]
        if kind is float and type(value) is int and is_finite(value):
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{self.where}.{name}: expected {kind.__name__}, got {quoted(value)}")
        return value

    def child(self, name: str) -> Fields:
        """Return the fields of an object that is a field."""
        return Fields(self.take(name, dict), f"{self.where}.{name}")

    def constant(self, name: str, allowed: Any, *, default: Any = _REQUIRED) -> None:
        """Refuse any value but this one; ``default`` is what the official code assumes when the field is absent."""
        self._seen.add(name)
        value = self._data.get(name, default)
        if value is _REQUIRED:
            raise ConfigError(f"{self.where}.{name}: missing; must be {allowed!r}")
        if value != allowed or (type(value) is bool) != (type(allowed) is bool):  # 1 is not true
            absent = "" if name in self._data else " (absent, which means this)"
            raise ConfigError(f"{self.where}.{name}: got {quoted(value)}{absent}, supported: {allowed!r}")

    def constants(self, table: Iterable[tuple[str, Any, Any]]) -> None:
        """Do so for every (name, allowed, default)."""
        for name, allowed, default in table:
            self.constant(name, allowed, default=default)

    def ignore(self, *names: str) -> None:
        """Leave fields out on purpose."""
        self._seen.update(names)

    def done(self) -> None:
        """Refuse the fields that nothing asked for."""
        unknown = sorted(set(self._data) - self._seen)
        if unknown:
            raise ConfigError(f"{self.where}: unknown field(s) {listed(unknown)}; no model here knows their meaning")
