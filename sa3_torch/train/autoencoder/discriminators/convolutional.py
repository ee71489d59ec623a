"""Build convolutional discriminators on spectrograms [T1.5].

Shapes: B batch, N audio samples, F one-sided bins, K windows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sa3_torch.train.autoencoder.transforms import spectrogram

DiscriminatorOutput = tuple[Tensor, list[Tensor]]  # logits fp32, and features of the layers
SLOPE = 0.2


def _conv(layer: nn.Conv2d) -> nn.Module:
    """Give a layer weight norm, and a bias of zero at the start.

    Elsewhere biases are drawn. Then quiet bins, which are most, give logits that are equal for real and decoded audio,
    and the gradient that is left of their difference is little more than rounding (a part in a hundred of it).
    """
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return weight_norm(layer)


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
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            features.append(x)
        return self.last(x).float(), features


class StftDiscriminator(nn.Module):
    """Look at real and imaginary parts of the tight transform at one size."""

    def __init__(self, size: int, audio_channels: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.net = SpectrogramNetwork(2 * audio_channels, width)

    def forward(self, audio: Tensor) -> DiscriminatorOutput:
        spectrum = spectrogram(audio, self.size, self.size // 4)  # (B, channels, K, F, 2)
        return self.net(spectrum.movedim(-1, 2).flatten(1, 2))
