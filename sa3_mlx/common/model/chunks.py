"""Plan to encode and decode a long clip in chunks of latent frames, exact by construction.

All numbers are latent frames; audio samples are frames times ``config.samples_per_latent``. A chunk is computed by
itself on the frames ``start..stop``, and ``keep_start..keep_stop`` of its result are used; kept ranges tile the clip.

Why the halo of ``halo()`` frames makes chunked equal whole:

*Chunked attention (SAME-S)* [B41]. Let P be the span. The first layers see aligned chunks [kP, (k+1)P), the later ones
chunks moved by P/2. If a computed range starts at a multiple a of P, its aligned chunks are those of the whole clip, so
the first layers agree everywhere. The shifted layers agree from a + P/2 on: only the shifted chunk across the edge,
which the model fills with copies, differs, and it covers the first P/2 frames. The same holds, mirrored, at the stop.
So P/2 frames at an inner edge are wrong, and one patch more through the kernel-3 output map (a patch is at most one
frame). A halo of P frames covers both: P >= P/2 + 1 for P >= 2, and for P = 1 half a frame of tokens and one patch
stay inside that frame. Starts and stops must be multiples of P; an odd start changes the pairing [B48]. The last chunk
may stop at a clip end that is no multiple of P: the model pads it exactly as it pads the whole clip [B39].

*Sliding attention (SAME-L)* [B42]. A layer reaches P frames, so after d layers frame i depends on i - dP .. i + dP, and
a halo of dP frames is exact up to the rounding of the rotary angles, whose positions restart in every chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import SAMEConfig

Direction = Literal["encode", "decode"]


@dataclass(frozen=True)
class Chunk:
    """Compute frames ``start..stop`` and use ``keep_start..keep_stop`` of them; all are counted in the clip."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


def pad_frames(frames: int, config: SAMEConfig) -> int:
    """Return frames rounded up to what the transformer runs on: a multiple of ``config.frame_multiple``."""
    return -(-frames // config.frame_multiple) * config.frame_multiple


def halo(config: SAMEConfig, direction: Direction) -> int:
    """Return the frames to compute and drop on each inner edge of a chunk: the others equal the whole clip's."""
    if config.attention == "chunked":
        return config.span
    if direction == "encode":
        return config.encoder_depth * config.span
    return config.decoder_depth * config.span + (1 if config.decoder_kernel == 3 else 0)


def default_chunk_frames(config: SAMEConfig, direction: Direction) -> int:
    """Return 128 frames as in the official code, more where the halo would be much of it: 192 for SAME-L."""
    return pad_frames(max(128, 16 * halo(config, direction)), config)


def long_chunk_frames(config: SAMEConfig, direction: Direction) -> int:
    """Return the frames of chunks for a device with room: 512, where the halo is much of the default; else that."""
    default = default_chunk_frames(config, direction)
    return default if default <= 128 else max(default, pad_frames(512, config))


def stream_chunk_frames(config: SAMEConfig) -> int:
    """Return short chunks for decoding while somebody listens: sound comes early, the halos cost a little more."""
    return pad_frames(max(32, 4 * halo(config, "decode")), config)


def check_chunk_frames(chunk_frames: int, config: SAMEConfig, direction: Direction) -> None:
    """Raise ValueError for a chunk size that cannot be exact with this autoencoder."""
    multiple = config.frame_multiple
    smallest = 2 * halo(config, direction) + multiple
    if chunk_frames < smallest or chunk_frames % multiple:
        rule = f", a multiple of {multiple}" if multiple > 1 else ""
        raise ValueError(
            f"chunk_frames is {chunk_frames}: to {direction} exactly this autoencoder needs at least {smallest}{rule}; "
            f"use {default_chunk_frames(config, direction)} or no chunks"
        )


def chunk_plan(frames: int, chunk_frames: int | None, config: SAMEConfig, direction: Direction) -> list[Chunk]:
    """Return chunks in time order whose kept parts, joined, equal the result on the whole clip of ``frames`` frames.

    ``chunk_frames`` None, or a clip that fits into one chunk, gives one chunk. Otherwise as few chunks as possible, all
    about equally long and none longer than ``chunk_frames``: the frames computed twice are 2 ``halo()`` per inner edge.
    The last chunk stops at the clip's end, which for SAME-S may be less than a span short.
    Raises ValueError for no frames and for a chunk size that cannot be exact.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}: at least 1 is needed to {direction}")
    if chunk_frames is None:
        return [Chunk(0, frames, 0, frames)]
    check_chunk_frames(chunk_frames, config, direction)
    multiple = config.frame_multiple
    spans, edge = pad_frames(frames, config) // multiple, halo(config, direction) // multiple  # counted in spans
    longest = chunk_frames // multiple
    if spans <= longest:
        return [Chunk(0, frames, 0, frames)]
    count = -(-(spans - 2 * edge) // (longest - 2 * edge))
    # The chunks without their halos on both sides tile what lies between the halo at the start and that at the end.
    cuts = [edge + (spans - 2 * edge) * i // count for i in range(1, count)]
    keeps = [0, *(cut * multiple for cut in cuts), frames]
    starts = [0, *((cut - edge) * multiple for cut in cuts)]
    stops = [*((cut + edge) * multiple for cut in cuts), frames]
    return [Chunk(*chunk) for chunk in zip(starts, stops, keeps[:-1], keeps[1:], strict=True)]


def official_plan(frames: int, chunk_frames: int = 128, overlap: int = 32) -> list[Chunk]:
    """Return the chunks of the official code [B48], only for comparison with its outputs: they may have visible seams.

    Starts 0, hop, 2 hop ... and a last one at ``frames - chunk_frames``; half the overlap is dropped at inner edges and
    a later chunk overwrites an earlier one. For encoding it holds when the audio is a whole number of latents.
    """
    if frames <= chunk_frames:
        return [Chunk(0, frames, 0, frames)]
    starts = list(range(0, frames - chunk_frames + 1, chunk_frames - overlap))
    if starts[-1] + chunk_frames != frames:
        starts.append(frames - chunk_frames)
    keep_starts = [0] + [start + overlap // 2 for start in starts[1:]]
    keep_stops = [*keep_starts[1:], frames]
    return [Chunk(a, a + chunk_frames, b, c) for a, b, c in zip(starts, keep_starts, keep_stops, strict=True)]
