"""Norm queries and keys per head, turn them and lay them out, in one kernel [B12, B13].

Shapes: B batch, N tokens, H heads, M maps (1, or 2 of differential attention), K head size (64). MLX takes some twenty
kernels for it: a norm copies strided heads, and the turned parts of a head are joined by copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

from sa3_mlx.common.model.config import HEAD_SIZE, ROTARY_SIZE
from sa3_mlx.runtime import mx, nn

from ..layers import DynamicTanh, RMSNorm, Rope, rope, rotate, scale_tanh
from .checked import Checked, normal

# A simdgroup has 32 lanes; lane l holds elements l and l + 32 of one head of one token. The first 32 elements turn, in
# pairs of l and l + 16: the partner is with lane l ^ 16.
SOURCE = """
    const int lane = thread_index_in_simdgroup;
    const int slot = thread_position_in_grid.y;  // heads of queries, then of keys, then of values
    const int length = parts_shape[1], padded = length + 2 * PADDING;
    const int item = thread_position_in_grid.z / padded;
    const int place = int(thread_position_in_grid.z % padded) - PADDING;  // in the sequence; the padding is outside it
    const bool inside = place >= 0 && place < length;

    const int kind = slot / (MAPS * HEADS);  // 0 queries, 1 keys, 2 values
    const int index = slot % (MAPS * HEADS);
    if (kind == 0 && !inside) {
        return;
    }
    const int part = kind == 2 ? 2 : kind + 3 * (index / HEADS);
    float first = 0.0f, second = 0.0f;
    if (inside) {
        const size_t token = size_t(item) * length + place;
        const size_t from = ((token * PARTS + part) * HEADS + index % HEADS) * 64 + lane;
        first = float(parts[from]);
        second = float(parts[from + 32]);
    }
    if (kind < 2 && inside) {
NORM
        const float partner = metal::simd_shuffle_xor(first, ushort(16));
        const int angle = place * 16 + lane % 16;
        first = first * cosines[angle] + (lane < 16 ? -partner : partner) * sines[angle];
    }
    if (kind == 0) {
        const size_t to = ((size_t(item) * MAPS * HEADS + index) * length + place) * 64 + lane;
        q[to] = static_cast<T>(first);
        q[to + 32] = static_cast<T>(second);
    } else if (kind == 1) {
        const size_t to = ((size_t(item) * MAPS * HEADS + index) * padded + place + PADDING) * 64 + lane;
        k[to] = static_cast<T>(first);
        k[to + 32] = static_cast<T>(second);
    }
VALUES
"""
RMS = """
        const float rms = metal::precise::rsqrt(metal::simd_sum(first * first + second * second) / 64.0f + eps);
        first *= rms * float(kind == 0 ? q_gamma[lane] : k_gamma[lane]);
        second *= rms * float(kind == 0 ? q_gamma[lane + 32] : k_gamma[lane + 32]);
"""
TANH = """
        const float alpha = float(kind == 0 ? q_alpha[0] : k_alpha[0]);
        first = float(kind == 0 ? q_gamma[lane] : k_gamma[lane]) * metal::precise::tanh(alpha * first)
            + float(kind == 0 ? q_beta[lane] : k_beta[lane]);
        second = float(kind == 0 ? q_gamma[lane + 32] : k_gamma[lane + 32]) * metal::precise::tanh(alpha * second)
            + float(kind == 0 ? q_beta[lane + 32] : k_beta[lane + 32]);
"""
VALUES = """
    else {
        const size_t to = ((size_t(item) * HEADS + index) * padded + place + PADDING) * 64 + lane;
        v[to] = static_cast<T>(first);
        v[to + 32] = static_cast<T>(second);
    }
"""
TABLES = ["parts", "cosines", "sines"]
WEIGHTS = {
    "rms": ["q_gamma", "k_gamma", "eps"],
    "tanh": ["q_alpha", "q_gamma", "q_beta", "k_alpha", "k_gamma", "k_beta"],
}
TOGETHER = 8  # simdgroups of a threadgroup


@dataclass(frozen=True)
class HeadsVariant:
    """Say what a kernel is compiled for."""

    heads: int  # H
    maps: int  # M
    norm: str
    eps: float  # of rms
    padding: int  # tokens of zeros before and after keys and values; where there are none, values stay as they are
    dtype: mx.Dtype

    @property
    def parts(self) -> int:
        """Count what the projection makes of a token: q, k, v, and q', k'."""
        return 3 * self.maps - (self.maps == 2)


@cache
def compiled(norm: str, values: bool) -> Callable[..., list[mx.array]]:
    source = SOURCE.replace("NORM\n", RMS if norm == "rms" else TANH).replace("VALUES\n", VALUES if values else "")
    kernel: object = mx.fast.metal_kernel(
        name=f"sa3_heads_{norm}{'_values' if values else ''}",
        input_names=TABLES + WEIGHTS[norm],
        output_names=["q", "k", "v"] if values else ["q", "k"],
        source=source,
        header="#include <metal_stdlib>\n#include <metal_simdgroup>\n",
    )
    return cast(Callable[..., list[mx.array]], kernel)


def _kernel(variant: HeadsVariant, arrays: list[mx.array]) -> list[mx.array]:
    """Return q, k (B, M H, N, K) and, padded, v (B, H, N, K) of parts (B, N, parts H K), tables and weights."""
    batch, length, _ = arrays[0].shape
    heads, maps, padded = variant.heads, variant.maps, length + 2 * variant.padding
    shapes = [(batch, maps * heads, length, HEAD_SIZE), (batch, maps * heads, padded, HEAD_SIZE)]
    slots = 2 * maps * heads
    if variant.padding:
        shapes.append((batch, heads, padded, HEAD_SIZE))
        slots += heads
    sizes = {"HEADS": heads, "MAPS": maps, "PARTS": variant.parts, "PADDING": variant.padding}
    return compiled(variant.norm, variant.padding > 0)(
        inputs=[*arrays, variant.eps] if variant.norm == "rms" else arrays,
        template=[("T", variant.dtype), *sizes.items()],
        grid=(32, slots, batch * padded),
        threadgroup=(32, min(TOGETHER, slots), 1),
        output_shapes=shapes,
        output_dtypes=[variant.dtype] * len(shapes),
    )


def _plain(variant: HeadsVariant, arrays: list[mx.array]) -> list[mx.array]:
    parts, cos, sin, *weights = arrays
    each = parts.reshape(*parts.shape[:2], variant.parts, variant.heads, HEAD_SIZE)
    half = len(weights) // 2
    turned = []
    for kind, own in ((0, weights[:half]), (1, weights[half:])):
        x = each[:, :, kind::3]
        x = mx.fast.rms_norm(x, own[0], variant.eps) if variant.norm == "rms" else scale_tanh(x, *own)
        turned.append(rotate(x.flatten(2, 3).transpose(0, 2, 1, 3), (cos, sin)))
    if not variant.padding:
        return turned
    ends = [(0, 0), (0, 0), (variant.padding, variant.padding), (0, 0)]
    return [turned[0], mx.pad(turned[1], ends), mx.pad(each[:, :, 2].transpose(0, 2, 1, 3), ends)]


def _sample(variant: HeadsVariant) -> list[mx.array]:
    length, names = 37, WEIGHTS[variant.norm]
    parts = normal(0, variant.dtype, 2, length, variant.parts * variant.heads * HEAD_SIZE)
    sizes = [1 if name.endswith("alpha") else HEAD_SIZE for name in names if name != "eps"]
    weights = [normal(1 + seed, variant.dtype, size) for seed, size in enumerate(sizes)]
    return [parts, *rope(900, 900 + length), *weights]


HEADS = Checked("of queries and keys", _kernel, _plain, _sample)


def head_norm_rope(
    parts: mx.array, heads: int, q_norm: nn.Module, k_norm: nn.Module, table: Rope, padding: int
) -> tuple[mx.array, mx.array, mx.array] | None:
    """Return what attention takes of a projection (B, N, 3 D or 5 D): q, k (B, M H, N, K), v (B, H, N, K).

    Keys and values get ``padding`` tokens of zeros before and after them. None where the kernel is off.
    """
    assert table[0].shape == (parts.shape[1], ROTARY_SIZE // 2), "a lane holds one turned element of a head"
    norms, eps = (q_norm, k_norm), 0.0
    if isinstance(q_norm, RMSNorm):
        norm, eps = "rms", q_norm.eps
        weights = [module.gamma for module in norms]
    else:
        assert isinstance(q_norm, DynamicTanh)
        norm, weights = "tanh", [array for module in norms for array in (module.alpha, module.gamma, module.beta)]
    count = parts.shape[2] // (heads * HEAD_SIZE)  # 3, or 5 of differential attention
    variant = HeadsVariant(heads=heads, maps=count // 2, norm=norm, eps=eps, padding=padding, dtype=parts.dtype)
    outputs = HEADS(variant, [parts, *table, *weights])
    if outputs is None:
        return None
    q, k, *v = outputs
    if not v:
        v = [parts.reshape(*parts.shape[:2], count, heads, HEAD_SIZE)[:, :, 2].transpose(0, 2, 1, 3)]
    return q, k, v[0]
