"""Settings of stage 0; a preset or TOML file holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.data.augment import AugmentConfig
from sa3_torch.train.data.crops import ShardsConfig
from sa3_torch.train.data.drawing import SharesConfig
from sa3_torch.train.run.optimizers import OptimizerConfig
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import TrainConfig

from .adversary import AdversarialConfig
from .coder import VariantsConfig
from .semantics import SemanticsConfig
from .spectral import SpectralConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Config):
    """Settings of ``sa3 train autoencoder``."""

    train: TrainConfig
    generator: OptimizerConfig
    crop_samples: int
    quietest_db: float
    spectral: SpectralConfig
    waveform_weight: float  # at the start ...
    waveform_final: float  # ... and once the spectral loss has its full weight
    spectral_start: float  # share of the run after which the spectral loss begins to fade in ...
    spectral_full: float  # ... and has its full weight
    softnorm_weight: float
    shares: SharesConfig
    augment: AugmentConfig
    variants: VariantsConfig | None = None
    shards: ShardsConfig | None = None  # for data that are shards
    semantics: SemanticsConfig | None = None
    adversarial: AdversarialConfig | None = None
    discriminator: OptimizerConfig | None = None

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "crop_samples")
        check(self, -60, 0, "quietest_db")
        check(self, 0, math.inf, "waveform_weight", "waveform_final", "softnorm_weight")
        check(self, 0, 1, "spectral_start", "spectral_full")
        if max(self.spectral.sizes) > self.crop_samples:
            raise ConfigError(
                f"crop_samples is {self.crop_samples}: less than the window of {max(self.spectral.sizes)}"
            )
        if self.adversarial is not None and self.adversarial.on and self.discriminator is None:
            raise ConfigError("adversarial is on without a table [discriminator]: give its learning rate there")
        if self.semantics is not None and self.semantics.critic_weight and self.train.accumulate > 1:
            raise ConfigError(
                f"train.accumulate is {self.train.accumulate}: the critic compares the items of a whole step; choose "
                "1, or semantics.critic_weight=0"
            )
