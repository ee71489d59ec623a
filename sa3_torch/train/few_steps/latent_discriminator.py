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
from sa3_torch.train.flow.conditioning import ConditionInputs, conditioning, prepare_to_train
from sa3_torch.train.networks.init import seeded

from .arc_losses import masked_mean
from .denoiser import Denoiser
from .frechet_loss import FeatureMoments
from .heads import Head, HeadConfig

BACKBONE = ("conditioner", "dit")  # its parts that stage 1 has trained


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Hold scores (B, N) with their mask."""

    scores: Tensor
    mask: Tensor


@torch.no_grad()
def score_notes(real: Verdict, fake: Verdict) -> dict[str, Tensor]:
    """Return how the scores of real and fake latents lie, for the log."""
    scores, valid = torch.cat([real.scores, fake.scores]), torch.cat([real.mask, fake.mask])
    mean = (scores * valid).sum() / valid.sum()
    return {
        "measured/gap": masked_mean(real.scores - fake.scores, real.mask).mean(),
        "measured/centre": masked_mean(real.scores + fake.scores, real.mask).mean() / 2,
        "measured/score_std": ((scores - mean).square() * valid).sum().div(valid.sum()).sqrt(),
    }


class LatentDiscriminator(nn.Module):
    """Score latents by the first blocks of ``base`` and a head that reads the hidden states of its blocks ``taps``,
    counted from 0, side by side. Blocks after the last of them are left out; all that remains is trained.

    ``moments``: of features that a further loss compares, where there is one.

    Raises ValueError for a block that the base does not have.
    """

    moments: FeatureMoments

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
        return prepare_to_train(self.dit, conditioning(self.conditioner, inputs))

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared) -> Verdict:
        """Score x (B, T, C) at times t (B,). Frames that are not valid change nothing.

        The head runs in fp32: differences of scores over steps of 0.01 are a loss.
        """
        features = torch.cat(self.features(x, t, prepared), dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            scores, mask = self.head(features.float(), _valid(x, prepared))
        return Verdict(scores=scores, mask=mask)

    def features(self, x: Tensor, t: Tensor, prepared: Prepared) -> list[Tensor]:
        """Return what the tapped blocks give: (B, T, D) each."""
        if prepared.valid is not None:
            x = torch.where(prepared.valid[..., None], x, 0.0)
        modulation = self.dit.modulation(t, prepared.seconds)
        h, sequence = self.dit.begin(x, prepared)
        features = []
        for index, layer in enumerate(self.dit.layers):
            last = index == self.taps[-1]
            block, context, local = cast(DiTBlock, layer), prepared.contexts[index], prepared.local[index]
            h = block(h, modulation, context, local, sequence, last)
            if index in self.taps:
                features.append(h if last else h[:, sequence.memory :])  # without the memory tokens
        return features


def _valid(x: Tensor, prepared: Prepared) -> Tensor:
    """Return which frames of x (B, T, C) are real: (B, T) bool."""
    if prepared.valid is not None:
        return prepared.valid
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
