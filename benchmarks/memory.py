"""Peak memory of the phases of a run by MLX's own counter, beside what ``spec/memory.py`` predicts."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from sa3_mlx import blas  # noqa: F401 (before mlx)

# isort: split
import mlx.core as mx

from sa3_mlx.pipeline import Pipeline
from sa3_mlx.spec.events import Conditioned, Finished, Sampled, Stepped
from sa3_mlx.spec.memory import MemoryPlan
from sa3_mlx.spec.request import Request, Residency


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
    return Peaks(
        before=max(phases["text"], phases.get("encode", 0)), sample=phases["sample"], decode=phases["decode"]
    )  # fmt: skip
