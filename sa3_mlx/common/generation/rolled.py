"""Make loops by rolling: the joint of a clip is made anew in the middle of it; see loop.py, *seam*."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_mlx.common.files.audio import clipped_share
from sa3_mlx.common.files.audio_file import Audio

from .events import AudioChunk, Conditioned, Event, Finished, Generation, NoiseSource, Stepped
from .request import Inpaint, Request, Residency

if TYPE_CHECKING:
    from .pipeline import BasePipeline


def run_rolled(
    pipeline: BasePipeline[Any], request: Request, noise: NoiseSource | None, residency: Residency
) -> Generator[Event, None, None]:
    """Yield the events of a run that makes loops: those of two runs, the steps of both counted on, audio at the end."""
    assert request.loop is not None
    plain = replace(request, loop=replace(request.loop, way="cut"))
    region = request.loop.joint(request.items[0].seconds)
    first, second = None, None
    for event in pipeline.stream(plain, noise=noise, residency=residency):
        if isinstance(event, Stepped):
            yield replace(event, steps=2 * event.steps)
        elif isinstance(event, Conditioned):
            yield event
        elif isinstance(event, Finished):
            first = event.generation
    assert first is not None
    rolled = [np.roll(audio, -(len(audio) // 2), axis=0) for audio in first.audio]
    inpaint = tuple(Inpaint(audio=audio, regions=(region,)) for audio in rolled)
    for event in pipeline.stream(replace(plain, inpaint=inpaint), noise=noise, residency=residency):
        if isinstance(event, Stepped):
            yield replace(event, index=event.index + event.steps, steps=2 * event.steps)
        elif isinstance(event, Finished):
            second = event.generation
        elif not isinstance(event, AudioChunk | Conditioned):
            yield event
    assert second is not None
    audios = tuple(_back(audio) for audio in second.audio)
    for item, audio in enumerate(audios):
        yield AudioChunk(item=item, start=0, audio=audio)
    yield Finished(generation=_whole(request, first, second, audios))


def _back(audio: Audio) -> Audio:
    back = np.roll(audio, len(audio) // 2, axis=0)
    back.flags.writeable = False
    return back


def _whole(request: Request, first: Generation, second: Generation, audios: tuple[Audio, ...]) -> Generation:
    """Return the result of both runs; its latents are those of the rolled clips."""

    return replace(
        second,
        request=request,
        audio=audios,
        seams=tuple(() for _ in audios),  # a loop has one joint, and no kept audio of somebody else
        clipped_share=tuple(map(clipped_share, audios)),
        timings={stage: first.timings[stage] + seconds for stage, seconds in second.timings.items()},
    )
