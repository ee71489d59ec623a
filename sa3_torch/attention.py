"""Attend plainly or differentially: self-attention (full, in chunks, or in a sliding window) and cross-attention.

Shapes: B batch, N tokens, S context tokens, D width, H heads, K head size (64). Differential attention [B13] is the
difference of two softmax maps over one V, which is not copied: every map is a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.model.config import HEAD_SIZE

from .choices import way
from .cuda import sequences
from .layers import Rope, linear_rows, rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
HeadNorm = Callable[[int], nn.Module]
Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys (B, N, H or 2H, K), values (B, N, H, K)


def heads_first(x: Tensor) -> Tensor:
    """Return (B, H, N, K) of (B, N, H, K)."""
    return x.transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """Return (B, N, H * K) of (B, H, N, K)."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / 8) v (B, N, D) of q, k (B, H or 2H, N, K), v (B, H, N, K). In fp32 on a CPU.

    2H heads are the two maps of differential attention, both over v; their difference is returned. ``mask`` is boolean,
    True = may attend, or a bias of the logits.
    """
    return _merge_heads(_attend(_maps(q, k, v.shape[1]), v, mask))


def _maps(q: Tensor, k: Tensor, heads: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return queries and keys of each softmax map, of (B, H or 2H, N, K)."""
    return zip(q.split(heads, dim=1), k.split(heads, dim=1), strict=True)


def _difference(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else maps[0] - maps[1]


def _attend(maps: Iterable[tuple[Tensor, Tensor]], v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the map, or the difference of both, over v."""
    dtype, cpu = v.dtype, v.device.type == "cpu"
    number = torch.float32 if cpu else dtype  # 16 bits are slower on a CPU
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float() if cpu else mask
        if mask.dtype != number:  # cuDNN misreads it: pytorch #191612
            raise ValueError(f"a bias of {mask.dtype} for queries of {number}: attention takes one number type")
    v, made = v.to(number), []
    for pair in maps:
        q, k = (x.to(dtype).to(number) for x in pair)  # norms and rotations of 16-bit products made them fp32
        with torch.autocast("cpu", enabled=False):
            made.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).to(dtype))
    return _difference(made)


def attend_to(real: Tensor | None, like: Tensor) -> Attend:
    """Return ``attend`` where only the tokens ``real`` (B, N) bool are attended to, the first ones of every item, or
    all where it is None. What is given for the other tokens means nothing. ``like``: a tensor of the network.

    Where clips stand ``apart``, every one is a sequence of its own, and its padding another one: there is no mask, with
    which GPUs take slower kernels, and no length is known to the host, so that one graph serves all of them.
    """
    if real is None:
        return attend
    if way("unequal") == "masked" or not sequences.ready(like):
        return partial(attend, mask=real[:, None, None])
    batch, tokens = real.shape
    starts = torch.arange(0, batch * tokens, tokens, device=real.device, dtype=torch.int32)
    ends = torch.stack([starts + real.sum(1, dtype=torch.int32), starts + tokens], dim=1).flatten()
    return partial(_attend_apart, ends=F.pad(ends, (1, 0)))


def _attend_apart(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """Do what ``attend`` does in sequences of all tokens of a batch, which are at ends[i]..ends[i + 1] - 1: items and
    their padding in turn. Queries may be those of the last tokens of every item only.
    """
    (batch, heads, tokens, _), rows = v.shape, q.shape[2]
    q_ends = ends
    if rows < tokens:
        items = torch.arange(1, len(ends) + 1, device=ends.device, dtype=ends.dtype) // 2  # that have begun before it
        q_ends = ends - items * (tokens - rows)
    q, k, v = (x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B N, H or 2H, K)
    maps = [sequences.attend(*pair, v, q_ends, ends, rows, tokens) for pair in _maps(q, k, heads)]
    return _difference(maps).flatten(1).unflatten(0, (batch, rows))


def window_mask(groups: int, group: int, device: torch.device) -> Tensor:
    """Mark the keys of 3 * group neighbours that a query sees: (groups, group, 3 * group) bool, |i - j| <= group."""
    query = torch.arange(group, device=device)[:, None]
    key = torch.arange(3 * group, device=device)[None, :] - group  # relative to the query group
    band = ((query - key).abs() <= group)[None]
    position = torch.arange(groups, device=device)[:, None, None] * group + key
    return band & (position >= 0) & (position < groups * group)


def attend_window(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend in a sliding window without a dense mask [B42]: shapes as ``attend``.

    ``mask`` comes from ``window_mask``. Keys and values have N = groups * group tokens; of every group there are as
    many queries as the mask has rows. Keys and values are overlapping strided views; both maps of differential
    attention share that of v.
    """
    groups, rows, window = mask.shape
    group = window // 3

    def windows(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, group, group)).flatten(0, 1)  # (B H, N + 2 group, K)
        return x.unfold(1, window, group).transpose(-1, -2)  # (B H, groups, 3 group, K)

    maps = ((part.flatten(0, 1).unflatten(1, (groups, rows)), windows(keys)) for part, keys in _maps(q, k, v.shape[1]))
    out = _attend(maps, windows(v), mask[None])
    return _merge_heads(out.flatten(1, 2).unflatten(0, v.shape[:2]))


class SelfAttention(nn.Module):
    """Project to q, k, v (and q', k') at once, norm per head, rotate, attend, project out [B13]."""

    def __init__(self, width: int, *, differential: bool, head_norm: HeadNorm) -> None:
        super().__init__()
        self.differential = differential
        self.to_qkv = nn.Linear(width, (5 if differential else 3) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = head_norm(HEAD_SIZE)
        self.k_norm = head_norm(HEAD_SIZE)

    def heads(self, x: Tensor) -> Heads:
        """Return queries, keys and values of the tokens (B, N, D), normed but without their positions."""
        parts = self.to_qkv(x).unflatten(-1, (-1, x.shape[2] // HEAD_SIZE, HEAD_SIZE))  # (B, N, 3 or 5, H, K)
        q, k = self.q_norm(parts[:, :, 0::3]), self.k_norm(parts[:, :, 1::3])  # with q', k' after them
        v = parts[:, :, 2]
        if v.requires_grad:  # for its backward pass attention would keep all parts, of which the values are a view
            v = v.contiguous()
        return q.flatten(2, 3), k.flatten(2, 3), v

    def heads_at(self, x: Tensor, rows: slice) -> Heads:
        """Return what ``heads`` does, with queries of the tokens ``rows`` only."""
        width = x.shape[2]

        def parts(tokens: Tensor, start: int, stop: int) -> Tensor:
            out = linear_rows(self.to_qkv, tokens, start * width, stop * width)
            return out.unflatten(-1, (stop - start, width // HEAD_SIZE, HEAD_SIZE))

        q, kv = [parts(x[:, rows], 0, 1)], parts(x, 1, 3)
        k = [kv[:, :, :1]]
        if self.differential:
            q, k = [*q, parts(x[:, rows], 3, 4)], [*k, parts(x, 4, 5)]
        q, k = self.q_norm(torch.cat(q, dim=2)), self.k_norm(torch.cat(k, dim=2))
        return q.flatten(2, 3), k.flatten(2, 3), kv[:, :, 1]

    def mix(self, heads: Heads, q_table: Rope, k_table: Rope, attend: Attend) -> Tensor:
        """Do what follows ``heads``: positions, attention, output projection -> (B, N, D)."""
        q, k, v = (heads_first(x) for x in heads)
        return self.to_out(attend(rotate(q, q_table), rotate(k, k_table), v))

    def forward(self, x: Tensor, table: Rope, attend: Attend) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        return self.mix(self.heads(x), table, table, attend)

    def at(self, x: Tensor, rows: slice, table: Rope, attend: Attend) -> Tensor:
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

    def prepare(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return normed keys (B, H or 2H, S, K), values (B, H, S, K) of (B, S, D). Rows of to_kv are k, (k',) v."""
        heads = context.shape[2] // HEAD_SIZE
        parts = self.to_kv(context).unflatten(-1, (-1, HEAD_SIZE))  # (B, S, 2H or 3H, K)
        return heads_first(self.k_norm(parts[:, :, :-heads])), heads_first(parts[:, :, -heads:])

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (B, N, D) to (B, N, D); ``bias`` (B, 1, 1, S) is added to the logits."""
        q = self.q_norm(self.to_q(x).unflatten(-1, (-1, HEAD_SIZE)))  # (B, N, H or 2H, K)
        return self.to_out(attend(heads_first(q), keys, values, bias))
