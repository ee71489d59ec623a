"""Chunked equals whole: checked on integer toy models that have exactly the reach of the two autoencoders."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_mlx.common.model.chunks import (
    Chunk,
    Direction,
    chunk_plan,
    default_chunk_frames,
    halo,
    official_plan,
    pad_frames,
)
from sa3_mlx.common.model.config import SAMEConfig
from sa3_mlx.common.model.presets import SAME_FIRST, SAME_L, SAME_S
from tests.support.tiny import SAME_TINY_L, SAME_TINY_S

Tokens = NDArray[np.uint64]
CONFIGS = {"tiny-s": SAME_TINY_S, "tiny-l": SAME_TINY_L, "demo": SAME_FIRST}
ODD_SPAN = dataclasses.replace(SAME_FIRST, stride=3, span=1)


def _mix(values: Tokens, others: Tokens) -> Tokens:
    """A hash of each token and of the list of tokens it sees: any other list gives another value."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    weights = np.arange(1, others.shape[-1] + 1, dtype=np.uint64) * odd
    seen = (((others ^ (others >> np.uint64(29))) * weights).sum(axis=-1, dtype=np.uint64)) * odd
    return (values * odd + seen) ^ (seen >> np.uint64(31))


def _chunked_layer(x: Tokens, size: int) -> Tokens:
    groups = x.reshape(-1, size)
    return _mix(groups, np.repeat(groups[:, None], size, axis=1)).reshape(-1)


def _transformer(x: Tokens, config: SAMEConfig, depth: int) -> Tokens:
    """The attention patterns of B41 and B42 on a sequence of tokens."""
    tokens = config.span * (config.stride + 1)
    if config.attention == "sliding":
        for _ in range(depth):
            padded = np.pad(x, tokens)
            x = _mix(x, np.lib.stride_tricks.sliding_window_view(padded, 2 * tokens + 1))
        return x
    for _ in range(depth // 2):
        x = _chunked_layer(x, tokens)
    half = tokens // 2
    x = np.concatenate([x[:half], x, x[-half:]])
    for _ in range(depth - depth // 2):
        x = _chunked_layer(x, tokens)
    return x[half:-half]


def _decode(latents: Tokens, config: SAMEConfig) -> Tokens:
    """(T,) -> (T * stride,) patches."""
    frames = latents.size
    latents = np.pad(latents, (0, pad_frames(frames, config) - frames))
    new = np.full((latents.size, config.stride), 7, dtype=np.uint64)
    x = _transformer(np.concatenate([latents[:, None], new], axis=1).reshape(-1), config, config.decoder_depth)
    patches = x.reshape(-1, config.stride + 1)[:, 1:].reshape(-1)
    if config.decoder_kernel == 3:
        patches = _mix(patches, np.lib.stride_tricks.sliding_window_view(np.pad(patches, 1), 3))
    return patches[: frames * config.stride]


def _encode(patches: Tokens, config: SAMEConfig) -> Tokens:
    """(T * stride,) patches -> (T,)"""
    frames = patches.size // config.stride
    padded = np.pad(patches, (0, (pad_frames(frames, config) - frames) * config.stride)).reshape(-1, config.stride)
    new = np.full((padded.shape[0], 1), 7, dtype=np.uint64)
    x = _transformer(np.concatenate([padded, new], axis=1).reshape(-1), config, config.encoder_depth)
    return x.reshape(-1, config.stride + 1)[:frames, -1]


def _run(direction: Direction, data: Tokens, config: SAMEConfig, plan: list[Chunk]) -> Tokens:
    parts = []
    stride = config.stride
    for chunk in plan:
        keep = slice(chunk.keep_start - chunk.start, chunk.keep_stop - chunk.start)
        if direction == "decode":
            out = _decode(data[chunk.start : chunk.stop], config).reshape(-1, stride)[keep]
        else:
            out = _encode(data.reshape(-1, stride)[chunk.start : chunk.stop].reshape(-1), config)[keep]
        parts.append(out.reshape(-1))
    return np.concatenate(parts)


def _data(frames: int) -> Tokens:
    return np.random.default_rng(frames).integers(1, 2**63, frames, dtype=np.uint64)


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("config", [*CONFIGS.values(), ODD_SPAN], ids=[*CONFIGS, "odd-span"])
def test_chunked_equals_whole_for_every_length(config: SAMEConfig, direction: Direction):
    smallest = 2 * halo(config, direction) + config.frame_multiple
    for size in (smallest, smallest + 2 * config.frame_multiple):
        for frames in (1, 2, size - 1, size, size + 1, 2 * size + 3, 3 * size + 2, 4 * size):
            data = _data(frames * (config.stride if direction == "encode" else 1))
            whole = _run(direction, data, config, [Chunk(0, frames, 0, frames)])
            plan = chunk_plan(frames, size, config, direction)
            np.testing.assert_array_equal(_run(direction, data, config, plan), whole)
            assert all(chunk.stop - chunk.start <= size for chunk in plan)


def test_toy_model_notices_a_wrong_start():
    """The check above is only worth something if an unaligned or too tight plan fails it."""
    data = _data(40)
    whole = _decode(data, SAME_TINY_S)
    unaligned = [Chunk(0, 20, 0, 17), Chunk(15, 40, 17, 40)]
    tight = [Chunk(0, 20, 0, 19), Chunk(18, 40, 19, 40)]
    for plan in (unaligned, tight):
        assert not np.array_equal(_run("decode", data, SAME_TINY_S, plan), whole)
    whole = _decode(data, SAME_TINY_L)
    tight = [Chunk(0, 20, 0, 17), Chunk(14, 40, 17, 40)]
    assert not np.array_equal(_run("decode", data, SAME_TINY_L, tight), whole)


@pytest.mark.parametrize("config", [SAME_S, SAME_L, SAME_FIRST, SAME_TINY_L])
def test_kept_ranges_tile_the_clip_and_starts_are_aligned(config: SAMEConfig):
    for direction in ("encode", "decode"):
        size = default_chunk_frames(config, direction)
        for frames in (size + 1, 5 * size - 3, 1293):
            plan = chunk_plan(frames, size, config, direction)
            assert plan[0].keep_start == 0 and plan[-1].keep_stop == frames
            assert all(a.keep_stop == b.keep_start for a, b in itertools.pairwise(plan))
            assert all(chunk.start % config.frame_multiple == 0 for chunk in plan)
            assert all(chunk.start <= chunk.keep_start < chunk.keep_stop <= chunk.stop for chunk in plan)


@pytest.mark.parametrize("config", [SAME_S, SAME_L, SAME_FIRST, SAME_TINY_L])
def test_chunks_are_few_and_balanced(config: SAMEConfig):
    """Nothing but the halo of inner edges is computed twice, and no chunk is longer than another by over a span."""
    for direction in ("encode", "decode"):
        size, edge = default_chunk_frames(config, direction), halo(config, direction)
        for frames in (size + config.frame_multiple, 2 * size, 1292, 4092):
            plan = chunk_plan(frames, size, config, direction)
            lengths = [chunk.stop - chunk.start for chunk in plan]
            assert sum(lengths) == frames + 2 * edge * (len(plan) - 1)
            assert max(lengths) - min(lengths) <= config.frame_multiple
            assert (size - 2 * edge) * (len(plan) - 1) + 2 * edge < pad_frames(frames, config)


def test_the_plan_of_half_a_minute_is_cheap():
    """Frames computed per frame of the clip; the official MLX port computes 1.56 (small) and 1.34 (large)."""
    for config, wanted in ((SAME_S, (324 + 8) / 324), (SAME_L, (323 + 24) / 323)):
        frames = 324 if config is SAME_S else 323
        plan = chunk_plan(frames, default_chunk_frames(config, "decode"), config, "decode")
        assert sum(chunk.stop - chunk.start for chunk in plan) / frames == wanted


def test_no_chunk_size_means_one_chunk():
    assert chunk_plan(5000, None, SAME_S, "decode") == [Chunk(0, 5000, 0, 5000)]


@pytest.mark.parametrize("size", [0, 4, 7, 9, -8])
def test_a_chunk_size_that_cannot_be_exact_is_refused(size: int):
    with pytest.raises(ValueError, match=f"chunk_frames is {size}: to decode exactly .* at least 6, a multiple of 2"):
        chunk_plan(40, size, SAME_S, "decode")


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="frames is 0"):
        chunk_plan(0, None, SAME_L, "encode")


def test_official_plan_is_the_one_of_b48():
    assert official_plan(40, 16, 4) == [Chunk(0, 16, 0, 14), Chunk(12, 28, 14, 26), Chunk(24, 40, 26, 40)]
    assert official_plan(41, 16, 4)[-1] == Chunk(25, 41, 27, 41)
    assert official_plan(37, 14, 5) == [
        Chunk(0, 14, 0, 11),
        Chunk(9, 23, 11, 20),
        Chunk(18, 32, 20, 25),
        Chunk(23, 37, 25, 37),
    ]
    assert official_plan(128) == [Chunk(0, 128, 0, 128)]
    assert official_plan(150) == [Chunk(0, 128, 0, 38), Chunk(22, 150, 38, 150)]
