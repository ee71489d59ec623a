"""Offer larger and smaller chunks of the autoencoder: chunks are planned once for both twins."""

from __future__ import annotations

from sa3_mlx.common.model.chunks import Direction, default_chunk_frames, halo, pad_frames
from sa3_mlx.common.model.config import SAMEConfig

CHUNKS = "chunks"  # name of the place in both tables
CHUNKS_TOLERANCE = 1e-3  # positions restart in every chunk: 3.9e-4 was measured between chunks and whole clips
FACTORS = {"half": 0.5, "double": 2.0, "quadruple": 4.0}  # ways other than the usual one


def chunk_frames(way: str, config: SAMEConfig, direction: Direction) -> int:
    """Return the frames of a chunk where a caller names none."""
    smallest = 2 * halo(config, direction) + config.frame_multiple
    usual = default_chunk_frames(config, direction)
    return max(smallest, pad_frames(int(FACTORS[way] * usual), config)) if way in FACTORS else usual
