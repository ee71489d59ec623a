"""Keep models loaded, within a limit of memory, until nobody has used them for a while."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

from sa3_mlx.cli import backend
from sa3_mlx.cli.options.model import MemoryOptions
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.run import Setup, Task, load, plan
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.memory.prediction import size_text

_QUIET = Progress(quiet=True)


@dataclass
class Loaded:
    """Hold an open pipeline."""

    pipeline: BasePipeline[Any]
    adapters: tuple[tuple[Any, ...], ...]  # that are on
    peak: int  # bytes that its run needs at most, its weights among them
    used: float  # when, monotonic seconds


class Models:
    """Open pipelines and hand them out. Only the thread that computes may use it: arrays of MLX belong to a thread."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._loaded: dict[Hashable, Loaded] = {}

    @property
    def names(self) -> list[str]:
        """Return the names of the models that are open."""
        return [str(key[0]) for key in list(self._loaded) if isinstance(key, tuple)]

    def ready(self, task: Task) -> tuple[Setup, BasePipeline[Any]]:
        """Return how a task runs and the pipeline for it; others are closed, longest unused first, to make room.

        Raises ValueError where it does not fit even by itself.
        """
        setup = self._plan(task)
        options, precision = task.options, setup.memory.precision
        key = (task.model.tag, str(task.model.folder), setup.model_hash, setup.backend, options.device, precision)
        wanted = tuple((file.path, file.path.stat().st_mtime_ns, file.strength, file.interval) for file in options.lora)
        found = self._loaded.get(key)
        if found is None:
            pipeline = load(task, setup)
        else:
            pipeline = found.pipeline
            if found.adapters != wanted:
                pipeline.change_adapters(setup.adapters)
            backend.hold_memory(setup.backend, options.device, setup.memory, self._limit)
        peak = setup.memory.peak if found is None else max(found.peak, setup.memory.peak)
        self._loaded[key] = Loaded(pipeline=pipeline, adapters=wanted, peak=peak, used=time.monotonic())
        return setup, pipeline

    def _plan(self, task: Task) -> Setup:
        while True:
            others = {key: entry for key, entry in self._loaded.items() if key[0] != task.model.tag}  # type: ignore[index]
            room = None if self._limit is None else self._limit - sum(entry.peak for entry in others.values())
            try:
                if room is not None and room <= 0:
                    raise ValueError(f"memory: {size_text(self._limit or 0)} are in use")
                found = plan(replace(task, memory=MemoryOptions(max_memory=room)), _QUIET)
                if found.memory.residency == "run" or not others:
                    return found
            except ValueError:
                if not others or self._limit is None:
                    raise
            self._close(min(others, key=lambda key: others[key].used))

    def free_idle(self, seconds: float) -> None:
        """Close what nobody has used for so long."""
        for key in [key for key, entry in self._loaded.items() if time.monotonic() - entry.used >= seconds]:
            self._close(key)

    def next_idle(self, seconds: float) -> float | None:
        """Return in how many seconds ``free_idle`` has something to close; None where nothing is open."""
        used = [entry.used for entry in self._loaded.values()]
        return max(0.0, min(used) + seconds - time.monotonic()) if used else None

    def free_all(self) -> None:
        """Close all."""
        for key in list(self._loaded):
            self._close(key)

    def _close(self, key: Hashable) -> None:
        pipeline = self._loaded.pop(key).pipeline
        pipeline.free(*pipeline.loaded)
