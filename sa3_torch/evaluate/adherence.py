"""Measure whether a demo model makes what the prompt says, by the judge, on held-out prompts and several seeds."""

from __future__ import annotations

from typing import Any

from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.judge.judge import Judge

from .prompts import held_out_prompts, sounds


def measure(pipeline: BasePipeline[Any], *, data_seed: int, seeds: int, sampling: Sampling) -> dict[str, Any]:
    """Return the judge's shares over all held-out prompts of the demo sounds and seeds (see ``judge.shares``)."""
    prompts = held_out_prompts(data_seed)
    pairs = list(sounds(pipeline, prompts, sampling=sampling, seeds=seeds))
    settings = {"prompts": len(prompts), "seeds": seeds, "sampling": sampling.to_dict()}
    return {**settings, **Judge().evaluate(pairs)}
