"""Estimate how long a run takes where MLX has no fast matrix products, to say it before the work."""

from __future__ import annotations

from collections.abc import Sequence

from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.memory.prediction import part_bytes
from sa3_mlx.common.model.config import ModelConfig

from . import backend

# fp32 operations a second with the reference BLAS of MLX's Linux wheel [P5.1]; in whole runs of the demo 2e9 to 3.4e9
RATE = 3e9
_EVALUATIONS = {"rk4": 4}  # of the network in a step, where it is not one


def slow_note(requests: Sequence[Request], config: ModelConfig) -> str | None:
    """Say about how long MLX takes for these requests and what makes it fast; None where it is fast."""
    from sa3_mlx.runtime import status

    if status().fast:
        return None
    seconds = sum(operations(request, config) for request in requests) / RATE
    other = "--backend torch" if backend.available("torch") else "pip install 'sa3[torch]'"
    return f"note: this takes about {duration_text(seconds)}: {status().message}, or {other}"


def operations(request: Request, config: ModelConfig) -> float:
    """Return the operations of the DiT and of the autoencoder in fp32: two for every weight and token."""
    settled, same = plan(request, config), config.same
    dit, clips = config.require_diffusion().dit, len(request.items)
    passes = settled.sampling.steps * _EVALUATIONS.get(settled.sampling.sampler, 1)
    passes *= 1 if settled.sampling.guidance.scale == 1 else 2
    coded = {"same.decoder": clips, "same.encoder": (request.init is not None) + (request.inpaint is not None)}
    products = passes * clips * (settled.frames + dit.memory_tokens) * part_bytes(config, "dit", 1)
    for part, times in coded.items():
        products += times * settled.frames * (same.stride + 1) * part_bytes(config, part, 1)
    return 2.0 * products


def duration_text(seconds: float) -> str:
    """Return seconds, minutes or hours in round numbers."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds, -1) if seconds >= 20 else round(seconds)):.0f} s"
