"""Encode text with the encoder half of T5Gemma [A4].

Shapes: B batch, S tokens, D width, H heads, K head size.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.files.safetensors import StoredTable, TensorFile
from sa3_mlx.common.model.config import TextEncoderConfig

from .cuda.transfer import upload
from .layers import graphed

SOFT_CAP = 50.0
ROPE_BASE = 10_000.0


class GemmaNorm(nn.Module):
    """Norm by RMS in fp32 with gain 1 + weight, eps 1e-6 [B2]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), 1e-6).to(x.dtype)


def rope_full(length: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin over all dimensions of a head, each (S, K) fp32, halves repeated [B2]."""
    exponent = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    frequency = (1.0 / np.float32(ROPE_BASE) ** exponent).astype(np.float32)
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency[None]
    angle = np.concatenate([angle, angle], axis=1).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class TextAttention(nn.Module):
    """Attend in both directions, scores soft-capped at 50 before the mask, fp32 softmax [B2]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Map (B, S, D), mask (B, S) bool, to (B, S, D)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)  # (B, H, S, K)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = SOFT_CAP * torch.tanh(scores / SOFT_CAP)
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class TextMLP(nn.Module):
    """Return down(gelu_tanh(gate(x)) * up(x)) [B2]."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class TextLayer(nn.Module):
    """Norm before and after both branches [B2]."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.pre_attn_norm = GemmaNorm(config.width)
        self.self_attn = TextAttention(config.width, config.heads)
        self.post_attn_norm = GemmaNorm(config.width)
        self.pre_ff_norm = GemmaNorm(config.width)
        self.mlp = TextMLP(config.width, config.intermediate)
        self.post_ff_norm = GemmaNorm(config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.post_attn_norm(self.self_attn(self.pre_attn_norm(x), cos, sin, mask))
        return x + self.post_ff_norm(self.mlp(self.pre_ff_norm(x)))


class FileEmbedding(nn.Module):
    """Read rows of an embedding table in a checkpoint: a prompt needs dozens of 256,000, so it stays in the file.

    ``dtype`` None keeps the file's.
    """

    def __init__(self, path: Path, name: str, dtype: torch.dtype | None, device: torch.device) -> None:
        super().__init__()
        self.path = path
        self.name = name
        self.dtype = dtype
        self.device = device

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows (B, S, D) of ids (B, S); the file is on the host, so ids that are there too wait for nothing."""
        rows = self.table.rows(ids.reshape(-1).cpu().numpy())
        own = {"BF16": torch.bfloat16, "F16": torch.float16}.get(self.table.dtype, torch.float32)
        return upload(rows, self.device).to(self.dtype or own).reshape(*ids.shape, self.table.width)

    @cached_property
    def table(self) -> StoredTable:
        """Open the table."""
        with TensorFile.open(self.path) as file:
            return file.table(self.name)


class T5GemmaEncoder(nn.Module):
    """Encode token ids to hidden states. Rows at padded positions mean nothing; the conditioner replaces them [B4]."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: nn.Embedding | FileEmbedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.depth))
        self.norm = GemmaNorm(config.width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return states (B, S, D) of ids (B, S) int, mask (B, S) bool, True at real tokens."""
        x = self.embed_tokens(ids)
        x = x * torch.tensor(math.sqrt(self.config.width), dtype=x.dtype)  # rounded to the dtype [B2]
        tables = rope_full(ids.shape[1], self.config.width // self.config.heads)
        cos, sin = (upload(table, x.device).to(x.dtype) for table in tables)
        return graphed(self, self._run, x, cos, sin, mask).clone()  # states of prompts are kept

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)
