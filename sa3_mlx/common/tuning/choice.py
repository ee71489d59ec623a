"""Describe places that have several ways to the same result, and hold which way each of them goes.

The tables are ``sa3_mlx/choices.py`` and ``sa3_torch/choices.py``. A place asks ``way(name)`` when it runs. The answer
is what the user said (``use``, ``using``), else what was tuned for this machine, else the usual way. A compiled graph
keeps the ways that were taken when it was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["cpu", "gpu"]
Work = Literal["step", "decode", "encode"]  # what is timed: a velocity of the DiT, or a clip through half of SAME


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Describe one place and its ways.

    ``tolerance`` bounds the relative error (L2, fp32) of a way against the plain form; 0 asks for the same bits.
    Results in 16 bits may be off by as many of their own roundings.
    """

    name: str
    about: str  # one line
    ways: tuple[str, ...]  # the first is the plain form, which defines the result
    usual: Mapping[Kind, str]  # the way that is taken unless something else is known
    work: tuple[Work, ...]  # what it can make faster
    tolerance: float = 0.0
    asked: Mapping[str, float] = field(default_factory=dict)  # ways never taken without the user's word: their errors

    def __post_init__(self) -> None:
        for way in (*self.usual.values(), *self.asked):
            self.check(way)
        if set(self.usual.values()) & set(self.asked):
            raise ValueError(f"{self.name}: a way that the user must ask for is not the usual one")

    @property
    def plain(self) -> str:
        """Return the way that defines the result."""
        return self.ways[0]

    def check(self, way: str) -> str:
        """Return the way. Raises ValueError where this place has no such way."""
        if way not in self.ways:
            raise ValueError(f"{self.name} is {way!r}: allowed are {', '.join(self.ways)}")
        return way


class Choices:
    """Hold the places of one twin, and the way that each of them goes."""

    def __init__(self, places: Sequence[Choice], kind: Kind) -> None:
        self.places = {place.name: place for place in places}
        self.kind = kind
        self._tuned: dict[str, str] = {}
        self._said: dict[str, str] = {}
        self._settle()

    def _settle(self) -> None:
        usual = {name: place.usual[self.kind] for name, place in self.places.items()}
        self._ways = usual | self._tuned | self._said

    def place(self, name: str) -> Choice:
        """Return a place. Raises ValueError for an unknown name."""
        if name not in self.places:
            raise ValueError(f"no place is called {name!r}: there are {', '.join(self.places)}")
        return self.places[name]

    def way(self, name: str) -> str:
        """Return the way that a place goes now; forward passes ask this. Raises ValueError for an unknown name."""
        try:
            return self._ways[name]
        except KeyError:
            return self.place(name).plain

    def use(self, name: str, way: str) -> None:
        """Go this way from now on. Raises ValueError for an unknown place or way."""
        self.place(name).check(way)
        self._said[name] = way
        self._settle()

    @contextmanager
    def using(self, ways: Mapping[str, str]) -> Iterator[None]:
        """Go these ways inside the ``with`` block. Raises ValueError as ``use``."""
        before = dict(self._said)
        try:
            for name, way in ways.items():
                self.use(name, way)
            yield
        finally:
            self._said = before
            self._settle()

    @contextmanager
    def tuned(self, ways: Mapping[str, str]) -> Iterator[None]:
        """Go these ways inside the ``with`` block, where the user said nothing. Raises ValueError as ``use``."""
        before = self._tuned
        self._tuned = {name: self.place(name).check(way) for name, way in ways.items()}
        self._settle()
        try:
            yield
        finally:
            self._tuned = before
            self._settle()
