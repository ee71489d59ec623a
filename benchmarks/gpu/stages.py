"""Take steps of every stage of training on one GPU: presets at their sizes, random weights, made data.

What a step takes there is compared with what its plan says; plans are counted by processes of their own meanwhile.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from benchmarks.speed.full_scale import FULL_SCALE, FullScale, RandomValues, built, settings_of
from benchmarks.speed.plans import plan_of
from benchmarks.speed.train_step import parts_of, seconds_of, variants
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_torch.train.autoencoder.stage import AutoencoderConfig, AutoencoderStage
from sa3_torch.train.run.logs import RunLog
from sa3_torch.train.run.loop import Trainer
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.planning.plan import LATE
from sa3_torch.train.run.stage import Stage, StageConfig

from .journal import Row, Workbench

# What matters most comes first: a run that is cut keeps what it has. The other presets follow.
ORDER = (
    *("pretrain medium", "autoencoder same-l", "posttrain medium", "ode-warmup medium", "lora released", "clap full"),
    *("distill-autoencoder same-s", "quantize medium"),
)
BY_PART = "autoencoder same-l"
MICRO_BATCHES = 2  # of a step at most: more of them repeat what two show
ENOUGH = 3.0  # seconds of timed steps
COUNTING = 4  # processes that count plans
# Presets of stages in short; of the others "first".
SHORT_PRESETS = {"autoencoder": "tiny", "distill-autoencoder": "tiny", "lora": "demo", "quantize": "demo"}
_GAME = (
    *("crop_samples=8192", "spectral_start=0.0", "spectral_full=0.0", "spectral.sizes=[128, 512]"),
    *("adversarial.start_step=0", "adversarial.discriminators.convolutional.width=4"),
    "adversarial.discriminators.transformer.depth=1",
    "adversarial.discriminators.transformer.views=[{kind='patch', size=97, stride=16, window=2}]",
)
SHORT_CHANGES = {
    "autoencoder": (*_GAME, "semantics.critic.max_rows=6", "semantics.critic.depth=1", "semantics.alignment.depth=1"),
    "distill-autoencoder": _GAME,
    "ode-warmup": ("teacher.sampling.steps=3",),
    "posttrain": ("taps=[0]", "head.width=16"),
    "quantize": ("rounds=1",),
}


@dataclass(frozen=True, kw_only=True)
class OneGpu:
    """Say how one GPU runs a preset: as the first of its processes, with micro-batches ``less`` times as small.

    ``model`` stands for the preset's.
    """

    case: FullScale
    changes: tuple[str, ...]
    model: ModelConfig | None
    micro_batch: int
    micro_batches: int
    of_preset: tuple[int, int]  # both of these, in the preset

    @classmethod
    def of(cls, case: FullScale, bench: Workbench, less: int) -> OneGpu | None:
        """Return None where there is less than an item."""
        if bench.short:
            case = replace(case, preset=SHORT_PRESETS.get(case.stage, "first"))
        config = settings_of(case)
        processes = config.machine.processes if config.machine else 1
        own = 2 * config.train.accumulate if bench.short else config.train.batch // processes
        micro, count = own // config.train.accumulate, min(config.train.accumulate, MICRO_BATCHES)
        if micro < less:
            return None
        short = ("train.precision='fp32'", *SHORT_CHANGES.get(case.stage, ())) if bench.short else ()
        own_batch = (f"train.batch={micro // less * count}", f"train.accumulate={count}", "train.compile=false")
        return cls(
            case=case,
            changes=(*short, *own_batch),
            model=_tiny() if bench.short else None,
            micro_batch=micro // less,
            micro_batches=count,
            of_preset=(micro, config.train.accumulate),
        )

    def about(self) -> Row:
        """Return what a row begins with."""
        micro, count = self.of_preset
        return {
            "stage": self.case.name,
            "micro_batch": self.micro_batch,
            "micro_batches": self.micro_batches,
            "micro_batch_of_preset": micro,
            "micro_batches_of_preset": count,
            "compiled": False,
        }

    def stage(self, folder: Path, bench: Workbench, *changes: str) -> Any:
        """Make it, with random weights on the device, for as long as the context lasts."""
        values = RandomValues(bench.device)
        return built(self.case, folder, *self.changes, *changes, networks=values, model=self.model)


def _tiny() -> ModelConfig:
    """Return the model "first", smaller."""
    first = PRESETS["first"]
    assert first.diffusion is not None
    dit = replace(first.diffusion.dit, width=64, depth=2)
    same = replace(first.same, width=64, encoder_depth=1, decoder_depth=1)
    return replace(first, same=same, diffusion=replace(first.diffusion, dit=dit, max_frames=32))


class _Silent(RunLog):
    """Write nothing."""

    def __init__(self) -> None:
        self._bar = None


class Steps(Trainer):
    """Take steps late in a run, where every term is on; nothing is written but its settings."""

    def __init__(self, stage: Stage, config: StageConfig, folder: Path) -> None:
        super().__init__(stage, config, folder, {})
        stage.precision = "fp32" if config.train.precision == "auto" else config.train.precision
        self.length = math.lcm(len(stage.groups), max(1, stage.period()))  # of a cycle of steps, which repeats
        self.step = int(LATE * config.train.steps) // self.length * self.length
        self.waited = 0.0  # seconds for data
        if stage.feed is not None:
            stage.feed.get = self._watched(stage.feed.get)  # type: ignore[assignment,method-assign]

    def _watched(self, get: Callable[[int, BatchSlice], Any]) -> Callable[[int, BatchSlice], Any]:
        def watched(step: int, part: BatchSlice) -> Any:
            begun = time.perf_counter()
            found = get(step, part)
            self.waited += time.perf_counter() - begun
            return found

        return watched

    def take(self, count: int) -> None:
        """Take so many steps, updates included."""
        for _ in range(count):
            self._train_step(_Silent())
            self.step += 1


def _at_once(run: OneGpu) -> Future[Row]:
    """Count the plan in this process."""
    done: Future[Row] = Future()
    try:
        done.set_result(planned(run))
    except Exception as error:
        done.set_exception(error)
    return done


@torch.enable_grad()
def stages(bench: Workbench) -> Iterator[Row]:
    """Every stage of training: steps with their peak memory, speed and waiting, then what its plan says of them."""
    names = {case.name: case for case in FULL_SCALE}
    rest = () if bench.short else tuple(name for name in names if name not in ORDER)
    pool = None if bench.short else ProcessPoolExecutor(COUNTING, get_context("spawn"))
    plans: list[tuple[Row, Future[Row]]] = []
    try:
        for name in (*ORDER, *rest):
            for run, row in _measured(bench, names[name]):
                yield row
                if "seconds" in row:
                    plans.append((row, _at_once(run) if pool is None else pool.submit(planned, run)))
            if name == BY_PART:
                yield from by_part(bench, names[name])
            while plans and plans[0][1].done():
                yield _beside(*plans.pop(0))
        for row, plan in plans:
            yield _beside(row, plan)
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _measured(bench: Workbench, case: FullScale) -> Iterator[tuple[OneGpu, Row]]:
    """Yield a row for the preset's micro-batch, and for half of it, and so on, until one fits."""
    less = 1
    while (run := OneGpu.of(case, bench, less)) is not None:
        try:
            yield run, {**run.about(), **steps_of(run, bench)}
            return
        except torch.OutOfMemoryError:
            yield run, {**run.about(), "out_of_memory": True}
        except Exception as error:  # whatever breaks on a machine that nobody has seen, the other stages go on
            yield run, {**run.about(), "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            return
        finally:
            _forget(bench)
        less *= 2


def _forget(bench: Workbench) -> None:
    """Give the memory of a GPU back; parts of a stage refer to each other."""
    if bench.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def steps_of(run: OneGpu, bench: Workbench) -> Row:
    """Return what steps take: seconds, peak bytes, shares of the time in which data and the GPU are waited for."""
    with TemporaryDirectory(dir=bench.folder) as folder, run.stage(Path(folder), bench) as stage:
        steps = Steps(stage, stage.config, Path(folder) / "run")
        if stage.feed is not None:
            stage.feed.start(steps.slices)
        try:
            steps.take(steps.length)  # warms up
            return _timed(steps, bench)
        finally:
            if stage.feed is not None:
                stage.feed.stop()


def _timed(steps: Steps, bench: Workbench) -> Row:
    gpu = bench.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    bench.sync()
    begun, steps.waited, taken, seconds = time.perf_counter(), 0.0, 0, 0.0
    while not taken or (seconds < ENOUGH and not bench.short):
        steps.take(steps.length)
        bench.sync()
        taken, seconds = taken + steps.length, time.perf_counter() - begun
    row: Row = {
        "seconds": seconds / taken,
        "steps_per_second": taken / seconds,
        "items_per_second": taken * steps.config.batch / seconds,
        "data_waits": steps.waited / seconds,
        "not_finite": sum(steps.bad_steps.values()),
    }
    if not gpu:
        return row
    row |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    walls: list[float] = []

    def step() -> None:
        begun = time.perf_counter()
        steps.take(1)
        bench.sync()
        walls.append(1e3 * (time.perf_counter() - begun))

    busy = bench.busy(step)
    assert busy is not None
    return {**row, "gpu_waits": max(0.0, 1 - busy / walls[-1])}


def planned(run: OneGpu) -> Row:
    """Return what the plan of the same steps says."""
    plan = plan_of(run.case, *run.changes, processes=1, model=run.model)
    return {"planned_bytes": plan.memory.peak, "tflop": plan.flops / 1e12, "planned_seconds": plan.seconds}


def _beside(row: Row, plan: Future[Row]) -> Row:
    """Return a row that compares both."""
    found: Row = {"stage": row["stage"], "micro_batch": row["micro_batch"]}
    if (error := plan.exception()) is not None:
        return {**found, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    found |= plan.result()
    if "peak_bytes" in row:
        found |= {"peak_to_plan": row["peak_bytes"] / found["planned_bytes"]}
    return {
        **found,
        "tflops": found["tflop"] / row["seconds"],
        "seconds_to_plan": row["seconds"] / found["planned_seconds"],
    }


def by_part(bench: Workbench, case: FullScale) -> Iterator[Row]:
    """Steps of the autoencoder with more and more terms, then what each part costs."""
    run = OneGpu.of(case, bench, 1)
    assert run is not None
    totals: dict[str, float] = {}
    for variant in variants(cast(AutoencoderConfig, settings_of(run.case, *run.changes))):
        with TemporaryDirectory(dir=bench.folder) as folder, run.stage(Path(folder), bench, *variant.changes) as stage:
            stage.precision = stage.config.train.precision
            took = bench.timed(partial(seconds_of, cast(AutoencoderStage, stage), variant.step))
        totals[variant.name] = took["ms"]
        yield {"stage": run.case.name, "up_to": variant.name, **took}
        _forget(bench)
    yield {"stage": run.case.name, "parts_ms": parts_of(totals)}
