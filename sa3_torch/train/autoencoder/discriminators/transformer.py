"""Build transformer-resampling discriminators: fixed transform, one resampling block, a logit per group of steps
[T1.5].

Shapes: B batch, N audio samples, T steps of the transform, s steps per logit, G groups of s steps and one logit token,
D width, H heads, K head size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_torch.attention import attend_window, heads_first, window_mask
from sa3_torch.layers import DynamicTanh, Rope, gate_silu, rope, rotate
from sa3_torch.same import patch
from sa3_torch.train.autoencoder.transforms import pad_to_multiple, spectrogram

from .config import TransformerConfig, View

MATCHED_BLOCKS = 2  # blocks whose outputs are matched as features


class WindowAttention(nn.Module):
    """Apply differential attention in a sliding window; any head size, unlike the attention of the models."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_qkv = nn.Linear(width, 5 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = DynamicTanh(head_size)
        self.k_norm = DynamicTanh(head_size)

    def forward(self, x: Tensor, table: Rope, mask: Tensor) -> Tensor:
        """Attend within the window, (B, N, D) -> (B, N, D)."""
        parts = self.to_qkv(x).unflatten(-1, (5, -1, self.head_size))  # (B, N, 5, H, K)
        q = self.q_norm(parts[:, :, 0:2].flatten(2, 3))  # (B, N, 2H, K), both maps
        k = self.k_norm(parts[:, :, 2:4].flatten(2, 3))
        q, k, v = heads_first(q), heads_first(k), heads_first(parts[:, :, 4])
        return self.to_out(attend_window(rotate(q, table), rotate(k, table), v, mask))


class WindowBlock(nn.Module):
    """Compute x + attn(dyt(x)), then x + ff(dyt(x)) with a gated feed-forward of one and a half times the width."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.pre_norm = DynamicTanh(width)
        self.attn = WindowAttention(width, head_size)
        self.ff_norm = DynamicTanh(width)
        self.ff_in = nn.Linear(width, 2 * (3 * width // 2))
        self.ff_out = nn.Linear(3 * width // 2, width)

    def forward(self, x: Tensor, table: Rope, mask: Tensor) -> Tensor:
        x = x + self.attn(self.pre_norm(x), table, mask)
        return x + self.ff_out(gate_silu(*self.ff_in(self.ff_norm(x)).chunk(2, dim=-1)))


@lru_cache(maxsize=16)
def padded_window_mask(tokens: int, valid: int, reach: int, device: torch.device) -> Tensor:
    """Return ``window_mask`` with the band |i - j| <= reach; keys from ``valid`` on are seen by no other queries than
    such."""
    mask = window_mask(tokens // reach, reach, device)
    start = torch.arange(tokens // reach, device=device)[:, None, None] * reach
    query = start + torch.arange(reach, device=device)[:, None]
    key = start + torch.arange(3 * reach, device=device) - reach
    return mask & ((key < valid) | (query >= valid))


class Resampler(nn.Module):
    """Return logits (B, ceil(T / s)) for (B, T, inputs), and the outputs of the first blocks."""

    def __init__(self, inputs: int, width: int, config: TransformerConfig, stride: int, window: int) -> None:
        super().__init__()
        self.stride, self.window = stride, window
        self.project_in = nn.Linear(inputs, width)
        self.new_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(WindowBlock(width, config.head_size) for _ in range(config.depth))
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.project_in(x)
        groups = -(-x.shape[1] // self.stride)
        padded = -(-groups // self.window) * self.window
        x = F.pad(x, (0, 0, 0, padded * self.stride - x.shape[1])).unflatten(1, (padded, self.stride))
        # Beside the token the mean of its group: the difference of two fresh attention maps brings it next to nothing.
        new = self.new_token.to(x.dtype) + x.mean(2, keepdim=True)
        x = torch.cat([x, new], dim=2).flatten(1, 2)
        size = self.stride + 1
        mask = padded_window_mask(padded * size, groups * size, self.window * size, x.device)
        table = rope(0, x.shape[1], x.device)
        features = []
        for block in self.blocks:
            x = block(x, table, mask)
            features.append(x[:, : groups * size])
        logits = self.last(x[:, self.stride :: size][:, :groups])
        return logits[..., 0].float(), features[:MATCHED_BLOCKS]


class ViewDiscriminator(nn.Module):
    """Look at patches or the complex spectrogram of the audio by a ``Resampler``."""

    def __init__(self, view: View, config: TransformerConfig, audio_channels: int) -> None:
        super().__init__()
        self.view = view
        inputs = audio_channels * (view.size if view.kind == "patch" else 2 * (view.size // 2 + 1))
        self.net = Resampler(inputs, config.width(inputs), config, view.stride, view.window)

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.net(self._steps(audio.float()))

    def _steps(self, audio: Tensor) -> Tensor:
        """Transform (B, N, channels) -> (B, T, inputs)."""
        size = self.view.size
        if self.view.kind == "patch":
            return patch(pad_to_multiple(audio, size), size)
        return spectrogram(audio, size, size // 4).movedim(2, 1).flatten(2)
