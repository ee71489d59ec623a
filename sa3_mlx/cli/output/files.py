"""Write the audio of a batch: pieces leave as they are finished, pictures and the report come at the end."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from sa3_mlx.cli.options.output import OutputOptions
from sa3_mlx.common.delivery.chain import Delivered
from sa3_mlx.common.files.audio import check_output, check_target
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.events import AudioChunk, Event, Finished, Generation
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import seconds_to_samples

from .outlet import Outlet
from .provenance import Provenance
from .report import report_file
from .sink import STDOUT
from .speaker import Speaker

SAMPLE_BYTES: dict[Subtype, int] = {  # at most
    "pcm16": 2,
    "pcm24": 3,
    "float": 4,
    **dict.fromkeys(("mp3", "vorbis", "opus", "aac"), 1),
}
_EXTENSIONS: dict[Subtype, str] = {  # of files that are not named; others are .wav
    "mp3": ".mp3",
    "vorbis": ".ogg",
    "opus": ".opus",
    "aac": ".m4a",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Name a file to make: clip ``item`` of batch ``batch``."""

    batch: int
    item: int
    path: Path
    picture: Path | None  # of its spectrogram


def find_targets(
    requests: Sequence[Request],
    only: int | None,
    out: Path | None,
    spectrogram: Path | None,
    command: str,
    form: Subtype | None = None,
) -> list[Target]:
    """Name the file of every clip, or of clip ``only`` of every batch: numbered where there are several.

    Without ``out`` each is called after its prompt, or the command, and its seed. Raises ValueError for several on
    standard output.
    """
    clips = [
        (batch, item)
        for batch, request in enumerate(requests)
        for item in (range(len(request.items)) if only is None else [only])
    ]
    if out == STDOUT and len(clips) > 1:
        raise ValueError(f"--out - takes one sound, this would make {len(clips)}; choose a file name")

    def name(path: Path, number: int) -> Path:
        return path if len(clips) == 1 else numbered(path, number)

    def own(batch: int, item: int) -> Path:
        clip = requests[batch].items[item]
        seeds = f"{clip.seed}" if clip.toward is None else f"{clip.seed}-{clip.toward}"
        return Path(f"{_slug(clip.prompt) or command}-{seeds}{_EXTENSIONS.get(form or 'pcm16', '.wav')}")

    return [
        Target(
            batch=batch,
            item=item,
            path=name(out, number) if out is not None else own(batch, item),
            picture=spectrogram and name(spectrogram, number),
        )
        for number, (batch, item) in enumerate(clips, start=1)
    ]


def numbered(path: Path, number: int) -> Path:
    """Return rain-3.wav for rain.wav."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")


def check_targets(
    targets: Sequence[Target], seconds: float, form: Subtype, sample_rate: int, channels: int, *, force: bool
) -> None:
    """Check everything about the files, at ``sample_rate``, that can be refused before any work.

    Raises ValueError or FileNotFoundError, one line, for names, folders and free space on the disk.
    """
    size = round(seconds * sample_rate + 1) * channels * SAMPLE_BYTES[form] + 65536
    for target in targets:
        if target.path != STDOUT:
            check_output(target.path, form, overwrite=force, size_bytes=size * len(targets))
        if target.picture is not None:
            if target.picture.suffix.lower() != ".png":
                raise ValueError(f"{target.picture}: a spectrogram is a .png file")
            check_target(target.picture, overwrite=force)


class Outlets:
    """Write the files of a batch, and play them. All sounds appear at the end of the ``with`` statement, or none does.

    Where the last sample may decide how loud the first one is, nothing leaves before the end.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        batch: Provenance,
        config: ModelConfig,
        output: OutputOptions,
        speaker: Speaker | None,
        began: float | None = None,
    ) -> None:
        """``began``: when the work on the batch did, by ``time.monotonic``; None is now."""
        self._targets = {target.item: target for target in targets}
        self._batch, self._config, self._output, self._speaker = batch, config, output, speaker
        self._outlets: dict[int, Outlet] = {}
        self._made: dict[int, Delivered] = {}
        self._open = ExitStack()
        self._generation: Generation | None = None
        self._start = time.monotonic() if began is None else began
        self._elapsed = 0.0
        self._first_sound: dict[int, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._open.__exit__(kind, error, None)

    def take(self, event: Event) -> None:
        """Write the finished samples of a clip; at the end of the batch, what needs the whole audio."""
        if isinstance(event, AudioChunk) and event.item in self._targets:
            if self._outlet(event.item).take(event.audio):
                self._first_sound.setdefault(event.item, time.monotonic() - self._start)
        elif isinstance(event, Finished):
            self._generation = event.generation
            self._elapsed = time.monotonic() - self._start
            for item in self._targets:
                self._made[item] = self._outlet(item).finish(event.generation.audio[item])

    def draw(self) -> list[str]:
        """Draw the pictures, after the sounds are whole; return what went wrong with any of them."""
        problems = []
        for target in self._targets.values():
            if target.picture is not None:
                from sa3_mlx.common.files.spectrogram import save_spectrogram

                clip, sound = self._batch.request.items[target.item], self._made[target.item]
                title = f"{clip.prompt or target.path.name} (seed {clip.seed})"
                made = self._batch.request.made(target.item)
                try:
                    save_spectrogram(target.picture, sound.audio, sound.sample_rate, title=title, made=made)
                except (OSError, ValueError, MemoryError) as error:
                    problems.append(f"{error or type(error).__name__}; its sound {target.path} is whole")
        return problems

    def _finished(self) -> Generation:
        if self._generation is None:
            raise RuntimeError("the pipeline ended without a result")
        return self._generation

    def report(self) -> None:
        """Print lines about every file; all clips of the batch shared the work."""
        generation = self._finished()
        for item, target in self._targets.items():
            report_file(
                target.path,
                generation.audio[item],
                self._made[item],
                generation.sample_rate,
                replace(self._batch, item=item),
                self._elapsed / len(self._batch.request.items),
                generation.seams[item] if generation.seams else (),
                self._first_sound.get(item),
                quiet=self._output.quiet,
            )

    def _outlet(self, item: int) -> Outlet:
        if item not in self._outlets:
            made, rate = replace(self._batch, item=item), self._config.sample_rate
            samples, channels = seconds_to_samples(made.clip.seconds, rate), self._config.audio_channels
            path, comment = self._targets[item].path, made.to_json()
            outlet = Outlet(path, made.output, samples, channels, rate, comment=comment, speaker=self._speaker)
            self._outlets[item] = self._open.enter_context(outlet)
        return self._outlets[item]
