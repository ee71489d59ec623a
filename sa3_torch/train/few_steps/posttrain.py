"""Stage 3, adversarial post-training (ARC): a few-step generator without guidance [T7].

Steps alternate. Generator G: x_t = (1 - t) z + t eps, fake = x_t - t v_G; discriminator D: real and fake with the same
noise of level t_D. G is to make D score the fake above the real, D the real above the fake (relativistic, softplus),
and above the real under another prompt (contrastive), with finite-difference R1 and R2 and centred scores. A latent
CLAP ties the fake to its prompt, and the distribution of its features to that of the data (frechet_loss.py). Nothing is
dropped out, in the turns of neither.

Shapes: B batch, T latent frames, C latent channels, N positions of scores. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor

from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import ShiftConfig
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.flow.conditioning import ConditionInputs, Networks
from sa3_torch.train.flow.demo import sample
from sa3_torch.train.flow.latent_data import ClipsConfig, LatentData
from sa3_torch.train.flow.masks import Masks
from sa3_torch.train.flow.model import StartModel, diffusion_of, export_model, open_model, open_text
from sa3_torch.train.flow.path import interpolate
from sa3_torch.train.flow.validation import VALIDATION_BATCHES
from sa3_torch.train.run import parallel
from sa3_torch.train.run.command import RunOptions, report_made, stage_command
from sa3_torch.train.run.feed import BatchFeed
from sa3_torch.train.run.optimizers import Group, OptimizerConfig
from sa3_torch.train.run.options import AUTOENCODER, FOLDER, LATENTS, MODEL, UNGATED
from sa3_torch.train.run.random import Purpose, item_noise
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import Split, Stage, StageConfig
from sa3_torch.weights import StableAudio

from .alarms import ADVERSARIAL, BalanceAlarms
from .arc_losses import finite_difference, masked_mean, mean_of_usable, relativistic
from .clap_terms import clean_features, prompt_distance
from .denoiser import Denoiser, channel_moments, few_step_config, few_step_sampling, frozen_inputs, write_few_step_demos
from .frechet_loss import FeatureMoments
from .heads import HeadConfig
from .latent_discriminator import BACKBONE, LatentDiscriminator, Verdict, score_notes
from .noise_levels import NoiseLevelConfig
from .scenes import SceneData, SceneDraw

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
VALIDATION_ITEMS = 8  # of a batch


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Config):
    """Weigh the terms; but for the discriminator's a term of weight 0 is not computed."""

    generator: float
    clap: float  # needs a latent CLAP, as ``frechet`` does
    discriminator: float
    contrastive: float
    gradient_penalty: float
    centring: float
    frechet: float = 0.0  # of features of the latent CLAP

    def __post_init__(self) -> None:
        check(self, 0, math.inf, *self.to_dict())


@dataclass(frozen=True, kw_only=True)
class PosttrainConfig(StageConfig):
    """Hold the settings of ``sa3 train posttrain``."""

    generator: OptimizerConfig
    discriminator: OptimizerConfig
    clips: ClipsConfig
    taps: tuple[int, ...]  # blocks of the base, from 0, that the discriminator's head reads
    head: HeadConfig
    weights: WeightsConfig
    generator_noise: NoiseLevelConfig
    discriminator_noise: NoiseLevelConfig
    shift_min_frames: int  # of noise levels that are shifted
    shift_max_frames: int
    penalty_step: float  # of the finite differences
    clap_max_noise: float  # latents that the CLAP sees have a noise level of up to this, uniformly
    own_sample_share: float  # of the generator's inputs that are made of its own samples, not of data
    head_start: int = 0  # steps in which the discriminator learns before the generator does
    backbone_rate: float = 1.0  # learning rate of the discriminator's blocks and conditioner to its head's; 0 freezes

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "shift_min_frames")
        check(self, self.shift_min_frames + 1, math.inf, "shift_max_frames")
        check(self, 1e-6, 1, "penalty_step")
        check(self, 0, 1, "clap_max_noise", "own_sample_share", "backbone_rate")
        check(self, 0, math.inf, "head_start")
        if self.weights.contrastive and self.train.batch < 2:
            raise ConfigError(
                "batch is 1: the contrastive term takes prompts of other items; set weights.contrastive=0"
            )
        if self.train.ema_every != 2:
            raise ConfigError(f"ema_every is {self.train.ema_every}: the generator moves every 2 steps; set it to that")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Hold everything of a step, of this slice of the batch, on the device."""

    step: int
    rows: slice  # of the global batch
    drawn: SceneDraw
    inputs: ConditionInputs

    @property
    def z(self) -> Tensor:
        return self.drawn.batch.latents

    @property
    def few_step(self) -> Tensor:
        """Return whose fake is what a user gets in one or two evaluations: (B,) bool."""
        return (self.drawn.t == 1) | self.drawn.own


class PosttrainStage(Stage):
    """Train G, conditioner and DiT of the folder ``start``, against D, made of those of ``base``, which stage 1 made.

    ``autoencoder``: folder of the one that made the latents; needed only where ``start`` does not say which it was.
    Raises ValueError when they do not belong together, or the CLAP term has a weight and ``clap`` is missing.
    """

    name = "posttrain"
    feed: BatchFeed[SceneDraw]

    def __init__(
        self,
        start: Path,
        base: Path,
        config: PosttrainConfig,
        latents: Sequence[Path],
        clap: LatentClap | None,
        autoencoder: Path | None = None,
    ) -> None:
        super().__init__()
        if (clap is not None) != (config.weights.clap > 0 or config.weights.frechet > 0):
            raise ConfigError(
                f"weights.clap is {config.weights.clap:g} and weights.frechet {config.weights.frechet:g} "
                f"{'without' if clap is None else 'with'} a latent CLAP: give one with --clap, or set both to 0"
            )
        opened = StartModel.open(start, latents, autoencoder)
        self.config, self.model_config, self.clap = config, few_step_config(opened.config), clap
        self.parents = {**opened.parents(), "base": file_hash(base / WEIGHTS_FILE)}
        self.model: StableAudio = opened.model.to(self.device)
        self.same = opened.same.to(self.device)
        self.tokenizer_file = opened.tokenizer_file
        self.networks = Networks.of(self.model)
        self.networks.text_encoder.requires_grad_(False)
        self.denoiser = Denoiser(self.networks.conditioner, self.networks.dit)
        self.discriminator = self._new_discriminator(base).to(self.device)
        if clap is not None and config.weights.frechet:
            self.discriminator.moments = FeatureMoments(clap.feature_width).to(self.device)  # checkpoints have them so
        rates = dict.fromkeys(BACKBONE, config.backbone_rate)
        for name, rate in rates.items():
            self.discriminator.get_submodule(name).requires_grad_(rate > 0)
        self.groups = {
            GENERATOR: Group(network=self.denoiser, optimizer=config.generator),
            DISCRIMINATOR: Group(network=self.discriminator, optimizer=config.discriminator, rates=rates),
        }
        tokenizer = open_text(opened.tokenizer_file, opened.config)
        self.latents = LatentData(opened.latents, tokenizer, opened.config, config.clips, config.train)
        self.balance = BalanceAlarms(ADVERSARIAL)
        self.feed = SceneData(config, self.latents).feed

    def _new_discriminator(self, base: Path) -> LatentDiscriminator:
        model, config, same = open_model(base)
        ours, theirs = self.networks.text_encoder.state_dict(), model.get_submodule("text_encoder").state_dict()
        if (
            same.config != self.model_config.same
            or diffusion_of(config).text_encoder != diffusion_of(self.model_config).text_encoder
            or any(not torch.equal(ours[name].cpu(), theirs[name]) for name in ours)
        ):
            raise ValueError(f"{base}: text encoder or autoencoder are not those of the model to train; give its base")
        return LatentDiscriminator(model, self.config.taps, self.config.head, self.config.train.seed)

    def data(self) -> tuple[Split, ...]:
        return self.latents.splits()

    def remarks(self) -> list[str]:
        return self.latents.remarks()

    def turn(self, step: int) -> str:
        return DISCRIMINATOR if step % 2 or step < self.config.head_start else GENERATOR

    def alarms(self, values: dict[str, float]) -> list[str]:
        return self.balance.alarms(values)

    def losses(self, step: int) -> dict[str, Tensor]:
        scene = self._scene(step)
        if self.turn(step) == GENERATOR:
            return self._generator_losses(scene, self._generate(scene))
        with torch.no_grad():
            fake = self._generate(scene)
        return self._discriminator_losses(scene, fake)

    def _scene(self, step: int) -> Scene:
        drawn = self.feed.get(step, self.batch_slice)
        rows, masks = self.batch_slice.rows(self.config.train.batch), drawn.masks
        drawn = drawn.to(self.device)
        with self.autocast():
            inputs = frozen_inputs(self.networks, drawn.batch, masks)
        return Scene(step=step, rows=rows, drawn=drawn, inputs=inputs)

    def _noise(self, scene: Scene, purpose: Purpose) -> Tensor:
        """Draw (B, T, C) for one use in this step."""
        shape = tuple(scene.z.shape[1:])
        return item_noise(scene.rows, shape, self.config.train.seed, purpose, scene.step, self.device)

    def _generate(self, scene: Scene) -> Tensor:
        """Return G's estimate (B, T, C) of the data, from data with noise, or from its own samples with noise."""
        start, t, noise = scene.z, scene.drawn.t, self._noise(scene, Purpose.GENERATOR_INPUT)
        with self.autocast():
            if self.config.own_sample_share:
                start = torch.where(scene.drawn.own[:, None, None], self._own_samples(scene), start)
            fake: Tensor = self.denoiser(interpolate(start, noise, t), t, scene.inputs)
        return fake

    @torch.no_grad()
    def _own_samples(self, scene: Scene) -> Tensor:
        """Return what G estimates of pure noise (``forward_sample_prob`` of the official code): (B, T, C)."""
        noise = self._noise(scene, Purpose.OWN_SAMPLES)
        sample: Tensor = self.denoiser(noise, torch.ones_like(scene.drawn.t), scene.inputs)
        return sample

    def _generator_losses(self, scene: Scene, fake: Tensor) -> dict[str, Tensor]:
        weights, terms = self.config.weights, {}
        if weights.generator:
            terms["adversarial"] = self.weighted("adversarial", weights.generator, self._fooled(scene, fake))
        batch = scene.drawn.batch
        if self.clap is not None and weights.clap:
            noisy = interpolate(fake, self._noise(scene, Purpose.CLAP_INPUT), scene.drawn.t_clap)
            terms["clap"] = self.weighted(
                "clap", weights.clap, prompt_distance(self.clap, noisy, scene.drawn.t_clap, batch)
            )
        if self.clap is not None and weights.frechet:
            distance = self.discriminator.moments(clean_features(self.clap, fake, batch), scene.few_step)
            terms["frechet"] = self.weighted("frechet", weights.frechet, distance)
        return terms

    def _fooled(self, scene: Scene, fake: Tensor) -> Tensor:
        """Return how far the discriminator's scores of the fake lie below those of the real."""
        noise, t = self._noise(scene, Purpose.SHARED_NOISE), scene.drawn.t_discriminator
        with torch.no_grad(), self.autocast():
            prepared = self.discriminator.prepare(scene.inputs)
            real_verdict = self.discriminator(interpolate(scene.z, noise, t), t, prepared)
        with self.autocast():
            verdict = self.discriminator(interpolate(fake, noise, t), t, prepared)
        self.notes |= score_notes(real_verdict, verdict)
        return relativistic(verdict.scores, real_verdict.scores, verdict.mask).mean()

    def _discriminator_losses(self, scene: Scene, fake: Tensor) -> dict[str, Tensor]:
        config, weights, t = self.config, self.config.weights, scene.drawn.t_discriminator
        noise = self._noise(scene, Purpose.SHARED_NOISE)
        if self.clap is not None and weights.frechet:
            with torch.no_grad():
                data, made = (clean_features(self.clap, x, scene.drawn.batch) for x in (scene.z, fake))
            first = self.batch_slice.rank % config.train.accumulate == 0
            self.discriminator.moments.add(data, made, scene.few_step, first=first)
        inputs = {
            Purpose.REAL_PENALTY: interpolate(scene.z, noise, t),
            Purpose.FAKE_PENALTY: interpolate(fake, noise, t),
        }
        with self.autocast():
            prepared = self.discriminator.prepare(scene.inputs)
            real, fake_verdict = (self.discriminator(x, t, prepared) for x in inputs.values())
        self.notes |= score_notes(real, fake_verdict)
        told_apart = relativistic(real.scores, fake_verdict.scores, real.mask).mean()
        terms = {"discriminator": self.weighted("discriminator", weights.discriminator, told_apart)}
        if weights.contrastive:
            contrastive = self._contrastive(scene, inputs[Purpose.REAL_PENALTY], real)
            terms["contrastive"] = self.weighted("contrastive", weights.contrastive, contrastive)
        if weights.gradient_penalty:
            penalties = []
            for purpose, verdict in ((Purpose.REAL_PENALTY, real), (Purpose.FAKE_PENALTY, fake_verdict)):
                moved = inputs[purpose] + config.penalty_step * self._noise(scene, purpose)
                with self.autocast():
                    scores = self.discriminator(moved, t, prepared).scores
                penalties.append(finite_difference(verdict.scores, scores, verdict.mask).mean())
            self.notes |= {"measured/r1": penalties[0].detach(), "measured/r2": penalties[1].detach()}
            penalty = torch.stack(penalties).mean()
            terms["gradient_penalty"] = self.weighted("gradient_penalty", weights.gradient_penalty, penalty)
        if weights.centring:
            centre = masked_mean((real.scores + fake_verdict.scores).square(), real.mask).mean()
            terms["centring"] = self.weighted("centring", weights.centring, centre)
        return terms

    def _contrastive(self, scene: Scene, real: Tensor, verdict: Verdict) -> Tensor:
        """Compare with the same sounds under prompts of others, whose scores are to be lower."""
        ids, mask = scene.drawn.other_ids, scene.drawn.other_mask
        with torch.no_grad(), self.autocast():
            hidden = self.networks.text_encoder(ids, mask)
        with self.autocast():
            prepared = self.discriminator.prepare(replace(scene.inputs, hidden=hidden, mask=mask))
            rolled = self.discriminator(real, scene.drawn.t_discriminator, prepared)
        losses = relativistic(verdict.scores, rolled.scores, verdict.mask)
        return mean_of_usable(losses, scene.drawn.usable, scene.drawn.usable_in_all, self.batch_slice.world)

    def validate(self) -> dict[str, float]:
        """Measure on held-out sounds the gap of the scores to one-step samples, and, of samples in 8 steps, the spread
        relative to that of the data and the cosine to the prompts by the CLAP."""
        shift, items = diffusion_of(self.model_config).shift, min(VALIDATION_ITEMS, self.config.train.batch)
        sums: dict[str, Tensor] = {}
        spread = torch.zeros(VALIDATION_BATCHES, 2, 3, self.latents.latents.channels, device=self.device).double()
        for index in range(VALIDATION_BATCHES):
            whole = self.latents.validation.batch(index, slice(0, items))
            for rows in self.shares(items, self.config.train.batch):
                row, moments = self._held_out(whole, rows, index, shift)
                spread[index] += moments
                for name, value in row.items():
                    sums[name] = sums.get(name, 0) + value.double().sum()
        names = ["gap", *(("clap", "clap_of_data") if self.clap is not None else ())]
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        totals = parallel.total(torch.stack([sums.get(name, none) for name in names])) / items / VALIDATION_BATCHES
        count, first, second = parallel.total(spread).unbind(2)
        stds = ((second - first.square() / count) / (count - 1)).sqrt().mean(2)  # (batches, samples and data)
        return {**dict(zip(names, totals.tolist(), strict=True)), "spread": float((stds[:, 0] / stds[:, 1]).mean())}

    def _held_out(
        self, whole: LatentBatch, rows: slice, index: int, shift: ShiftConfig
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the measures (B,) of some items of a held-out batch, and the moments of samples and data (2, 3, C)."""
        batch = whole[rows].to(self.device)
        z, t = batch.latents, torch.full((len(batch.items),), 0.5, device=self.device)
        seed, shape = self.config.train.seed + 1, tuple(z.shape[1:])
        noise = item_noise(rows, shape, seed, Purpose.GENERATOR_INPUT, index, self.device)
        with self.autocast():
            inputs = frozen_inputs(self.networks, batch, Masks.nothing_kept(batch.valid))
            prepared = self.discriminator.prepare(inputs)
            fake = self.denoiser(noise, torch.ones_like(t), inputs)
            real, judged = (self.discriminator(interpolate(x, noise, t), t, prepared) for x in (z, fake))
        samples = sample(self.networks, whole, rows, few_step_sampling(8), shift).float()
        everywhere = batch.valid.to(self.device)
        valid = everywhere[:, : samples.shape[1]]
        row = {"gap": masked_mean(real.scores - judged.scores, real.mask)}
        if self.clap is not None:
            text = self.clap.embed_text(batch.ids, batch.mask)
            row["clap"] = (self.clap.embed_audio(samples, valid, torch.zeros_like(t)) * text).sum(1)
            row["clap_of_data"] = (self.clap.embed_audio(z, everywhere, torch.zeros_like(t)) * text).sum(1)
        return row, torch.stack([channel_moments(samples, valid), channel_moments(z, everywhere)])

    def demo(self, folder: Path, step: int) -> None:
        write_few_step_demos(folder, step, self.networks, self.latents, self.same, self.model_config)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        export_model(folder, self.model_config, weights, self.same, self.tokenizer_file, self.parents)


@stage_command("posttrain")
@click.option("--model", type=MODEL, required=True, help="The model of `sa3 train ode-warmup`.")
@click.option("--base", type=MODEL, required=True, help="The flow-matching model.")
@LATENTS
@UNGATED
@click.option(
    "--clap",
    "clap_folder",
    type=FOLDER,
    default=None,
    help="Latent CLAP of `sa3 train clap`; without it set weights.clap=0.",
)
@AUTOENCODER
def posttrain(
    run: RunOptions,
    model: Path,
    base: Path,
    latents: tuple[Path, ...],
    ungated: bool,
    clap_folder: Path | None,
    autoencoder: Path | None,
) -> None:
    """Make a model good in few steps, without guidance (stage 3)."""
    config = run.settings(PosttrainConfig, "posttrain")
    clap, hashes = None, {}
    if clap_folder is not None:
        clap = LatentClap.load(clap_folder, autoencoder=base, device=str(parallel.own_device()))
        hashes["clap"] = file_hash(clap_folder / WEIGHTS_FILE)
    stage = PosttrainStage(model, base, config, latents, clap, autoencoder)
    if not ungated:
        stage.latents.latents.check_gate()
    if run.train(stage, config, {**stage.parents, **hashes, "latents": stage.latents.latents.identity()}):
        report_made("model", run.out / "model", "generate", "piano note A4", "--model", run.out / "model")
