"""A conditioner and a DiT as one network, and what it is told of a batch: shared by the stages with several of them.

Shapes: B batch, T latent frames, S text tokens, D context width, C latent channels. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sa3_torch.conditioner import Conditioner
from sa3_torch.dit import Conditioning, DiT


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The whole condition of a batch, before a conditioner sees it.

    ``hidden`` (B, S, D) states of the text encoder, ``mask`` (B, S), ``seconds`` (B,), ``local`` (B, T, 1 + C) mask of
    kept frames and their latents, ``valid`` and ``keep`` (B, T) bool.
    """

    hidden: Tensor
    mask: Tensor
    seconds: NDArray[np.float32]
    local: Tensor
    valid: Tensor
    keep: Tensor

    @property
    def generated(self) -> Tensor:
        return self.valid & ~self.keep

    @property
    def kept(self) -> Tensor:
        return self.valid & self.keep


class Denoiser(nn.Module):
    """Estimates of the clean latents by one network with its own conditioner."""

    def __init__(self, conditioner: Conditioner, dit: DiT) -> None:
        super().__init__()
        self.conditioner, self.dit = conditioner, dit

    @classmethod
    def frozen_copy(cls, model: nn.Module) -> Denoiser:
        """Of the conditioner and the DiT of ``model``, in evaluation mode, without gradients."""
        parts = cast(Conditioner, model.get_submodule("conditioner")), cast(DiT, model.get_submodule("dit"))
        return cls(*(copy.deepcopy(part) for part in parts)).eval().requires_grad_(False)  # type: ignore[arg-type]

    def conditioning(self, bundle: Bundle) -> Conditioning:
        context, seconds = self.conditioner(bundle.hidden, bundle.mask, bundle.seconds)
        return Conditioning(context=context, seconds=seconds, local=bundle.local, valid=bundle.valid)

    def forward(self, x: Tensor, t: Tensor, bundle: Bundle) -> Tensor:
        """x - t v: (B, T, C) float32, t (B,) -> (B, T, C) float32."""
        velocity = self.dit(x, t, self.dit.prepare(self.conditioning(bundle)))
        return x - t[:, None, None] * velocity.float()
