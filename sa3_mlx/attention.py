"""Attend plainly or differentially: self-attention (full, in chunks, or in a sliding window) and cross-attention.

Shapes: B batch, N tokens, S context tokens, D width, H heads, K head size (64). Differential attention [B13] is the
difference of two softmax maps over one V. On a GPU attention leaves its result as (B, N, H, K) in memory: what is
transposed before it is subtracted is read as it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sa3_mlx.common.model.config import HEAD_SIZE
from sa3_mlx.runtime import mx, nn

from .choices import way
from .kernels import head_norm_rope, near_attention
from .layers import Rope, linear_rows, rotate

Attend = Callable[[mx.array, mx.array, mx.array], mx.array]
HeadNorm = Callable[[int], nn.Module]
Heads = tuple[mx.array, mx.array, mx.array]  # queries, keys (B, N, H or 2H, K), values (B, N, H, K)


def heads_first(x: mx.array) -> mx.array:
    """Return (B, H, N, K) of (B, N, H, K)."""
    return x.transpose(0, 2, 1, 3)


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """Return softmax(q k^T / 8) v (B, N, D) of q, k (B, H or 2H, N, K), v (B, H, N, K); the softmax is fp32.

    2H heads are the two maps of differential attention, both over v; their difference is returned. ``mask`` is boolean,
    True = may attend, or a bias of the logits.
    """
    if q.shape[1] == v.shape[1] or way("two_maps") == "apart":
        maps = [_attend(*pair, v, mask).transpose(0, 2, 1, 3) for pair in _maps(q, k, v)]
    else:
        maps = _attend(q, k, mx.concatenate([v, v], axis=1), mask).transpose(0, 2, 1, 3).split(2, axis=2)
    return _difference(maps).flatten(2)


def _maps(q: mx.array, k: mx.array, v: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
    """Return queries and keys of each softmax map."""
    heads = v.shape[1]
    return zip(q.split(q.shape[1] // heads, axis=1), k.split(k.shape[1] // heads, axis=1), strict=True)


def _difference(maps: Sequence[mx.array]) -> mx.array:
    return maps[0] if len(maps) == 1 else maps[0] - maps[1]


def _attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=HEAD_SIZE**-0.5, mask=mask)


def window_mask(groups: int, group: int) -> mx.array:
    """Mark the keys of 3 * group neighbours that a query sees: (groups, group, 3 * group) bool, |i - j| <= group."""
    query = np.arange(group)[:, None]
    key = np.arange(3 * group)[None, :] - group  # relative to the query group
    band = (np.abs(query - key) <= group)[None]
    position = np.arange(groups)[:, None, None] * group + key
    return mx.array(band & (position >= 0) & (position < groups * group))


def attend_window(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """Attend in a sliding window without a dense mask [B42]: shapes as ``attend``.

    ``mask`` comes from ``window_mask``. Keys and values have N = groups * group tokens, or a group of zeros before and
    after them too; of every group there are as many queries as the mask has rows. Keys and values are overlapping
    strided views, of which both maps of differential attention share that of v. Either every head is an item of the
    batch and the groups take the place of heads, so that nothing is transposed; or every group is an item.
    """
    groups, rows, window = mask.shape
    group, (batch, heads, _, size) = window // 3, v.shape
    by_groups = way("window_layout") == "groups"

    def windows(x: mx.array) -> mx.array:
        if x.shape[2] == groups * group:
            x = mx.pad(x, [(0, 0), (0, 0), (group, group), (0, 0)])
        token, head = size, x.shape[2] * size
        if by_groups:
            strides = (heads * head, group * token, head, token, 1)
            return mx.as_strided(x, (batch, groups, heads, window, size), strides).flatten(0, 1)
        return mx.as_strided(x, (batch * heads, groups, window, size), (head, group * token, token, 1))

    def queries(x: mx.array) -> mx.array:
        x = x.reshape(batch, heads, groups, rows, size)
        return x.swapaxes(1, 2).flatten(0, 1) if by_groups else x.flatten(0, 1)

    def tokens_first(x: mx.array) -> mx.array:
        if by_groups:
            return x.swapaxes(1, 2).reshape(batch, groups, rows, heads, size)
        return x.reshape(batch, heads, groups, rows, size).transpose(0, 2, 3, 1, 4)

    seen = mx.tile(mask[:, None], (batch, 1, 1, 1)) if by_groups else mask[None]
    values = windows(v)
    maps = [tokens_first(_attend(queries(own), windows(keys), values, seen)) for own, keys in _maps(q, k, v)]
    return _difference(maps).reshape(batch, groups * rows, heads * size)


@dataclass(frozen=True)
class Near:
    """Attend to near tokens: in a sliding window with a mask of ``window_mask``, or to all tokens of a chunk."""

    mask: mx.array | None = None

    @property
    def padding(self) -> int:
        """Return how many tokens of zeros it needs before and after keys and values; it can add them itself."""
        return 0 if self.mask is None or way("window_attention") == "kernel" else self.mask.shape[2] // 3

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Return what ``attend`` does, as the choice of the window says."""
        chosen, dtype = way("window_attention"), q.dtype
        if chosen == "kernel" and q.shape[2] == v.shape[2]:
            out = near_attention(q, k, v, v.shape[2] if self.mask is None else self.mask.shape[2] // 3)
            if out is not None:
                return out
        if chosen == "float16":
            q, k, v = (x.astype(mx.float16) for x in (q, k, v))
        return (attend(q, k, v) if self.mask is None else attend_window(q, k, v, self.mask)).astype(dtype)


class SelfAttention(nn.Module):
    """Project to q, k, v (and q', k') at once, norm per head, rotate, attend, project out [B13]."""

    def __init__(self, width: int, *, differential: bool, head_norm: HeadNorm) -> None:
        super().__init__()
        self.differential = differential
        self.to_qkv = nn.Linear(width, (5 if differential else 3) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = head_norm(HEAD_SIZE)
        self.k_norm = head_norm(HEAD_SIZE)

    def heads(self, x: mx.array) -> Heads:
        """Return queries, keys and values of the tokens (B, N, D), normed but without their positions."""
        parts = self.to_qkv(x).reshape(*x.shape[:2], -1, x.shape[2] // HEAD_SIZE, HEAD_SIZE)  # (B, N, 3 or 5, H, K)
        q, k = self.q_norm(parts[:, :, 0::3]), self.k_norm(parts[:, :, 1::3])  # with q', k' after them
        return q.flatten(2, 3), k.flatten(2, 3), parts[:, :, 2]

    def heads_at(self, x: mx.array, rows: slice) -> Heads:
        """Return what ``heads`` does, with queries of the tokens ``rows`` only."""
        width = x.shape[2]

        def parts(tokens: mx.array, start: int, stop: int) -> mx.array:
            out = linear_rows(self.to_qkv, tokens, start * width, stop * width)
            return out.reshape(*tokens.shape[:2], stop - start, width // HEAD_SIZE, HEAD_SIZE)

        q, kv = [parts(x[:, rows], 0, 1)], parts(x, 1, 3)
        k = [kv[:, :, :1]]
        if self.differential:
            q, k = [*q, parts(x[:, rows], 3, 4)], [*k, parts(x, 4, 5)]
        q, k = self.q_norm(mx.concatenate(q, axis=2)), self.k_norm(mx.concatenate(k, axis=2))
        return q.flatten(2, 3), k.flatten(2, 3), kv[:, :, 1]

    def mix(self, heads: Heads, q_table: Rope, k_table: Rope, attend: Attend) -> mx.array:
        """Do what follows ``heads``: positions, attention, output projection -> (B, N, D)."""
        q, k, v = (heads_first(x) for x in heads)
        return self.to_out(attend(rotate(q, q_table), rotate(k, k_table), v))

    def __call__(self, x: mx.array, table: Rope, attend: Attend) -> mx.array:
        """Map (B, N, D) to (B, N, D)."""
        if way("head_norm_rope") == "kernel":
            padding = attend.padding if isinstance(attend, Near) else 0
            heads = x.shape[2] // HEAD_SIZE
            placed = head_norm_rope(self.to_qkv(x), heads, self.q_norm, self.k_norm, table, padding)
            if placed is not None:
                return self.to_out(attend(*placed))
        return self.mix(self.heads(x), table, table, attend)

    def at(self, x: mx.array, rows: slice, table: Rope, attend: Attend) -> mx.array:
        """Return the result for the tokens ``rows`` only, with ``attend`` between these and all tokens."""
        cos, sin = table
        return self.mix(self.heads_at(x, rows), (cos[rows], sin[rows]), table, attend)


class CrossAttention(nn.Module):
    """Attend to the context, without positions [B6, B13]; keys and values are prepared once per prompt."""

    def __init__(self, width: int, *, differential: bool, head_norm: HeadNorm) -> None:
        super().__init__()
        self.differential = differential
        self.to_q = nn.Linear(width, (2 if differential else 1) * width, bias=False)
        self.to_kv = nn.Linear(width, (3 if differential else 2) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = head_norm(HEAD_SIZE)
        self.k_norm = head_norm(HEAD_SIZE)

    def prepare(self, context: mx.array) -> tuple[mx.array, mx.array]:
        """Return normed keys (B, H or 2H, S, K), values (B, H, S, K) of (B, S, D). Rows of to_kv are k, (k',) v."""
        heads = context.shape[2] // HEAD_SIZE
        parts = self.to_kv(context).reshape(*context.shape[:2], -1, HEAD_SIZE)  # (B, S, 2H or 3H, K)
        return heads_first(self.k_norm(parts[:, :, :-heads])), heads_first(parts[:, :, -heads:])

    def __call__(self, x: mx.array, keys: mx.array, values: mx.array, bias: mx.array | None = None) -> mx.array:
        """Map (B, N, D) to (B, N, D); ``bias`` (B, 1, 1, S) is added to the logits."""
        q = self.q_norm(self.to_q(x).reshape(*x.shape[:2], -1, HEAD_SIZE))  # (B, N, H or 2H, K)
        return self.to_out(attend(heads_first(q), keys, values, bias))
