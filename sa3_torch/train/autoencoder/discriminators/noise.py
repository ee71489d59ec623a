"""Put noise on the input of discriminators: below the masking threshold, and white while they win [T1.5].

Shapes: B batch, N audio samples, F one-sided bins, K windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.schema import Config
from sa3_torch.train.autoencoder.filters import bark_bands
from sa3_torch.train.autoencoder.spectral import tight_stft, tight_window
from sa3_torch.train.autoencoder.transforms import full_precision
from sa3_torch.train.run.parallel import follow
from sa3_torch.train.run.settings import check

SIZE, HOP = 2048, 512
LOSS_DECAY = 0.99
WINNING = 0.1  # mean loss of the discriminators below which white noise makes it harder


@dataclass(frozen=True, kw_only=True)
class InputNoiseConfig(Config):
    """Choose the noises on the input of discriminators."""

    masked: bool  # noise shaped like the masking threshold
    masked_db: float  # its distance below the spread energy of the sound
    instance: bool  # white noise of std 10 (0.1 - L) std(x) where the mean loss L of the discriminators is below 0.1

    def __post_init__(self) -> None:
        check(self, 0, 120, "masked_db")


class InputNoise(nn.Module):
    """Add the noises to what discriminators see, drawn independently for real and decoded audio."""

    loss_mean: Tensor

    def __init__(self, config: InputNoiseConfig, sample_rate: int) -> None:
        super().__init__()
        self.config, self.sample_rate = config, sample_rate
        self.register_buffer("loss_mean", torch.ones(()))

    @torch.no_grad()
    def follow(self, loss: Tensor) -> None:
        """Follow ``loss``, the scalar of a discriminator step, the mean over all processes; once per step."""
        follow(self.loss_mean, loss, LOSS_DECAY)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw standard normals for audio of shape (B, N, channels) -> (B, 2, N, channels); slice them as the audio."""
        return torch.randn((shape[0], 2, *shape[1:]), generator=generator)

    def forward(self, audio: Tensor, noise: Tensor) -> Tensor:
        """Add ``noise``, from ``draw``, to audio (B, N, channels). The gradient of the audio passes unchanged."""
        if self.config.masked:
            audio = audio + masked_noise(audio.detach(), noise[:, 0], self.sample_rate, self.config.masked_db)
        if self.config.instance:
            scale = 10 * (WINNING - self.loss_mean).clamp_min(0)
            audio = audio + scale * audio.detach().std((1, 2), keepdim=True) * noise[:, 1]
        return audio


def masked_noise(audio: Tensor, noise: Tensor, sample_rate: int, below_db: float) -> Tensor:
    """Filter white noise (B, N, channels) to lie ``below_db`` under the energy of ``audio`` spread over bands."""
    member, spreading = (torch.from_numpy(x).to(audio.device) for x in bark_bands(SIZE, sample_rate))
    signals = [F.pad(x.transpose(1, 2).flatten(0, 1).float(), (SIZE, SIZE)) for x in (audio, noise)]
    sound, white = (tight_stft(x, SIZE, HOP) for x in signals)  # (B channels, K, F, 2)
    expected = 2 * HOP / SIZE  # energy of white noise in a bin
    with full_precision(audio):
        per_bin = (sound.square().sum(-1) @ member @ spreading) / member.sum(0).clamp_min(1)
        gain = (per_bin @ member.T * (10 ** (-below_db / 10) / expected)).sqrt()
    shaped = torch.view_as_complex((white * gain[..., None]).contiguous())
    edge = torch.full((SIZE // 2 + 1,), 0.5**0.5, device=audio.device)
    edge[0] = edge[-1] = 1.0
    frames = torch.fft.irfft(shaped * edge, SIZE, norm="ortho")
    frames = frames * torch.from_numpy(tight_window(SIZE, HOP)).to(audio.device)
    length = SIZE + (frames.shape[1] - 1) * HOP
    out = F.fold(frames.transpose(1, 2), (1, length), (1, SIZE), stride=(1, HOP))[:, 0, 0]
    return out[:, SIZE : SIZE + audio.shape[1]].unflatten(0, (audio.shape[0], audio.shape[2])).transpose(1, 2)
