"""Visit the states of a run: every evaluation of the DiT, with what it was given and what it said.

Shapes: B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np

from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.generation.events import host_noise
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Request
from sa3_mlx.runtime import mx

from .dit import DiT, Prepared
from .guidance import guide
from .pipeline import Pipeline
from .samplers import SAMPLERS


@dataclass(frozen=True, kw_only=True)
class State:
    """Describe one evaluation. With guidance a step has two; the second is the unconditional or negative one."""

    index: int  # of the step
    x: mx.array  # (B, T, C)
    t: np.ndarray  # (B,)
    cond: Conditioning[mx.array]
    velocity: mx.array  # (B, T, C)
    end: mx.array | None  # (B, T, C) latents that the run came to; None with guidance, where both halves lead there


def visit(pipeline: Pipeline, request: Request) -> Iterator[State]:
    """Sample a request to its end, without decoding it, and yield every evaluation of the DiT.

    Raises ValueError for guidance in part of the times only, which would leave evaluations unused.
    """
    planned = plan(request, pipeline.config)
    guidance = planned.sampling.guidance
    if guidance.interval != (0.0, 1.0):
        raise ValueError(f"guidance interval is {guidance.interval}: states are visited with guidance throughout")
    noise = host_noise(request, planned)
    cond, null = pipeline.encode_texts(request, planned)
    init, inpaint = pipeline.encode_sources(request, planned)
    local = pipeline.local_input(planned, inpaint)
    conds = [replace(given, local=local) for given in (cond, null) if given is not None]
    dit = cast(DiT, pipeline.load_part("dit"))
    pairs: list[tuple[Conditioning[mx.array], Prepared]] = [(given, dit.prepare(given)) for given in conds]
    seen: list[tuple[Conditioning[mx.array], mx.array, np.ndarray, mx.array]] = []

    def velocity(x: mx.array, t: np.ndarray) -> mx.array:
        outs = [dit(x.astype(local.dtype), t, prepared).astype(mx.float32) for _, prepared in pairs]
        mx.eval(outs)
        seen.extend((given, x, t, out) for given, out in zip(conds, outs, strict=True))
        return outs[0] if len(outs) == 1 else guide(x, t, outs[0], outs[1], guidance, cond.valid)

    start, draw = pipeline.start(planned, noise, init), partial(pipeline.draw, planned, noise)
    steps = SAMPLERS[planned.sampling.sampler](velocity, start, planned.sigmas, draw)
    visited: list[tuple[int, Conditioning[mx.array], mx.array, np.ndarray, mx.array]] = []
    for last in steps:
        mx.eval(last.x)
        visited.extend((last.index, *evaluation) for evaluation in seen)
        seen.clear()
    end = last.x if null is None else None
    for index, given, x, t, out in visited:
        yield State(index=index, x=x, t=t, cond=given, velocity=out, end=end)
