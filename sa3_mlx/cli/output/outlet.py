"""Finish a sound and write it: piece by piece while it is made, or at its end where that decides on its beginning."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

from sa3_mlx.common.delivery.chain import Delivered, DeliveryStream, deliver
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.encoders import check_rate

from .provenance import OutputRecord
from .sink import STDOUT, Sink, check_pipe, open_sink
from .speaker import Speaker


def check_delivery(output: OutputRecord, path: Path | None, seconds: float, sample_rate: int, *, kept: bool) -> None:
    """Refuse, before any work, what cannot be done to a sound of a model with ``sample_rate``, or not on a pipe.

    ``kept``: parts of it are those of an input. Raises ValueError or ImportError, one line.
    """
    output.check(seconds, output.format, kept=kept)
    check_rate(output.format, output.rate or sample_rate)
    if path == STDOUT:
        check_pipe(output.format)
        if output.whole:
            option = output.whole[0]
            raise ValueError(f"{option} needs the whole audio before its first sample: not possible with --out -")


class Outlet:
    """Take a sound of ``samples`` in all at ``sample_rate``; the file appears at the end of the ``with`` statement."""

    def __init__(
        self,
        path: Path,
        output: OutputRecord,
        samples: int,
        channels: int,
        sample_rate: int,
        *,
        comment: str,
        speaker: Speaker | None = None,
    ) -> None:
        self._path, self._output, self._comment, self._speaker = path, output, comment, speaker
        self._stream = DeliveryStream(output, samples, channels, sample_rate)
        self._channels, self._sample_rate = channels, sample_rate
        self._sink: Sink | None = None
        self._open = ExitStack()

    def take(self, audio: Audio) -> bool:
        """Take the next samples; return whether they can leave now, and not at the end."""
        if self._output.whole:
            return False
        self._write(self._stream.take(audio), self._stream.samples)
        return True

    def finish(self, audio: Audio) -> Delivered:
        """Take the whole sound, all of whose pieces have come; return what the file holds."""
        sound = deliver(audio, self._sample_rate, self._output, clips=self._output.format != "float")
        if self._output.whole:
            self._write(sound.audio, len(sound.audio))
        return sound

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._open.__exit__(kind, error, None)

    def _write(self, audio: Audio, samples: int) -> None:
        if self._sink is None:
            rate, form = self._stream.sample_rate, self._output.format
            sink = open_sink(self._path, samples, self._channels, rate, form, comment=self._comment)
            self._sink = self._open.enter_context(sink)
        self._sink.write(audio)
        if self._speaker is not None:
            self._speaker.write(audio)
