"""Peak memory of the phases of a run by MLX's own counter, beside what the plan predicts."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from sa3_mlx.common.generation.events import Conditioned, Finished, Sampled, Stepped
from sa3_mlx.common.generation.memory import MemoryPlan
from sa3_mlx.common.generation.request import Request, Residency
from sa3_mlx.pipeline import Pipeline
from sa3_mlx.runtime import mx


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes; ``before`` sampling: text and, with given audio, encoding."""

    before: int
    sample: int
    decode: int


def measured(pipeline: Pipeline, request: Request, *, residency: Residency) -> Peaks:
    """Of one run that begins with no part in memory."""
    pipeline.free(*pipeline.loaded)
    gc.collect()
    other, peaks = mx.get_active_memory(), []  # what earlier work left
    mx.reset_peak_memory()
    for event in pipeline.stream(request, residency=residency):
        if isinstance(event, Stepped):
            mx.eval(event.denoised)
        if isinstance(event, Conditioned | Sampled | Finished):
            peaks.append(mx.get_peak_memory() - other)
            mx.reset_peak_memory()
    return Peaks(before=peaks[0], sample=peaks[1], decode=peaks[2])


def predicted(plan: MemoryPlan) -> Peaks:
    phases = {phase.name: phase.peak for phase in plan.phases}
    return Peaks(before=max(phases["text"], phases.get("encode", 0)), sample=phases["sample"], decode=phases["decode"])
