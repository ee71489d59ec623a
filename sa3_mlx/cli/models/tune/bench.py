"""Do the work that ``sa3 tune`` times, through a pipeline as a user has it: ``PipelineBench``.

Some settings need a process of their own: ``FreshBench`` starts ``python -m sa3_mlx.cli.models.tune.bench JSON`` for
every call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.cli import backend
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.events import Conditioned, Latents, Sampled
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.lengths import samples_to_frames, seconds_to_samples
from sa3_mlx.common.schema import Config
from sa3_mlx.common.terminal import show
from sa3_mlx.common.tuning.choice import Twin, Work

_PROMPT = "a slow warm piano in a large hall"
_RUN = 0.3  # seconds that a timed run of one work should take at least
_CHECKED_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Subject(Config):
    """Say what is tuned."""

    twin: Twin
    device: str  # as it was asked for
    folder: str
    seconds: float  # of the clip

    def open(self) -> BasePipeline[Any]:
        """Open the pipeline, in the usual ways."""
        pipeline = backend.load(Path(self.folder), self.twin, device=self.device)
        pipeline.ways = {}
        return pipeline


class PipelineBench:
    """Sample, decode and encode a clip of one prompt in this process."""

    def __init__(self, subject: Subject, clock: Callable[[], float] = time.perf_counter) -> None:
        self.subject, self._clock = subject, clock
        self.pipeline = subject.open()
        config = self.pipeline.config
        generates = config.diffusion is not None
        self.dtypes: dict[Work, str] = {"step": self.pipeline.precision.dtype} if generates else {}
        self.dtypes |= {"decode": "float32", "encode": "float32"}
        self.timed: tuple[Work, ...] = ("step", "decode") if generates else ("decode", "encode")
        samples = seconds_to_samples(subject.seconds, config.sample_rate)
        rng = np.random.default_rng(0)
        shape = (samples_to_frames(samples, config.same), config.same.latent_channels)
        self._latents: Latents = rng.standard_normal(shape, np.float32)
        self._audio: Audio = 0.1 * rng.standard_normal((samples, config.audio_channels), np.float32)
        self._repeats: dict[Work, int] = {}

    def results(self, works: Sequence[Work]) -> list[NDArray[np.float32]]:
        """Return latents after two steps, decoded audio, encoded latents."""
        return [self._run(work, _CHECKED_STEPS)[0] for work in works]

    def seconds(self, works: Sequence[Work]) -> float:
        """Return the seconds that a clip takes: all steps, or all of its frames."""
        return sum(self._seconds(work) for work in works)

    def fresh(self, ways: Mapping[str, str], environment: Mapping[str, str]) -> FreshBench:
        """Return a bench that does the same in processes of its own."""
        return FreshBench(ways=dict(ways), environment=dict(environment), like=self)

    def _seconds(self, work: Work) -> float:
        """Time as many steps as take long enough, or as many repeats."""
        usual = self.pipeline.config.usual_sampling.steps if work == "step" else 1
        if work not in self._repeats:
            self._run(work, _CHECKED_STEPS)
            took = self._run(work, _CHECKED_STEPS)[1] / (_CHECKED_STEPS if work == "step" else 1)
            most = usual if work == "step" else 20
            self._repeats[work] = int(np.clip(np.ceil(_RUN / max(took, 1e-6)), min(_CHECKED_STEPS, most), most))
        count = self._repeats[work]
        if work == "step":
            return self._run(work, count)[1] * usual / count
        return sum(self._run(work, 1)[1] for _ in range(count)) / count

    def _run(self, work: Work, steps: int) -> tuple[NDArray[np.float32], float]:
        """Do one work once; return its result and the seconds that it took."""
        if work == "step":
            return self._sample(steps)
        start = self._clock()
        result = self.pipeline.decode(self._latents) if work == "decode" else self.pipeline.encode(self._audio)
        return result, self._clock() - start

    def _sample(self, steps: int) -> tuple[Latents, float]:
        item = Item(prompt=_PROMPT, seconds=self.subject.seconds, seed=0)
        sampling = replace(self.pipeline.config.usual_sampling, steps=steps)
        events = self.pipeline.stream(Request(items=(item,), sampling=sampling))
        assert isinstance(next(events), Conditioned)
        start = self._clock()
        sampled = next(event for event in events if isinstance(event, Sampled))
        return sampled.latents, self._clock() - start


@dataclass(frozen=True, kw_only=True)
class FreshBench:
    """Start a process for every call, with other variables in its environment."""

    ways: dict[str, str]
    environment: dict[str, str]
    like: PipelineBench

    @property
    def dtypes(self) -> Mapping[Work, str]:
        """Return those of the bench in this process."""
        return self.like.dtypes

    @property
    def timed(self) -> Sequence[Work]:
        """Return those of the bench in this process."""
        return self.like.timed

    def results(self, works: Sequence[Work]) -> list[NDArray[np.float32]]:
        """Return what ``PipelineBench.results`` does there."""
        with tempfile.TemporaryDirectory() as folder:
            self._start(_Order(subject=self.like.subject, ways=self.ways, works=tuple(works), results=folder))
            return [np.load(Path(folder) / f"{work}.npy") for work in works]

    def seconds(self, works: Sequence[Work]) -> float:
        """Return what a warm run takes there."""
        return float(self._start(_Order(subject=self.like.subject, ways=self.ways, works=tuple(works), results=None)))

    def fresh(self, ways: Mapping[str, str], environment: Mapping[str, str]) -> FreshBench:
        """Return such a bench with other ways and variables."""
        return replace(self, ways=dict(ways), environment=dict(environment))

    def _start(self, order: _Order) -> str:
        pipeline = self.like.pipeline
        pipeline.free(*pipeline.loaded)  # no two models in memory
        command = [sys.executable, "-m", __spec__.name, json.dumps(order.to_dict())]
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["the process failed"])[-1])
        return (done.stdout.strip().splitlines() or [""])[-1]


@dataclass(frozen=True, kw_only=True)
class _Order(Config):
    """Say what a process of its own does: write results to a folder, or print seconds."""

    subject: Subject
    ways: dict[str, str]
    works: tuple[Work, ...]
    results: str | None

    @cached_property
    def bench(self) -> PipelineBench:
        """Open the pipeline."""
        return PipelineBench(self.subject)

    def carry_out(self) -> str:
        """Do it, and return what to print."""
        with backend.choices(self.subject.twin).using(self.ways):
            if self.results is not None:
                for work, values in zip(self.works, self.bench.results(self.works), strict=True):
                    np.save(Path(self.results) / f"{work}.npy", values)
                return ""
            self.bench.seconds(self.works)
            return repr(self.bench.seconds(self.works))


if __name__ == "__main__":
    show(_Order.from_dict(json.loads(sys.argv[1])).carry_out())
