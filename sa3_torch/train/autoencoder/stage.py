"""Stage 0: SAME on spectral and waveform losses, adversarial and semantic terms [T1].

One generator step: crops -> encoder -> u; r <- EMA of std(u); z = u / r; decoder(r z + 0.05 r n) -> audio; losses in
fp32. In a discriminator's turn the autoencoder runs without gradients and leaves r alone. See coder.py.
For small models the waveform is learnt first, then the spectral loss takes over and gives noises their energy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.schema import ConfigError
from sa3_torch.same import SAME
from sa3_torch.train.autoencoder.semantics.held_out import BATCH, measure_semantics
from sa3_torch.train.data.audio_data import open_audio
from sa3_torch.train.data.augment import NO_AUGMENTATION
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.data.crops import AudioBatch, AudioCrops, Crops, ShardCrops
from sa3_torch.train.data.shards import ShardIndex
from sa3_torch.train.networks.init import init_autoencoder
from sa3_torch.train.run.command import RunOptions, stage_command
from sa3_torch.train.run.optimizers import Group
from sa3_torch.train.run.options import AUDIO, MODEL
from sa3_torch.train.run.parallel import BatchSlice, mean, moments, std_of
from sa3_torch.train.run.stage import Split, Stage, maybe_compile
from sa3_torch.weights import save_checkpoint

from .adversary import Adversary
from .coder import PLAIN, Coder
from .config import AutoencoderConfig
from .demo import save_demo
from .losses import soft_norm_loss, waveform_loss
from .reconstruct import Reconstructor, measure_reconstructions
from .semantics import Semantics
from .spectral import Average, spectral_distance, spectral_input, spectral_terms
from .start import Start


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

    def __init__(
        self,
        model: ModelConfig,
        config: AutoencoderConfig,
        clips: ClipSet,
        *,
        shards: ShardIndex | None = None,
        start: Start | None = None,
    ) -> None:
        """``clips`` are trained and measured on; with ``shards``, which are trained on then, measured alone."""
        super().__init__()
        self.model_config, self.config, self.clips, self.shards = model, config, clips, shards
        variants, train = config.variants or PLAIN, config.train
        if not variants.train_encoder and start is None:
            raise ConfigError("variants.train_encoder is 0 without a start: the encoder would stay as it began")
        self.model: SAME = SAME(model.same, model.audio_channels)
        self.crops: Crops = self._crops()
        self.coder = Coder(self.model, variants, train, self.crops.items)
        self.coder.check_crops(config.crop_samples, model.name)
        self.coder.settled = self._initialise(start)
        self.semantics, self.adversary = self._extras()
        self.groups = self._groups()
        self._heard: list[Tensor] = []  # by window size: items that are not silent, mean over slices; see ``prepare``
        self.attached = False  # whether the semantic networks have reached the latents
        self._distance = maybe_compile(spectral_distance, train.compile)

    def _crops(self) -> Crops:
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

    def _initialise(self, start: Start | None) -> bool:
        """The first weights; whether running_std belongs to them already."""
        if start is not None:
            return start.load_into(self.model, self.model_config)
        train = self.config.train
        loud = torch.cat([self.crops.batch(10**9 + i).audio for i in range(-(-256 // train.batch))])
        self._begin(loud)
        return False

    def _begin(self, loud: Tensor) -> None:
        """Weights of a model that starts from nothing; ``loud`` (B, N, channels) are training crops."""
        init_autoencoder(self.model, loud, self.config.train.seed)

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

    def data(self) -> tuple[Split, ...]:
        splits = [
            Split(name=name, items=len(clips), seconds=sum(clip.seconds for clip in clips))
            for name, clips in ((name, self.clips.select(name)) for name in ("train", "validation"))
        ]
        if self.shards is not None:  # the clips are what is held out of them
            splits[0] = Split(name="train", items=self.shards.samples, seconds=None)
        return tuple(splits)

    def turn(self, step: int) -> str:
        return "discriminator" if self.adversary is not None and self.adversary.plays(step) else "generator"

    def frozen(self, step: int) -> list[Tensor]:
        return self.coder.frozen(step) if self.turn(step) == "generator" else []

    def losses(self, step: int) -> dict[str, Tensor]:
        with self.coder.stride(step):
            return self._losses(step)

    def _losses(self, step: int) -> dict[str, Tensor]:
        batch = self._batch(step, self.batch_slice)
        audio = batch.audio.to(self.device)
        if self.turn(step) == "discriminator":
            return self._discriminator_losses(audio, step)
        with self.autocast():
            u = self.coder.raw_latents(audio, step)
            if self.config.train.accumulate == 1:
                self._follow_std(std_of(moments(u)), step)
            z = u / self.model.bottleneck.running_std.clone()
            output = self.coder.decoded(self.coder.masked(z, step, self.batch_slice), step, self.batch_slice)
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
            raw = self.semantics.losses(z, audio, captions, step=step, batch_slice=self.batch_slice)
        weights = self.semantics.weights()
        self.notes |= {f"measured/{name}": value for name, value in raw.items() if name not in weights}
        return {name: self.weighted(name, weight, raw[name]) for name, weight in weights.items()}

    def _adversarial_losses(self, comparisons: list[Comparison], step: int) -> dict[str, Tensor]:
        if self.adversary is None or not self.adversary.heeded(step):
            return {}
        sums: dict[str, Tensor] = {}
        for compared in comparisons:
            with self.autocast():
                raw = self.adversary.terms(
                    compared.reference, compared.prediction, step=step, batch_slice=self.batch_slice
                )
            for name, value in raw.items():
                sums[name] = sums.get(name, 0) + compared.share * value
        return {name: self.weighted(name, self.adversary.weights[name], value) for name, value in sums.items()}

    def _discriminator_losses(self, audio: Tensor, step: int) -> dict[str, Tensor]:
        assert self.adversary is not None
        with self.autocast():
            with torch.no_grad():
                z = self.coder.raw_latents(audio, step) / self.model.bottleneck.running_std
                output = self.coder.decoded(self.coder.masked(z, step, self.batch_slice), step, self.batch_slice)
                comparisons = self._comparisons(z, output, audio, step)
            losses = [
                compared.share
                * self.adversary.loss(compared.reference, compared.prediction, step=step, batch_slice=self.batch_slice)
                for compared in comparisons
            ]
        loss = torch.stack(losses).sum()
        share = sum(compared.share for compared in comparisons)
        self.adversary.follow(loss / share, batch_slice=self.batch_slice, micro_batches=self.config.train.accumulate)
        self.notes["measured/discriminator_mean"] = self.adversary.noise.loss_mean.detach()
        return {"discriminator": loss}

    def prepare(self, step: int, slices: list[BatchSlice]) -> None:
        """Of the whole batch, before its first micro-batch is divided by them: running_std, and heard items by size."""
        if self.turn(step) == "discriminator":
            return
        with self.coder.stride(step):
            self._prepare(step, slices)

    def _prepare(self, step: int, slices: list[BatchSlice]) -> None:
        found, heard = [], []
        for each in slices:
            audio = self._batch(step, each).audio.to(self.device)
            with self.autocast():
                found.append(moments(self.coder.raw_latents(audio, step)))
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
        """Takes the number of heard items of a slice, for one size after the other, to its mean over all slices."""
        if self.config.train.accumulate == 1:
            return mean
        known = iter(self._heard)
        return lambda _count: next(known)

    def _batch(self, step: int, batch_slice: BatchSlice) -> AudioBatch:
        return self.crops.batch(step, batch_slice.rows(self.crops.items))

    def _follow_std(self, std: Tensor, step: int) -> None:
        """``std`` of u of all processes."""
        self.coder.follow_std(std, step)
        if self.semantics is not None:
            self.semantics.follow(std / self.model.bottleneck.running_std.mean())

    def _note_latents(self, z: Tensor) -> None:
        """Kurtosis is 3 for normal numbers."""
        values = z.detach().float()
        centred = values - values.mean()
        self.notes |= {
            "latents/mean": values.mean(),
            "latents/std": values.std(),
            "latents/r": self.model.bottleneck.running_std.mean(),
            "latents/kurtosis": centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-12),
        }

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
            self.clips,
            split="validation",
            samples=config.crop_samples,
            batch=min(BATCH, config.train.batch),
            seed=config.train.seed,
            quietest_db=0.0,
            shares=config.shares.to_dict(),
            augment=replace(NO_AUGMENTATION, pan=config.augment.pan),
        )

    def demo(self, folder: Path, step: int) -> None:
        through = Reconstructor(self.model, self.clips, self.model_config.sample_rate, self.device)
        save_demo(through, self.semantics, self.adversary, folder / f"{step:06d}.wav", step)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        config = ModelConfig(
            name=f"{self.model_config.name}-autoencoder",
            sample_rate=self.model_config.sample_rate,
            audio_channels=self.model_config.audio_channels,
            same=self.model_config.same,
            diffusion=None,
        )
        save_checkpoint(folder, config, {f"same.{k}": v for k, v in weights.items()}, "F32")


@stage_command("autoencoder")
@AUDIO
@click.option("--model", "size", default="demo", show_default=True, type=click.Choice(sorted(PRESETS)))
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
        click.echo(f"autoencoder: {made}; next: sa3 pre-encode --autoencoder {made} --data {data}")
