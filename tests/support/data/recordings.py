"""Recordings with captions to pre-encode, and what encodes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

from sa3_torch.train.data.encode.pre_encode import EncodeConfig, PreEncoder
from sa3_torch.train.data.encode.sources import FolderSource
from tests.support.command import RATE

CONFIG = EncodeConfig(copies=2, seed=0, shard_frames=150, chunk_frames=8)


def noise(samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, (samples, 2)).astype(np.int16)


def write_recordings(folder: Path) -> Path:
    """Write eight recordings of 1000 to 8000 samples with captions; one more is silent, one a duplicate."""
    folder.mkdir()
    for i in range(8):
        soundfile.write(folder / f"{i}.wav", noise(1000 * (i + 1), i), RATE)
        about = {"prompt": [f"noise {i}", f"sound {i}"], "licence": "CC0", "bpm": 100 + i}
        (folder / f"{i}.json").write_text(json.dumps(about))
    soundfile.write(folder / "quiet.wav", np.zeros((500, 2), np.int16), RATE)
    (folder / "quiet.txt").write_text("nothing\n")
    (folder / "twin.wav").write_bytes((folder / "0.wav").read_bytes())
    (folder / "twin.txt").write_text("again\n")
    return folder


def encoder_of(folder: Path, autoencoder: Path, out: Path, config: EncodeConfig = CONFIG) -> PreEncoder:
    return PreEncoder(FolderSource(folder, RATE, 2), autoencoder, out, config)
