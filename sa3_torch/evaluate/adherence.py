"""Measure whether a demo model makes what the prompt says, by the judge, on held-out prompts and several seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.judge.judge import Judge

from .prompts import JudgedPrompt, held_out_prompts, sounds


def measure(
    pipeline: BasePipeline[Any],
    *,
    data_seed: int,
    seeds: int,
    sampling: Sampling,
    progress: Callable[[list[JudgedPrompt]], Iterable[JudgedPrompt]] = iter,
) -> dict[str, Any]:
    """Return the judge's shares over all held-out prompts of the demo sounds and seeds (see ``judge.shares``).

    ``progress`` goes through the prompts, with a bar for example.
    """
    prompts = held_out_prompts(data_seed)
    pairs = list(sounds(pipeline, prompts, sampling=sampling, seeds=seeds, progress=progress))
    settings = {"prompts": len(prompts), "seeds": seeds, "sampling": sampling.to_dict()}
    return {**settings, **Judge().evaluate(pairs)}
