"""Generate in a process of its own and report: ``python -m benchmarks.speed.worker JSON``, started by ``latency``.

A process of its own makes a cold start cold, and its memory its own. It prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sa3_mlx.common.generation.events import AudioChunk, Conditioned, Finished, Generation, Sampled
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import Config

BORN = time.time()
USUAL = "usual"  # ways of a run where nothing was tuned


@dataclass(frozen=True, kw_only=True)
class Work(Config):
    """Say what to do. ``spawned`` are seconds since the epoch at which the parent started this process."""

    backend: str
    device: str  # torch only
    folder: str
    dtype: str
    text_dtype: str
    compiled: bool  # torch only
    tuned: bool  # go the ways that `sa3 tune` found in this home
    prompt: str
    seconds: float
    sampling: Sampling
    warmups: int
    repeats: int
    minutes: float  # repeat at least so long
    write: bool  # also write each result to a file, as the command does
    spawned: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Hold the seconds of one generation by stage; ``total`` is from the request to the last sample in memory."""

    total: float
    cpu: float  # seconds of work of all cores, which other programs do not change much
    text: float
    sample: float
    decode: float
    first_sound: float
    begun: float  # since the first generation of the process began


def main() -> None:
    """Do the work of the command line and print what it took."""
    print(json.dumps(work(Work.from_dict(json.loads(sys.argv[1])))), flush=True)


def work(work: Work) -> dict[str, Any]:
    """Generate ``warmups`` + ``repeats`` times; return timings of the repeats and the peak of memory."""
    from .energy import EnergyMeter

    pipeline, finish, memory = _open(work)
    if not work.tuned:
        pipeline.ways = {}
    opened = time.time()
    request = Request(items=(Item(prompt=work.prompt, seconds=work.seconds, seed=0),), sampling=work.sampling)
    begin = time.perf_counter()
    for _ in range(work.warmups):
        _generate(pipeline, request, finish, begin)
    memory.reset()
    timings: list[Timing] = []
    with EnergyMeter(on_cuda=memory.name == "torch cuda") as meter:
        while len(timings) < work.repeats or timings[-1].begun + timings[-1].total < 60 * work.minutes:
            timing, generation = _generate(pipeline, request, finish, begin)
            timings.append(timing)
    if work.write:
        from sa3_mlx.common.files.audio import write_audio

        with tempfile.TemporaryDirectory() as folder:
            write_audio(Path(folder) / "out.wav", generation.audio[0], generation.sample_rate)
    done = time.time()
    energy = (
        None if meter.energy is None else {**asdict(meter.energy), "joules_each": meter.energy.joules / len(timings)}
    )
    return {
        "interpreter": BORN - work.spawned,
        "load": opened - BORN,
        "wall": done - work.spawned,
        "timings": [asdict(timing) for timing in timings],
        "steps": work.sampling.steps,
        "sampler": work.sampling.sampler,
        "guidance": work.sampling.guidance.scale,
        "frames": len(generation.latents[0]),
        "peak_memory_bytes": memory.peak(),
        "memory_counter": memory.name,
        "peak_rss_bytes": _peak_rss(),
        "finite": bool(all(abs(audio).max() < float("inf") for audio in generation.audio)),
        "energy": energy,
        "device": memory.device,
        "dtype": pipeline.precision.dtype,
        "text_dtype": pipeline.precision.text_dtype or "file",
        "ways": ", ".join(f"{place} {way}" for place, way in pipeline.ways.items()) or USUAL,
    }


@dataclass(frozen=True, kw_only=True)
class MemoryCounter:
    """Read the framework's own counter of its peak, where it has one."""

    name: str | None
    device: str
    reset: Callable[[], None]
    peak: Callable[[], int | None]


def _open(work: Work) -> tuple[BasePipeline[Any], Callable[[Any], None], MemoryCounter]:
    """Return the pipeline, a function that waits for an array, and the memory counter."""
    if work.backend == "mlx":
        from sa3_mlx.pipeline import Pipeline
        from sa3_mlx.runtime import mx

        pipeline = Pipeline.load(work.folder, dtype=work.dtype, text_dtype=work.text_dtype)
        memory = MemoryCounter(
            name="mlx", device=mx.default_device().type.name, reset=mx.reset_peak_memory, peak=mx.get_peak_memory
        )
        return pipeline, lambda array: mx.eval(array), memory
    return _open_torch(work)


def _open_torch(work: Work) -> tuple[BasePipeline[Any], Callable[[Any], None], MemoryCounter]:
    import torch

    from sa3_torch.choices import use
    from sa3_torch.pipeline import Pipeline, choose_device

    for place in ("compiled_step", "compiled_decoder"):
        use(place, "compiled" if work.compiled else "plain")
    use("graphs", "captured" if work.compiled else "plain")
    device = choose_device(work.device)
    pipeline = Pipeline.load(work.folder, dtype=work.dtype, text_dtype=work.text_dtype, device=work.device)
    if device.type == "cuda":
        return (
            pipeline,
            lambda _: torch.cuda.synchronize(),
            MemoryCounter(
                name="torch cuda",
                device=torch.cuda.get_device_name(),
                reset=torch.cuda.reset_peak_memory_stats,
                peak=torch.cuda.max_memory_allocated,
            ),
        )
    wait = torch.mps.synchronize if device.type == "mps" else _nothing
    return pipeline, lambda _: wait(), MemoryCounter(name=None, device=device.type, reset=_nothing, peak=_nothing)


def _nothing() -> None:
    return None


def _generate(
    pipeline: BasePipeline[Any], request: Request, finish: Callable[[Any], None], begin: float
) -> tuple[Timing, Generation]:
    """Time one generation; the device is waited for only between stages, so that steps may overlap."""
    start, worked = time.perf_counter(), time.process_time()
    marks: dict[str, float] = {}
    for event in pipeline.stream(request):
        if isinstance(event, Conditioned):
            finish(())
            marks["text"] = time.perf_counter() - start
        elif isinstance(event, Sampled):
            finish(())
            marks["sample"] = time.perf_counter() - start
        elif isinstance(event, AudioChunk):
            marks.setdefault("first", time.perf_counter() - start)
        elif isinstance(event, Finished):
            total, generation = time.perf_counter() - start, event.generation
    timing = Timing(
        total=total,
        cpu=time.process_time() - worked,
        text=marks["text"],
        sample=marks["sample"] - marks["text"],
        decode=total - marks["sample"],
        first_sound=marks["first"],
        begun=start - begin,
    )
    return timing, generation


def _peak_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
