"""What ODE warm-up and adversarial post-training share: they turn a trained model into one that samples in few steps.

The text encoder and the autoencoder stay as they are. What is exported says that it is a denoiser: users get the
ping-pong sampler, 8 steps without guidance [T7.3].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import LOGSNR
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.flow.diffusion import ClipsConfig, DiffusionStage, Draw
from sa3_torch.train.flow.model import autoencoder_of, diffusion_of, open_model
from sa3_torch.train.run.stage import TrainConfig

from .denoisers import Bundle, Denoiser

DEMO_STEPS = (1, 4, 8)


class FewStepStage(DiffusionStage):
    """Trains the conditioner and the DiT of the checkpoint folder ``start`` on ``latents``.

    ``autoencoder``: folder of the one that made the latents; needed only where ``start`` does not say which it was.
    """

    def __init__(
        self, start: Path, train: TrainConfig, clips: ClipsConfig, latents: Sequence[Path], autoencoder: Path | None
    ) -> None:
        model, config, same = open_model(start)
        self.start_digest = file_hash(start / WEIGHTS_FILE)
        opened = LatentSet(*latents, autoencoder=autoencoder_of(start, same, autoencoder))
        self.start_config = config
        super().__init__(
            model,
            few_step_config(config),
            train,
            clips,
            few_step_demo(8),
            opened,
            start / TOKENIZER_FILE,
            same,
            train_text=False,
        )
        self.denoiser = Denoiser(self.conditioner, self.dit)

    def bundle(self, batch: LatentBatch, draw: Draw) -> Bundle:
        """The condition of a batch, its prompts as states of the frozen text encoder."""
        ids, mask, valid, keep = (x.to(self.device) for x in (batch.ids, batch.mask, draw.valid, draw.keep))
        with torch.no_grad(), self.autocast():
            hidden = self.text_encoder(ids, mask)
        channel = keep[..., None].float()
        local = torch.cat([channel, channel * batch.latents.to(self.device)], dim=-1)  # (B, T, 1 + C)
        seconds = batch.seconds.numpy()
        return Bundle(hidden=hidden, mask=mask, seconds=seconds, local=local, valid=valid, keep=keep)

    def demo(self, folder: Path, step: int) -> None:
        """The same prompts from the same noise in 1, 4 and 8 steps."""
        for steps in DEMO_STEPS:
            self.write_demo(folder, f"{step:06d}-{steps}", few_step_demo(steps))

    def parents(self) -> dict[str, str]:
        return {**super().parents(), "start": self.start_digest}


def few_step_demo(steps: int) -> Sampling:
    return Sampling(sampler="pingpong", steps=steps)


def few_step_config(config: ModelConfig) -> ModelConfig:
    """That of a model that denoises at once; its schedule is that of the released post-trained models (7.3)."""
    diffusion = replace(diffusion_of(config), objective="rf_denoiser", shift=LOGSNR)
    return replace(config, name=config.name.removesuffix("-base"), diffusion=diffusion)
