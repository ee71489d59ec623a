"""Train stage 0: SAME on spectral and waveform losses, adversarial and semantic terms [T1].

One generator step: crops -> encoder -> u; r <- EMA of std(u); z = u / r; decoder(r z + 0.05 r n) -> audio; losses in
fp32. In a discriminator's turn the autoencoder runs without gradients and leaves r as it is. See coder.py.
For small models the waveform is learnt first, then the spectral loss takes over and gives noises their energy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.schema import ConfigError
from sa3_torch.same import SAME
from sa3_torch.train.data.audio_data import open_audio
from sa3_torch.train.data.augment import NO_AUGMENTATION, AugmentConfig
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.data.crops import AudioBatch, AudioCrops, Crops, ShardCrops, ShardsConfig
from sa3_torch.train.data.drawing import SharesConfig
from sa3_torch.train.data.shards import ShardIndex
from sa3_torch.train.networks.init import init_autoencoder
from sa3_torch.train.run import parallel
from sa3_torch.train.run.command import RunOptions, report_made, stage_command
from sa3_torch.train.run.feed import BatchFeed
from sa3_torch.train.run.optimizers import Group, OptimizerConfig
from sa3_torch.train.run.options import AUDIO, MODEL
from sa3_torch.train.run.parallel import BatchSlice, mean, moments, std_of
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import Split, Stage, StageConfig
from sa3_torch.weights import save_checkpoint

from .adversary import AdversarialConfig, Adversary
from .coder import Coder
from .demo import save_demo
from .losses import Comparison, latent_statistics, silence_loss, soft_norm_loss, waveform_loss
from .reconstruct import Reconstructor, measure_reconstructions
from .semantics import Semantics, SemanticsConfig
from .semantics.held_out import BATCH, measure_semantics
from .spectral import SpectralConfig, SpectralLoss
from .start import Start


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(StageConfig):
    """Hold the settings of ``sa3 train autoencoder``."""

    generator: OptimizerConfig
    crop_samples: int
    quietest_db: float
    spectral: SpectralConfig
    waveform_weight: float  # at the start ...
    waveform_final: float  # ... and once the spectral loss has its full weight
    silence_weight: float = 0.0  # of what is made where there is silence; needed where waveform_final is 0
    spectral_start: float  # share of the run after which the spectral loss begins to fade in ...
    spectral_full: float  # ... and has its full weight
    softnorm_weight: float
    train_encoder: bool = True  # false: the decoder alone learns, and latents stay what they are
    shares: SharesConfig
    augment: AugmentConfig
    shards: ShardsConfig | None = None  # for data that are shards
    semantics: SemanticsConfig | None = None
    adversarial: AdversarialConfig | None = None
    discriminator: OptimizerConfig | None = None

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "crop_samples")
        check(self, -60, 0, "quietest_db")
        check(self, 0, math.inf, "waveform_weight", "waveform_final", "silence_weight", "softnorm_weight")
        check(self, 0, 1, "spectral_start", "spectral_full")
        if not self.waveform_final and not self.silence_weight:
            raise ConfigError(
                "waveform_final is 0 and silence_weight too: silence would have no loss; set one, such as "
                "silence_weight=0.1"
            )
        if not self.train_encoder and (self.softnorm_weight or self.semantics is not None):
            raise ConfigError(
                "train_encoder is false: nothing can shape the latents; choose softnorm_weight=0 and no [semantics]"
            )
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


class AutoencoderStage(Stage):
    """Train an autoencoder, and the networks beside it that the settings switch on."""

    name = "autoencoder"
    feed: BatchFeed[AudioBatch]

    def __init__(
        self,
        model: ModelConfig,
        config: AutoencoderConfig,
        clips: ClipSet,
        *,
        shards: ShardIndex | None = None,
        start: Start | None = None,
    ) -> None:
        """Train and measure on ``clips``; where there are ``shards``, train on these and measure on the clips."""
        super().__init__()
        self.model_config, self.config, self.clips, self.shards = model, config, clips, shards
        self.model: SAME = SAME(model.same, model.audio_channels)
        self.crops: Crops = self._crops()
        self.feed = BatchFeed(self._read)
        self.coder = Coder(self.model, config.train, self.crops.items)
        self.coder.check_crops(config.crop_samples, model.name)
        self.coder.settled = self._initialise(start)
        if not config.train_encoder:
            if not self.coder.settled:
                raise ConfigError("train_encoder is false: give --start, an autoencoder of the same stride")
            self.model.encoder.requires_grad_(False)
            self.model.bottleneck.requires_grad_(False)
        self.spectral = SpectralLoss(config.spectral, config.train, model.sample_rate)
        self.semantics, self.adversary = self._semantics(), self._adversary()
        self.groups = self._groups()
        self.attached = False  # whether the gradient of the semantic networks has reached the latents

    def _initialise(self, start: Start | None) -> bool:
        """Set the first weights; return whether running_std belongs to them already."""
        if start is not None:
            return start.load_into(self.model, self.model_config)
        batch = self.config.train.batch
        rows, items = parallel.own_rows(self.crops.items), self.crops.items  # each process reads its own
        parts = (self.crops.batch(10**9 + i, rows).audio.to(self.device) for i in range(-(-256 // batch)))
        self._begin(torch.cat([parallel.gather_shares(audio, items).cpu() for audio in parts]))
        return False

    def _begin(self, audio: Tensor) -> None:
        """Set the weights of a model that starts from nothing; ``audio`` (B, N, channels) are training crops."""
        init_autoencoder(self.model, audio, self.config.train.seed)

    def _semantics(self) -> Semantics | None:
        config = self.config
        if config.semantics is None:
            return None
        samples, seed = config.crop_samples, config.train.seed
        found = Semantics(config.semantics, self.model_config, items=self.crops.items, samples=samples, seed=seed)
        return found if found.weights() else None

    def _adversary(self) -> Adversary | None:
        config, model = self.config.adversarial, self.model_config
        if config is None or not config.on:
            return None
        return Adversary(config, model.audio_channels, seed=self.config.train.seed)

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

    # --- data ---------------------------------------------------------------------------------------------------------

    def _crops(self) -> Crops:
        """Draw crops of the shards, or of the training clips."""
        config, train = self.config, self.config.train
        if self.shards is None:
            return AudioCrops(
                self.clips,
                split="train",
                samples=config.crop_samples,
                batch=train.batch,
                seed=train.seed,
                quietest_db=config.quietest_db,
                shares=config.shares.to_dict(),
                augment=config.augment,
            )
        if config.shards is None:
            raise ConfigError("the data are shards, the settings have no table [shards]: give streams and window there")
        return ShardCrops(
            self.shards,
            samples=config.crop_samples,
            batch=train.batch,
            streams=config.shards.streams,
            window=config.shards.window,
            seed=train.seed,
            quietest_db=config.quietest_db,
            augment=config.augment,
        )

    def _held_out(self) -> AudioCrops:
        """Draw crops of held-out clips as they are trained on, but at full level."""
        config = self.config
        return AudioCrops(
            self.clips,
            split="validation",
            samples=config.crop_samples,
            batch=min(BATCH, config.train.batch),
            seed=config.train.seed,
            quietest_db=0.0,
            shares=config.shares.to_dict(),
            augment=replace(NO_AUGMENTATION, pan=config.augment.pan),
        )

    def _read(self, step: int, part: BatchSlice) -> AudioBatch:
        return self.crops.batch(step, part.rows(self.crops.items))

    def data(self) -> tuple[Split, ...]:
        splits = [
            Split(name=name, items=len(clips), seconds=sum(clip.seconds for clip in clips))
            for name, clips in ((name, self.clips.select(name)) for name in ("train", "validation"))
        ]
        if self.shards is not None:  # the clips are what is held out of them
            splits[0] = Split(name="train", items=self.shards.samples, seconds=None)
        return tuple(splits)

    # --- losses -------------------------------------------------------------------------------------------------------

    def turn(self, step: int) -> str:
        return "discriminator" if self.adversary is not None and self.adversary.is_trained(step) else "generator"

    def losses(self, step: int) -> dict[str, Tensor]:
        batch = self.feed.get(step, self.batch_slice)
        audio = batch.audio.to(self.device, non_blocking=True)
        if self.turn(step) == "discriminator":
            return self._discriminator_losses(audio, step)
        return self._generator_losses(audio, batch.captions, step)

    def _generator_losses(self, audio: Tensor, captions: tuple[str, ...], step: int) -> dict[str, Tensor]:
        with self.autocast():
            u = self.coder.raw_latents(audio)
            if self.config.train.accumulate == 1:
                self._follow_std(std_of(moments(u)), step)
            z = u / self.model.bottleneck.running_std.clone()
            output = self.coder.decoded(z, step, self.batch_slice)
        self.notes |= {f"latents/{name}": value for name, value in latent_statistics(z).items()}
        self.notes["latents/r"] = self.model.bottleneck.running_std.mean()
        comparisons = self._comparisons(z, output, audio, step)
        return {
            **self._reconstruction_losses(comparisons, step),
            **self._latent_losses(z),
            **self._semantic_losses(z, audio, captions, step),
            **self._adversarial_losses(comparisons, step),
        }

    def _comparisons(self, _z: Tensor, output: Tensor, audio: Tensor, _step: int) -> list[Comparison]:
        """Return what is compared with what; the first is audio and its reconstruction."""
        return [Comparison(name="spectral", weight=1.0, share=1.0, reference=audio, prediction=output)]

    def _reconstruction_losses(self, comparisons: list[Comparison], step: int) -> dict[str, Tensor]:
        config, fade, first = self.config, self._fade(step), comparisons[0]
        waveform_weight = (1 - fade) * config.waveform_weight + fade * config.waveform_final
        loss = waveform_loss(first.prediction, first.reference)
        terms = {"waveform": self.weighted("waveform", waveform_weight, loss)}
        if config.silence_weight:
            loss = silence_loss(first.prediction, first.reference)
            terms["silence"] = self.weighted("silence", config.silence_weight, loss)
        if fade == 0:
            return terms
        for compared, raw in zip(comparisons, self.spectral.terms(comparisons, step), strict=True):
            loss = torch.stack([config.spectral.weights[name] * value for name, value in raw.items()]).sum()
            terms[compared.name] = self.weighted(compared.name, fade * compared.weight, loss)
            self.notes |= {f"{compared.name}_{name}/raw": value.detach() for name, value in raw.items()}
        return terms

    def _fade(self, step: int) -> float:
        """Return 0 while the waveform is learnt, then up to 1: the spectral loss by itself leaves phases unlearnt."""
        start, full = (
            share * self.config.train.steps for share in (self.config.spectral_start, self.config.spectral_full)
        )
        return 1.0 if step >= full else min(1.0, max(0.0, (step - start) / max(1.0, full - start)))

    def _latent_losses(self, z: Tensor) -> dict[str, Tensor]:
        return {"softnorm": self.weighted("softnorm", self.config.softnorm_weight, soft_norm_loss(z))}

    def _semantic_losses(self, z: Tensor, audio: Tensor, captions: tuple[str, ...], step: int) -> dict[str, Tensor]:
        if self.semantics is None:
            return {}
        self.attached = step >= self.semantics.config.detached_steps
        with self.autocast():
            raw = self.semantics.losses(z, audio, captions, step=step, batch_slice=self.batch_slice)
        weights = self.semantics.weights()
        self.notes |= {f"measured/{name}": value for name, value in raw.items() if name not in weights}
        return {name: self.weighted(name, weight, raw[name]) for name, weight in weights.items()}

    def _adversarial_losses(self, comparisons: list[Comparison], step: int) -> dict[str, Tensor]:
        if self.adversary is None or not self.adversary.reaches_generator(step):
            return {}
        with self.autocast():
            raw = self.adversary.terms(comparisons)
        return {name: self.weighted(name, self.adversary.weights[name], value) for name, value in raw.items()}

    def _discriminator_losses(self, audio: Tensor, step: int) -> dict[str, Tensor]:
        assert self.adversary is not None
        with self.autocast():
            with torch.no_grad():
                z = self.coder.raw_latents(audio) / self.model.bottleneck.running_std
                output = self.coder.decoded(z, step, self.batch_slice)
                comparisons = self._comparisons(z, output, audio, step)
            return {"discriminator": self.adversary.loss(comparisons)}

    def prepare(self, step: int, slices: list[BatchSlice]) -> None:
        """Find running_std and the audible items by size of the whole batch, by which micro-batches are divided."""
        if self.turn(step) == "discriminator":
            return
        found, counts = [], []
        for each in slices:
            audio = self.feed.get(step, each).audio.to(self.device, non_blocking=True)
            with self.autocast():
                found.append(moments(self.coder.raw_latents(audio)))
            counts.append(self.spectral.count(audio, step))
        self._follow_std(std_of(torch.stack(found).sum(0)), step)
        self.spectral.know(mean(torch.stack(counts).mean(0)))

    def _follow_std(self, std: Tensor, step: int) -> None:
        """Move running_std towards ``std`` of u of all processes; that of a frozen encoder stays."""
        if not self.config.train_encoder:
            return
        self.coder.follow_std(std, step)
        if self.semantics is not None:
            self.semantics.follow(std / self.model.bottleneck.running_std.mean())

    # --- validation and export ----------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Return the measures of ``measure_reconstructions`` and ``measure_semantics``.

        Raises RuntimeError when latents lose their rank.
        """
        measures = measure_reconstructions(self.model, self.clips, self.model_config.sample_rate, self.device)
        if not parallel.is_first():
            return measures
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

    def demo(self, folder: Path, step: int) -> None:
        if not parallel.is_first():
            return
        through = Reconstructor(self.model, self.clips, self.model_config.sample_rate, self.device)
        save_demo(through, self.semantics, self.adversary, folder / f"{step:06d}.wav", step)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        config = replace(self.model_config, name=f"{self.model_config.name}-autoencoder", diffusion=None, sampling=None)
        save_checkpoint(folder, config, {f"same.{k}": v for k, v in weights.items()}, "F32")


@stage_command("autoencoder")
@AUDIO
@click.option("--model", "size", default="first", show_default=True, type=click.Choice(sorted(PRESETS)))
@click.option(
    "--start",
    "folder",
    type=MODEL,
    default=None,
    help="Checkpoint folder to begin with; its stride may be another one than the model's.",
)
@click.option("--stride", type=click.IntRange(1), default=None, help="Patches per latent. Default: the model's.")
def autoencoder(run: RunOptions, data: str, size: str, folder: Path | None, stride: int | None) -> None:
    """Train a SAME autoencoder (stage 0)."""
    config = run.settings(AutoencoderConfig, "autoencoder")
    start, audio, model = None if folder is None else Start.open(folder), open_audio(data, run.out), PRESETS[size]
    model = replace(model, same=replace(model.same, stride=stride or model.same.stride))
    stage = AutoencoderStage(model, config, audio.clips, shards=audio.shards, start=start)
    belongings = {"data": audio.digest, "start": start.digest if start else "", "stride": stride}
    if run.train(stage, config, belongings):
        made = run.out / "model"
        report_made("autoencoder", made, "pre-encode", "--data", data, "--autoencoder", made, "--out", "latents")
