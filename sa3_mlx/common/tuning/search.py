"""Find the fastest ways that give the right result: ``search``.

Every way is compared with the plain form before it is timed. A way takes the place of the usual one where it is faster
by more than the spread of the measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .choice import Choice, Choices, Work
from .timing import Times, interleaved

_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_FRESH_ROUNDS = 3  # of processes, each of which warms up by itself
_MOST = 3e-2  # relative error that is allowed in 16 bits, whatever they round


class Bench(Protocol):
    """Do the work that is timed."""

    @property
    def dtypes(self) -> Mapping[Work, str]:
        """Return the number types of the works that the model has."""

    @property
    def timed(self) -> Sequence[Work]:
        """Return the works that a usual clip consists of; others are only compared."""

    def results(self, works: Sequence[Work]) -> list[NDArray[np.float32]]:
        """Return what each of the works gives, the same numbers whenever the ways are the same."""

    def seconds(self, works: Sequence[Work]) -> float:
        """Do the works and return the seconds that they take for one clip."""

    def fresh(self, ways: Mapping[str, str], environment: Mapping[str, str]) -> Bench:
        """Return a bench that works in processes of its own, with these variables in their environment."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Tell how one way did."""

    place: str
    way: str
    error: float | None = None  # against the plain form
    times: Times | None = None  # of a clip
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """Hold the ways that are better than the usual ones, and environments that they need."""

    ways: Mapping[str, str]
    environment: Mapping[str, str]
    before: Times  # of a clip in the usual ways
    after: Times


def bound(place: Choice, way: str, dtype: str) -> float:
    """Return the relative error that a way may have in a number type."""
    allowed = place.asked.get(way, place.tolerance)
    if dtype == "float32" or not allowed:
        return allowed
    return max(allowed, min(_MOST, allowed * _ROUNDING[dtype] / _ROUNDING["float32"]))


def relative_error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return the relative L2 error; infinite for another shape and for numbers that are not finite."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    difference = float(np.linalg.norm(found.astype(np.float64) - wanted))
    return difference / max(float(np.linalg.norm(wanted.astype(np.float64))), 1e-30)


class Search:
    """Go through the places of a twin, one after the other, each with the best ways of those before it."""

    def __init__(
        self,
        choices: Choices,
        bench: Bench,
        *,
        allowed: Mapping[str, str],
        only: Collection[str] = (),
        impossible: Callable[[Choice, str], str | None],
        report: Callable[[Trial], None],
    ) -> None:
        """Take what ``sa3 tune`` was told. Raises ValueError for a place or a way that is not there."""
        for name in (*allowed, *only):
            choices.place(name).check(allowed.get(name, choices.usual[name]))
        self.choices, self.bench, self.report = choices, bench, report
        self.allowed, self.only, self.impossible = allowed, only, impossible
        self._plain = {place.name: place.plain for place in choices.places.values() if not place.environment}
        self._kept: dict[str, str] = {}
        self._environment: dict[str, str] = {}
        self._mended = False  # whether a usual way was wrong: then what is right stays, however slow
        self._wanted: dict[Work, NDArray[np.float32]] = {}  # what the plain forms give
        self._errors: dict[tuple[str, str], float] = {}

    def places(self) -> list[tuple[Choice, list[str], list[Work]]]:
        """List the places that can be tuned, with the ways to try, the usual one first, and the works to time."""
        found = []
        for place in self.choices.places.values():
            works = [work for work in place.work if work in self.bench.timed]
            usual = self.choices.usual[place.name]
            others = [way for way in place.ways if way != usual and self._may(place, way)]
            if works and others and (not self.only or place.name in self.only):
                found.append((place, [usual, *others], works))
        return found

    def not_asked(self) -> list[tuple[str, str]]:
        """List the places and ways that are left out because nobody asked for them."""
        places = self.choices.places.values()
        return [(place.name, way) for place in places for way in place.asked if not self._may(place, way)]

    def _may(self, place: Choice, way: str) -> bool:
        return way not in place.asked or self.allowed.get(place.name) == way

    def run(self, rounds: Callable[[float], int]) -> Found:
        """Try everything. ``rounds`` says how often ways are timed, given the seconds that one run of each takes."""
        with self.choices.using(self._plain), self.choices.watching() as met:
            works = list(self.bench.dtypes)
            self._wanted = dict(zip(works, self.bench.results(works), strict=True))
        for place, ways, works in self.places():
            if not (place.name in met or place.apply or place.environment):
                self.report(Trial(place=place.name, way="any", verdict="left out: this model does not pass here"))
                continue
            sound = [way for way in ways if self._sound(place, way)]
            if not sound or sound == ways[:1]:
                continue
            best = self._fastest(place, sound, works, rounds)
            if best != ways[0]:
                self._keep(place, best)
                self._mended |= ways[0] not in sound
        if self._kept and not self._together():
            self._kept, self._environment = {}, {}
        before, after = self._gain(self.bench.timed, rounds)
        return Found(ways=self._kept, environment=self._environment, before=before, after=after)

    def _gain(self, works: Sequence[Work], rounds: Callable[[float], int]) -> tuple[Times, Times]:
        """Time a clip in the usual ways and in the kept ones, which go where they are slower together."""
        runs = {"usual": partial(self._all, {}, {}, works)}
        if self._kept or self._environment:
            runs["tuned"] = partial(self._all, self._kept, self._environment, works)
        times = interleaved(runs, _FRESH_ROUNDS if self._environment else self._warmed(runs, rounds))
        before, after = times["usual"], times.get("tuned", times["usual"])
        if after.median > before.median and not self._mended:
            self.report(Trial(place="all", way="together", times=after, verdict="dropped: slower together"))
            self._kept, self._environment, after = {}, {}, before
        return before, after

    @staticmethod
    def _warmed(runs: Mapping[str, Callable[[], float]], rounds: Callable[[float], int]) -> int:
        """Run everything once, which does not count, and return how often to time it."""
        begin = time.monotonic()
        for run in runs.values():
            run()
        return rounds(time.monotonic() - begin)

    def _all(self, ways: Mapping[str, str], environment: Mapping[str, str], works: Sequence[Work]) -> float:
        if self._environment:
            return self.bench.fresh(ways, environment).seconds(works)
        with self.choices.using(ways):
            return self.bench.seconds(works)

    def _keep(self, place: Choice, way: str) -> None:
        if place.environment:
            self._environment |= place.environment.get(way, {})
        else:
            self._kept[place.name] = way

    def _sound(self, place: Choice, way: str) -> bool:
        """Compare a way with the plain form, all else plain; say why it is dropped."""
        works = [work for work in place.work if work in self.bench.dtypes]
        if (reason := self.impossible(place, way)) is not None:
            self.report(Trial(place=place.name, way=way, verdict=f"left out: {reason}"))
            return False
        try:
            found = self._results(place, way, works)
        except Exception as error:  # whatever a framework raises
            reason = (str(error).splitlines() or [""])[0]
            self.report(Trial(place=place.name, way=way, verdict=f"dropped: {type(error).__name__} {reason}".rstrip()))
            return False
        limits = [bound(place, way, self.bench.dtypes[work]) for work in works]
        return self._close(place.name, way, found, works, limits)

    def _close(
        self, place: str, way: str, found: list[NDArray[np.float32]], works: Sequence[Work], limits: Sequence[float]
    ) -> bool:
        """Tell whether results are those of the plain form; say of what is not."""
        errors = [relative_error(values, self._wanted[work]) for values, work in zip(found, works, strict=True)]
        self._errors[place, way] = max(errors)
        for work, error, most in zip(works, errors, limits, strict=True):
            if not error <= most:
                verdict = f"dropped: error {error:.1e} of {work}, allowed are {most:.1e}"
                self.report(Trial(place=place, way=way, error=error, verdict=verdict))
                return False
        return True

    def _results(self, place: Choice, way: str, works: Sequence[Work]) -> list[NDArray[np.float32]]:
        if place.environment:
            return self.bench.fresh(self._plain, place.environment.get(way, {})).results(works)
        with self.choices.using({**self._plain, place.name: way}):
            return self.bench.results(works)

    def _seconds(self, place: Choice, way: str, works: Sequence[Work]) -> float:
        if place.environment:
            variables = {**self._environment, **place.environment.get(way, {})}
            return self.bench.fresh(self._kept, variables).seconds(works)
        with self.choices.using({**self._kept, place.name: way}):
            return self.bench.seconds(works)

    def _fastest(
        self, place: Choice, ways: Sequence[str], works: Sequence[Work], rounds: Callable[[float], int]
    ) -> str:
        """Return the way to go: the first one unless another one beats it."""
        runs = {way: partial(self._seconds, place, way, works) for way in ways}
        times = interleaved(runs, _FRESH_ROUNDS if place.environment else self._warmed(runs, rounds))
        first, fastest = ways[0], min(times, key=lambda way: times[way].median)
        best = fastest if times[fastest].beats(times[first]) else first
        for way in ways:
            slower = times[way].median >= times[first].median
            verdict = "usual" if way == first else "slower" if slower else "no faster than the spread"
            self.report(
                Trial(
                    place=place.name,
                    way=way,
                    error=self._errors[place.name, way],
                    times=times[way],
                    verdict="kept" if way == best != self.choices.usual[place.name] else verdict,
                )
            )
        return best

    def _together(self) -> bool:
        """Check all kept ways at once: their errors may add up, and no more."""
        works = list(self.bench.dtypes)
        with self.choices.using(self._kept):
            found = self.bench.results(works)
            ways = [(place, self.choices.way(name)) for name, place in self.choices.places.items()]
        limits = [sum(bound(place, way, self.bench.dtypes[work]) for place, way in ways) for work in works]
        return self._close("all", "together", found, works, limits)
