"""Plain and differential attention: self-attention (full, in chunks, or in a sliding window) and cross-attention.

Shapes: B batch, N tokens, S context tokens, D width, H heads, K head size (64). Differential attention [B13] is the
difference of two softmax maps over one V; both maps run as 2H heads of one call, then the halves are subtracted.
"""

from __future__ import annotations

from collections.abc import Callable

from . import blas  # noqa: F401 (before mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import Rope, rotate
from .spec.config import HEAD_SIZE

Attend = Callable[[mx.array, mx.array, mx.array], mx.array]
HeadNorm = Callable[[int], nn.Module]


def split_heads(x: mx.array) -> mx.array:
    """(B, N, H * K) -> (B, H, N, K)"""
    return x.reshape(*x.shape[:2], -1, HEAD_SIZE).transpose(0, 2, 1, 3)


def merge_heads(x: mx.array) -> mx.array:
    """(B, H, N, K) -> (B, N, H * K)"""
    return x.transpose(0, 2, 1, 3).flatten(2)


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """softmax(q k^T / 8) v; ``mask`` is boolean, True = may attend. The softmax is in fp32 whatever the dtype."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=HEAD_SIZE**-0.5, mask=mask)


def window_mask(groups: int, group: int) -> mx.array:
    """Which of 3 * group neighbouring keys a query sees: (groups, group, 3 * group) bool, the band |i - j| <= group."""
    query = np.arange(group)[:, None]
    key = np.arange(3 * group)[None, :] - group  # relative to the query group
    band = (np.abs(query - key) <= group)[None]
    position = np.arange(groups)[:, None, None] * group + key
    return mx.array(band & (position >= 0) & (position < groups * group))


def attend_window(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """Sliding-window attention without a dense mask [B42]: (B, H, N, K) -> (B, H, N, K).

    ``mask`` comes from ``window_mask``; N = groups * group. Keys and values are overlapping strided views, with the
    heads as the batch axis and the groups as the head axis, so that nothing is transposed.
    """
    groups, group, _ = mask.shape
    batch, heads, length, size = q.shape
    padded = length + 2 * group

    def windows(x: mx.array) -> mx.array:
        x = mx.pad(x, [(0, 0), (0, 0), (group, group), (0, 0)])  # (B, H, N + 2 group, K)
        shape = (batch * heads, groups, 3 * group, size)
        return mx.as_strided(x, shape, (padded * size, group * size, size, 1))

    out = attend(q.reshape(batch * heads, groups, group, size), windows(k), windows(v), mask[None])
    return out.reshape(batch, heads, length, size)


class SelfAttention(nn.Module):
    """Fused q, k, v (and q', k') projection, per-head norm, rotary embedding, attention, output projection [B13]."""

    def __init__(self, width: int, *, differential: bool, head_norm: HeadNorm) -> None:
        super().__init__()
        self.differential = differential
        self.to_qkv = nn.Linear(width, (5 if differential else 3) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = head_norm(HEAD_SIZE)
        self.k_norm = head_norm(HEAD_SIZE)

    def __call__(self, x: mx.array, table: Rope, attend: Attend) -> mx.array:
        """(B, N, D) -> (B, N, D). ``attend`` maps q, k, v (B, H or 2H, N, K) to (B, H or 2H, N, K)."""
        parts = [split_heads(p) for p in self.to_qkv(x).split(5 if self.differential else 3, axis=-1)]
        v = parts[2]
        if self.differential:
            q = rotate(self.q_norm(mx.concatenate([parts[0], parts[3]], axis=1)), table)  # (B, 2H, N, K)
            k = rotate(self.k_norm(mx.concatenate([parts[1], parts[4]], axis=1)), table)
            first, second = attend(q, k, mx.concatenate([v, v], axis=1)).split(2, axis=1)
            out = first - second
        else:
            out = attend(rotate(self.q_norm(parts[0]), table), rotate(self.k_norm(parts[1]), table), v)
        return self.to_out(merge_heads(out))


class CrossAttention(nn.Module):
    """Attention to the context, no positions and no mask [B6, B13]. Keys and values are prepared once per prompt."""

    def __init__(self, width: int, *, differential: bool, head_norm: HeadNorm) -> None:
        super().__init__()
        self.differential = differential
        self.to_q = nn.Linear(width, (2 if differential else 1) * width, bias=False)
        self.to_kv = nn.Linear(width, (3 if differential else 2) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = head_norm(HEAD_SIZE)
        self.k_norm = head_norm(HEAD_SIZE)

    def prepare(self, context: mx.array) -> tuple[mx.array, mx.array]:
        """(B, S, D) -> normed keys and values, each (B, H or 2H, S, K). Differential rows are k, k', v."""
        parts = [split_heads(p) for p in self.to_kv(context).split(3 if self.differential else 2, axis=-1)]
        v = parts[-1]
        if self.differential:
            return self.k_norm(mx.concatenate(parts[:2], axis=1)), mx.concatenate([v, v], axis=1)
        return self.k_norm(parts[0]), v

    def __call__(self, x: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """(B, N, D) -> (B, N, D)"""
        out = attend(self.q_norm(split_heads(self.to_q(x))), keys, values)
        if self.differential:
            first, second = out.split(2, axis=1)
            out = first - second
        return self.to_out(merge_heads(out))
