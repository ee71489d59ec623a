"""Where the audio of a batch goes: pieces leave as they are finished, pictures and the report come at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sa3_mlx.cli.options import OutputOptions
from sa3_mlx.common.files.audio import Audio, apply_peak
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import seconds_to_samples

from .provenance import Provenance
from .report import report_file
from .sink import PlayerSink, Sink, open_sink

if TYPE_CHECKING:
    from sa3_mlx.common.generation.events import AudioChunk, Generation


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file to make: item ``item`` of a batch."""

    item: int
    path: Path
    provenance: Provenance
    picture: Path | None  # of its spectrogram


class Outlets:
    """The files of a batch, and a player. All files appear at the end of the ``with`` statement, or none does.

    With a peak limit nothing leaves before the end: the last sample may decide how loud the first one is.
    """

    def __init__(
        self, batch: Sequence[Made], config: ModelConfig, output: OutputOptions, sound: PlayerSink | None
    ) -> None:
        self._batch = {made.item: made for made in batch}
        self._config, self._output, self._sound = config, output, sound
        self._sinks: dict[int, Sink] = {}
        self._open = ExitStack()
        self._start = time.monotonic()
        self._elapsed = 0.0
        self._first_sound: dict[int, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._open.__exit__(kind, error, None)

    def take(self, chunk: AudioChunk) -> None:
        """The next finished samples of an item."""
        if chunk.item in self._batch and self._output.peak is None:
            self._write(self._batch[chunk.item], chunk.audio)

    def finish(self, generation: Generation) -> None:
        """What needs the whole audio."""
        self._elapsed = time.monotonic() - self._start
        for made in self._batch.values():
            audio = self._limited(generation.audio[made.item])
            if self._output.peak is not None:
                self._write(made, audio)
            if made.picture is not None:
                from sa3_mlx.common.files.spectrogram import save_spectrogram

                title = f"{made.provenance.prompt or made.path.name} (seed {made.provenance.seed})"
                save_spectrogram(made.picture, audio, generation.sample_rate, title=title)

    def report(self, generation: Generation, items: int) -> None:
        """Lines about every file; ``items`` of the batch shared the work."""
        for made in self._batch.values():
            audio = generation.audio[made.item]
            first = None if self._output.peak is not None else self._first_sound[made.item]
            report_file(
                made.path,
                audio,
                self._limited(audio),
                generation.sample_rate,
                made.provenance,
                self._elapsed / items,
                generation.seams[made.item] if generation.seams else (),
                first,
                quiet=self._output.quiet,
            )

    def _limited(self, audio: Audio) -> Audio:
        return audio if self._output.peak is None else apply_peak(audio, self._output.peak)

    def _write(self, made: Made, audio: Audio) -> None:
        if made.item not in self._sinks:
            rate, channels = self._config.sample_rate, self._config.audio_channels
            samples = seconds_to_samples(made.provenance.seconds, rate)
            sink = open_sink(
                made.path, samples, channels, rate, made.provenance.format, comment=made.provenance.to_json()
            )
            self._sinks[made.item] = self._open.enter_context(sink)
            if self._sound is not None:
                self._sound.start_item(samples, channels, rate)
        self._sinks[made.item].write(audio)
        if self._sound is not None:
            self._sound.write(audio)
        self._first_sound.setdefault(made.item, time.monotonic() - self._start)
