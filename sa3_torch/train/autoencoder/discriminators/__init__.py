"""Build the discriminators of the autoencoder, and compute their losses [T1.5]."""

from __future__ import annotations

from torch import Tensor, nn

from sa3_torch.train.networks.init import seeded

from .config import FULL, TINY, WHOLE, ChromaView, ConvolutionalConfig, DiscriminatorsConfig, TransformerConfig, View
from .convolutional import ChromaDiscriminator, DiscriminatorOutput, StftDiscriminator, SubbandDiscriminator
from .losses import discriminator_loss, feature_matching_loss, generator_loss
from .noise import InputNoise, InputNoiseConfig
from .transformer import ChromaViewDiscriminator, ViewDiscriminator

__all__ = [
    "FULL",
    "TINY",
    "WHOLE",
    "ChromaView",
    "ConvolutionalConfig",
    "DiscriminatorOutput",
    "Discriminators",
    "DiscriminatorsConfig",
    "InputNoise",
    "InputNoiseConfig",
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


def build(config: DiscriminatorsConfig, sample_rate: int, audio_channels: int, seed: int) -> Discriminators:
    """Build fresh discriminators of both families."""
    with seeded(seed):
        return Discriminators(_members(config, sample_rate, audio_channels))


def _members(config: DiscriminatorsConfig, sample_rate: int, audio_channels: int) -> dict[str, nn.Module]:
    conv, transformer = config.convolutional, config.transformer
    members: dict[str, nn.Module] = {}
    for size in conv.stft_sizes:
        members[f"conv_stft_{size}"] = StftDiscriminator(size, audio_channels, conv.width)
    for bands in conv.pqmf_bands:
        members[f"conv_pqmf_{bands}"] = SubbandDiscriminator(bands, audio_channels, conv.width)
    if conv.chroma_bins:
        members[f"conv_chroma_{conv.chroma_bins}"] = ChromaDiscriminator(
            conv.chroma_bins, conv.chroma_size, sample_rate, audio_channels, conv.width
        )
    for view in transformer.views:
        members[f"{view.kind}_{view.size}"] = ViewDiscriminator(view, transformer, audio_channels)
    for band in transformer.chroma_views:
        members[f"chroma_{band.octave:g}".replace(".", "_")] = ChromaViewDiscriminator(
            band, transformer, sample_rate, audio_channels
        )
    return members
