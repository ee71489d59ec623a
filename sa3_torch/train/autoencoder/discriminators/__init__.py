"""Build the discriminators of the autoencoder, and compute their losses [T1.5]."""

from __future__ import annotations

from torch import Tensor, nn

from sa3_torch.train.networks.init import seeded

from .config import ConvolutionalConfig, DiscriminatorsConfig, TransformerConfig, View
from .convolutional import DiscriminatorOutput, StftDiscriminator
from .losses import discriminator_loss, feature_matching_loss, generator_loss
from .transformer import ViewDiscriminator

__all__ = [
    "ConvolutionalConfig",
    "DiscriminatorOutput",
    "Discriminators",
    "DiscriminatorsConfig",
    "TransformerConfig",
    "View",
    "build",
    "discriminator_loss",
    "feature_matching_loss",
    "generator_loss",
]


class Discriminators(nn.Module):
    """Hold all discriminators of a configuration, by a name that says what each looks at."""

    def __init__(self, members: dict[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)

    def forward(self, audio: Tensor) -> list[DiscriminatorOutput]:
        """Return logits and features of every discriminator for audio (B, N, channels)."""
        return [member(audio) for member in self.members.values()]


def build(config: DiscriminatorsConfig, audio_channels: int, seed: int) -> Discriminators:
    """Build fresh discriminators of both families."""
    conv, transformer = config.convolutional, config.transformer
    members: dict[str, nn.Module] = {}
    with seeded(seed):
        for size in conv.stft_sizes:
            members[f"conv_stft_{size}"] = StftDiscriminator(size, audio_channels, conv.width)
        for view in transformer.views:
            members[f"{view.kind}_{view.size}"] = ViewDiscriminator(view, transformer, audio_channels)
        return Discriminators(members)
