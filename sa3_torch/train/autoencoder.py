"""Stage 0, first version: SAME on a spectral and a waveform loss with the soft-norm bottleneck (training spec, 1).

One step: crops -> encoder -> u; r <- EMA of std(u); z = u / r; decoder(r z + 0.05 r n) -> audio; losses in fp32.
The waveform is learnt first, then the spectral loss takes over and gives noises and drums their energy back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sa3_mlx.spec.config import Config, ConfigError, ModelConfig
from sa3_torch.same import SAME, patch, unpatch
from sa3_torch.weights import save_checkpoint

from .augment import AugmentConfig
from .clips import Clip, ClipSet
from .data import AudioCrops, SharesConfig
from .init import init_autoencoder
from .logs import save_sound
from .losses import soft_norm_loss, waveform_loss
from .metrics import effective_rank, log_mel_l1, si_sdr, spectral_convergence
from .optimizers import Group, OptimizerConfig
from .parallel import Part, follow, mean, moments, std_of
from .settings import check
from .spectral import SpectralConfig, spectral_distance, spectral_input, spectral_loss
from .stage import Stage, TrainConfig, maybe_compile, step_generator

STD_DECAY = 0.999
NOISE = 0.05  # on the latents while training, relative to running_std
VALIDATION_CLIPS = 48


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

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "crop_samples")
        check(self, -60, 0, "quietest_db")
        check(self, 0, math.inf, "waveform_weight", "waveform_final", "softnorm_weight")
        check(self, 0, 1, "spectral_start", "spectral_full")
        if max(self.spectral.sizes) > self.crop_samples:
            raise ConfigError(
                f"crop_samples is {self.crop_samples}: less than the window of {max(self.spectral.sizes)}"
            )


class AutoencoderStage(Stage):
    name = "autoencoder"

    def __init__(self, model: ModelConfig, config: AutoencoderConfig, clips: ClipSet) -> None:
        super().__init__()
        train, ratio = config.train, model.same.samples_per_latent * model.same.frame_multiple
        if config.crop_samples % ratio:
            raise ConfigError(f"crop_samples is {config.crop_samples}: {model.name} needs a multiple of {ratio}")
        self.model_config, self.config, self.clips = model, config, clips
        self.model: SAME = SAME(model.same, model.audio_channels)
        self.crops = AudioCrops(
            clips, split="train", samples=config.crop_samples, batch=train.batch, seed=train.seed,
            quietest_db=config.quietest_db, shares=config.shares.to_dict(), augment=config.augment,
        )  # fmt: skip
        loud = torch.cat([self.crops.batch(10**9 + i).audio for i in range(-(-256 // train.batch))])
        init_autoencoder(self.model, loud, train.seed)
        self.model.to(self.device)
        self.groups = {"generator": Group(network=self.model, optimizer=config.generator)}
        self._encode = maybe_compile(self.model.encoder, train.compile)
        self._decode = maybe_compile(self.model.decoder, train.compile)
        self._distance = maybe_compile(spectral_distance, train.compile)

    def losses(self, step: int) -> dict[str, Tensor]:
        config, bottleneck = self.config, self.model.bottleneck
        audio = self._audio(step, self.part)
        with self.autocast():
            u = self._raw_latents(audio)
            if config.train.accumulate == 1:
                self._follow_std(std_of(moments(u)), step)
            r = bottleneck.running_std.clone()
            z = u / r
            output = unpatch(self._decode(r * (z + NOISE * self._noise(z, step))), self.model.audio_channels).float()
        fade = self._fade(step)
        waveform_weight = (1 - fade) * config.waveform_weight + fade * config.waveform_final
        terms = {
            "waveform": self.weighted("waveform", waveform_weight, waveform_loss(output, audio)),
            "softnorm": self.weighted("softnorm", config.softnorm_weight, soft_norm_loss(z)),
        }
        if fade > 0:
            output, audio = (
                spectral_input(x, config.spectral, self.model_config.sample_rate, step) for x in (output, audio)
            )
            loss = spectral_loss(output, audio, config.spectral, self._distance, mean)
            terms["spectral"] = self.weighted("spectral", fade, loss)
        return terms

    def prepare(self, step: int, parts: list[Part]) -> None:
        """running_std of the whole batch, before its first micro-batch is divided by it."""
        with self.autocast():
            found = [moments(self._raw_latents(self._audio(step, part))) for part in parts]
        self._follow_std(std_of(torch.stack(found).sum(0)), step)

    def _audio(self, step: int, part: Part) -> Tensor:
        return self.crops.batch(step, part.slice(self.crops.items)).audio.to(self.device)

    def _raw_latents(self, audio: Tensor) -> Tensor:
        """u, before the division by running_std: (B, N, 2) -> (B, T, C) float32."""
        bottleneck = self.model.bottleneck
        u = self._encode(patch(audio, self.model.config.patch_size)).float()
        return u * bottleneck.scale + bottleneck.bias

    def _noise(self, z: Tensor, step: int) -> Tensor:
        """Standard normals like z, drawn for the global batch."""
        batch = self.crops.items
        noise = torch.randn(batch, *z.shape[1:], generator=step_generator(self.config.train.seed, step))
        return noise[self.part.slice(batch)].to(self.device)

    def _follow_std(self, std: Tensor, step: int) -> None:
        """running_std follows the standard deviation of u; it starts at that of the first batch."""
        with torch.no_grad():
            follow(self.model.bottleneck.running_std, std.clamp_min(1e-4), min(STD_DECAY, step / (step + 10)))

    def _fade(self, step: int) -> float:
        """0 while the waveform is learnt, then up to 1: the spectral loss alone leaves the phases unlearnt."""
        start, full = (
            share * self.config.train.steps for share in (self.config.spectral_start, self.config.spectral_full)
        )
        return min(1.0, max(0.0, (step - start) / max(1.0, full - start)))

    def validate(self) -> dict[str, float]:
        """Held-out clips of at most 2 s: medians over tonal ones (or the user's recordings), log-mel over all kinds."""
        held_out = self.clips.select("validation")
        waveform = [clip for clip in held_out if clip.kind in ("note", "chord", "user")][:VALIDATION_CLIPS]
        texture = [clip for clip in held_out if clip.kind in ("drum", "noise")][:VALIDATION_CLIPS]
        if not waveform:
            raise ValueError("no held-out notes, chords or recordings to validate on; add more clips")
        pairs = [self._reconstruct(clip) for clip in waveform + texture]
        latents = torch.cat([self._latents(audio)[0] for audio, _ in pairs]).float().cpu()
        return {
            "si_sdr": float(np.median([si_sdr(a, b) for a, b in pairs[: len(waveform)]])),
            "spectral_convergence": float(np.median([spectral_convergence(a, b) for a, b in pairs[: len(waveform)]])),
            "log_mel": float(np.mean([log_mel_l1(a, b) for a, b in pairs])),
            "effective_rank": effective_rank(latents.numpy()),
            "latent_std": float(latents.std()),
        }

    def _reconstruct(self, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
        audio = self.clips.read(clip, 0, 2 * self.model_config.sample_rate)
        if audio.shape[1] == 1:
            audio = np.repeat(audio, self.model.audio_channels, axis=1)
        output = self.model.decode(self._latents(audio))[0, : len(audio)]
        return audio, output.float().cpu().numpy()

    def _latents(self, audio: np.ndarray) -> Tensor:
        """(N, 2) -> (1, T, C)"""
        return self.model.encode(torch.from_numpy(audio)[None].to(self.device))

    def demo(self, folder: Path, step: int) -> None:
        """One file: original, reconstruction, of six held-out clips in turn."""
        clips = self.clips.select("validation")
        pieces = [piece for clip in clips[:: max(1, len(clips) // 6)][:6] for piece in self._reconstruct(clip)]
        save_sound(
            folder / f"{step:06d}.wav", np.concatenate(pieces), self.model_config.sample_rate,
            title=f"step {step}: original, reconstruction of {len(pieces) // 2} clips",
        )  # fmt: skip

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        config = ModelConfig(
            name=f"{self.model_config.name}-autoencoder", sample_rate=self.model_config.sample_rate,
            audio_channels=self.model_config.audio_channels, same=self.model_config.same, diffusion=None,
        )  # fmt: skip
        save_checkpoint(folder, config, {f"same.{k}": v for k, v in weights.items()}, "F32")
