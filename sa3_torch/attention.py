"""Plain and differential attention: self-attention (full, in chunks, or in a sliding window) and cross-attention.

Shapes: B batch, N tokens, S context tokens, D width, H heads, K head size (64). Differential attention [B13] is the
difference of two softmax maps over one V; both maps run as 2H heads of one call, then the halves are subtracted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.spec.config import HEAD_SIZE

from .layers import Rope, rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
HeadNorm = Callable[[int], nn.Module]


def split_heads(x: Tensor) -> Tensor:
    """(B, N, H * K) -> (B, H, N, K)"""
    return x.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, H * K)"""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / 8) v; ``mask`` is boolean, True = may attend. In fp32 on a CPU: bf16 is slower there."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)


def window_mask(groups: int, group: int, device: torch.device) -> Tensor:
    """Which of 3 * group neighbouring keys a query sees: (groups, group, 3 * group) bool, the band |i - j| <= group."""
    query = torch.arange(group, device=device)[:, None]
    key = torch.arange(3 * group, device=device)[None, :] - group  # relative to the query group
    band = ((query - key).abs() <= group)[None]
    position = torch.arange(groups, device=device)[:, None, None] * group + key
    return band & (position >= 0) & (position < groups * group)


def attend_window(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Sliding-window attention without a dense mask [B42]: (B, H, N, K) -> (B, H, N, K).

    ``mask`` comes from ``window_mask``; N = groups * group. Keys and values are overlapping strided views.
    """
    groups, group, _ = mask.shape

    def windows(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, group, group)).flatten(0, 1)  # (B H, N + 2 group, K)
        return x.unfold(1, 3 * group, group).transpose(-1, -2)  # (B H, groups, 3 group, K)

    out = attend(q.flatten(0, 1).unflatten(1, (groups, group)), windows(k), windows(v), mask[None])
    return out.flatten(1, 2).unflatten(0, q.shape[:2])


class SelfAttention(nn.Module):
    """Fused q, k, v (and q', k') projection, per-head norm, rotary embedding, attention, output projection [B13]."""

    def __init__(self, width: int, *, differential: bool, head_norm: HeadNorm) -> None:
        super().__init__()
        self.differential = differential
        self.to_qkv = nn.Linear(width, (5 if differential else 3) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = head_norm(HEAD_SIZE)
        self.k_norm = head_norm(HEAD_SIZE)

    def forward(self, x: Tensor, table: Rope, attend: Attend) -> Tensor:
        """(B, N, D) -> (B, N, D). ``attend`` maps q, k, v (B, H or 2H, N, K) to (B, H or 2H, N, K)."""
        parts = [split_heads(p) for p in self.to_qkv(x).chunk(5 if self.differential else 3, dim=-1)]
        v = parts[2]
        if self.differential:
            q = rotate(self.q_norm(torch.cat([parts[0], parts[3]], dim=1)), table)  # (B, 2H, N, K)
            k = rotate(self.k_norm(torch.cat([parts[1], parts[4]], dim=1)), table)
            first, second = attend(q, k, torch.cat([v, v], dim=1)).chunk(2, dim=1)
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

    def prepare(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> normed keys and values, each (B, H or 2H, S, K). Differential rows are k, k', v."""
        parts = [split_heads(p) for p in self.to_kv(context).chunk(3 if self.differential else 2, dim=-1)]
        v = parts[-1]
        if self.differential:
            return self.k_norm(torch.cat(parts[:2], dim=1)), torch.cat([v, v], dim=1)
        return self.k_norm(parts[0]), v

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        out = attend(self.q_norm(split_heads(self.to_q(x))), keys, values)
        if self.differential:
            first, second = out.chunk(2, dim=1)
            out = first - second
        return self.to_out(merge_heads(out))
