"""Make long pieces as files: windows are kept beside the file until it is whole, so that the same command goes on.

Audio leaves as it is decoded; nothing that is held grows with the length.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from sa3_mlx.cli.notes import announce
from sa3_mlx.cli.options.sampling import SamplingOptions
from sa3_mlx.cli.output.files import Target
from sa3_mlx.cli.output.outlet import Outlet
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.provenance import Provenance
from sa3_mlx.cli.output.report import seam_text, share_text
from sa3_mlx.cli.output.sink import STDOUT
from sa3_mlx.cli.output.speaker import Speaker
from sa3_mlx.cli.run import Task, check, load, plan, provenance, run
from sa3_mlx.common.files.audio import check_target, resampled_length
from sa3_mlx.common.files.drift_picture import save_drift
from sa3_mlx.common.files.wav import wav_header
from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.events import AudioChunk, Event, PieceFinished, Stepped, WindowMade
from sa3_mlx.common.generation.long.store import FolderStore, folder_of, stored_seed
from sa3_mlx.common.generation.long.windows import by_windows, item_between
from sa3_mlx.common.generation.regions import Seam
from sa3_mlx.common.generation.request import LongForm, Request, extend
from sa3_mlx.common.measures.drift import DriftMeter, DriftRow
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import samples_to_seconds, seconds_to_samples
from sa3_mlx.common.terminal import command, labelled, report, say

from .source import SourceFile

_ROWS = 12  # of the table of drift
_LABEL = 6  # columns
_AHEAD_SECONDS = 600.0  # of what is played; a piece that is made faster waits, so that memory stays flat


def resumed(sampling: SamplingOptions, form: LongForm | None, out: Path | None) -> SamplingOptions:
    """Take the seed of a piece that was begun before, where none is given."""
    if form is None or sampling.seed is not None or out is None:
        return sampling
    return replace(sampling, seed=stored_seed(folder_of(out)))


def ending(whole: Request, source: SourceFile | None, config: ModelConfig) -> Request:
    """Return what the model is asked for: a request as it is, or the end of a piece that goes on from a long file.

    That is what ``source`` holds of the file, and all that is made. Raises ValueError for what cannot be made, in the
    time of the whole.
    """
    if source is None or not source.skipped:
        return whole
    validate(replace(whole, inpaint=None), config)
    rate, (item,) = config.sample_rate, whole.items
    offset = samples_to_seconds(source.skipped, rate)
    own = samples_to_seconds(seconds_to_samples(item.seconds, rate) - source.skipped, rate)
    part = item_between(item, offset, own, config.same.samples_per_latent / rate)
    return replace(whole, items=(part,), inpaint=extend(source.audio, own, config))


def run_any(task: Task, drift: Path | None = None) -> list[Path]:
    """Make a piece as ``run_long`` where it is made in windows, else clips as ``run``."""
    if all(by_windows(request, task.model.config) for request in task.requests):
        return run_long(task, drift)
    if drift is not None:
        raise ValueError("--drift draws pieces made in windows; this is made in one run of the model")
    return run(task)


def run_long(task: Task, drift: Path | None = None) -> list[Path]:
    """Check everything, load the model, make the pieces and print what was made; return the files.

    ``drift``: the picture of a single piece. Raises ValueError, OSError or ImportError, one line.
    """
    progress, config = Progress(quiet=task.output.quiet), task.model.config
    _check(task, drift)
    targets = check(task)
    if task.output.out == STDOUT or targets[0].path.suffix.lower() == ".wav":  # which may be too long for it
        samples = resampled_length(
            seconds_to_samples(task.seconds, config.sample_rate), config.sample_rate, task.file_rate
        )
        wav_header(samples, config.audio_channels, task.file_rate, task.format, "")
    setup = plan(task, progress)
    pipeline = load(task, setup)
    announce(task, setup, pipeline.tokenizer, progress)
    with Speaker(task.file_rate, config.audio_channels) if task.output.play else nullcontext() as speaker:
        for request, target in zip(setup.requests, targets, strict=True):
            whole = request if task.whole is None else settled(task.whole, request)
            made, meter = provenance(task, setup, whole), _Meter(whole, config)
            with _kept(task, made, target, progress) as store:
                events = pipeline.stream(request, residency=setup.memory.residency, store=store)
                events = after_beginning(events, task.source, config)
                _write(_watched(events, progress), made, target, config, meter, speaker)
            meter.report(target.path, made, quiet=task.output.quiet)
            if drift is not None:
                save_drift(drift, {"": meter.rows()}, title=f"{made.clip.prompt} (seed {made.clip.seed})")
    return [target.path for target in targets]


def _check(task: Task, drift: Path | None) -> None:
    """Refuse what a piece cannot have that leaves before it is whole."""
    output = task.output
    picture = () if output.spectrogram is None else ("--spectrogram",)
    for name in (*task.delivery.whole, *picture):
        raise ValueError(f"{name} needs the whole audio, which is never in memory of a piece made in windows")
    if drift is not None:
        if len(task.requests) > 1:
            raise ValueError(f"--drift draws one piece, this would make {len(task.requests)}")
        if drift.suffix.lower() != ".png":
            raise ValueError(f"{drift}: a picture of drift is a .png file")
        check_target(drift, overwrite=output.force)


def settled(whole: Request, end: Request) -> Request:
    """Return the whole piece with what was settled for its end."""
    return replace(
        whole,
        sampling=end.sampling,
        chunk_frames=end.chunk_frames,
        encode_chunk_frames=end.encode_chunk_frames,
    )


def after_beginning(events: Iterator[Event], source: SourceFile | None, config: ModelConfig) -> Iterator[Event]:
    """Pass the events of a piece's end on as those of the whole, after what was skipped of its source."""
    skipped, start = 0 if source is None else source.skipped, 0
    for audio in () if source is None else source.beginning(config):
        yield AudioChunk(item=0, start=start, audio=audio)
        start += len(audio)
    for event in events:
        if isinstance(event, AudioChunk):
            yield replace(event, start=skipped + event.start)
        elif isinstance(event, PieceFinished):
            yield replace(event, seams=tuple(replace(seam, sample=skipped + seam.sample) for seam in event.seams))
        else:
            yield event


@contextmanager
def _kept(task: Task, made: Provenance, target: Target, progress: Progress) -> Iterator[FolderStore | None]:
    """Yield the windows beside a file; they are removed when it is whole, and said to be there when it is not."""
    if target.path == STDOUT:
        yield None
        return
    folder, request = folder_of(target.path), made.request.to_dict()
    sizes = ("chunk_frames", "encode_chunk_frames")  # change no latent
    piece = {
        "request": {name: value for name, value in request.items() if name not in sizes},
        "model": made.model.to_dict(),
        "runtime": made.runtime.to_dict(),
    }
    inputs = {"input": made.input, "second_input": made.second_input}
    piece |= {name: record.to_dict() for name, record in inputs.items() if record is not None}
    with FolderStore.open(folder, piece, anew=task.output.force) as store:
        if count := store.count():
            progress.line(f"{count} windows of it are in {folder}, which are not made again")
        try:
            yield store
        except BaseException:
            if store.count():
                progress.line(
                    f"{store.count()} windows stay in {folder}: the same command (seed {made.clip.seed}) goes on"
                )
            else:
                store.remove()
            raise
        store.remove()


def _watched(events: Iterator[Event], progress: Progress) -> Generator[Event, None, None]:
    """Pass events on while a bar shows how far the windows are."""
    bar = None
    try:
        for event in events:
            if isinstance(event, WindowMade):
                bar = bar or progress.bar("windows", event.windows, "windows")
                bar.update(event.index + 1 - bar.n)
            elif isinstance(event, Stepped) and bar is not None:
                bar.update(1 / event.steps)
            yield event
    finally:
        if bar is not None:
            bar.close()


def _write(
    events: Iterator[Event],
    made: Provenance,
    target: Target,
    config: ModelConfig,
    meter: _Meter,
    speaker: Speaker | None,
) -> None:
    """Write the audio of a piece as it comes."""
    samples = seconds_to_samples(made.clip.seconds, config.sample_rate)
    channels, rate, comment = config.audio_channels, config.sample_rate, made.to_json()
    with Outlet(target.path, made.output, samples, channels, rate, comment=comment, speaker=speaker) as outlet:
        for event in events:
            meter.take(event)
            if isinstance(event, AudioChunk):
                outlet.take(event.audio)
                if speaker is not None:
                    speaker.wait(_AHEAD_SECONDS)


class _Meter:
    """Measure a piece while it leaves: the level of all, the drift of what is made of it."""

    def __init__(self, request: Request, config: ModelConfig) -> None:
        self._drift = DriftMeter(config.sample_rate, config.same.samples_per_latent)
        self._rate, self._start, self._first = config.sample_rate, time.monotonic(), 0.0
        self._samples, self._peak, self._beyond, self._made = 0, 0.0, 0, 0
        self._seams: tuple[Seam, ...] = ()
        spans = request.made(0) or ((0.0, request.items[0].seconds),)
        self._begins, self._ends = (seconds_to_samples(time, self._rate) for time in (spans[0][0], spans[-1][1]))

    def take(self, event: Event) -> None:
        if isinstance(event, WindowMade):
            self._drift.add_latents(event.latents)
            self._made += not event.resumed
        elif isinstance(event, AudioChunk):
            size = np.abs(event.audio).max(axis=1, initial=0.0)
            self._first = self._first or time.monotonic() - self._start
            self._samples += len(size)
            self._peak = max(self._peak, float(size.max(initial=0.0)))
            self._beyond += int((size > 1).sum())
            self._drift.add_audio(event.audio[max(0, self._begins - event.start) : max(0, self._ends - event.start)])
        elif isinstance(event, PieceFinished):
            self._seams = event.seams

    def rows(self, most: int | None = None) -> list[DriftRow]:
        """Return the drift in the time of the whole."""
        began = self._begins / self._rate
        return [replace(row, start=began + row.start) for row in self._drift.rows(most)]

    def report(self, path: Path, made: Provenance, *, quiet: bool) -> None:
        """Print lines about a piece; those of one on standard output go to stderr."""
        write = say if path == STDOUT else report
        if quiet:
            write(f"{path} seed {made.clip.seed}")
            return
        seconds, elapsed = self._samples / self._rate, time.monotonic() - self._start

        def line(label: str, text: str) -> None:
            write(labelled(label, text, _LABEL))

        line("file", f"{path}  ({seconds:.2f} s, {self._rate} Hz, {made.output.format})")
        line("seed", str(made.clip.seed))
        line("speed", f"{elapsed:.1f} s, {self._made} windows made, first sound after {self._first:.1f} s")
        if self._beyond and made.output.format != "float":
            share = share_text(self._beyond / self._samples, self._samples)
            line("level", f"{share} were clipped (peak {20 * np.log10(self._peak):+.1f} dB); a float .wav keeps them")
        for seam in self._seams:
            line("seam", seam_text(seam, self._rate))
        line("drift", "minute  level dB  centre Hz  latents: mean  spread  moved")
        for row in self.rows(_ROWS):
            line(
                "",
                f"{row.start / 60:6.0f}  {row.level_db:8.1f}  {row.centroid_hz:9.0f}  {row.mean:13.3f}  "
                f"{row.spread:6.3f}  {row.moved:5.3f}",
            )
        if path != STDOUT:
            line("next", command("rerun", str(path)))
