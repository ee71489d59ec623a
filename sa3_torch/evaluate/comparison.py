"""Compare several models and samplings, each with several seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.judge.judge import RIGHT
from sa3_torch.evaluate.measures.one_step import many_steps, one_step_error, one_steps
from sa3_torch.evaluate.measures.paired import Difference, paired_difference

from .run import Evaluator, batches, clip_items

Measures = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Name a model as it is called in tables, and say how it is sampled."""

    name: str
    pipeline: BasePipeline[Any]
    sampling: Sampling

    @property
    def label(self) -> str:
        """Return model and sampling as one text."""
        return f"{self.name} {self.sampling}"


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """Hold the measures of an entry, one dictionary a seed.

    ``mean`` and ``spread`` (standard deviation) are over the seeds; None where no seed, or less than two, have a value.
    """

    entry: Entry
    measures: tuple[Measures, ...]
    details: tuple[dict[str, Any], ...]

    @property
    def mean(self) -> Measures:
        """Return the mean of every measure."""
        return {name: None if (values := self._of(name)) is None else float(np.mean(values)) for name in self.names}

    @property
    def spread(self) -> Measures:
        """Return the standard deviation of every measure."""
        return {
            name: None if (values := self._of(name)) is None or len(values) < 2 else float(np.std(values, ddof=1))
            for name in self.names
        }

    @property
    def names(self) -> list[str]:
        """Return the names of the measures."""
        return list(self.measures[0])

    def _of(self, name: str) -> list[float] | None:
        values = [value for found in self.measures if (value := found[name]) is not None]
        return values or None

    def intervals(self, first: ComparisonRow | None = None) -> dict[str, Difference]:
        """Return the mean of every measure of single sounds, or its difference to ``first``, with its 95 % interval by
        drawing prompts again.

        The sounds of all seeds are taken together, and ``first`` was asked for the same. A measure with less than two
        prompts is left out.
        """
        ours, theirs = self._sounds(), None if first is None else first._sounds()
        found = {}
        for name in (*RIGHT, "clap_own", "clap_first"):
            chosen = [i for i, sound in enumerate(ours) if name in sound]
            prompts = [ours[i]["prompt"] for i in chosen]
            if len(set(prompts)) >= 2:
                other = [0 if theirs is None else theirs[i][name] for i in chosen]
                found[name] = paired_difference([ours[i][name] for i in chosen], other, prompts)
        return found

    def _sounds(self) -> list[dict[str, Any]]:
        return [sound for details in self.details for sound in details["sounds"]]

    def to_dict(self, first: ComparisonRow) -> dict[str, Any]:
        """Return JSON values, with the differences to the first row of a table.

        The key "setting" holds the sampling as one writes it, such as "euler:50:3".
        """
        return {
            "model": self.entry.name,
            "setting": str(self.entry.sampling),
            "mean": self.mean,
            "spread": self.spread,
            "interval": {name: asdict(found) for name, found in self.intervals().items()},
            "to_first": {name: asdict(found) for name, found in self.intervals(first).items()},
            "seeds": list(self.measures),
            "details": list(self.details),
        }


def compare(
    evaluator: Evaluator, entry: Entry, seeds: int, advance: Callable[[int], None] = lambda _: None
) -> ComparisonRow:
    """Run an entry with the seeds 0, 1, ...; ``advance`` is called with the number of clips that are done."""
    found = [evaluator.run(entry.pipeline, entry.sampling, seed, advance) for seed in range(seeds)]
    return ComparisonRow(entry=entry, measures=tuple(m for m, _ in found), details=tuple(d for _, d in found))


def compare_one_step(
    entries: Sequence[Entry],
    teacher: Entry,
    evaluator: Evaluator,
    seeds: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Return the one-step error of every model against the teacher's result, by name, one value a seed.

    ``advance`` is called with the number of clips that are done, the teacher's included.
    """
    errors: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for seed in range(seeds):
        parts = _items(evaluator, seed)
        wanted = many_steps(teacher.pipeline, parts, teacher.sampling)
        advance(len(wanted))
        for name, pipeline in {entry.name: entry.pipeline for entry in entries}.items():
            errors[name].append(one_step_error(one_steps(pipeline, parts), wanted))
            advance(len(wanted))
    return errors


def _items(evaluator: Evaluator, seed: int) -> list[list[Item]]:
    chosen = clip_items(evaluator.real.asked.clips, evaluator.options.clips, seed)
    return [[chosen[i].item for i in rows] for rows in batches(chosen, evaluator.options.batch)]
