"""Put a long piece together in memory, for programs that want it as they want a clip."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sa3_mlx.common.files.audio import clipped_share
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.events import AudioChunk, Event, Generation, Latents, PieceFinished, WindowMade
from sa3_mlx.common.model.config import ModelConfig


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
        seams=((),),
        clipped_share=(clipped_share(audio),),
        timings=event.timings,
        ways=event.ways,
    )
