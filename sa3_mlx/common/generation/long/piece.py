"""Put together what was made in parts: a long piece in memory, a piece or a window and the audio around it."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import replace

import numpy as np

from sa3_mlx.common.files.audio import clipped_share
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.events import AudioChunk, Event, Finished, Generation, Latents, PieceFinished, WindowMade
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.model.config import ModelConfig

from .around import Around
from .between import Between

_BLOCK = 1 << 18  # samples of what is passed on as it is


def joined(events: Iterable[Event], config: ModelConfig) -> Generation:
    """Collect the events of a long piece. An hour of stereo at 44.1 kHz takes 1.3 GB: a stream needs none of it."""
    latents, chunks = list[Latents](), list[Audio]()
    for event in events:
        if isinstance(event, WindowMade):
            latents.append(event.latents)
        elif isinstance(event, AudioChunk):
            chunks.append(event.audio)
    assert isinstance(event, PieceFinished)
    audio = np.concatenate(chunks)
    return Generation(
        request=event.request,
        audio=(audio,),
        sample_rate=config.sample_rate,
        seeds=(event.request.items[0].seed,),
        latents=(np.concatenate(latents),),
        seams=(event.seams,),
        clipped_share=(clipped_share(audio),),
        timings=event.timings,
        ways=event.ways,
    )


def within(events: Iterable[Event], found: Between, whole: Request) -> Generator[Event, None, None]:
    """Pass the events of a piece on as those of the whole: audio before and after it is that of the source."""
    yield from _source(found, 0, found.start)
    for event in events:
        if isinstance(event, AudioChunk):
            yield replace(event, start=found.start + event.start)
        elif isinstance(event, PieceFinished):
            yield from _source(found, found.stop, found.samples)
            seams = tuple(replace(seam, sample=seam.sample + found.start) for seam in event.seams)
            yield replace(event, request=whole, seams=seams)
        else:
            yield event


def _source(found: Between, start: int, stop: int) -> Generator[Event, None, None]:
    for first in range(start, stop, _BLOCK):
        yield AudioChunk(item=0, start=first, audio=found.source[first : min(first + _BLOCK, stop)])


def placed(events: Iterable[Event], found: Around, whole: Request) -> Generator[Event, None, None]:
    """Pass the events of the window on as those of the whole: audio before and after it is that of the source."""
    source, last = found.inpaint.audio, found.start
    for event in events:
        if isinstance(event, AudioChunk):
            if last == found.start and last:
                yield AudioChunk(item=0, start=0, audio=source[:last])
            last = found.start + event.start + len(event.audio)
            yield replace(event, start=found.start + event.start)
        elif isinstance(event, Finished):
            rest = source[last : found.samples]
            if len(rest):
                yield AudioChunk(item=0, start=last, audio=rest)
            made = event.generation
            audio = np.concatenate([source[: found.start], made.audio[0], rest])
            seams = tuple(replace(seam, sample=seam.sample + found.start) for seam in made.seams[0])
            share = clipped_share(audio)
            made = replace(made, request=whole, audio=(audio,), seams=(seams,), clipped_share=(share,))
            yield Finished(generation=made)
        else:
            yield event
