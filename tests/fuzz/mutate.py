"""Strategies that damage a valid input: bytes, JSON, TOML, headers of safetensors and of sounds, text."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

_DEEPEST = 100  # beyond, only the text is damaged: how far Python goes down depends on where it begins
Draw = Callable[[st.SearchStrategy[Any]], Any]
Mutation = Callable[[Draw, bytes], bytes]

_NUMBERS = (0, -1, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, -(2**63), 10**9, 10**18, 10**400)
_FLOATS = (0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), -float("inf"))
_TEXTS = ("", " ", "nan", "a", "0", "../../x", "\x00", "\x1b[2J\x07", "\ud800", "é" * 40, "a" * 5000, "[0-999999999]")
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [0] * 300, {"a": {"b": {"c": 1}}})
ODD = st.one_of(*(st.sampled_from(kind) for kind in (_NUMBERS, _FLOATS, _TEXTS, _OTHERS))).map(copy.deepcopy)
JUNK = st.recursive(
    ODD | st.text(max_size=12) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
_TOKENS = (
    *("nan", "inf", "-inf", "-1", "0", "1e308", "1e999", "1" * 30, "9" * 5000, "true", "null", '""', "''", "[]", "{}"),
    *("[" * 3000, "1979-05-27", '"a"', "é", "\x00", "\x1b[31m", "\n", "-", ":", "=", ".", "{0..999999999}", "\\", '"'),
    *("\udce4", "\u202e", "a" * 3000, "(a+)+$", "..", "/", "%s", "{}", "$(x)", "~", "*"),
)
_POINTS = (0, 1, 2, 4, 7, 8, 12, 16, 20, 22, 24, 28, 32, 34, 36, 40, 44, 48)


def _number(draw: Draw, low: int, high: int) -> int:
    return int(draw(st.integers(low, max(low, high))))


def _place(draw: Draw, data: bytes) -> int:
    """Choose a byte: one of the header mostly, where most of the meaning is."""
    if draw(st.booleans()):
        return min(int(draw(st.sampled_from(_POINTS))), len(data))
    return _number(draw, 0, min(len(data), 400) if draw(st.booleans()) else len(data))


def damaged_bytes(draw: Draw, data: bytes) -> bytes:
    """Cut, lengthen, overwrite or repeat parts of the bytes."""
    for _ in range(_number(draw, 1, 3)):
        at, kind = _place(draw, data), _number(draw, 0, 6)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + draw(st.binary(max_size=16)) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + _number(draw, 1, 64) :]
        elif kind == 3:
            new = struct.pack("<q", draw(st.sampled_from(_NUMBERS)) % 2**63)[: draw(st.sampled_from((1, 2, 4, 8)))]
            data = data[:at] + new + data[at + len(new) :]
        elif kind == 4:
            data = data[:at] + data[at : at + _number(draw, 1, 256)] * 2 + data[at:]
        elif kind == 5:
            new = draw(st.binary(min_size=1, max_size=8))
            data = data[:at] + new + data[at + len(new) :]
        else:
            data = (
                data[:at] + bytes([(data[at] if at < len(data) else 0) ^ (1 << _number(draw, 0, 7))]) + data[at + 1 :]
            )
    return data


def damaged_text(draw: Draw, data: bytes) -> bytes:
    """Put odd tokens into a text, or in place of its words; repeat and drop parts."""
    text = data.decode("utf-8", "surrogateescape")
    for _ in range(_number(draw, 1, 3)):
        at, kind = _number(draw, 0, len(text)), _number(draw, 0, 4)
        token = draw(st.sampled_from(_TOKENS) | st.text(max_size=12))
        if kind == 0:
            text = text[:at] + token + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + _number(draw, 1, 20) :]
        elif kind == 2:
            text = text[:at] + token + text[at + _number(draw, 1, 8) :]
        elif kind == 3:
            text = text[:at] + text[at : at + 40] * draw(st.sampled_from((2, 3, 500))) + text[at:]
        else:
            text = token
    return text.encode("utf-8", "surrogatepass")


def _nodes(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of all values in a JSON document; of long lists the first and last few."""
    found = [path]
    if isinstance(value, dict):
        children: list[Any] = list(value)
    else:
        children = list(range(len(value))) if isinstance(value, list) else []
    for key in children if len(children) <= 60 else [*children[:3], *children[-3:]]:
        found += _nodes(value[key], (*path, key))  # type: ignore[index]
    return found


def damaged_value(draw: Draw, value: Any) -> Any:
    """Replace, drop, add, rename, wrap or exchange values of a JSON document."""
    value = copy.deepcopy(value)
    for _ in range(_number(draw, 1, 2)):
        paths = _nodes(value)
        *above, last = draw(st.sampled_from(paths[1:])) if len(paths) > 1 else (None,)
        if last is None:
            return draw(JUNK)
        table = value
        for key in above:
            table = table[key]
        kind = _number(draw, 0, 7)
        if kind <= 2:
            table[last] = draw(ODD)
        elif kind == 3:
            del table[last]
        elif kind == 4 and isinstance(table, dict):
            table[draw(st.sampled_from(_TEXTS) | st.text(max_size=6))] = table.pop(last)
        elif kind == 5:
            table[last] = draw(st.sampled_from(([table[last]], {"a": table[last]}, str(table[last]))))
        elif kind == 6:
            *other, name = draw(st.sampled_from(paths[1:]))
            source = value
            try:
                for key in other:
                    source = source[key]
                table[last] = copy.deepcopy(source[name])
            except (KeyError, IndexError, TypeError):
                pass
        elif isinstance(table[last], int | float) and not isinstance(table[last], bool):
            table[last] = table[last] * draw(st.sampled_from((-1, 0.5, 2, 1000, 10**6, 10**12)))
        else:
            table[last] = draw(JUNK)
    return value


def _depth(data: bytes) -> int:
    """Return about how deeply a JSON text is nested."""
    depth = deepest = 0
    for byte in data:
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    return deepest


def damaged_json(draw: Draw, data: bytes) -> bytes:
    """Damage the document, or now and then its text."""
    kind = _number(draw, 0, 9)
    if kind == 0:
        return damaged_text(draw, data)
    if kind == 1:
        return damaged_bytes(draw, data)
    if _depth(data) > _DEEPEST:
        return damaged_text(draw, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return damaged_text(draw, data)
    try:
        return json.dumps(draw(JUNK) if kind == 2 else damaged_value(draw, value)).encode()
    except (ValueError, OverflowError, RecursionError):  # of a document that is damaged already
        return damaged_text(draw, data)


def damaged_toml(draw: Draw, data: bytes) -> bytes:
    """Give keys of a TOML file other values, drop, rename and repeat lines."""
    if not _number(draw, 0, 4):
        return damaged_text(draw, data)
    lines = data.decode("utf-8", "surrogateescape").splitlines()
    for _ in range(_number(draw, 1, 2)):
        if not lines:
            break
        at, kind = _number(draw, 0, len(lines) - 1), _number(draw, 0, 5)
        key, equals, _ = lines[at].partition("=")
        if kind <= 2 and equals:
            odd = draw(st.sampled_from(_TOKENS) | ODD.map(lambda value: json.dumps(value)))
            lines[at] = f"{key}= {odd}"
        elif kind == 3:
            del lines[at]
        elif kind == 4:
            lines[at] = f"x{lines[at]}"
        else:
            lines.insert(_number(draw, 0, len(lines)), lines[at])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def damaged_safetensors(draw: Draw, data: bytes) -> bytes:
    """Damage the header as JSON, with a length that fits mostly; or the bytes."""
    if len(data) < 10 or not _number(draw, 0, 3):
        return damaged_bytes(draw, data)
    length = struct.unpack("<Q", data[:8])[0]
    header = damaged_json(draw, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damaged_npy(draw: Draw, data: bytes) -> bytes:
    """Damage the header, a Python literal, as text that keeps its length mostly; or the bytes."""
    if len(data) < 12 or not _number(draw, 0, 2):
        return damaged_bytes(draw, data)
    length = struct.unpack("<H", data[8:10])[0]
    header = damaged_text(draw, data[10 : 10 + length].rstrip())
    if draw(st.booleans()):
        header = header.ljust(length - 1)[: length - 1] + b"\n"
    return data[:8] + struct.pack("<H", len(header) % 65536) + header + data[10 + length :]


MUTATIONS: dict[str, Mutation] = {
    "bytes": damaged_bytes,
    "text": damaged_text,
    "json": damaged_json,
    "toml": damaged_toml,
    "safetensors": damaged_safetensors,
    "npy": damaged_npy,
}
