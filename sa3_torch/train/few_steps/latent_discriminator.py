"""The discriminator of adversarial post-training: the first blocks of the base DiT, told the prompt by their own
conditioner, and a head on their hidden states [T7.1].

Shapes: B batch, T latent frames, C latent channels, D width, N positions of scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sa3_torch.conditioner import Conditioner
from sa3_torch.dit import DiT, DiTBlock, Prepared
from sa3_torch.train.flow.conditioning import ConditionInputs, conditioning
from sa3_torch.train.networks.init import seeded

from .denoiser import Denoiser
from .heads import Head, HeadConfig


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Scores (B, N) with their mask, and what the tapped blocks gave: (B, T, D) each."""

    scores: Tensor
    mask: Tensor
    features: list[Tensor]


class LatentDiscriminator(nn.Module):
    """``taps``: blocks of ``base``, counted from 0, whose hidden states the head reads side by side; what lies behind
    the last one is left out. All that remains is trained, its conditioner too.

    Raises ValueError for a block that the base does not have.
    """

    def __init__(self, base: nn.Module, taps: tuple[int, ...], head: HeadConfig, seed: int) -> None:
        super().__init__()
        copied = Denoiser.frozen_copy(base).requires_grad_(True)
        self.conditioner: Conditioner = copied.conditioner
        self.dit: DiT = copied.dit
        depth = len(self.dit.layers)
        if sorted(set(taps)) != list(taps) or not taps or not 0 <= taps[0] <= taps[-1] < depth:
            raise ValueError(f"taps is {list(taps)}: allowed are ascending blocks 0 to {depth - 1}")
        self.taps = taps
        del self.dit.layers[taps[-1] + 1 :], self.dit.project_out, self.dit.postprocess
        with seeded(seed):
            self.head = Head(head, len(taps) * self.dit.config.width)

    def prepare(self, inputs: ConditionInputs) -> Prepared:
        """Compute what does not depend on the latents, in the precision of the caller."""
        return self.dit.prepare(conditioning(self.conditioner, inputs))

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared) -> Verdict:
        """x (B, T, C), t (B,). Frames that are not valid change nothing. The head runs in fp32: differences of scores
        over steps of 0.01 are a loss."""
        features = self._features(x, t, prepared)
        valid = cast(Tensor, prepared.valid)
        with torch.autocast(x.device.type, enabled=False):
            scores, mask = self.head(torch.cat(features, dim=-1).float(), valid)
        return Verdict(scores=scores, mask=mask, features=features)

    def _features(self, x: Tensor, t: Tensor, prepared: Prepared) -> list[Tensor]:
        valid = cast(Tensor, prepared.valid)
        modulation = self.dit.modulation(t, prepared.seconds)
        h, sequence = self.dit.begin(torch.where(valid[..., None], x, 0.0), prepared)
        features = []
        for index, layer in enumerate(self.dit.layers):
            last = index == self.taps[-1]
            block, context, local = cast(DiTBlock, layer), prepared.contexts[index], prepared.local[index]
            h = block(h, modulation, context, local, sequence, last)
            if index in self.taps:
                features.append(h if last else h[:, sequence.memory :])  # without the memory tokens
        return features
