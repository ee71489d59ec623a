"""Weights of a trained autoencoder as the start of another one, also at another stride (training spec, 13.1)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sa3_mlx.spec.config import ConfigError, ModelConfig, SAMEConfig
from sa3_torch.same import SAME

from .encode import load_autoencoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The autoencoder of a checkpoint folder and the hash of its weights."""

    folder: Path
    model: SAME
    digest: str

    @classmethod
    def open(cls, folder: Path) -> Start:
        """Raises FileNotFoundError or ValueError for a folder without an autoencoder."""
        model, digest = load_autoencoder(folder)
        return cls(folder=folder, model=model, digest=digest)

    def load_into(self, same: SAME, config: ModelConfig) -> bool:
        """Copy the weights to ``same``; whether its stride is that of the start.

        All weights carry over to another stride: no shape depends on it, as a group has one latent token, one vector
        stands for all new tokens, and attention knows positions by rotation alone. What does not carry over is what
        they do: new tokens have learnt to look back over the old number of patches, so the sound is wrong at first, and
        the statistics of the latents change; running_std is measured anew. Raises ConfigError for other sizes.
        """
        differing = differences(self.model.config, same.config)
        if self.model.audio_channels != same.audio_channels:
            differing.append(f"audio_channels {self.model.audio_channels}, not {same.audio_channels}")
        if differing:
            raise ConfigError(
                f"{self.folder}: its autoencoder cannot be the start of {config.name}: {'; '.join(differing)}; only "
                "the stride may differ"
            )
        same.load_state_dict(self.model.state_dict())
        return self.model.config.stride == same.config.stride


def differences(old: SAMEConfig, new: SAMEConfig) -> list[str]:
    """Sizes of a start that a model does not have, but for the stride: "width 64, not 128"."""
    a, b = old.to_dict(), new.to_dict()
    return [f"{name} {a[name]}, not {b[name]}" for name in a if name != "stride" and a[name] != b[name]]
