"""Turn requests into files in four steps: check, plan, stream, output. All refusals come before a model is loaded.

Every request is one batch, whose files are written when it is done, each of them whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import OutputOptions
from sa3_mlx.cli.output.files import SAMPLE_BYTES, Outlets, Target, check_targets, find_targets
from sa3_mlx.cli.output.outlet import check_delivery
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.provenance import (
    CommandName,
    InputRecord,
    ModelRecord,
    OutputRecord,
    Provenance,
    RuntimeRecord,
)
from sa3_mlx.cli.output.report import report_next
from sa3_mlx.cli.output.sink import STDOUT
from sa3_mlx.cli.output.speaker import Speaker, check_speaker
from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.files.encoders import SUBTYPES
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.events import AudioChunk, Event, Generation
from sa3_mlx.common.generation.plan import with_chunks
from sa3_mlx.common.generation.request import Request, Residency
from sa3_mlx.common.installed import Model
from sa3_mlx.common.measures.choice import Grade
from sa3_mlx.common.memory.prediction import (
    IN_MEMORY,
    MemoryPlan,
    fit,
    part_bytes,
    predict,
    stored_weight_bytes,
    weight_bytes,
)
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.chunks import stream_chunk_frames
from sa3_mlx.common.model.precision import Precision, allowed_precisions
from sa3_mlx.common.tuning.chunk import CHUNKS
from sa3_mlx.common.version import version

from . import backend
from .adapters import open_adapters, record
from .backend import Backend
from .choosing import by_clap, choose, groups, report_grade
from .fingerprint import fingerprint
from .notes import announce

if TYPE_CHECKING:
    from sa3_mlx.cli.audio.source import SourceFile
    from sa3_mlx.common.generation.pipeline import BasePipeline


@dataclass(frozen=True)
class Task:
    """Hold what a command wants made: batches of clips with one model, as files."""

    command: CommandName
    requests: tuple[Request, ...]  # all clips of one length
    model: Model
    options: ModelOptions
    memory: MemoryOptions
    output: OutputOptions
    source: SourceFile | None = None  # what the requests start from
    only: int | None = None  # write this clip of every batch, and no other
    ways: Mapping[str, str] | None = None  # in place of those that were tuned here
    best_of: int | None = None  # so many requests of one clip each stand for a file: the best one, and its grade
    graded: Grade | None = None  # what the tags say of one that was chosen before
    whole: Request | None = None  # what the tags say of a piece of which the request is the end

    @property
    def seconds(self) -> float:
        """Return the length of every clip in seconds."""
        return (self.whole or self.requests[0]).items[0].seconds

    @property
    def delivery(self) -> OutputRecord:
        """Return what happens to a finished sound, and the kind of its file. Raises ConfigError."""
        delivery = self.output.delivery(self.model.config.sample_rate, self.format)
        return OutputRecord(format=self.format, **delivery.to_dict())

    @property
    def file_rate(self) -> int:
        """Return the sample rate of the files in Hz."""
        return self.delivery.rate or self.model.config.sample_rate

    @property
    def format(self) -> Subtype:
        """Return the format of samples: the one asked for, or what holds kept samples exactly, in FLAC most nearly."""
        if self.output.format is not None:
            return self.output.format
        suffix = ".wav" if self.output.out is None else self.output.out.suffix.lower()
        allowed = SUBTYPES.get(suffix, SUBTYPES[".wav"])  # a name that is none is refused elsewhere
        if self.source is None or self.requests[0].inpaint is None:
            return allowed[0]
        return self.source.exact if self.source.exact in allowed else max(allowed, key=SAMPLE_BYTES.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Hold what was settled before a model is loaded."""

    requests: tuple[Request, ...]  # with their sampling and the sizes of chunks
    backend: Backend
    memory: MemoryPlan
    adapters: tuple[Applied, ...]
    model_hash: str
    ways: Mapping[str, str]  # that are not the usual ones


def run(task: Task) -> list[Path]:
    """Check everything, load the model, make the files and print what was made; return the files."""
    progress, config, problems = Progress(quiet=task.output.quiet), task.model.config, list[str]()
    targets = check(task)
    setup = plan(task, progress)
    pipeline = load(task, setup)
    announce(task, setup, pipeline.tokenizer, progress)
    with Speaker(task.file_rate, config.audio_channels) if task.output.play else nullcontext() as speaker:
        for number, candidates in enumerate(groups(setup.requests, task.best_of)):
            request, graded, began = candidates[0], task.graded, time.monotonic()
            events: Iterable[Event] = stream(pipeline, request, setup.memory.residency, progress)
            if task.best_of is not None:

                def made_by(one: Request) -> Iterable[Event]:
                    return stream(pipeline, one, setup.memory.residency, progress)

                def cosine(made: Generation) -> float:
                    return pipeline.clap_cosines(made, residency=setup.memory.residency)[0]

                ranks = cosine if by_clap(candidates, config) else None
                request, events, graded = choose(candidates, made_by, progress, ranks)
            made = replace(provenance(task, setup, request), grade=graded)
            wanted = [target for target in targets if target.batch == number]
            problems += output(task, events, wanted, made, speaker, began)
            if graded is not None and task.best_of is not None and not task.output.quiet:
                report_grade(graded, task.best_of, to_pipe=task.output.out == STDOUT)
    last = targets[-1]
    if not task.output.quiet and last.path != STDOUT:
        source = None if task.source is None else task.source.path
        report_next(last.path, replace(made, item=last.item), source, task.options, config.max_seconds)
    if problems:
        raise OSError(problems[0] if len(problems) == 1 else f"{problems[0]}; {len(problems) - 1} more failed")
    return [target.path for target in targets]


def check(task: Task) -> list[Target]:
    """Refuse what cannot be done, without a look at weights; return the files to make.

    Raises ValueError, OSError or ImportError, one line.
    """
    config, wanted = task.model.config, task.output
    for request in task.requests:
        validate(request, config)
    kept = task.requests[0].inpaint is not None
    check_delivery(task.delivery, wanted.out, task.seconds, config.sample_rate, kept=kept)
    if wanted.play:
        check_speaker(task.file_rate, config.audio_channels)
    firsts = [candidates[0] for candidates in groups(task.requests, task.best_of)]
    targets = find_targets(firsts, task.only, wanted.out, wanted.spectrogram, task.command, task.format)
    check_targets(targets, task.seconds, task.format, task.file_rate, config.audio_channels, force=wanted.force)
    return targets


def plan(task: Task, progress: Progress) -> Setup:
    """Open adapters, choose the backend and settle memory and precision; weights are looked at, not loaded.

    Raises ValueError, OSError or ImportError, one line.
    """
    model, options = task.model, task.options
    adapters = open_adapters(options.lora, model.config)
    framework = backend.choose(options.backend, options.device, compiled=options.compiled)
    early = task.output.out == STDOUT or (task.output.play and not task.delivery.whole)
    chunk = stream_chunk_frames(model.config.same) if early else None  # short ones, where somebody listens already
    ways = backend.tuned_ways(framework, options.device, model.config) if task.ways is None else task.ways
    requests = [
        with_chunks(
            replace(
                request,
                sampling=request.sampling or model.config.usual_sampling,
                chunk_frames=request.chunk_frames or chunk,
            ),
            ways.get(CHUNKS, "usual"),
            model.config.same,
        )
        for request in task.requests
    ]
    with backend.choices(framework).tuned(ways):
        memory = _plan_memory(task, requests[0], framework, adapters, progress)
    return Setup(
        requests=tuple(
            replace(request, chunk_frames=memory.chunk_frames, encode_chunk_frames=memory.encode_chunk_frames)
            for request in requests
        ),
        backend=framework,
        memory=memory,
        adapters=adapters,
        model_hash=fingerprint(model.folder, model.config, quiet=task.output.quiet),
        ways=ways,
    )


def load(task: Task, setup: Setup) -> BasePipeline[Any]:
    """Open the model as it was planned; its weights are read when they are needed first."""
    options, precision = task.options, setup.memory.precision
    pipeline = backend.load(
        task.model.folder,
        setup.backend,
        precision.dtype,
        precision.text_dtype or "auto",
        options.device,
        compiled=options.compiled,
        adapters=setup.adapters,
        merged=options.lora_merged,
    )
    pipeline.ways = setup.ways
    backend.hold_memory(setup.backend, options.device, setup.memory, task.memory.max_memory)
    return pipeline


def stream(
    pipeline: BasePipeline[Any], request: Request, residency: Residency, progress: Progress
) -> Generator[Event, None, None]:
    """Yield the events of one batch while bars show how far it is. Raises ValueError for audio that is not finite."""
    with progress.watch(request, pipeline.config.sample_rate) as watch:
        for event in pipeline.stream(request, residency=residency):
            watch(event)
            if isinstance(event, AudioChunk) and not np.isfinite(event.audio).all():
                raise ValueError(
                    "the model's numbers overflowed, no file was written; use --dtype float32 and "
                    "--text-dtype float32, or a lower --guidance"
                )
            yield event


def output(
    task: Task,
    events: Iterable[Event],
    targets: Sequence[Target],
    made: Provenance,
    speaker: Speaker | None,
    began: float | None = None,
) -> list[str]:
    """Write the files of one batch while its events arrive, and print a report; return what pictures failed."""
    with Outlets(targets, made, task.model.config, task.output, speaker, began) as outlets:
        for event in events:
            outlets.take(event)
    problems = outlets.draw()
    outlets.report()
    return problems


def provenance(task: Task, setup: Setup, request: Request) -> Provenance:
    """Return what the tags say of a batch's first clip."""
    options, precision = task.options, setup.memory.precision
    return Provenance(
        sa3=version(),
        command=task.command,
        item=0,
        request=request,
        model=ModelRecord(
            name=task.model.tag,
            config=task.model.config.name,
            hash=setup.model_hash,
            adapters=tuple(record(file) for file in options.lora),
            adapters_merged=options.lora_merged and bool(options.lora),
        ),
        runtime=RuntimeRecord(
            backend=setup.backend,
            device=options.device,
            compiled=options.compiled,
            dtype=precision.dtype,
            text_dtype=precision.text_dtype or "auto",
            ways=backend.choices(setup.backend).differing(setup.ways),
        ),
        output=task.delivery,
        input=_record(task.source),
        second_input=None if task.source is None else _record(task.source.second),
    )


def _record(source: SourceFile | None) -> InputRecord | None:
    return None if source is None else InputRecord(name=source.name, hash=source.hash)


def _plan_memory(
    task: Task, request: Request, framework: Backend, adapters: Sequence[Applied], progress: Progress
) -> MemoryPlan:
    """Predict what the run needs and in which precision; with --max-memory find the plan that fits, and print it.

    All requests of a task need the same. On an Apple GPU the plan fits into what the GPU should use, if one does.
    Raises ValueError when no plan fits into the limit of the user.
    """
    options, config, limit = task.options, task.model.config, task.memory.max_memory
    gpu = backend.on_gpu(framework, options.device)
    precisions = allowed_precisions(options.dtype, options.text_dtype, on_gpu=gpu)
    expanded = framework == "torch" or (bool(options.lora) and options.lora_merged)  # packed weights take full size

    def weights(precision: Precision) -> Mapping[str, int]:
        if expanded:
            sizes = weight_bytes(config, precision)
        else:
            with TensorFile.open(task.model.folder / WEIGHTS_FILE) as file:
                sizes = stored_weight_bytes(file, precision)
        if any(by_clap(candidates, config) for candidates in groups(task.requests, task.best_of)):
            sizes = {**sizes, "clap": part_bytes(config, "clap", 4)}
        return {**sizes, "dit": sizes["dit"] + sum(applied.adapter.bytes for applied in adapters)}

    metal = backend.metal(framework)
    if limit is None:
        if metal is None:
            return predict(request, config, precisions[0], weights=weights(precisions[0]))
        room = metal.working_set
        with suppress(ValueError):
            return fit(request, config, precisions[:1], room, weights=weights, metal=metal, residencies=IN_MEMORY)
        return predict(request, config, precisions[0], residency="phase", weights=weights(precisions[0]), metal=metal)
    found = fit(request, config, precisions, limit, weights=weights, metal=metal)
    progress.line(f"{found.text()}; {backend.memory_note(framework, options.device)}")
    return found
