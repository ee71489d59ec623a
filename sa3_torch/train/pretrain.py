"""Stage 1, first version: flow matching on pre-encoded latents (training spec, section 4).

One step: t (truncated logit-normal, shifted by length), eps; x_t = (1 - t) z + t eps; target v = eps - z; clips are
extended by silence, some frames are kept as context, the prompt is dropped for some; squared error on valid frames.
The demo model has no pretrained text encoder: its own small one is trained here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sa3_mlx.spec.config import Config, ModelConfig
from sa3_torch.same import SAME

from .diffusion import ClipsConfig, DemoConfig, DiffusionStage, new_model
from .flow import shift_times, truncated_logit_normal
from .init import init_conditioner, init_dit, init_text_encoder
from .latents import LatentSet
from .optimizers import Group, OptimizerConfig
from .settings import check
from .stage import TrainConfig, step_generator


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Settings of ``sa3 train pretrain``."""

    train: TrainConfig
    optimizer: OptimizerConfig
    clips: ClipsConfig
    demo: DemoConfig
    shift_min_frames: int
    shift_max_frames: int
    context_weight: float  # of the error on kept frames
    prompt_dropout: float

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "shift_min_frames")
        check(self, self.shift_min_frames + 1, math.inf, "shift_max_frames")
        check(self, 0, math.inf, "context_weight")
        check(self, 0, 1, "prompt_dropout")


class PretrainStage(DiffusionStage):
    name = "pretrain"

    def __init__(
        self, model: ModelConfig, config: PretrainConfig, latents: LatentSet, tokenizer_file: Path, same: SAME
    ) -> None:
        network = new_model(model)
        super().__init__(
            network, model, config.train, config.clips, config.demo, latents, tokenizer_file, same, train_text=True
        )
        self.config = config
        init_dit(self.dit, config.train.seed)
        init_text_encoder(self.text_encoder, config.train.seed + 1)
        init_conditioner(self.conditioner, config.train.seed + 2)
        self.groups = {"diffusion": Group(network=self.model, optimizer=config.optimizer)}

    def losses(self, step: int) -> dict[str, Tensor]:
        """Everything is drawn for the global batch; the part of it is computed."""
        random, config = step_generator(self.config.train.seed, step), self.config
        batch = self.batches.batch(step)
        t = truncated_logit_normal(len(batch.latents), random)
        t = shift_times(t, batch.valid.sum(1).float(), config.shift_min_frames, config.shift_max_frames)
        draw = self.draw(batch, random)
        drop = torch.rand(len(t), generator=random) < config.prompt_dropout
        noise = torch.randn(batch.latents.shape, generator=random)
        rows = self.part.slice(len(t))
        loss = self.velocity_error(batch[rows], draw[rows], t[rows], noise[rows], drop[rows], config.context_weight)
        return {"flow": loss}
