"""Read the entries of an index strictly: every field is there, has its kind and can be, or the place is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from sa3_mlx.common.schema import is_finite, quoted

_Entry = TypeVar("_Entry")


def _whole(least: int) -> tuple[str, Callable[[Any], bool]]:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**62

    return f"a whole number, at least {least}", holds


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_seconds(value: Any) -> bool:
    return is_finite(value) and value >= 0


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


_TEXT = ("a text", _is_text)
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "id": ("a text that is not empty", lambda value: _is_text(value) and bool(value)),
    "captions": ("a list of texts", _are_texts),
    "seconds": ("a number of seconds, at least 0", _is_seconds),
    **dict.fromkeys(("kind", "label", "licence", "source", "name", "hash"), _TEXT),
    "split": ("train or validation", lambda value: value in ("train", "validation")),
    **dict.fromkeys(("shard", "offset", "samples", "bytes", "number"), _whole(0)),
    **dict.fromkeys(("frames", "of"), _whole(1)),
    "midi": ("a whole number or null", lambda value: value is None or _whole(0)[1](value)),
    "instrument": ("a text or null", lambda value: value is None or _is_text(value)),
    "fields": ("an object", lambda value: isinstance(value, dict)),
}


def parse_entry(kind: type[_Entry], entry: object, where: str) -> _Entry:
    """Return the dataclass ``kind`` of an entry of a JSON file. Raises ValueError that begins with ``where``."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in entry.keys() - fields.keys():
        raise ValueError(f"{where}: {quoted(name)} is not known")
    for name, field in fields.items():
        if name in entry:
            words, holds = _RULES[name]
            if not holds(entry[name]):
                raise ValueError(f"{where}: {name} is {quoted(entry[name])}; expected {words}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: {name} is missing")
    values = {name: tuple(value) if name == "captions" else value for name, value in entry.items()}
    return kind(**values)


def parse_entries(kind: type[_Entry], entries: object, where: str) -> list[_Entry]:
    """Return the dataclasses of a list. Raises ValueError that begins with ``where`` and says which one."""
    if not isinstance(entries, list):
        raise ValueError(f"{where}: expected a list, got {type(entries).__name__}")
    return [parse_entry(kind, entry, f"{where}: entry {number}") for number, entry in enumerate(entries)]
