"""Measure how near one step comes to what many steps make of the same noise [T5]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.generation.events import Conditioned, Sampled
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Sampling

Array = NDArray[np.float32]
ONE_STEP = Sampling(sampler="euler", steps=1)


def sample(pipeline: BasePipeline[Any], request: Request) -> list[Array]:
    """Return the latents (T, C) of every item's valid frames, without decoding them."""
    valid: tuple[int, ...] = ()
    for event in pipeline.stream(request):
        if isinstance(event, Conditioned):
            valid = event.valid
        if isinstance(event, Sampled):
            return [z[:frames] for z, frames in zip(event.latents, valid, strict=True)]
    raise ValueError("the pipeline ended without latents")


def one_step_error(made: Sequence[Array], wanted: Sequence[Array]) -> float:
    """Return the squared difference of latents (T, C) relative to the variance of the wanted ones about their mean.

    Raises ValueError for other counts, or none.
    """
    if not wanted or len(made) != len(wanted):
        raise ValueError(f"{len(made)} results for {len(wanted)} wanted ones: expected as many, and at least one")
    a, b = np.concatenate(made).astype(np.float64), np.concatenate(wanted).astype(np.float64)
    variance = np.square(b - b.mean(axis=0)).mean()
    return float(np.square(a - b).mean() / max(variance, 1e-12))


def one_steps(pipeline: BasePipeline[Any], batches: Sequence[Sequence[Item]]) -> list[Array]:
    """Return what one Euler step without guidance makes of the noise of every item."""
    return [z for items in batches for z in sample(pipeline, Request(items=tuple(items), sampling=ONE_STEP))]


def many_steps(pipeline: BasePipeline[Any], batches: Sequence[Sequence[Item]], sampling: Sampling) -> list[Array]:
    """Return what ``sampling`` makes of the same noise."""
    return [z for items in batches for z in sample(pipeline, Request(items=tuple(items), sampling=sampling))]
