"""Read pre-encoded latents for the flow-matching loss."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.schema import quoted
from sa3_torch.evaluate.measures.flow import LatentClip
from sa3_torch.train.data.clip_cache import ClipSet, read_index
from sa3_torch.train.data.latents import LATENT_FORMAT, LatentItem, LatentSet

from .real import audio_of

Array = NDArray[np.float32]

TRAINING_MOST = 4096  # clips to fit linear baselines to
HELD_OUT_MOST = 512
LARGEST_DIFFERENCE = 0.05  # of stored latents to the model's, relative L2: rounding of weights gives less
_COMPARED = 4


def open_latents(folder: Path) -> LatentSet:
    """Open latents of whatever autoencoder; ``check_latents`` compares them with a model's."""
    made = read_index(folder, LATENT_FORMAT).get("autoencoder")
    if not isinstance(made, str):
        raise ValueError(f"{folder / 'index.json'}: autoencoder is {quoted(made)}; expected a hash")
    return LatentSet(folder, autoencoder=made)


def split_latents(latents: LatentSet, max_frames: int) -> tuple[list[LatentClip], list[Array]]:
    """Return captioned held-out clips, and training latents (T, C).

    Long ones are cut to ``max_frames``; of many ones a part is taken that is spread over the set. Raises ValueError
    where a split has none.
    """
    items = {split: [i for i in latents.items if i.split == split and i.captions] for split in ("validation", "train")}
    held_out = [
        LatentClip(latents=_read(latents, item, max_frames), caption=item.captions[0], seconds=item.seconds)
        for item in _some(items["validation"], HELD_OUT_MOST)
    ]
    training = [_read(latents, item, max_frames) for item in _some(items["train"], TRAINING_MOST)]
    for split, found in (("validation", held_out), ("train", training)):
        if not found:
            raise ValueError(f"{latents}: no captioned latents of split {split}")
    return held_out, training


def check_latents(latents: LatentSet, clips: ClipSet, pipeline: BasePipeline[Any]) -> None:
    """Raise ValueError when the model's autoencoder makes other latents of the same clips."""
    channels = pipeline.config.same.latent_channels
    if latents.channels != channels:
        raise ValueError(
            f"{latents} has {latents.channels} channels, {pipeline.config.name} {channels}: encode "
            "again with its autoencoder"
        )
    by_id = {clip.id: clip for clip in clips.clips}
    for item in [item for item in latents.items if item.id in by_id and item.split == "validation"][:_COMPARED]:
        stored = _read(latents, item, item.frames)
        own = pipeline.encode(audio_of(clips, by_id[item.id], pipeline.config.audio_channels))[: len(stored)]
        difference = float(np.linalg.norm(own - stored[: len(own)]) / max(float(np.linalg.norm(stored)), 1e-12))
        if not difference <= LARGEST_DIFFERENCE:  # which holds for one that is not finite, too
            raise ValueError(
                f"{latents}: the autoencoder of {pipeline.config.name} makes other latents of "
                f"{item.id} (difference {difference:.2f}); encode again with it"
            )


def _some(items: list[LatentItem], most: int) -> Iterable[LatentItem]:
    return items[:: -(-len(items) // most)] if items else []


def _read(latents: LatentSet, item: LatentItem, frames: int) -> Array:
    return np.asarray(latents.read(item, 0, frames).numpy())
