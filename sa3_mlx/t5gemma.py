"""Encode text with the encoder half of T5Gemma [A4].

Shapes: B batch, S tokens, D width, H heads, K head size.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import numpy as np

from sa3_mlx.common.files.safetensors import StoredTable, TensorFile
from sa3_mlx.common.model.config import TextEncoderConfig
from sa3_mlx.runtime import mx, nn

SOFT_CAP = 50.0
ROPE_BASE = 10_000.0


class GemmaNorm(nn.Module):
    """Norm by RMS in fp32 with gain 1 + weight, eps 1e-6 [B2]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        gain = 1.0 + self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), gain, 1e-6).astype(x.dtype)


def rope_full(length: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin over all dimensions of a head, each (S, K) fp32, halves repeated [B2]."""
    exponent = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    frequency = (1.0 / np.float32(ROPE_BASE) ** exponent).astype(np.float32)
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency[None]
    angle = np.concatenate([angle, angle], axis=1).astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def gelu_tanh(x: mx.array) -> mx.array:
    """Return GELU in its tanh form. The one of mlx.nn is compiled, which needs a C++ compiler at run time on Linux."""
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class TextAttention(nn.Module):
    """Attend in both directions, scores soft-capped at 50 before the mask, fp32 softmax [B2]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array, mask: mx.array) -> mx.array:
        """Map (B, S, D), mask (B, S) bool, to (B, S, D)."""
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (p(x).reshape(shape).transpose(0, 2, 1, 3) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)  # (B, H, S, K)
        scores = q @ k.transpose(0, 1, 3, 2) * q.shape[-1] ** -0.5
        scores = SOFT_CAP * mx.tanh(scores / SOFT_CAP)
        scores = mx.where(mask[:, None, None, :], scores, mx.finfo(scores.dtype).min)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return self.o_proj((weights @ v).transpose(0, 2, 1, 3).flatten(2))


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    a, b = x.split(2, axis=-1)
    return x * cos + mx.concatenate([-b, a], axis=-1) * sin


class TextMLP(nn.Module):
    """Return down(gelu_tanh(gate(x)) * up(x)) [B2]."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gelu_tanh(self.gate_proj(x)) * self.up_proj(x))


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

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array, mask: mx.array) -> mx.array:
        x = x + self.post_attn_norm(self.self_attn(self.pre_attn_norm(x), cos, sin, mask))
        return x + self.post_ff_norm(self.mlp(self.pre_ff_norm(x)))


class FileEmbedding(nn.Module):
    """Read rows of an embedding table in a checkpoint: a prompt needs dozens of 256,000, so it stays in the file.

    ``dtype`` None keeps the file's.
    """

    def __init__(self, path: Path, name: str, dtype: mx.Dtype | None) -> None:
        super().__init__()
        self.path = path
        self.name = name
        self.dtype = dtype

    def __call__(self, ids: mx.array) -> mx.array:
        """Return rows (B, S, D) of ids (B, S)."""
        rows = self.table.rows(np.array(ids).reshape(-1))
        own = {"BF16": mx.bfloat16, "F16": mx.float16}.get(self.table.dtype, mx.float32)
        return mx.array(rows).astype(self.dtype or own).reshape(*ids.shape, self.table.width)

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
        self.layers = [TextLayer(config) for _ in range(config.depth)]
        self.norm = GemmaNorm(config.width)

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        """Return states (B, S, D) of ids (B, S) int, mask (B, S) bool, True at real tokens."""
        x = self.embed_tokens(ids)
        x = x * mx.array(math.sqrt(self.config.width), dtype=x.dtype)  # rounded to the dtype [B2]
        tables = rope_full(ids.shape[1], self.config.width // self.config.heads)
        cos, sin = (mx.array(table, dtype=x.dtype) for table in tables)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)
