"""Compute Fourier features of time and duration, and rotary angles: float32 constants, trigonometry on the host.

The angles of the Fourier features reach 62832 rad, so the last bit of a frequency decides: the constants below are the
exact float32 values of the official code, and cos and sin are taken accurately on the host, once, for both twins
([A5], 'Precision trap').

Shapes: N values, B batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .config import ROTARY_SIZE, TIMESTEP_FEATURES

Float32Array = NDArray[np.float32]

_FREQUENCY_BITS = """
    3f000000 3f0a6187 3f159a95 3f21bca5 3f2eda9d 3f3d08eb 3f4c5da5 3f5cf0ac 3f6edbd1 3f811d7d 3f8b962c 3f96e842
    3fa32562 3fb0609a 3fbeae8a 3fce2577 3fdedd75 3ff0f08f 40023d77 400ccd82 401838d7 40249143 4031ea00 404057d7
    404ff140 4060ce88 407309f2 40835ff5 408e078c 40998c5b 40a60051 40b376d3 40c204d6 40d1c10c 40e2c3ef 40f52806
    410484f7 410f4455 411ae2d5 4127728f 41350718 4143b592 415394e0 4164bdb8 41774ad4 4185ac8c 419083e1 419c3c49
    41a8e80a 41b69ada 41c56a15 41d56cc7 41e6bbe1 41f97261 4206d6b2 4211c633 421d98bf 422a60c5 42383223 42472264
    425748d1 4268be87 427b9ec4 42880370 42930b55 429ef83f 42abdcc7 42b9ccf6 42c8de88 42d928fb 42eac5a2 42fdcff0
    430932d0 4314534f 43205ad3 432d5c1d 433b6b63 434a9e91 435b0d54 436cd14a 43800308 438a64cc 43959e1d 43a1c079
    43aedebf 43bd0d61 43cc627c 43dcf5eb 43eee17a 44012090 440b997c 4416ebd5 44232942 443064cb 443eb30e 444e2a56
    445ee2be 4470f644 4482408c 448cd0d7 44983c71 44a49526 44b1ee31 44c05c5d 44cff62f 44e0d3dc 44f30fb3 45036316
    450e0aee 45199000 4526043f 45337b10 45420965 4551c5f6 4562c95c 45752de0 45848821 458f47bc 459ae680 45a77686
    45b50b5f 45c3ba31 45d399dc 45e4c318 45f750bf 4605afbd 46108752 461c4001
"""
_ROTARY_BITS = """
    3f800000 3f0ff59a 3ea1e89b 3e361887 3dcccccd 3d6655c2 3d0186e3 3c91ad39 3c23d70a 3bb8449c 3b4f3e38 3ae91528
    3a83126f 3a136a16 39a5cb60 393a7753
"""


def _from_bits(text: str) -> Float32Array:
    values = np.array([int(word, 16) for word in text.split()], dtype=np.uint32).view(np.float32)
    values.setflags(write=False)
    return values


FREQUENCIES = _from_bits(_FREQUENCY_BITS)  # (128,) 0.5 .. 10000, exponentially spaced [B5]
ROTARY_FREQUENCIES = _from_bits(_ROTARY_BITS)  # (16,) 10000^(-2k/32) [B12]
assert FREQUENCIES.size * 2 == TIMESTEP_FEATURES and ROTARY_FREQUENCIES.size * 2 == ROTARY_SIZE


def fourier_features(values: ArrayLike) -> Float32Array:
    """Return (N, 256) float32 of (N,) in 0..1, the 128 cosines first [B5, B8].

    Used with t itself (the timestep) and with seconds / seconds_max (the duration). The angle is formed in float32 as
    ((u f) 2) pi in this order; cos and sin of that angle are computed in float64 and rounded once.
    """
    u = np.asarray(values, dtype=np.float32).reshape(-1, 1)
    angles = ((u * FREQUENCIES) * np.float32(2)) * np.float32(np.pi)  # (N, 128)
    exact = angles.astype(np.float64)
    return np.concatenate([np.cos(exact), np.sin(exact)], axis=-1).astype(np.float32)


def seconds_features(seconds: ArrayLike, seconds_max: float) -> Float32Array:
    """Return (B, 256) float32 of durations (B,), clamped to 0..seconds_max and divided by it [B5]."""
    top = np.float32(seconds_max)
    return fourier_features(np.clip(np.asarray(seconds, dtype=np.float32), np.float32(0), top) / top)


def rope_table(positions: ArrayLike) -> tuple[Float32Array, Float32Array]:
    """Return cos and sin (N, 16), float32, of positions (N,); the angle is position x frequency in float32 [B12]."""
    angles = np.asarray(positions, dtype=np.float32).reshape(-1, 1) * ROTARY_FREQUENCIES  # (N, 16)
    exact = angles.astype(np.float64)
    return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)
