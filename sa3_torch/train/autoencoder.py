"""Stage 0: SAME on spectral and waveform losses, adversarial and semantic terms (training spec, 1).

One generator step: crops -> encoder -> u; r <- EMA of std(u); z = u / r; decoder(r z + 0.05 r n) -> audio; losses in
fp32. In a discriminator's turn the autoencoder runs without gradients and leaves r alone.
For small models the waveform is learnt first, then the spectral loss takes over and gives noises their energy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sa3_mlx.spec.config import Config, ConfigError, ModelConfig
from sa3_torch.same import SAME, patch, unpatch
from sa3_torch.weights import save_checkpoint

from .adversary import AdversarialConfig, Adversary
from .augment import NO_AUGMENTATION, AugmentConfig
from .clips import ClipSet
from .data import AudioBatch, AudioCrops, SharesConfig
from .init import init_autoencoder
from .losses import soft_norm_loss, waveform_loss
from .optimizers import Group, OptimizerConfig
from .parallel import Part, follow, mean, moments, std_of
from .reconstruct import measure_reconstructions, save_reconstructions
from .semantics import Semantics, SemanticsConfig
from .semantics.held_out import BATCH, measure_semantics
from .settings import check
from .spectral import Average, SpectralConfig, spectral_distance, spectral_input, spectral_terms
from .stage import Stage, TrainConfig, maybe_compile, step_generator

STD_DECAY = 0.999
NOISE = 0.05  # on the latents while training, relative to running_std


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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sounds (B, N, 2) that are compared, with the weight of their spectral and adversarial terms."""

    name: str  # of the spectral term
    weight: float  # of it
    share: float  # of the adversarial terms
    reference: Tensor
    prediction: Tensor


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
        self.semantics, self.adversary = self._extras()
        self.groups = self._groups()
        self._heard: list[Tensor] = []  # by window size: items that are not silent, mean over parts; see ``prepare``
        self.attached = False  # whether the semantic networks have reached the latents
        self._encode = maybe_compile(self.model.encoder, train.compile)
        self._decode = maybe_compile(self.model.decoder, train.compile)
        self._distance = maybe_compile(spectral_distance, train.compile)

    def _extras(self) -> tuple[Semantics | None, Adversary | None]:
        """The networks beside the autoencoder that the settings switch on."""
        config, model, items = self.config, self.model_config, self.crops.items
        semantics = adversary = None
        if config.semantics is not None:
            semantics = Semantics(
                config.semantics, model, items=items, samples=config.crop_samples, seed=config.train.seed
            )
            if not semantics.weights():
                semantics = None
        if config.adversarial is not None and config.adversarial.on:
            adversary = Adversary(
                config.adversarial, model.sample_rate, model.audio_channels, items=items, seed=config.train.seed
            )
        return semantics, adversary

    def _groups(self) -> dict[str, Group]:
        network: nn.Module = self.model
        if self.semantics is not None:
            network = nn.ModuleDict({"autoencoder": self.model, "semantics": self.semantics})
        groups = {"generator": Group(network=network.to(self.device), optimizer=self.config.generator)}
        if self.adversary is not None:
            assert self.config.discriminator is not None
            network = self.adversary.to(self.device)
            groups["discriminator"] = Group(network=network, optimizer=self.config.discriminator)
        return groups

    def turn(self, step: int) -> str:
        return "discriminator" if self.adversary is not None and self.adversary.plays(step) else "generator"

    def losses(self, step: int) -> dict[str, Tensor]:
        batch = self._batch(step, self.part)
        audio = batch.audio.to(self.device)
        if self.turn(step) == "discriminator":
            return self._discriminator_losses(audio, step)
        with self.autocast():
            u = self._raw_latents(audio)
            if self.config.train.accumulate == 1:
                self._follow_std(std_of(moments(u)), step)
            z = u / self.model.bottleneck.running_std.clone()
            output = self._decoded(z, step)
        self._note_latents(z)
        comparisons = self._comparisons(z, output, audio, step)
        return {
            **self._reconstruction_losses(comparisons, step),
            **self._latent_losses(z),
            **self._semantic_losses(z, audio, batch.captions, step),
            **self._adversarial_losses(comparisons, step),
        }

    def _comparisons(self, _z: Tensor, output: Tensor, audio: Tensor, _step: int) -> list[Comparison]:
        """What is held against what; the first is audio and its reconstruction."""
        return [Comparison(name="spectral", weight=1.0, share=1.0, reference=audio, prediction=output)]

    def _latent_losses(self, z: Tensor) -> dict[str, Tensor]:
        return {"softnorm": self.weighted("softnorm", self.config.softnorm_weight, soft_norm_loss(z))}

    def _reconstruction_losses(self, comparisons: list[Comparison], step: int) -> dict[str, Tensor]:
        config, fade, first = self.config, self._fade(step), comparisons[0]
        waveform_weight = (1 - fade) * config.waveform_weight + fade * config.waveform_final
        loss = waveform_loss(first.prediction, first.reference)
        terms = {"waveform": self.weighted("waveform", waveform_weight, loss)}
        if fade == 0:
            return terms
        counts: list[Tensor] = []
        average = self._average()

        def record(count: Tensor) -> Tensor:
            counts.append(average(count))
            return counts[-1]

        for compared in comparisons:  # all are divided by the heard items of the first reference
            known = iter(counts)
            average_of = record if compared is first else lambda _count, known=known: next(known)
            prediction, reference = (self._spectral_input(x, step) for x in (compared.prediction, compared.reference))
            raw = spectral_terms(prediction, reference, config.spectral, self._distance, average_of)
            loss = torch.stack([config.spectral.weights[name] * value for name, value in raw.items()]).sum()
            terms[compared.name] = self.weighted(compared.name, fade * compared.weight, loss)
            self.notes |= {f"{compared.name}_{name}/raw": value.detach() for name, value in raw.items()}
        return terms

    def _semantic_losses(self, z: Tensor, audio: Tensor, captions: tuple[str, ...], step: int) -> dict[str, Tensor]:
        if self.semantics is None:
            return {}
        self.attached = step >= self.semantics.config.detached_steps
        with self.autocast():
            raw = self.semantics.losses(z, audio, captions, step=step, part=self.part)
        weights = self.semantics.weights()
        self.notes |= {f"measured/{name}": value for name, value in raw.items() if name not in weights}
        return {name: self.weighted(name, weight, raw[name]) for name, weight in weights.items()}

    def _adversarial_losses(self, comparisons: list[Comparison], step: int) -> dict[str, Tensor]:
        if self.adversary is None or not self.adversary.heeded(step):
            return {}
        sums: dict[str, Tensor] = {}
        for compared in comparisons:
            with self.autocast():
                raw = self.adversary.terms(compared.reference, compared.prediction, step=step, part=self.part)
            for name, value in raw.items():
                sums[name] = sums.get(name, 0) + compared.share * value
        return {name: self.weighted(name, self.adversary.weights[name], value) for name, value in sums.items()}

    def _discriminator_losses(self, audio: Tensor, step: int) -> dict[str, Tensor]:
        assert self.adversary is not None
        with self.autocast():
            with torch.no_grad():
                z = self._raw_latents(audio) / self.model.bottleneck.running_std
                comparisons = self._comparisons(z, self._decoded(z, step), audio, step)
            losses = [
                compared.share * self.adversary.loss(compared.reference, compared.prediction, step=step, part=self.part)
                for compared in comparisons
            ]
        loss = torch.stack(losses).sum()
        share = sum(compared.share for compared in comparisons)
        self.adversary.follow(loss / share, part=self.part, micro_batches=self.config.train.accumulate)
        self.notes["measured/discriminator_mean"] = self.adversary.noise.loss_mean.detach()
        return {"discriminator": loss}

    def prepare(self, step: int, parts: list[Part]) -> None:
        """Of the whole batch, before its first micro-batch is divided by them: running_std, and heard items by size."""
        if self.turn(step) == "discriminator":
            return
        found, heard = [], []
        for part in parts:
            audio = self._batch(step, part).audio.to(self.device)
            with self.autocast():
                found.append(moments(self._raw_latents(audio)))
            counts: list[Tensor] = []

            def record(count: Tensor, counts: list[Tensor] = counts) -> Tensor:
                counts.append(count)
                return count

            signals = self._spectral_input(audio, step)
            spectral_terms(signals, signals, self.config.spectral, self._distance, record)
            heard.append(torch.stack(counts))
        self._follow_std(std_of(torch.stack(found).sum(0)), step)
        self._heard = list(mean(torch.stack(heard).mean(0)))

    def _spectral_input(self, audio: Tensor, step: int) -> Tensor:
        return spectral_input(audio, self.config.spectral, self.model_config.sample_rate, step)

    def _average(self) -> Average:
        """Takes the number of heard items of a part, for one size after the other, to its mean over all parts."""
        if self.config.train.accumulate == 1:
            return mean
        known = iter(self._heard)
        return lambda _count: next(known)

    def _batch(self, step: int, part: Part) -> AudioBatch:
        return self.crops.batch(step, part.slice(self.crops.items))

    def _raw_latents(self, audio: Tensor) -> Tensor:
        """u, before the division by running_std: (B, N, 2) -> (B, T, C) float32."""
        bottleneck = self.model.bottleneck
        u = self._encode(patch(audio, self.model.config.patch_size)).float()
        return u * bottleneck.scale + bottleneck.bias

    def _decoded(self, z: Tensor, step: int) -> Tensor:
        """(B, T, C) -> (B, N, 2), with the training noise of the global batch."""
        items, r = self.crops.items, self.model.bottleneck.running_std.clone()
        noise = torch.randn(items, *z.shape[1:], generator=step_generator(self.config.train.seed, step))
        noisy = r * (z + NOISE * noise[self.part.slice(items)].to(self.device))
        return unpatch(self._decode(noisy), self.model.audio_channels).float()

    def _follow_std(self, std: Tensor, step: int) -> None:
        """running_std follows the standard deviation of u; it starts at that of the first batch."""
        running = self.model.bottleneck.running_std
        with torch.no_grad():
            follow(running, std.clamp_min(1e-4), min(STD_DECAY, step / (step + 10)))
            if self.semantics is not None:
                self.semantics.follow(std / running.mean())

    def _note_latents(self, z: Tensor) -> None:
        """Kurtosis is 3 for normal numbers."""
        values = z.detach().float()
        centred = values - values.mean()
        self.notes |= {
            "latents/mean": values.mean(), "latents/std": values.std(),
            "latents/r": self.model.bottleneck.running_std.mean(),
            "latents/kurtosis": centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-12),
        }  # fmt: skip

    def _fade(self, step: int) -> float:
        """0 while the waveform is learnt, then up to 1: the spectral loss alone leaves the phases unlearnt."""
        start, full = (
            share * self.config.train.steps for share in (self.config.spectral_start, self.config.spectral_full)
        )
        return 1.0 if step >= full else min(1.0, max(0.0, (step - start) / max(1.0, full - start)))

    def validate(self) -> dict[str, float]:
        """See ``measure_reconstructions``, ``measure_semantics``. Raises RuntimeError when latents lose their rank."""
        measures = measure_reconstructions(self.model, self.clips, self.model_config.sample_rate, self.device)
        if self.semantics is not None:
            pitches = {clip.id: clip.midi if clip.label == "note" else None for clip in self.clips.select("validation")}
            measures |= measure_semantics(self.semantics, self.model.encode, self._held_out(), pitches)
        share = self.config.semantics.least_rank if self.config.semantics is not None else 0.0
        least, rank = share * self.model_config.same.latent_channels, measures["effective_rank"]
        if self.attached and rank < least:
            raise RuntimeError(
                f"autoencoder: the effective rank of held-out latents is {rank:.1f}, less than {least:.1f}, that is "
                f"semantics.least_rank = {share:g} of the channels; lower semantics.alignment_weight or go on detached "
                "for longer"
            )
        return measures

    def _held_out(self) -> AudioCrops:
        """Crops as they are trained on, of held-out clips, at full level."""
        config = self.config
        return AudioCrops(
            self.clips, split="validation", samples=config.crop_samples, batch=min(BATCH, config.train.batch),
            seed=config.train.seed, quietest_db=0.0, shares=config.shares.to_dict(),
            augment=replace(NO_AUGMENTATION, pan=config.augment.pan),
        )  # fmt: skip

    def demo(self, folder: Path, step: int) -> None:
        """One file: original, reconstruction, of six held-out clips in turn."""
        save_reconstructions(
            self.model, self.clips, self.model_config.sample_rate, self.device, folder / f"{step:06d}.wav", step
        )

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        config = ModelConfig(
            name=f"{self.model_config.name}-autoencoder", sample_rate=self.model_config.sample_rate,
            audio_channels=self.model_config.audio_channels, same=self.model_config.same, diffusion=None,
        )  # fmt: skip
        save_checkpoint(folder, config, {f"same.{k}": v for k, v in weights.items()}, "F32")
