"""Measure what choosing the best of several sounds gains, by the judge: ``python -m benchmarks best-of``.

*one* is the first sound of a group, *checks* and *clap* are those that ``--best-of`` keeps without and with a latent
CLAP, *any* asks whether there was a right one at all, which no choice can beat.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks.options import BACKEND, MODEL, SamplingChoice, open_pipeline
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.measures.choice import Grade, best, grade
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.terminal import report
from sa3_torch.evaluate.judge.judge import Judge, right
from sa3_torch.evaluate.measures.paired import paired_difference
from sa3_torch.evaluate.prompts import JudgedPrompt, held_out_prompts

WAYS = ("one", "checks", "clap", "any")
PAIRS = (("checks", "one"), ("clap", "one"), ("clap", "checks"), ("any", "clap"))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Hold what was found of one sound."""

    grade: Grade  # with the cosine of the latent CLAP
    right: dict[str, bool]  # by the judge


def chosen(group: Sequence[Candidate], key: str) -> dict[str, float]:
    """Return whether the sound that each way keeps is right, 0 or 1, by way. ``key``: one of what ``right`` says."""
    by_checks = best([replace(one.grade, clap=None) for one in group])
    places = {"one": 0, "checks": by_checks, "clap": best([one.grade for one in group])}
    found = {way: float(group[place].right[key]) for way, place in places.items()}
    return {**found, "any": max(float(one.right[key]) for one in group)}


def candidates(
    pipeline: BasePipeline[Any], judge: Judge, prompt: JudgedPrompt, sampling: Sampling, seeds: range
) -> list[Candidate]:
    """Make the sounds of a prompt in one batch, and judge them."""
    items = tuple(Item(prompt=prompt.caption, seconds=prompt.seconds, seed=seed) for seed in seeds)
    made = pipeline.generate(Request(items=items, sampling=sampling))
    cosines = pipeline.clap_cosines(made)
    verdicts = [right(prompt, judge.check(audio, prompt)) for audio in made.audio]
    grades = [replace(grade(made, number), clap=cosine) for number, cosine in enumerate(cosines)]
    return [Candidate(grade=one, right=found) for one, found in zip(grades, verdicts, strict=True)]


def table(groups: Sequence[tuple[str, Sequence[Candidate]]], key: str) -> dict[str, Any]:
    """Return shares of right sounds by way, and paired differences with their intervals, over (prompt, candidates)."""
    asked = [(prompt, chosen(group, key)) for prompt, group in groups if key in group[0].right]
    prompts = [prompt for prompt, _ in asked]
    values = {way: [found[way] for _, found in asked] for way in WAYS}
    return {
        "groups": len(asked),
        "shares": {way: float(np.mean(values[way])) for way in WAYS},
        "differences": {
            f"{first} - {second}": asdict(paired_difference(values[first], values[second], prompts))
            for first, second in PAIRS
        },
    }


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
@click.option("--of", "count", type=click.IntRange(2), default=4, show_default=True, help="Sounds to choose from.")
@click.option("--groups", type=click.IntRange(1), default=4, show_default=True, help="Of so many sounds, a prompt.")
@click.option("--data-seed", type=int, default=0, show_default=True, help="Seed of `sa3 data render`.")
def best_of(model: str, backend: str, choice: SamplingChoice, count: int, groups: int, data_seed: int) -> None:
    """Measure what choosing the best of several sounds gains, on held-out prompts of the demo sounds.

    MODEL has a latent CLAP, see 'sa3 add-clap'.
    """
    pipeline, judge = open_pipeline(model, backend), Judge()
    sampling = choice.resolved(pipeline.config.usual_sampling)
    found: list[tuple[str, Sequence[Candidate]]] = []
    prompts = held_out_prompts(data_seed)
    for number, prompt in enumerate(tqdm(prompts, desc="best of", unit="prompt", disable=None, delay=1)):
        for group in range(groups):
            first = 10_000 * number + group * count
            seeds = range(first, first + count)
            found.append((prompt.caption, candidates(pipeline, judge, prompt, sampling, seeds)))
    keys = dict.fromkeys(key for _, group in found for key in group[0].right)
    rows = {key: table(found, key) for key in keys}
    for key, row in rows.items():
        shares = "  ".join(f"{way} {share:.1%}" for way, share in row["shares"].items())
        report(f"{key:18} {shares}  ({row['groups']} groups)")
        for name, gap in row["differences"].items():
            report(f"  {name:16} {gap['value']:+.1%} ({gap['low']:+.1%} to {gap['high']:+.1%})")
    settings = {"model": pipeline.config.name, "backend": backend, "of": count, "sampling": sampling.to_dict()}
    report(json.dumps({**settings, "prompts": len(prompts), "measures": rows}))
