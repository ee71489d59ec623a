"""Does a demo model make what the prompt says? Held-out prompts, several seeds, scored by the judge."""

from __future__ import annotations

from typing import Any

from .judge.judge import Judge
from .prompts import Generates, held_out_prompts, sounds


def measure(
    pipeline: Generates, *, data_seed: int, seeds: int, steps: int, sampler: str, guidance: float
) -> dict[str, Any]:
    """The judge's shares over all held-out prompts of the demo sounds and seeds (see ``judge.shares``)."""
    prompts = held_out_prompts(data_seed)
    pairs = list(sounds(pipeline, prompts, seeds=seeds, steps=steps, sampler=sampler, guidance=guidance))
    settings = {"prompts": len(prompts), "seeds": seeds, "steps": steps, "sampler": sampler, "guidance": guidance}
    return {**settings, **Judge().evaluate(pairs)}
