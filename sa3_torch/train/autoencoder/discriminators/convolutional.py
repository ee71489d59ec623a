"""Build convolutional discriminators on spectrograms, sub-bands and chroma [T1.5].

Shapes: B batch, N audio samples, F one-sided bins, K windows.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sa3_torch.train.autoencoder.transforms import chromagram, pqmf, spectrogram

DiscriminatorOutput = tuple[Tensor, list[Tensor]]  # logits fp32, and features of the layers
SLOPE = 0.2
CHROMA_OCTAVE, CHROMA_WIDTH = 5.0, 2.0  # as customary for chromagrams over all octaves


def _conv(layer: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """Give a layer weight norm, and a bias of zero at the start.

    Elsewhere biases are drawn. Then quiet bins, which are most, give logits that are equal for real and decoded audio,
    and the gradient that is left of their difference is little more than rounding (a part in a hundred of it).
    """
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return weight_norm(layer)


def _run(layers: nn.ModuleList, last: nn.Module, x: Tensor) -> DiscriminatorOutput:
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), SLOPE)
        features.append(x)
    return last(x).float(), features


class SpectrogramNetwork(nn.Module):
    """Run 2-D convolutions over time and frequency, of the EnCodec type (arXiv 2210.13438): (B, channels, K, F) ->
    logits.

    Time is never strided; three layers halve the frequencies and dilate time by 1, 2, 4.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_conv(nn.Conv2d(channels, width, (3, 9), padding=(1, 4)))])
        for dilation in (1, 2, 4):
            self.layers.append(
                _conv(nn.Conv2d(width, width, (3, 9), (1, 2), padding=(dilation, 4), dilation=(dilation, 1)))
            )
        self.layers.append(_conv(nn.Conv2d(width, width, 3, padding=1)))
        self.last = _conv(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        return _run(self.layers, self.last, x)


class StftDiscriminator(nn.Module):
    """Look at real and imaginary parts of the tight transform at one size."""

    def __init__(self, size: int, audio_channels: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.net = SpectrogramNetwork(2 * audio_channels, width)

    def forward(self, audio: Tensor) -> DiscriminatorOutput:
        spectrum = spectrogram(audio, self.size, self.size // 4)  # (B, channels, K, F, 2)
        return self.net(spectrum.movedim(-1, 2).flatten(1, 2))


class ChromaDiscriminator(nn.Module):
    """Look at a chromagram of all octaves."""

    def __init__(self, bins: int, size: int, sample_rate: int, audio_channels: int, width: int) -> None:
        super().__init__()
        self.bins, self.size, self.sample_rate = bins, size, sample_rate
        self.net = SpectrogramNetwork(audio_channels, width)

    def forward(self, audio: Tensor) -> DiscriminatorOutput:
        return self.net(
            chromagram(
                audio,
                self.sample_rate,
                bins=self.bins,
                size=self.size,
                hop=self.size // 4,
                octave=CHROMA_OCTAVE,
                width=CHROMA_WIDTH,
            )
        )


class SubbandDiscriminator(nn.Module):
    """Run 1-D convolutions over critically sampled sub-bands; one band is the waveform itself."""

    def __init__(self, bands: int, audio_channels: int, width: int) -> None:
        super().__init__()
        self.bands = bands
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.layers = nn.ModuleList([_conv(nn.Conv1d(audio_channels * bands, width, 15, padding=7))])
        for before, after in pairwise(widths):
            self.layers.append(_conv(nn.Conv1d(before, after, 41, 4, padding=20, groups=4)))
        self.layers.append(_conv(nn.Conv1d(widths[-1], widths[-1], 5, padding=2)))
        self.last = _conv(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, audio: Tensor) -> DiscriminatorOutput:
        return _run(self.layers, self.last, pqmf(audio, self.bands))
