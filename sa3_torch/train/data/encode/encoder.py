"""Encode sounds to latents: in chunks that equal the whole, in batches of equal lengths, in fp32 or faster [T3].

Shapes: B items, L audio samples, T latent frames, C latent channels, R samples per latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from sa3_mlx.common.model.chunks import check_chunk_frames, default_chunk_frames, halo, pad_frames
from sa3_torch.layers import halve_products
from sa3_torch.same import SAME
from sa3_torch.train.data.clip_cache import Audio

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")  # of the products in the encoder's blocks
SILENCE_FRAMES = 32
WHOLE_SECONDS = 30  # shorter recordings are encoded in one piece


def chunk_size(same: SAME, sample_rate: int, chunk_frames: int | None) -> int:
    """Return how many frames are encoded at once. Raises ValueError for a size that cannot be exact."""
    if chunk_frames is None:
        whole = pad_frames(-(-WHOLE_SECONDS * sample_rate // same.config.samples_per_latent), same.config)
        return max(whole, default_chunk_frames(same.config, "encode"))
    check_chunk_frames(chunk_frames, same.config, "encode")
    return chunk_frames


def set_precision(same: SAME, precision: str) -> None:
    """Let an encoder multiply with inputs of fewer bits; sums, norms and everything else stay in fp32.

    Raises ValueError for tf32 without an NVIDIA GPU.
    """
    if precision == "tf32":
        if same.bottleneck.running_std.device.type != "cuda":
            raise ValueError("tf32 is a precision of NVIDIA GPUs: choose --device cuda, or another precision")
        torch.backends.cuda.matmul.allow_tf32 = True  # of the process, which does nothing else
    elif precision != "float32":
        dtype = torch.float16 if precision == "float16" else torch.bfloat16
        halve_products(same.encoder.get_submodule("layers"), dtype, wide=True)


@torch.no_grad()
def encode_blocks(
    same: SAME, blocks: Iterator[Audio], chunk_frames: int, lead: int = 0, batch: int = 1
) -> Iterator[Tensor]:
    """Encode audio in pieces (n, channels), after ``lead`` zeros, to latents in pieces (T, C): ceil(L / R) frames.

    Chunks, up to ``batch`` at once, overlap by the halo of chunks.py, which makes them equal to the whole but for
    rounding. So many of audio are held, and no more.
    """
    size, edge = same.config.samples_per_latent, halo(same.config, "encode")
    step, chunk = (chunk_frames - 2 * edge) * size, chunk_frames * size
    held, given = [np.zeros((lead, same.audio_channels), np.float32)], 0  # given: frames of a chunk that were before
    for block in chain(blocks, [None]):  # None: no more is to come
        if block is not None:
            held.append(block)
            if sum(map(len, held)) <= chunk + (batch - 1) * step:
                continue
        buffer = np.concatenate(held)
        while len(buffer) > chunk:  # more is to come: right edges are dropped
            count = min(batch, -(-(len(buffer) - chunk) // step))
            for latents in _encode(same, np.stack([buffer[k * step : k * step + chunk] for k in range(count)])):
                yield latents[given : chunk_frames - edge]
                given = edge
            buffer = buffer[count * step :]
        held = [buffer]
    if len(held[0]):
        yield _encode(same, held[0][None])[0, given:]


@torch.no_grad()
def encode_alike(same: SAME, sounds: Sequence[Audio], chunk_frames: int, batch: int) -> list[Tensor]:
    """Encode whole sounds (n, channels) -> latents (T, C) of each, in their order.

    Those that fill as many groups of frames are encoded together, as many as have the frames of ``batch`` chunks: the
    zeros at their ends are those that each would have by itself, so latents differ by rounding only.
    """
    size = same.config.samples_per_latent
    alike: dict[int, list[int]] = {}
    for number, sound in enumerate(sounds):
        alike.setdefault(pad_frames(-(-len(sound) // size), same.config), []).append(number)
    found: dict[int, Tensor] = {}
    for frames, numbers in alike.items():
        count = max(1, batch * chunk_frames // frames)
        for at in range(0, len(numbers), count):
            together = numbers[at : at + count]
            padded = [np.pad(sounds[number], ((0, frames * size - len(sounds[number])), (0, 0))) for number in together]
            for number, latents in zip(together, _encode(same, np.stack(padded)), strict=True):
                found[number] = latents[: -(-len(sounds[number]) // size)]
    return [found[number] for number in range(len(sounds))]


@torch.no_grad()
def silence_latent(same: SAME) -> Tensor:
    """Encode zeros: the latent away from the ends -> (C,)."""
    zeros = np.zeros((1, SILENCE_FRAMES * same.config.samples_per_latent, same.audio_channels), np.float32)
    return _encode(same, zeros)[0, SILENCE_FRAMES // 2]


def _encode(same: SAME, audio: Audio) -> Tensor:
    """Encode (B, L, channels) where the autoencoder is -> (B, T, C)."""
    return same.encode(torch.from_numpy(np.ascontiguousarray(audio)).to(same.bottleneck.running_std.device))
