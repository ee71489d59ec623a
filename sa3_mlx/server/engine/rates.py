"""Learn how long work takes, and say how long other work of its kind is going to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sa3_mlx.common.generation.long.between import between
from sa3_mlx.common.generation.long.windows import layout
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.model.config import ModelConfig

_NEW_SHARE = 0.3  # of the latest measurement in a rate


@dataclass(frozen=True, kw_only=True)
class JobSize:
    """Count the work of a request: network passes times latent frames of all clips, and frames that are coded."""

    sampled: float
    coded: float
    steps: int

    @classmethod
    def of(cls, request: Request, config: ModelConfig) -> JobSize:
        """Count a request that can be done."""
        sampling = request.sampling or config.usual_sampling
        passes = sampling.steps * (1 if sampling.guidance.scale == 1 else 2)
        if request.long is not None:
            parts = layout(request, config) if request.inpaint is None else between(request, config).layout(config)
            made = sum(window.frames for window in parts.windows)
            return cls(sampled=passes * made, coded=parts.frames, steps=len(parts.windows) * sampling.steps)
        settled, clips = plan(request, config), len(request.items)
        given = (request.init is not None) + (request.inpaint is not None)
        runs = 2 if request.loop is not None and request.loop.way == "seam" else 1  # the joint has one of its own
        frames, given = runs * clips * settled.frames, given + runs - 1
        return cls(sampled=passes * frames, coded=(1 + given) * frames, steps=runs * sampling.steps)


class Rates:
    """Hold seconds per unit of work, by model: a moving average, stored between runs of a server."""

    def __init__(self, known: Mapping[str, float], store: Callable[[dict[str, float]], None]) -> None:
        self._seconds = dict(known)
        self._store = store

    def learn(self, model: str, work: JobSize, timings: Mapping[str, float]) -> None:
        """Take the seconds that a run took, by stage."""
        rest = sum(timings.get(stage, 0.0) for stage in ("text", "encode", "decode"))
        measured = {f"{model} sampled": timings["sample"] / work.sampled, f"{model} coded": rest / work.coded}
        for name, value in measured.items():
            old = self._seconds.get(name, value)
            self._seconds[name] = old + _NEW_SHARE * (value - old)
        self._store({name: self._seconds[name] for name in measured})

    def seconds(self, model: str, work: JobSize, steps_done: int = 0) -> float | None:
        """Return how long a run is going to take from here on; None where nothing is known of the model."""
        sampled, coded = (self._seconds.get(f"{model} {what}") for what in ("sampled", "coded"))
        if sampled is None or coded is None:
            return None
        return sampled * work.sampled * (1 - steps_done / work.steps) + coded * work.coded
