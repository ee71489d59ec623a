"""Tell a diffusion model about its batch: the networks, their inputs, the conditioning.

Shapes: B batch, T latent frames, S text tokens, D width of the text states, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_torch.conditioner import Conditioner
from sa3_torch.dit import DiT, LocalInput, Prepared
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.train.data.batches import LatentBatch

from .masks import Masks


@dataclass(frozen=True, kw_only=True)
class ConditionInputs:
    """Hold what a batch is conditioned on, before a conditioner sees it.

    ``hidden`` (B, S, D) states of the text encoder, ``mask`` (B, S), ``seconds`` (B,), ``local`` (B, T or 1, 1 + C),
    ``valid`` (B, T) bool or None, which means that all frames are: attention without a mask is faster.
    """

    hidden: Tensor
    mask: Tensor
    seconds: NDArray[np.float32]
    local: Tensor
    valid: Tensor | None


def local_input(keep: Tensor, latents: Tensor) -> Tensor:
    """Return the mask of kept frames and their latents [B7]: (B, T) bool, (B, T, C) -> (B, T, 1 + C)."""
    mask = keep[..., None].float()
    return torch.cat([mask, mask * latents], dim=-1)


def conditioning(conditioner: Conditioner, inputs: ConditionInputs, drop: Tensor | None = None) -> Conditioning[Tensor]:
    """Return what the DiT is told.

    Where ``drop`` (B,) is true, text and seconds tokens are zeros; the global duration and the local input stay.
    """
    context, seconds = conditioner(inputs.hidden, inputs.mask, inputs.seconds)
    if drop is not None:
        context = torch.where(drop[:, None, None], 0.0, context)
    return Conditioning(context=context, seconds=seconds, local=inputs.local, valid=inputs.valid)


def prepare_to_train(dit: DiT, cond: Conditioning[Tensor]) -> Prepared:
    """Do what ``DiT.prepare`` does, but leave the local terms to the blocks.

    Once per evaluation they cost the same there. Outside of checkpointed blocks they would be kept for the backward
    pass, four tensors (B, T, D) of every block: by arithmetic 19 GB of the medium model, 16 items of 4096 frames.
    """
    prepared = dit.prepare(replace(cond, local=None))
    if cond.local is None:
        return prepared
    return replace(prepared, local=(LocalInput(cond.local),) * len(prepared.local))


@dataclass(frozen=True)
class Networks:
    """Hold the networks of a diffusion model."""

    text_encoder: T5GemmaEncoder
    conditioner: Conditioner
    dit: DiT

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Take those of a ``StableAudio``."""
        return cls(
            cast(T5GemmaEncoder, model.get_submodule("text_encoder")),
            cast(Conditioner, model.get_submodule("conditioner")),
            cast(DiT, model.get_submodule("dit")),
        )

    def without_text(self) -> nn.Module:
        """Return conditioner and DiT under their names, where the text encoder stays as it is: it is neither wrapped
        nor sharded, and no part of checkpoints of the run."""
        return nn.ModuleDict({"conditioner": self.conditioner, "dit": self.dit})

    @property
    def device(self) -> torch.device:
        return next(self.dit.parameters()).device

    def inputs(self, batch: LatentBatch, masks: Masks | None) -> ConditionInputs:
        """Encode the texts of a batch; ``masks`` None: nothing is kept and all frames are real, as in sampling."""
        ids, mask, device = batch.ids.to(self.device), batch.mask.to(self.device), self.device
        if masks is None:
            local, valid = torch.zeros(len(ids), 1, 1 + batch.latents.shape[2], device=device), None
        else:
            local = local_input(masks.keep.to(device), batch.latents.to(device))
            valid = None if bool(masks.valid.all()) else masks.valid.to(device)  # masks are on the host
        hidden = self.text_encoder(ids, mask)
        return ConditionInputs(hidden=hidden, mask=mask, seconds=batch.seconds.numpy(), local=local, valid=valid)

    def conditioning(self, batch: LatentBatch, masks: Masks | None, drop: Tensor | None = None) -> Conditioning[Tensor]:
        """Return what the DiT is told of a batch; see ``inputs`` and ``conditioning``."""
        return conditioning(self.conditioner, self.inputs(batch, masks), drop)
