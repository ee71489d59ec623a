"""Does a demo model make what the prompt says? Held-out prompts, several seeds, scored by the judge."""

from __future__ import annotations

from typing import Any

from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.judge.judge import Judge

from .prompts import Generates, held_out_prompts, sounds


def measure(pipeline: Generates, *, data_seed: int, seeds: int, sampling: Sampling) -> dict[str, Any]:
    """The judge's shares over all held-out prompts of the demo sounds and seeds (see ``judge.shares``)."""
    prompts = held_out_prompts(data_seed)
    pairs = list(sounds(pipeline, prompts, sampling=sampling, seeds=seeds))
    settings = {"prompts": len(prompts), "seeds": seeds, "sampling": sampling.to_dict()}
    return {**settings, **Judge().evaluate(pairs)}
