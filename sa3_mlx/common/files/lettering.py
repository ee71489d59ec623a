"""Write in pictures what others wrote: titles in any script, without a box, a formula or a warning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sa3_mlx.common.terminal import excerpt, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

USUAL = "DejaVu Sans"  # comes with matplotlib
_FIRST = ("Noto Sans", "Arial Unicode", "Hiragino", "PingFang", "Apple SD")  # families with many letters
_NEVER = ("LastResort", "Blank", "Emoji")  # have boxes or colours where letters should be
_LETTERS = 110  # of a title


@contextmanager
def quiet_drawing() -> Iterator[None]:
    """Keep the notes of matplotlib, of caches and folders, off the terminal while it is imported and draws."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def write_title(place: Axes | Figure, text: str) -> None:
    """Write a title in one line, its end left out where it is long, with fonts that have its letters."""
    line, families = lettered(excerpt(one_line(text), _LETTERS))
    if hasattr(place, "suptitle"):
        place.suptitle(line, fontfamily=families, parse_math=False)
    else:
        place.set_title(line, loc="left", fontsize=11, fontfamily=families, parse_math=False)


def lettered(text: str) -> tuple[str, list[str]]:
    """Return a text that can be drawn and the families of fonts for it; letters that no font has are escapes."""
    missing, families = _without(USUAL, set(text)), [USUAL]
    for family in _others() if missing else ():
        left = _without(family, missing)
        if left != missing:
            families.append(family)
            missing = left
        if not missing:
            break
    escaped = {ord(letter): letter.encode("unicode_escape").decode("ascii") for letter in missing}
    return text.translate(escaped), families


def _without(family: str, letters: set[str]) -> set[str]:
    """Return the letters that a font does not have; all of them for one that cannot be scaled or read."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(fontManager.findfont(family, fallback_to_default=False))
    except (OSError, RuntimeError, ValueError):
        return letters
    return {letter for letter in letters if not font.get_char_index(ord(letter))} if font.scalable else letters


@functools.cache
def _others() -> tuple[str, ...]:
    """Return the families of all fonts that are installed, those with many letters first."""
    from matplotlib.font_manager import fontManager

    names = {entry.name for entry in fontManager.ttflist if not any(word in entry.name for word in _NEVER)} - {USUAL}
    return tuple(sorted(names, key=lambda name: (not name.startswith(_FIRST), name)))
