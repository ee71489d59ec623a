"""Pre-encoding: every captioned clip of a cache to latents, once (training spec, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sa3_mlx.spec.checkpoint import WEIGHTS_FILE
from sa3_mlx.spec.config import ModelConfig
from sa3_mlx.spec.tensorfile import file_hash
from sa3_torch.same import SAME
from sa3_torch.weights import load_part

from .clips import Clip, ClipSet, generator
from .data import LatentSet, write_latents

SILENCE_FRAMES = 32
_SHIFT = 103  # purpose of the random generator


def load_autoencoder(folder: Path) -> tuple[SAME, str]:
    """The frozen autoencoder of a checkpoint folder in fp32, and the hash of its weights."""
    same = load_part(folder, ModelConfig.load(folder), "same", torch.device("cpu"), torch.float32)
    assert isinstance(same, SAME)
    return same, file_hash(folder / WEIGHTS_FILE)


@torch.no_grad()
def encode_clips(clips: ClipSet, autoencoder: Path, out: Path, *, copies: int, seed: int) -> LatentSet:
    """Encode all captioned clips in fp32; a last frame that holds any audio counts (ceil rule).

    Training clips are encoded ``copies`` times: the first as it is, the others behind a random silence of less than one
    frame, so that the model meets every phase of a sound against the latent grid.
    """
    same, digest = load_autoencoder(autoencoder)
    wanted = [clip for clip in clips.clips if clip.captions]

    def encoded() -> Iterator[tuple[Clip, Tensor]]:
        for number, clip in enumerate(tqdm(wanted, desc="encode", unit="clip", mininterval=2.0)):
            audio = clips.read(clip)
            if audio.shape[1] == 1:
                audio = np.repeat(audio, same.audio_channels, axis=1)
            shifts = generator(seed, _SHIFT, number).integers(1, same.config.samples_per_latent, copies)
            for copy in range(copies if clip.split == "train" else 1):
                shifted = np.pad(audio, ((int(shifts[copy]) if copy else 0, 0), (0, 0)))
                marked = dataclasses.replace(clip, id=f"{clip.id}+{copy}") if copy else clip
                yield marked, same.encode(torch.from_numpy(shifted)[None])[0]

    silence = same.encode(torch.zeros(1, SILENCE_FRAMES * same.config.samples_per_latent, same.audio_channels))
    return write_latents(out, encoded(), silence=silence[0, SILENCE_FRAMES // 2], autoencoder=digest)
