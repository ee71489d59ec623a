"""Attend to near tokens in one kernel, both maps of differential attention over one V at once [B13, B41, B42].

Shapes: B batch, N tokens, H heads, M maps (1 or 2), K head size (64). MLX attends in tiles of 32 x 32, of which a
window of 17 and chunks of 34 tokens use less than a half; here a tile is 8 queries and the keys that any of them sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np

from sa3_mlx.common.model.config import HEAD_SIZE
from sa3_mlx.runtime import mx

from .checked import Checked, normal

ROWS = 8  # queries of a simdgroup, and the side of the matrices that it multiplies
FARTHEST = 36  # tokens: the scores of a simdgroup stay in registers
TOGETHER = 4  # simdgroups of a threadgroup, which share most of their keys

# Of a matrix of 8 x 8, which the lanes of a simdgroup hold together, a lane has two neighbours of a row; lanes of the
# same row differ in bits 0 and 3. That is undocumented, but MLX's own attention stands on it.
HEADER = """
#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#define UNROLLED _Pragma("clang loop unroll(full)")
"""
SOURCE = """
    const int lane = thread_index_in_simdgroup;
    const int row = ((lane / 4) & 4) + (lane / 2) % 4;
    const int column = ((lane / 4) & 2) * 2 + (lane % 2) * 2;
    const int length = q_shape[2];
    const int head = thread_position_in_grid.z % HEADS, item = thread_position_in_grid.z / HEADS;
    const int query = 8 * thread_position_in_grid.y + row;
    const int begin = metal::max(8 * int(thread_position_in_grid.y) - REACH, 0);  // the first key

    metal::simdgroup_matrix<float, 8, 8> left, right, sum;
    thread float2& a = reinterpret_cast<thread float2&>(left.thread_elements());
    thread float2& b = reinterpret_cast<thread float2&>(right.thread_elements());
    thread float2& c = reinterpret_cast<thread float2&>(sum.thread_elements());

    float2 weights[TILES];
    for (int map = 0; map < MAPS; map++) {
        const device T* queries = q + item * q_strides[0] + (map * HEADS + head) * q_strides[1];
        const device T* keys = k + item * k_strides[0] + (map * HEADS + head) * k_strides[1];
        float2 scores[TILES];
        UNROLLED for (int tile = 0; tile < TILES; tile++) {
            scores[tile] = float2(0.0f, 0.0f);
        }
        for (int part = 0; part < 64; part += 8) {
            float2 own = float2(0.0f, 0.0f);
            if (query < length) {
                const device T* from = queries + query * q_strides[2] + part + column;
                own = float2(float(from[0]), float(from[1]));
            }
            UNROLLED for (int tile = 0; tile < TILES; tile++) {
                const int key = begin + 8 * tile + column;
                const device T* from = keys + key * k_strides[2] + part + row;
                a = own;
                b = float2(
                    key < length ? float(from[0]) : 0.0f, key + 1 < length ? float(from[k_strides[2]]) : 0.0f);
                c = scores[tile];
                metal::simdgroup_multiply_accumulate(sum, left, right, sum);
                scores[tile] = c;
            }
        }
        float most = -1e30f;
        UNROLLED for (int tile = 0; tile < TILES; tile++) {
            UNROLLED for (int side = 0; side < 2; side++) {
                const int key = begin + 8 * tile + column + side;
                const bool seen = key < length && metal::abs(query - key) <= REACH;
                scores[tile][side] = seen ? 0.125f * scores[tile][side] : -1e30f;
                most = metal::max(most, scores[tile][side]);
            }
        }
        most = metal::max(most, metal::simd_shuffle_xor(most, ushort(1)));
        most = metal::max(most, metal::simd_shuffle_xor(most, ushort(8)));
        float total = 0.0f;
        UNROLLED for (int tile = 0; tile < TILES; tile++) {
            UNROLLED for (int side = 0; side < 2; side++) {
                const float score = scores[tile][side];
                scores[tile][side] = score > -1e29f ? metal::precise::exp(score - most) : 0.0f;
                total += scores[tile][side];
            }
        }
        total += metal::simd_shuffle_xor(total, ushort(1));
        total += metal::simd_shuffle_xor(total, ushort(8));
        UNROLLED for (int tile = 0; tile < TILES; tile++) {
            const float2 shares = scores[tile] / total;
            weights[tile] = map == 0 ? shares : weights[tile] - shares;
        }
    }

    const device T* values = v + item * v_strides[0] + head * v_strides[1];
    for (int part = 0; part < 64; part += 8) {
        c = float2(0.0f, 0.0f);
        UNROLLED for (int tile = 0; tile < TILES; tile++) {
            const int key = begin + 8 * tile + row;
            const device T* from = values + key * v_strides[2] + part + column;
            a = weights[tile];
            b = key < length ? float2(float(from[0]), float(from[1])) : float2(0.0f, 0.0f);
            metal::simdgroup_multiply_accumulate(sum, left, right, sum);
        }
        if (query < length) {
            device T* to = out + ((size_t(item) * length + query) * HEADS + head) * 64 + part + column;
            to[0] = static_cast<T>(c[0]);
            to[1] = static_cast<T>(c[1]);
        }
    }
"""


@dataclass(frozen=True)
class NearVariant:
    """Say what a kernel is compiled for."""

    heads: int  # H
    maps: int  # M
    reach: int  # tokens to each side
    tiles: int  # of 8 keys, that 8 queries see together
    dtype: mx.Dtype


@cache
def compiled() -> Callable[..., list[mx.array]]:
    kernel: object = mx.fast.metal_kernel(
        name="sa3_near_attention",
        input_names=["q", "k", "v"],
        output_names=["out"],
        source=SOURCE,
        header=HEADER,
        ensure_row_contiguous=False,
    )
    return cast(Callable[..., list[mx.array]], kernel)


def _kernel(variant: NearVariant, arrays: list[mx.array]) -> list[mx.array]:
    """Return (B, N, H K) of q, k (B, M H, N, K), v (B, H, N, K), whose last axis is contiguous."""
    batch, heads, length, size = arrays[2].shape
    rows = -(-length // ROWS)
    sizes = {"HEADS": heads, "MAPS": variant.maps, "REACH": variant.reach, "TILES": variant.tiles}
    return compiled()(
        inputs=arrays,
        template=[("T", variant.dtype), *sizes.items()],
        grid=(32, rows, batch * heads),
        threadgroup=(32, min(TOGETHER, rows), 1),
        output_shapes=[(batch, length, heads * size)],
        output_dtypes=[variant.dtype],
    )


def _plain(variant: NearVariant, arrays: list[mx.array]) -> list[mx.array]:
    q, k, v = arrays
    place = np.arange(v.shape[2])
    mask = mx.array(np.abs(place[:, None] - place) <= variant.reach)
    maps = [
        mx.fast.scaled_dot_product_attention(*pair, v, scale=HEAD_SIZE**-0.5, mask=mask)
        for pair in zip(q.split(variant.maps, axis=1), k.split(variant.maps, axis=1), strict=True)
    ]
    out = maps[0] if len(maps) == 1 else maps[0] - maps[1]
    return [out.transpose(0, 2, 1, 3).flatten(2)]


def _sample(variant: NearVariant) -> list[mx.array]:
    """Return sequences that no more tiles than those can hold; values lie as a projection leaves them."""
    whole = 2 * variant.reach + ROWS > ROWS * variant.tiles
    length = ROWS * variant.tiles - 3 if whole else ROWS * variant.tiles + 2 * variant.reach + 3
    q, k = (normal(seed, variant.dtype, 2, variant.maps * variant.heads, length, HEAD_SIZE) for seed in (1, 2))
    return [q, k, normal(3, variant.dtype, 2, length, variant.heads, HEAD_SIZE).transpose(0, 2, 1, 3)]


NEAR = Checked("of near attention", _kernel, _plain, _sample)


def near_attention(q: mx.array, k: mx.array, v: mx.array, reach: int) -> mx.array | None:
    """Return softmax(q k^T / 8) v (B, N, D) of q, k (B, M H, N, K), v (B, H, N, K), each over ``reach`` tokens around.

    The numbers of a head lie side by side. None where the reach is too far, or the kernel is off.
    """
    heads, length = v.shape[1], v.shape[2]
    reach = min(reach, length)
    tiles = -(-min(ROWS + 2 * reach, length) // ROWS)
    if reach > FARTHEST:
        return None
    variant = NearVariant(heads=heads, maps=q.shape[1] // heads, reach=reach, tiles=tiles, dtype=q.dtype)
    outputs = NEAR(variant, [q, k, v])
    return None if outputs is None else outputs[0]
