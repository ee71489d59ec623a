"""Draw noise by a counter: a seed gives the same numbers to every backend, batch position and clip length.

Contract [A15.8]. A value depends on (seed, purpose, frame, channel) and on the number of channels, never on the batch,
on its neighbours or on how many frames are drawn, so

- two items with one seed get the same noise, by themselves or in any batch,
- a longer clip's noise begins with the shorter clip's,
- any range of frames can be drawn (``start``), so chunked decoding sees what whole decoding sees,
- the number of steps leaves the initial noise as it is: every purpose is a stream of its own.

Layout: Philox 4x64 with key (seed, 0) and the 256-bit counter (block, 0, index, stream). Each frame takes a whole
number of blocks of four 64-bit words; Box-Muller in float64 turns each pair of words into two normals. Raw Philox
words are stable across numpy releases. Logarithm, cosine and sine may differ in their last bit between platforms, which
the rounding to float32 hides almost always; on one platform the bits repeat.

Shapes: B batch, T frames, C channels.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEED_MAX = 2**63 - 1

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class NoiseStream:
    """Say what noise is for: ``stream`` separates the uses, ``index`` the draws of one use (the sampler step)."""

    stream: int
    index: int = 0


INITIAL = NoiseStream(0)  # the noise that sampling starts from
DECODER_LATENT = NoiseStream(2)  # added to the latents before decoding [B47]
DECODER_TOKENS = NoiseStream(3)  # added to the decoder's new tokens [B47]


def step(index: int) -> NoiseStream:
    """Return the purpose of what a stochastic sampler adds at the end of step ``index`` (0, 1, ...) [B27].

    Raises ValueError for a negative index.
    """
    if index < 0:
        raise ValueError(f"step index is {index}: steps count from 0")
    return NoiseStream(1, index)


def check_seed(seed: int) -> None:
    """Raise ValueError unless ``seed`` is a Python int in 0 .. 2**63 - 1."""
    if type(seed) is not int or not 0 <= seed <= SEED_MAX:
        raise ValueError(f"seed is {seed!r}: allowed are the integers 0 to {SEED_MAX}")


def random_seed() -> int:
    """Return a fresh seed from the operating system, short enough to note down (0 .. 2**32 - 1)."""
    return secrets.randbelow(2**32)


def noise(seed: int, purpose: NoiseStream, frames: int, channels: int, *, start: int = 0) -> Float32Array:
    """Draw standard normals of frames ``start .. start + frames`` -> (frames, channels) float32, time-major.

    Raises ValueError for a seed outside 0 .. 2**63 - 1 and for impossible sizes.
    """
    check_seed(seed)
    if frames < 0 or channels < 1 or start < 0:
        raise ValueError(f"noise of {frames} frames x {channels} channels from frame {start}: sizes must be positive")
    blocks = -(-channels // 4)  # of four words, per frame
    counter = np.array([start * blocks, 0, purpose.index, purpose.stream], dtype=np.uint64)
    generator = np.random.Philox(counter=counter, key=np.array([seed, 0], dtype=np.uint64))
    words = generator.random_raw(frames * blocks * 4)
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
    pairs = uniform.reshape(frames, blocks * 2, 2)
    radius = np.sqrt(-2.0 * np.log1p(-pairs[..., 0]))
    angle = 2.0 * np.pi * pairs[..., 1]
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return normals.reshape(frames, blocks * 4)[:, :channels].astype(np.float32)


def batch_noise(
    seeds: Sequence[int], purpose: NoiseStream, frames: int, channels: int, *, start: int = 0
) -> Float32Array:
    """Draw noise with one seed per item -> (B, frames, channels) float32. Raises as ``noise``."""
    return np.stack([noise(seed, purpose, frames, channels, start=start) for seed in seeds])
