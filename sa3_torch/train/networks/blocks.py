"""The transformer block of small networks beside the diffusion model that are told a noise level.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sa3_mlx.common.model.config import DiTConfig
from sa3_torch.attention import Attend, SelfAttention
from sa3_torch.dit import BLOCK_EPS, head_rms_norm
from sa3_torch.layers import FeedForward, RMSNorm, Rope, modulate


class ModulatedBlock(nn.Module):
    """Apply modulated self-attention and feed-forward as in the DiT; both end in zeros at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_shift_gate = nn.Parameter(torch.zeros(6 * width))
        self.pre_norm = RMSNorm(width, BLOCK_EPS)
        self.self_attn = SelfAttention(width, differential=False, head_norm=head_rms_norm)
        self.ff_norm = RMSNorm(width, BLOCK_EPS)
        self.ff = FeedForward(width, DiTConfig.ff_mult, "silu")
        for last in (self.self_attn.to_out, self.ff.proj_out):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, modulation: Tensor, table: Rope, attend: Attend) -> Tensor:
        """Map x (B, N, D), with modulation (B, 6 D), to (B, N, D)."""
        parts = (self.scale_shift_gate + modulation)[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = parts
        h = self.self_attn(modulate(self.pre_norm(x), 1 + scale_a, shift_a), table, attend)
        x = x + h * torch.sigmoid(1 - gate_a)
        return x + self.ff(modulate(self.ff_norm(x), 1 + scale_f, shift_f)) * torch.sigmoid(1 - gate_f)
