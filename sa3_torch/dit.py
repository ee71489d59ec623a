"""The diffusion transformer (architecture spec, section 6).

Shapes: B batch, T latent frames, M memory tokens, N = M + T, S context tokens, D width, C latent channels, H heads,
K head size. What depends only on the prompt, the duration and the kept audio is computed once by ``prepare``; a step is
``velocity = dit(x, t, prepared)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from sa3_mlx.spec.config import FF_MULT_DIT, TIMESTEP_FEATURES, DiTConfig
from sa3_mlx.spec.features import FREQUENCIES

from .attention import CrossAttention, SelfAttention, attend
from .layers import MLP, FeedForward, RMSNorm, Rope, rope

head_rms_norm = partial(RMSNorm, eps=1e-6)  # [B11]
BLOCK_EPS = 1e-5  # [B11]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a prompt, a duration and kept audio say.

    context: (B, S, Dc) text tokens and the duration token. Zeros are the unconditional input of guidance [B19].
    seconds: (B, Dc) the duration vector [B6].
    local:   (B, T, 1 + C) mask (1 = keep) and masked latents, or (B, 1, 1 + C) where all frames agree (zeros for plain
             text-to-audio, which matter [B7]); None leaves the local term out, which no released model was trained for.
    valid:   (B, T) bool, True = real frame; None = all. Padded keys are removed from self-attention [B16].
    """

    context: Tensor
    seconds: Tensor
    local: Tensor | None
    valid: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything of a prompt that no sampling step changes; made by ``DiT.prepare``."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]  # per block: (B, H or 2H, S, K) each
    local: tuple[Tensor | None, ...]  # per block: (B, T or 1, D)
    seconds: Tensor  # (B, D)
    valid: Tensor | None  # (B, T)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention, local term, feed-forward, in this order [B10]."""

    def __init__(self, config: DiTConfig, latent_channels: int) -> None:
        super().__init__()
        width = config.width
        self.scale_shift_gate = nn.Parameter(torch.zeros(6 * width))
        self.pre_norm = RMSNorm(width, BLOCK_EPS)
        self.self_attn = SelfAttention(width, differential=config.differential, head_norm=head_rms_norm)
        self.cross_attn_norm = RMSNorm(width, BLOCK_EPS)
        self.cross_attn = CrossAttention(width, differential=config.differential, head_norm=head_rms_norm)
        self.ff_norm = RMSNorm(width, BLOCK_EPS)
        self.ff = FeedForward(width, FF_MULT_DIT, "silu")
        self.local_embed = MLP(latent_channels + 1, width, width, bias=True)

    def forward(
        self, x: Tensor, modulation: Tensor, table: Rope, mask: Tensor | None, context: tuple[Tensor, Tensor],
        local: Tensor | None, memory: int,
    ) -> Tensor:  # fmt: skip
        """x (B, N, D), modulation (B, 6 D), mask (B, 1, 1, N) bool -> (B, N, D)"""
        parts = (self.scale_shift_gate + modulation)[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = parts
        h = self.pre_norm(x) * (1 + scale_a) + shift_a
        x = x + self.self_attn(h, table, partial(attend, mask=mask)) * torch.sigmoid(1 - gate_a)
        x = x + self.cross_attn(self.cross_attn_norm(x), *context)
        if local is not None:  # memory tokens get no local term
            x = torch.cat([x[:, :memory], x[:, memory:] + local], dim=1)
        h = self.ff_norm(x) * (1 + scale_f) + shift_f
        return x + self.ff(h) * torch.sigmoid(1 - gate_f)


class DiT(nn.Module):
    """Predicts the velocity eps - z of the flow x_t = (1 - t) z + t eps."""

    def __init__(self, config: DiTConfig, latent_channels: int, context_width: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.to_timestep_embed = MLP(TIMESTEP_FEATURES, width, width, bias=True)
        self.to_cond_embed = MLP(context_width, width, width, bias=False)
        self.to_global_embed = MLP(context_width, width, width, bias=False)
        self.to_modulation = MLP(width, width, 6 * width, bias=True)
        self.preprocess = nn.Linear(latent_channels, latent_channels, bias=False)
        self.project_in = nn.Linear(latent_channels, width, bias=False)
        self.memory_tokens = nn.Parameter(torch.zeros(config.memory_tokens, width))
        self.layers = nn.ModuleList(DiTBlock(config, latent_channels) for _ in range(config.depth))
        self.project_out = nn.Linear(width, latent_channels, bias=False)
        self.postprocess = nn.Linear(latent_channels, latent_channels, bias=False)

    def prepare(self, cond: Conditioning) -> Prepared:
        """Context projection, cross-attention keys and values, local terms and the duration embedding."""
        context = self.to_cond_embed(cond.context)
        blocks = [cast(DiTBlock, layer) for layer in self.layers]
        return Prepared(
            keys_values=tuple(block.cross_attn.prepare(context) for block in blocks),
            local=tuple(None if cond.local is None else block.local_embed(cond.local) for block in blocks),
            seconds=self.to_global_embed(cond.seconds),
            valid=cond.valid,
        )

    def modulation(self, t: Tensor, seconds: Tensor) -> Tensor:
        """t (B,) fp32 in [0, 1], seconds (B, D) -> (B, 6 D), shared by all blocks [B8]."""
        features = timestep_features(t).to(self.memory_tokens.dtype)
        return self.to_modulation(seconds + self.to_timestep_embed(features))

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        """x (B, T, C), t (B,) fp32 -> velocity (B, T, C). Frames that are not valid hold meaningless values."""
        memory = self.config.memory_tokens
        modulation = self.modulation(t, prepared.seconds)
        h = self.project_in(x + self.preprocess(x))
        h = torch.cat([self.memory_tokens.to(h.dtype).expand(len(h), -1, -1), h], dim=1)  # (B, N, D)
        table = rope(0, h.shape[1], h.device)
        mask = None
        if prepared.valid is not None:
            mask = torch.nn.functional.pad(prepared.valid, (memory, 0), value=True)[:, None, None]  # (B, 1, 1, N)
        for layer, context, local in zip(self.layers, prepared.keys_values, prepared.local, strict=True):
            h = layer(h, modulation, table, mask, context, local, memory)
        y = self.project_out(h[:, memory:])
        return y + self.postprocess(y)


def timestep_features(t: Tensor) -> Tensor:
    """(B,) -> (B, 256), cosines first; the angle is formed in fp32 in the official order [B5, B8]."""
    frequencies = torch.tensor(FREQUENCIES, device=t.device)
    angle = (t.float()[:, None] * frequencies * 2.0 * float(np.float32(np.pi))).double()
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()
