"""Measure whether sounds of one prompt differ as real ones do [T12.3]."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Hold mean pairwise distances, averaged over the prompts that both sets have at least twice; ``ratio`` of both
    means.

    All are None without such a prompt.
    """

    made: float | None
    real: float | None
    ratio: float | None
    prompts: int


def pairwise_distance(features: NDArray[np.floating]) -> float:
    """Return the mean Euclidean distance over all pairs of (n, D). Raises ValueError for n below 2."""
    x = features.astype(np.float64)
    if len(x) < 2:
        raise ValueError(f"pairwise distance of {len(x)} clip(s): at least 2 are needed")
    rows, columns = np.triu_indices(len(x), 1)
    return float(np.linalg.norm(x[rows] - x[columns], axis=1).mean())


def diversity(
    made: NDArray[np.floating], made_prompts: Sequence[str], real: NDArray[np.floating], real_prompts: Sequence[str]
) -> Diversity:
    """Compare features (n, D) of generated and (m, D) of real clips, with their prompts (or labels)."""
    found = [_by_prompt(made, made_prompts), _by_prompt(real, real_prompts)]
    prompts = sorted(set(found[0]) & set(found[1]))
    if not prompts:
        return Diversity(made=None, real=None, ratio=None, prompts=0)
    ours, theirs = (float(np.mean([values[prompt] for prompt in prompts])) for values in found)
    return Diversity(made=ours, real=theirs, ratio=ours / theirs if theirs > 0 else None, prompts=len(prompts))


def _by_prompt(features: NDArray[np.floating], prompts: Sequence[str]) -> dict[str, float]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows[prompt].append(row)
    return {prompt: pairwise_distance(features[chosen]) for prompt, chosen in rows.items() if len(chosen) > 1}
