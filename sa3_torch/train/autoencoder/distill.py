"""Train a small autoencoder that reads and writes the latents of a large one [T2].

z_T, z_S latents of teacher and student; y_TS is the teacher's decoding of the student's latents, and so on. The teacher
is frozen, not the graph through it: y_TS carries a gradient to the student's encoder, y_ST to its decoder.

Shapes: B batch, N audio samples, T latent frames, C latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sa3_mlx.common.installed import name_of
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.data.audio_data import open_audio
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.data.shards import ShardIndex
from sa3_torch.train.networks.init import init_student
from sa3_torch.train.run.command import RunOptions, report_made, stage_command
from sa3_torch.train.run.options import AUDIO, MODEL
from sa3_torch.train.run.settings import check

from .losses import Comparison
from .stage import AutoencoderConfig, AutoencoderStage


@dataclass(frozen=True, kw_only=True)
class DistillConfig(AutoencoderConfig):
    """Hold the settings of ``sa3 train distill-autoencoder``: those of an autoencoder, and what ties it to
    the teacher."""

    path_weight: float  # of each of the four spectral terms
    cross_share: float  # of the adversarial terms of the three pairs beside (x, y_SS)
    latent_l1_weight: float
    latent_mse_weight: float
    recompute_teacher: bool  # activation checkpointing of the teacher's decoder: less memory, more time

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_encoder:
            raise ConfigError("train_encoder is false: a student learns both directions")
        check(self, 0, math.inf, "path_weight", "cross_share", "latent_l1_weight", "latent_mse_weight")


class DistillStage(AutoencoderStage):
    """Train stage 0 with a teacher."""

    name = "distill-autoencoder"

    def __init__(
        self,
        model: ModelConfig,
        config: DistillConfig,
        clips: ClipSet,
        teacher: Path,
        *,
        shards: ShardIndex | None = None,
    ) -> None:
        """Open the teacher, a checkpoint folder. Raises ConfigError when its latents have another shape."""
        self.teacher, self.digest = load_autoencoder(teacher)
        own, its = model.same, self.teacher.config
        if (own.latent_channels, own.samples_per_latent) != (its.latent_channels, its.samples_per_latent):
            raise ConfigError(
                f"{teacher}: latents of {its.latent_channels} channels per {its.samples_per_latent} samples, "
                f"{model.name} has {own.latent_channels} per {own.samples_per_latent}; a student needs the same"
            )
        super().__init__(model, config, clips, shards=shards)
        self.distill = config
        self._z_teacher = torch.zeros(())  # of this step, see ``_comparisons``
        self.teacher.to(self.device)

    def _begin(self, loud: Tensor) -> None:
        init_student(self.model, self.teacher, loud, self.config.train.seed)

    def _comparisons(self, z: Tensor, output: Tensor, audio: Tensor, step: int) -> list[Comparison]:
        weight, share = self.distill.path_weight, self.distill.cross_share
        with self.autocast():
            with torch.no_grad():
                z_teacher = self.teacher.encode(audio).float()
                theirs = self._teach(z_teacher)
            by_teacher = self._teach(z)
            of_teacher = self.coder.decoded(z_teacher, step, self.batch_slice)
        self._z_teacher = z_teacher
        return [
            Comparison(name="spectral", weight=weight, share=1.0, reference=audio, prediction=output),
            Comparison(name="spectral_as_teacher", weight=weight, share=share, reference=theirs, prediction=output),
            Comparison(name="spectral_by_teacher", weight=weight, share=share, reference=audio, prediction=by_teacher),
            Comparison(name="spectral_of_teacher", weight=weight, share=share, reference=audio, prediction=of_teacher),
        ]

    def _teach(self, z: Tensor) -> Tensor:
        """Decode by the teacher: (B, T, C) -> (B, N, 2) float32."""
        if self.distill.recompute_teacher and torch.is_grad_enabled():
            return checkpoint(self.teacher.decode, z, use_reentrant=False).float()
        return self.teacher.decode(z).float()

    def _latent_losses(self, z: Tensor) -> dict[str, Tensor]:
        config, target = self.distill, self._z_teacher
        square = F.mse_loss(z.float(), target)
        self.notes |= {
            "measured/latent_error": square.detach() / target.var(),
            "measured/latent_cosine": F.cosine_similarity(z.detach().float(), target, dim=1).mean(),
        }
        return {
            **super()._latent_losses(z),
            "latent_l1": self.weighted("latent_l1", config.latent_l1_weight, F.l1_loss(z.float(), target)),
            "latent_mse": self.weighted("latent_mse", config.latent_mse_weight, square),
        }


@stage_command("distill-autoencoder", preset="tiny")
@AUDIO
@click.option("--teacher", type=MODEL, required=True, help="The large autoencoder, or a model with it.")
@click.option("--model", "size", default="first", show_default=True, type=click.Choice(sorted(PRESETS)))
def distill_autoencoder(run: RunOptions, data: str, teacher: Path, size: str) -> None:
    """Train a small autoencoder for the latents of a large one."""
    config = run.settings(DistillConfig, "distill-autoencoder")
    audio = open_audio(data, run.out)
    stage = DistillStage(PRESETS[size], config, audio.clips, teacher, shards=audio.shards)
    if run.train(stage, config, {"data": audio.digest, "teacher": stage.digest}):
        report_made(f"autoencoder for the latents of {name_of(teacher)}", run.out / "model")
