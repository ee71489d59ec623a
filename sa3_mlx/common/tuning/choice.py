"""Describe places that have several ways to the same result, and hold which way each of them goes.

The tables are ``sa3_mlx/choices.py`` and ``sa3_torch/choices.py``. A place asks ``way(name)`` when it runs. The answer
is what the user said (``use``, ``using``), else what was tuned for this machine, else the usual way. A compiled graph
keeps the ways that were taken when it was made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["cpu", "gpu"]
Twin = Literal["mlx", "torch"]
Work = Literal["step", "decode", "encode"]  # what is timed: the steps of a clip, or a clip through half of SAME


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Describe one place and its ways.

    ``tolerance`` bounds the relative error (L2, fp32) of a way against the plain form; 0 asks for the same bits.
    Results in 16 bits may be off by as many of their own roundings.

    Most places ask ``way(name)``. A setting of the whole process is made by ``apply``, or, where only a new process can
    have it, by ``environment``: variables that the framework reads when it is imported.
    """

    name: str
    about: str  # one line
    ways: tuple[str, ...]  # the first is the plain form, which defines the result
    usual: Mapping[Kind, str]  # the way that is taken unless something else is known
    work: tuple[Work, ...]  # what it can make faster
    tolerance: float = 0.0
    asked: Mapping[str, float] = field(default_factory=dict)  # ways never taken without the user's word: their errors
    apply: Callable[[str], object] | None = None
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by way

    def __post_init__(self) -> None:
        for way in (*self.usual.values(), *self.asked, *self.environment):
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

    def in_environment(self, usual: str) -> str:
        """Return the way that this process goes by its environment."""
        fitting = (way for way, wanted in self.environment.items() if wanted.items() <= os.environ.items())
        return next(fitting, usual)


class Choices:
    """Hold the places of one twin, and the way that each of them goes."""

    def __init__(self, twin: Twin, kind: Kind, places: Sequence[Choice]) -> None:
        self.twin, self.kind = twin, kind
        self.places = {place.name: place for place in places}
        self.usual = {place.name: place.in_environment(place.usual[kind]) for place in places}
        self._tuned: dict[str, str] = {}
        self._said: dict[str, str] = {}
        self._ways = dict(self.usual)
        self._met: set[str] | None = None

    def place(self, name: str) -> Choice:
        """Return a place. Raises ValueError for an unknown name."""
        if name not in self.places:
            raise ValueError(f"no place is called {name!r}: there are {', '.join(self.places)}")
        return self.places[name]

    def way(self, name: str) -> str:
        """Return the way that a place goes now; forward passes ask this. Raises ValueError for an unknown name."""
        if self._met is not None:
            self._met.add(name)
        try:
            return self._ways[name]
        except KeyError:
            return self.place(name).plain

    @contextmanager
    def watching(self) -> Iterator[set[str]]:
        """Yield a set that takes the names of the places that are passed inside the ``with`` block."""
        self._met = met = set[str]()
        try:
            yield met
        finally:
            self._met = None

    def now(self) -> dict[str, str]:
        """Return the ways of all places."""
        return dict(self._ways)

    def differing(self, ways: Mapping[str, str]) -> dict[str, str]:
        """Return which of these ways, and of those of this process, may give other bits than the usual ones here."""
        settled = {name: way for name, way in self.usual.items() if self.places[name].environment}
        return {name: way for name, way in {**settled, **ways}.items() if self._differs(self.places[name], way)}

    def _differs(self, place: Choice, way: str) -> bool:
        return way != place.usual[self.kind] and (place.tolerance > 0 or way in place.asked)

    def use(self, name: str, way: str) -> None:
        """Go this way from now on. Raises ValueError for an unknown place or way, or one that needs a new process."""
        self._settle(self._tuned, {**self._said, **self._checked({name: way})})

    @contextmanager
    def using(self, ways: Mapping[str, str]) -> Iterator[None]:
        """Go these ways inside the ``with`` block. Raises ValueError as ``use``."""
        before, now = self._said, {**self._said, **self._checked(ways)}
        self._settle(self._tuned, now)
        try:
            yield
        finally:
            self._settle(self._tuned, before)

    @contextmanager
    def tuned(self, ways: Mapping[str, str]) -> Iterator[None]:
        """Go these ways inside the ``with`` block, where the user said nothing. Raises ValueError as ``use``."""
        before, now = self._tuned, self._checked(ways)
        self._settle(now, self._said)
        try:
            yield
        finally:
            self._settle(before, self._said)

    def _checked(self, ways: Mapping[str, str]) -> dict[str, str]:
        for name, way in ways.items():
            place = self.place(name)
            if place.check(way) != self.usual[name] and place.environment:
                wanted = " ".join(f"{key}={value}" for key, value in place.environment.get(way, {}).items())
                raise ValueError(f"{name} is settled when a process begins: {way} needs {wanted or 'no'} before it")
        return dict(ways)

    def _settle(self, tuned: dict[str, str], said: dict[str, str]) -> None:
        before, self._tuned, self._said = self._ways, tuned, said
        self._ways = {**self.usual, **tuned, **said}
        for name, way in self._ways.items():
            apply = self.places[name].apply
            if apply is not None and way != before[name]:
                apply(way)
