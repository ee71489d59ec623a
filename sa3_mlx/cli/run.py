"""From options to files: everything that can be refused is refused before a model is loaded.

A job is one prompt or several; every prompt is one batch of one seed per file, and its files are written when it is
done, each of them whole or not at all.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sa3_mlx.cli.output.files import Made, Outlets
from sa3_mlx.cli.output.player import find_player, find_stream_player, play
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.provenance import Command, Provenance
from sa3_mlx.cli.output.report import report_next
from sa3_mlx.cli.output.sink import STDOUT, PlayerSink, check_pipe
from sa3_mlx.common.files.audio import Audio, check_output, check_target
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.memory import MemoryPlan, fit, predict, stored_weight_bytes, weight_bytes
from sa3_mlx.common.generation.noise import SEED_MAX, check_seed, random_seed
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, Request, validate
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.chunks import stream_chunk_frames
from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.model.precision import Precision, allowed_precisions
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_mlx.common.version import version

from .adapters import AdapterRecord, describe, open_adapters, record
from .backend import Backend
from .home import Model
from .options import ModelOptions, OutputOptions, SamplingOptions

if TYPE_CHECKING:
    from sa3_mlx.common.generation.events import AudioChunk, Generation
    from sa3_mlx.common.generation.request import Residency
    from sa3_mlx.pipeline import Pipeline

_BYTES = {"pcm16": 2, "pcm24": 3, "float": 4}
_PEAK_RANGE = (-60.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The audio file that a job starts from, at the model's rate and channels."""

    path: Path
    name: str  # for the tags
    hash: str
    audio: Audio


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a command wants made. ``seeds`` is one batch; prompt number k uses ``seeds`` moved by k batches."""

    command: Command
    model: Model
    options: ModelOptions
    sampling: SamplingOptions
    output: OutputOptions
    prompts: tuple[str, ...]
    seconds: float
    seeds: tuple[int, ...]
    format: Subtype
    exact: Subtype | None = None  # the format that holds kept samples exactly
    source: Source | None = None
    noise_level: float | None = None
    monotone: bool = False
    regions: tuple[tuple[float, float], ...] = ()
    crossfade_ms: float | None = None
    only: int | None = None  # write this item of the batch alone
    max_memory: int | None = None  # bytes
    chunk_frames: int | None = None
    encode_chunk_frames: int | None = None

    def seeds_of(self, number: int) -> tuple[int, ...]:
        return tuple(seed + number * len(self.seeds) for seed in self.seeds)

    def items(self) -> range:
        return range(len(self.seeds)) if self.only is None else range(self.only, self.only + 1)


def batch_seeds(sampling: SamplingOptions, prompts: int) -> tuple[int, ...]:
    """Seeds of the first batch; a fresh one when none is asked for. Raises ValueError for one that is out of range."""
    first = random_seed() if sampling.seed is None else sampling.seed
    check_seed(first)
    last = first + sampling.batch * prompts - 1
    if last > SEED_MAX:
        raise ValueError(f"seed is {first}: the last file would need seed {last}, allowed is up to {SEED_MAX}")
    return tuple(range(first, first + sampling.batch))


def make_request(job: Job, number: int) -> Request:
    """The request of one prompt."""
    usual, chosen = job.model.config.usual_sampling, job.sampling
    source = job.source
    return Request(
        items=tuple(
            Item(prompt=job.prompts[number], negative_prompt=chosen.negative, seconds=job.seconds, seed=seed)
            for seed in job.seeds_of(number)
        ),
        sampling=Sampling(
            sampler=chosen.sampler or usual.sampler,
            steps=usual.steps if chosen.steps is None else chosen.steps,
            guidance=Guidance(
                scale=usual.guidance.scale if chosen.guidance is None else chosen.guidance,
                apg=chosen.apg,
                rescale=chosen.rescale,
                interval=chosen.interval,
                norm_threshold=chosen.norm_threshold,
            ),
        ),
        init=InitAudio(audio=source.audio, noise_level=job.noise_level) if source and job.noise_level else None,
        inpaint=Inpaint(audio=source.audio, regions=job.regions) if source and job.regions else None,
        monotone=job.monotone,
        head_room_seconds=chosen.head_room,
        crossfade_ms=job.crossfade_ms,
        decode_noise=chosen.decode_noise,
        chunk_frames=job.chunk_frames,
        encode_chunk_frames=job.encode_chunk_frames,
    )


def run(job: Job) -> list[Path]:
    """Check everything, load the model, make the files; prints what was made. -> the files."""
    if not job.prompts:
        raise ValueError("no prompt given")
    if job.noise_level is not None and not 0 < job.noise_level <= 1:
        raise ValueError(f"noise level is {job.noise_level:g}: allowed is above 0 and up to 1")
    requests = [make_request(job, number) for number in range(len(job.prompts))]
    for request in requests:
        validate(request, job.model.config)
    _check_options(job)
    files = _check_files(job)
    adapters = open_adapters(job.options.lora, job.model.config)
    records = tuple(record(file) for file in job.options.lora)
    from . import backend, fingerprint

    framework = backend.choose(job.options.backend, job.options.device, compiled=job.options.compiled)
    progress = Progress(quiet=job.output.quiet)
    streaming = _streaming_player(job)
    requests = [_for_streaming(job, request, heard_early=streaming is not None) for request in requests]
    memory = _plan_memory(job, requests[0], framework, progress, sum(applied.adapter.bytes for applied in adapters))
    types = memory.precision.dtype, memory.precision.text_dtype or "auto"
    pipeline = backend.load(
        job.model.folder,
        framework,
        *types,
        job.options.device,
        compiled=job.options.compiled,
        adapters=adapters,
        merged=job.options.lora_merged,
    )
    backend.hold_memory(framework, job.options.device, memory.peak, job.max_memory)
    chunks = (memory.chunk_frames, memory.encode_chunk_frames)
    requests = [replace(request, chunk_frames=chunks[0], encode_chunk_frames=chunks[1]) for request in requests]
    digest = fingerprint.fingerprint(job.model.folder, job.model.config)
    progress.line(f"{job.model.label} on {framework}, {job.seconds:g} s, seed {_seed_text(job)}")
    for file, applied in zip(job.options.lora, adapters, strict=True):
        progress.line(f"adapter {file.name}: {describe(applied)}")
    _warn_of_rounding(job, progress)
    for prompt in job.prompts:
        _warn_of_unheard(pipeline.tokenizer, job.model.name, prompt, progress)
    count, made = len(job.items()), []
    with PlayerSink(streaming) if streaming else nullcontext() as sound:
        for number, request in enumerate(requests):
            paths = files[number * count : (number + 1) * count]
            entries = zip(job.items(), paths, strict=True)
            batch = [_made(job, request, *entry, framework, pipeline.precision, digest, records) for entry in entries]
            outlets = Outlets(batch, job.model.config, job.output, sound)
            with outlets:
                generation = _generate(pipeline, request, progress, outlets.take, residency=memory.residency)
                outlets.finish(generation)
            outlets.report(generation, len(job.seeds))
            made += batch
    if not job.output.quiet and made[-1].path != STDOUT:
        report_next(made[-1].path, made[-1].provenance, job.source.path if job.source else None)
    if job.output.play and not streaming:
        for path in files:
            play(path)
    return files


def _streaming_player(job: Job) -> list[str] | None:
    """A player that can begin before the end; with --peak the end decides how loud the beginning is."""
    return find_stream_player() if job.output.play and job.output.peak is None else None


def _for_streaming(job: Job, request: Request, *, heard_early: bool) -> Request:
    """Short chunks where somebody listens while the rest is decoded."""
    if job.chunk_frames is not None or not (heard_early or job.output.out == STDOUT):
        return request
    return replace(request, chunk_frames=stream_chunk_frames(job.model.config.same))


def _plan_memory(job: Job, request: Request, framework: Backend, progress: Progress, adapter_bytes: int) -> MemoryPlan:
    """What the run needs and in which precision; with --max-memory the plan that fits, printed.

    All prompts of a job are alike. Raises ValueError when no plan fits.
    """
    from . import backend

    options, config = job.options, job.model.config
    gpu = backend.on_gpu(framework, options.device)
    precisions = allowed_precisions(options.dtype, options.text_dtype, on_gpu=gpu)

    def weights(precision: Precision) -> Mapping[str, int]:
        sizes = own_weights(precision)
        return {**sizes, "dit": sizes["dit"] + adapter_bytes}

    def own_weights(precision: Precision) -> Mapping[str, int]:
        if framework == "torch" or (options.lora and options.lora_merged):  # which expand packed weights
            return weight_bytes(config, precision)
        with TensorFile.open(job.model.folder / WEIGHTS_FILE) as file:
            return stored_weight_bytes(file, precision)

    if job.max_memory is None:
        return predict(request, config, precisions[0], weights=weights(precisions[0]))
    plan = fit(request, config, precisions, job.max_memory, weights=weights)
    progress.line(f"{plan.text()}; {backend.memory_note(framework, options.device)}")
    return plan


def _warn_of_unheard(tokenizer: Tokenizer, name: str, prompt: str, progress: Progress) -> None:
    """Say which part of a prompt the model cannot hear."""
    if unknown := tokenizer.unknown(prompt):
        progress.line(f"note: {name} does not know {', '.join(map(repr, unknown))}; see 'sa3 info {shlex.quote(name)}'")
    count = tokenizer.count(prompt)
    if prompt.strip() and not count:
        progress.line(f"note: {name} hears nothing of the prompt {prompt!r}")
    if count > tokenizer.max_length:
        progress.line(f"note: the prompt has {count} tokens, {name} hears the first {tokenizer.max_length}")


def _warn_of_rounding(job: Job, progress: Progress) -> None:
    """Say when the file cannot hold the kept samples as they are, and which can."""
    if job.exact is None or job.crossfade_ms is None or _BYTES[job.exact] <= _BYTES[job.format]:
        return
    better = "--format pcm24" if job.exact == "pcm24" else "--out with .wav and --format float"
    progress.line(f"note: kept samples are rounded to {job.format}; {better} keeps them exactly")


def _generate(
    pipeline: Pipeline,
    request: Request,
    progress: Progress,
    take: Callable[[AudioChunk], None],
    *,
    residency: Residency,
) -> Generation:
    from sa3_mlx.common.generation.events import AudioChunk, Finished

    with progress.watch(request, pipeline.config.sample_rate) as watch:
        for event in pipeline.stream(request, residency=residency):
            watch(event)
            if isinstance(event, AudioChunk):
                if not np.isfinite(event.audio).all():
                    raise ValueError(
                        "the model's numbers overflowed, no file was written; use --dtype float32 and "
                        "--text-dtype float32, or a lower --guidance"
                    )
                take(event)
            if isinstance(event, Finished):
                return event.generation
    raise RuntimeError("the pipeline ended without a result")


def _made(
    job: Job,
    request: Request,
    item: int,
    path: Path,
    framework: Backend,
    precision: Precision,
    digest: str,
    records: tuple[AdapterRecord, ...],
) -> Made:
    entry, sampling = request.items[item], request.sampling or job.model.config.usual_sampling
    provenance = Provenance(
        sa3=version(),
        command=job.command,
        prompt=entry.prompt,
        negative_prompt=entry.negative_prompt,
        seconds=entry.seconds,
        seed=entry.seed,
        steps=sampling.steps,
        sampler=sampling.sampler,
        guidance=sampling.guidance,
        model=job.model.tag,
        config=job.model.config.name,
        model_hash=digest,
        backend=framework,
        device=job.options.device,
        compiled=job.options.compiled,
        dtype=precision.dtype,
        text_dtype=precision.text_dtype or "auto",
        adapters=records,
        adapters_merged=job.options.lora_merged and bool(records),
        input=job.source.name if job.source else None,
        input_hash=job.source.hash if job.source else None,
        noise_level=job.noise_level,
        monotone=job.monotone,
        regions=job.regions,
        crossfade_ms=request.crossfade_ms,
        head_room_seconds=request.head_room_seconds,
        decode_noise=request.decode_noise,
        chunk_frames=request.chunk_frames,
        encode_chunk_frames=request.encode_chunk_frames,
        batch_seeds=tuple(other.seed for other in request.items),
        batch_index=item,
        format=job.format,
        peak_db=job.output.peak,
    )
    picture = None if job.output.spectrogram is None else spectrogram_path(job.output.spectrogram, path, job)
    return Made(item=item, path=path, provenance=provenance, picture=picture)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _check_options(job: Job) -> None:
    peak = job.output.peak
    if peak is not None and not _PEAK_RANGE[0] <= peak <= _PEAK_RANGE[1]:
        raise ValueError(f"peak is {peak:g} dB: allowed are -60 to 0")
    if job.output.out == STDOUT:
        if peak is not None:
            raise ValueError("--peak needs the whole audio before its first sample: not possible with --out -")
        check_pipe(job.format)
    if job.output.play and _streaming_player(job) is None:
        if job.output.out == STDOUT:
            raise FileNotFoundError("--play beside --out - needs a player that reads a pipe: install aplay or ffplay")
        find_player(".wav" if job.output.out is None else job.output.out.suffix.lower())


def _check_files(job: Job) -> list[Path]:
    """Every output path, after everything about it has been checked."""
    out = job.output.out or Path(f"{_slug(job.prompts[0]) or job.command}-{job.seeds[job.only or 0]}.wav")
    count = len(job.prompts) * len(job.items())
    if out == STDOUT and count > 1:
        raise ValueError(f"--out - takes one sound, this would make {count}; choose a file name")
    files = [out] if count == 1 else [numbered(out, number) for number in range(1, count + 1)]
    samples = seconds_to_samples(job.seconds, job.model.config.sample_rate)
    size = samples * job.model.config.audio_channels * _BYTES[job.format] + 65536
    for path in files:
        if path != STDOUT:
            check_output(path, job.format, overwrite=job.output.force, size_bytes=size * count)
        if job.output.spectrogram is not None:
            _check_picture(spectrogram_path(job.output.spectrogram, path, job), force=job.output.force)
    return files


def _check_picture(path: Path, *, force: bool) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: a spectrogram is a .png file")
    check_target(path, overwrite=force)


def numbered(path: Path, number: int) -> Path:
    """rain.wav -> rain-3.wav"""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def spectrogram_path(picture: Path, audio: Path, job: Job) -> Path:
    """The picture itself, or with the number of its audio file where there are several."""
    if len(job.prompts) * len(job.items()) == 1:
        return picture
    return picture.with_name(f"{picture.stem}-{audio.stem.rsplit('-', 1)[1]}{picture.suffix}")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")


def _seed_text(job: Job) -> str:
    count = len(job.prompts) * len(job.seeds)
    first = job.seeds[0] if job.only is None else job.seeds[job.only]
    return str(first) if count == 1 or job.only is not None else f"{first} to {first + count - 1}"


def read_prompts(path: Path) -> Iterator[str]:
    """One prompt per line, "-" is standard input; empty lines and lines that begin with # are left out."""
    if path != Path("-") and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    try:
        data = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8") from error
    for line in lines:
        if line.strip() and not line.startswith("#"):
            yield line.strip()
