"""Carry out one batch of jobs with a loaded model, and tell listeners what happens."""

from __future__ import annotations

import base64
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from sa3_mlx.cli import backend
from sa3_mlx.cli.audio.long import after_beginning, ending, settled
from sa3_mlx.cli.audio.source import SourceFile
from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.latents.files import output_samples, read_latents, write_latents
from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import OutputOptions
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.run import Setup, Task, provenance, stream
from sa3_mlx.common.files.audio import AudioWriter, peak_db, read_audio, write_audio
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.files.spectrogram import envelope
from sa3_mlx.common.files.wav import sample_bytes
from sa3_mlx.common.generation.events import (
    AudioChunk,
    Conditioned,
    Event,
    Finished,
    PieceFinished,
    Stepped,
    WindowMade,
)
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.regions import Seam
from sa3_mlx.common.generation.request import InitAudio, Item, Request
from sa3_mlx.common.installed import Model
from sa3_mlx.common.memory.prediction import predict, size_text
from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.schema import quoted
from sa3_mlx.server.orders import MAKING, Kind
from sa3_mlx.server.settings import Settings
from sa3_mlx.server.store.records import KEPT, SoundRecord
from sa3_mlx.server.store.store import Store, new_id

from .models import Models
from .queue import Job, together
from .rates import JobSize, Rates
from .results import record_of, sound_name, written

Finish = Callable[..., None]
_QUIET = Progress(quiet=True)
_PREVIEW_SHARE = 0.2  # of the time of a run that previews may take
_PREVIEW_COLUMNS = 400


class Stopped(Exception):
    """Report that the server stops, or that nobody wants the result any more."""


class Runs:
    """Carry out batches. One at a time, all in one thread."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        models: Models,
        rates: Rates,
        stopping: threading.Event,
        find: Callable[[str], Model],
    ) -> None:
        self._settings, self._store, self._models = settings, store, models
        self._rates, self._stopping, self._find = rates, stopping, find
        self._task: tuple[Task, Setup] | None = None  # of the latest run
        self._ends: float | None = None  # when this run is expected to end, monotonic seconds
        self._valid: tuple[int, ...] = ()
        self._next_preview = 0.0

    @property
    def remaining(self) -> float | None:
        """Return the seconds that the current run is going to take, None where nothing is known."""
        return None if self._ends is None else round(max(0.0, self._ends - time.monotonic()), 2)

    def run(self, jobs: Sequence[Job], finish: Finish) -> None:
        """Do what the jobs ask for, which all have one ``batch_key``.

        ``finish`` is told of every job that is over. Raises Stopped, and whatever goes wrong.
        """
        self._ends, self._task, self._next_preview = None, None, 0.0
        order = jobs[0].order
        model = self._find(order.model)
        if order.kind in MAKING:
            self._make(jobs, model, finish)
        elif order.kind == "encode":
            self._encode(jobs[0], model, finish)
        else:
            self._decode(jobs[0], model, finish)

    def explain(self, error: Exception) -> str | None:
        """Say what would fit, where the latest run was out of memory; None where it was something else."""
        text = str(error).lower()
        if self._task is None or not (isinstance(error, MemoryError) or "alloc" in text or "out of memory" in text):
            return None
        task, setup = self._task
        return f"out of memory: {_what_fits(setup.requests[0], task.model, setup, self._settings.max_memory)}"

    def _ready(self, model: Model, request: Request, order: Any) -> tuple[Task, Setup, BasePipeline[Any]]:
        own = self._settings.model
        task = Task(
            "generate" if order.kind not in MAKING else order.kind,
            (request,),
            model,
            ModelOptions(
                name=model.name,
                backend=own.backend,
                device=own.device,
                dtype=own.dtype,
                text_dtype=own.text_dtype,
                compiled=own.compiled,
                lora=tuple(choice.file(self._settings.adapters) for choice in order.adapters),
                lora_merged=False,
            ),
            MemoryOptions(max_memory=None),
            OutputOptions(out=None, format=KEPT, peak=None, spectrogram=None, play=False, force=True, quiet=True),
        )
        setup, pipeline = self._models.ready(task)
        self._task = (task, setup)
        return task, setup, pipeline

    def _make(self, jobs: Sequence[Job], model: Model, finish: Finish) -> None:
        source = self._source(jobs[0], model)
        requests = [job.order.read_request(None if source is None else source.audio) for job in jobs]
        wanted = together(requests)
        task, setup, pipeline = self._ready(model, ending(wanted, source, model.config), jobs[0].order)
        task, request, first = replace(task, source=source), setup.requests[0], 0
        if request.long is not None:
            self._make_long(jobs[0], task, setup, settled(wanted, request), pipeline, finish)
            return
        work, places = JobSize.of(request, model.config), dict[str, int]()
        for job, own in zip(jobs, requests, strict=True):
            job.steps = work.steps
            places[job.id] = first
            first += len(own.items)
        owners = [(job, item) for job, own in zip(jobs, requests, strict=True) for item in range(len(own.items))]
        self._expect(model, work, 0)
        live = list(jobs)
        with closing(stream(pipeline, request, setup.memory.residency, _QUIET)) as events:
            for event in events:
                live = self._still_wanted(live, finish)
                self._tell(event, live, owners, pipeline, model, work)
                if isinstance(event, Finished):
                    made = provenance(task, setup, request)
                    self._rates.learn(model.tag, work, event.generation.timings)
                    for job in live:
                        count = job.clips
                        with written(self._store.pool, job, made, event.generation, places[job.id], count) as files:
                            finish(job, "done", sounds=self._store.keep(job.id, files))

    def _make_long(
        self, job: Job, task: Task, setup: Setup, whole: Request, pipeline: BasePipeline[Any], finish: Finish
    ) -> None:
        """Make a long piece: it goes to the disk as it is decoded, so that what is held does not grow with it.

        ``whole`` is what the tags say; what ``setup`` makes may be the end of it, after what a long source has.
        """
        request, model, config, pool = setup.requests[0], task.model, task.model.config, self._store.pool
        made, work = provenance(task, setup, whole), JobSize.of(request, config)
        shape = seconds_to_samples(made.clip.seconds, config.sample_rate), config.audio_channels
        pool.check_room(4 * math.prod(shape))
        job.steps, windows, peak, seams = work.steps, 0, 0.0, tuple[Seam, ...]()
        self._expect(model, work, 0)
        try:
            with pool.new(".wav") as path:
                with (
                    AudioWriter(path, *shape, config.sample_rate, KEPT, comment=made.to_json()) as file,
                    closing(stream(pipeline, request, setup.memory.residency, _QUIET)) as events,
                ):
                    for event in after_beginning(events, task.source, config):
                        if self._stopping.is_set() or job.cancelled.is_set():
                            raise Stopped
                        if isinstance(event, Stepped):
                            self._step([job], model, work, windows * event.steps + event.index + 1)
                        elif isinstance(event, WindowMade):
                            windows = event.index + 1
                        elif isinstance(event, AudioChunk):
                            peak = max(peak, float(np.abs(event.audio).max()))
                            file.write(event.audio)
                            job.feed.append("audio", audio_data(event.audio, 0, event.start, config.sample_rate))
                        elif isinstance(event, PieceFinished):
                            self._rates.learn(model.tag, work, event.timings)
                            seams = event.seams
                level = peak_db(np.array([[peak]], np.float32))
                record = record_of(job, made, shape, level, config.sample_rate, [asdict(seam) for seam in seams])
                finish(job, "done", sounds=self._store.keep(job.id, [(path, record)]))
        except Stopped:
            self._still_wanted([job], finish)  # it is over once nothing is left of its file
            raise

    def _source(self, job: Job, model: Model) -> SourceFile | None:
        """Read what a job starts from. Raises ValueError where it is gone."""
        if job.order.source is None:
            return None
        return read_source(self._store, job.order.kind, job.order.source, model, job.order.request or {})

    def _still_wanted(self, jobs: list[Job], finish: Finish) -> list[Job]:
        """Close cancelled jobs; return the others. Raises Stopped where there is none, or the server stops."""
        if self._stopping.is_set():
            raise Stopped
        for job in jobs:
            if job.cancelled.is_set():
                finish(job, "cancelled")
        left = [job for job in jobs if not job.cancelled.is_set()]
        if not left:
            raise Stopped
        return left

    def _expect(self, model: Model, work: JobSize, steps_done: int) -> None:
        seconds = self._rates.seconds(model.tag, work, steps_done)
        self._ends = None if seconds is None else time.monotonic() + seconds

    def _tell(
        self,
        event: Event,
        jobs: Sequence[Job],
        owners: Sequence[tuple[Job, int]],
        pipeline: BasePipeline[Any],
        model: Model,
        work: JobSize,
    ) -> None:
        if isinstance(event, Conditioned):
            self._valid = event.valid
        elif isinstance(event, Stepped):
            self._step(jobs, model, work, event.index + 1)
            if event.index + 1 < event.steps:
                self._preview(event, jobs, owners, pipeline)
        elif isinstance(event, AudioChunk):
            job, item = owners[event.item]
            if job in jobs:
                job.feed.append("audio", audio_data(event.audio, item, event.start, model.config.sample_rate))

    def _step(self, jobs: Sequence[Job], model: Model, work: JobSize, done: int) -> None:
        """Tell that so many of all steps are done."""
        self._expect(model, work, done)
        for job in jobs:
            job.step = done
            job.feed.append("step", {"step": done, "steps": work.steps, "remaining": self.remaining})

    def _preview(
        self, event: Stepped, jobs: Sequence[Job], owners: Sequence[tuple[Job, int]], pipeline: BasePipeline[Any]
    ) -> None:
        """Show those who look how the sound is going to be, as often as it costs little."""
        if time.monotonic() < self._next_preview:
            return
        began = time.monotonic()
        for row, (job, item) in enumerate(owners):
            if job in jobs and job.feed.watched:
                audio = pipeline.preview(event.denoised, row, self._valid[row])
                job.feed.append("preview", {"item": item, "step": event.index + 1, **peaks(audio, _PREVIEW_COLUMNS)})
        took = time.monotonic() - began
        self._next_preview = time.monotonic() + took / _PREVIEW_SHARE

    def _encode(self, job: Job, model: Model, finish: Finish) -> None:
        sound = self._store.database.sound(job.order.source or "")
        if sound is None:
            raise ValueError("the sound to encode is gone")
        config, path = model.config, self._store.path(sound)
        audio = read_audio(path, config.sample_rate, config.audio_channels)
        seconds = min(len(audio) / config.sample_rate, config.max_seconds)
        carrier = Request(items=(Item(prompt="", seconds=seconds, seed=0),), init=InitAudio(audio=audio, noise_level=1))
        _, setup, pipeline = self._ready(model, carrier, job.order)
        tags = {
            "model": model.tag,
            "model_hash": setup.model_hash,
            "samples": str(len(audio)),
            "sample_rate": str(config.sample_rate),
            "input_hash": file_hash(path),
        }
        frames = pipeline.encode(
            audio,
            chunk_frames=setup.memory.encode_chunk_frames,
            advance=lambda _: self._still_wanted([job], finish),
        )
        record = _record(job, sound_name(sound.name), seconds=len(audio) / config.sample_rate, samples=len(frames))
        record = replace(record, sample_rate=config.sample_rate, channels=frames.shape[1], model=model.tag)
        with self._store.pool.new(".safetensors") as file:
            write_latents(file, frames, tags)
            finish(job, "done", sounds=self._store.keep(job.id, [(file, record)]))

    def _decode(self, job: Job, model: Model, finish: Finish) -> None:
        sound = self._store.database.sound(job.order.source or "")
        if sound is None:
            raise ValueError("the latents to decode are gone")
        config, path = model.config, self._store.path(sound)
        latents, tags = read_latents(path)
        samples = output_samples(path, latents, tags, config)
        if tags.get("model_hash") != (digest := fingerprint(model.folder, config, quiet=True)):
            raise ValueError(f"these latents are of {tags.get('model')}, not of {model.tag} ({digest[:19]}...)")
        carrier = Request(
            items=(Item(prompt="", seconds=min(samples / config.sample_rate, config.max_seconds), seed=0),)
        )
        _, setup, pipeline = self._ready(model, carrier, job.order)
        pieces: list[Audio] = []
        done = 0
        for piece in pipeline.decode_stream(latents, chunk_frames=setup.memory.chunk_frames):
            self._still_wanted([job], finish)
            pieces.append(piece[: samples - done])
            job.feed.append("audio", audio_data(pieces[-1], 0, done, config.sample_rate))
            done += len(pieces[-1])
        audio = np.concatenate(pieces)
        record = _record(job, sound_name(sound.name), seconds=samples / config.sample_rate, samples=samples)
        record = replace(record, sample_rate=config.sample_rate, channels=audio.shape[1], model=model.tag)
        with self._store.pool.new(".wav") as file:
            write_audio(file, audio, config.sample_rate, KEPT)
            finish(job, "done", sounds=self._store.keep(job.id, [(file, record)]))


def read_source(store: Store, kind: Kind, sound_id: str, model: Model, request: dict[str, Any]) -> SourceFile:
    """Read the sound that a job starts from, as the commands do. Raises ValueError for one that is not there."""
    sound = store.database.sound(sound_id)
    if sound is None:
        raise ValueError(f"source is {quoted(sound_id)}: there is no such sound; upload it first")
    if sound.subtype == LATENTS:
        raise ValueError(
            f"source is {quoted(sound_id)}, which holds latents: a job of kind decode makes a sound of them"
        )
    items = request.get("items") or [{}]
    seconds, head_room = items[0].get("seconds"), request.get("head_room_seconds")
    goes_on = kind == "extend" and request.get("long") is not None
    found = SourceFile.read(store.path(sound), model.config, seconds, head_room, end=goes_on)
    return replace(found, name=sound.name)


LATENTS = "latents"


def _record(job: Job, name: str, *, seconds: float, samples: int) -> SoundRecord:
    return SoundRecord(
        id=new_id(),
        created=time.time(),
        kind=job.order.kind,
        name=name,
        file="",
        seconds=seconds,
        samples=samples,
        sample_rate=0,
        channels=0,
        subtype=LATENTS if job.order.kind == "encode" else KEPT,
        job=job.id,
        parent=job.order.source,
    )


def audio_data(audio: Audio, item: int, start: int, sample_rate: int) -> dict[str, Any]:
    """Return a chunk of audio as the data of an event: 16-bit PCM in base64."""
    return {
        "item": item,
        "start": start,
        "samples": len(audio),
        "channels": audio.shape[1],
        "sample_rate": sample_rate,
        "pcm16": base64.b64encode(sample_bytes(audio, "pcm16")).decode("ascii"),
    }


def peaks(audio: Audio, columns: int) -> dict[str, list[float]]:
    """Return the lowest and the highest sample of every column, rounded."""
    low, high = envelope(audio, columns)
    return {"low": [round(float(value), 3) for value in low], "high": [round(float(value), 3) for value in high]}


def _what_fits(request: Request, model: Model, setup: Setup, limit: int | None) -> str:
    """Say what the run needs, and which shorter or smaller one needs half of it or keeps the limit."""
    needed = setup.memory.peak
    if request.long is not None:
        return f"this needs about {size_text(needed)}; choose a smaller model, or shorter windows"
    budget = min(needed // 2, limit or needed)
    seconds = max(item.seconds for item in request.items)
    for items, share in [(1, 1.0)] * (len(request.items) > 1) + [(1, 0.5**power) for power in range(1, 8)]:
        wanted = seconds * share
        smaller = tuple(replace(item, seconds=wanted) for item in request.items[:items])
        peak = predict(
            replace(request, items=smaller),
            model.config,
            setup.memory.precision,
            residency=setup.memory.residency,
            metal=backend.metal(setup.backend),
        ).peak
        if peak <= budget:
            what = "one clip at a time" if share == 1 else f"{wanted:.3g} s"
            return f"this needs about {size_text(needed)}; {what} would need {size_text(peak)}"
    return f"this needs about {size_text(needed)}; choose a smaller model"
