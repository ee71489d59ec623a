"""Stage 2, ODE warm-up: one step from any state lands where the frozen base's sampler ends [T5].

One step: the base samples a batch with guidance; its states X_k at times t_k, its result z_T and the whole condition
are kept for ``refresh_rate`` steps. Every item picks a k; z = X_k - t_k v(X_k, t_k); squared error to z_T.

From pure noise only, the states are those of guided trajectories. Ping-pong sampling asks for others, estimates with
new noise, which guidance has not shaped yet; a share of the trajectories therefore begins with data and noise. No state
of sampling is made of data, though: in a share of these the student's own estimate from pure noise takes their place,
so that it learns to mend its own errors.

What is kept is a function of the step at which it was drawn, and of the student's weights then, of which checkpoints
have a copy; so a resumed run computes it again and goes on alike.

Shapes: B batch, T latent frames, C latent channels, K steps of the teacher. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.installed import name_of
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.guidance import GuidedVelocity
from sa3_torch.samplers import SAMPLERS
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.flow.conditioning import ConditionInputs, Networks, conditioning
from sa3_torch.train.flow.latent_data import ClipsConfig, LatentData
from sa3_torch.train.flow.losses import flow_errors, flow_loss
from sa3_torch.train.flow.masks import Masks
from sa3_torch.train.flow.model import StartModel, diffusion_of, export_model, open_model, open_text
from sa3_torch.train.flow.path import interpolate
from sa3_torch.train.flow.validation import VALIDATION_BATCHES
from sa3_torch.train.run import parallel
from sa3_torch.train.run.blocks import work_by_blocks
from sa3_torch.train.run.command import RunOptions, report_made, stage_command
from sa3_torch.train.run.feed import BatchFeed
from sa3_torch.train.run.optimizers import Group, OptimizerConfig
from sa3_torch.train.run.options import AUTOENCODER, LATENTS, MODEL, UNGATED
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.random import Purpose, item_noise, item_uniforms
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import Split, Stage, StageConfig
from sa3_torch.weights import StableAudio

from .denoiser import Denoiser, channel_moments, few_step_config, frozen_inputs, write_few_step_demos
from .noise_levels import sampling_log_snr

VALIDATION_ITEMS = 8  # of a batch


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """Say how the base model samples what is learnt: DPM-Solver++, in the official code with plain guidance."""

    sampling: Sampling  # its sampler adds no noise
    refresh_rate: int  # steps for which its samples are kept
    renoised_share: float  # of its trajectories that begin with data and noise instead of pure noise
    first_share: float  # of the student's items that take the first state of a trajectory; the others take any
    own_share: float = 0.0  # of the trajectories with data and noise, that take the student's estimate for the data

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "refresh_rate")
        check(self, 0, 1, "renoised_share", "first_share", "own_share")
        if self.own_share and not self.renoised_share:
            raise ConfigError(
                f"teacher.own_share is {self.own_share:g}, of a teacher.renoised_share of 0: set that above 0"
            )
        if self.sampling.sampler == "pingpong":
            raise ConfigError("teacher.sampling.sampler is 'pingpong', which adds noise itself: choose dpmpp or euler")


@dataclass(frozen=True, kw_only=True)
class OdeWarmupConfig(StageConfig):
    """Hold the settings of ``sa3 train ode-warmup``."""

    optimizer: OptimizerConfig
    clips: ClipsConfig
    teacher: TeacherConfig
    context_weight: float  # of the error on kept frames

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "context_weight")


@dataclass(frozen=True, kw_only=True)
class TeacherDraw:
    """Hold what a run of the teacher begins with, but for the noise."""

    batch: LatentBatch
    masks: Masks
    levels: Tensor  # (B,) of the noise
    own: Tensor  # (B,) bool, whose data are the student's estimates


class TeacherData:
    """Draw the slices of the batches that the teacher samples, from training clips. ``feed`` reads them ahead."""

    def __init__(self, config: OdeWarmupConfig, data: LatentData) -> None:
        self.config, self.data = config, data
        self.feed = BatchFeed(self.read, every=config.teacher.refresh_rate)

    def read(self, step: int, part: BatchSlice) -> TeacherDraw:
        """Read the clips of a slice and draw masks, and at which noise levels and of what the teacher begins, on the
        CPU."""
        train, teacher, rows = self.config.train, self.config.teacher, part.rows(self.config.train.batch)
        batch = self.data.train.batch(step, rows)
        share, level, own = item_uniforms(rows, 3, train.seed, Purpose.TEACHER_LEVELS, step).unbind(1)
        renoised = share < teacher.renoised_share
        return TeacherDraw(
            batch=batch,
            masks=self.data.masks(batch, rows, step),
            levels=torch.where(renoised, sampling_log_snr(level), 1.0),
            own=renoised & (own < teacher.own_share),
        )


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Hold a run of the teacher with all that it was told."""

    states: Tensor  # (K, B, T, C)
    times: Tensor  # (K, B)
    result: Tensor  # (B, T, C)
    inputs: ConditionInputs
    masks: Masks

    def at(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Return state (B, T, C) and time (B,) of every item at its own step ``picks`` (B,)."""
        rows = torch.arange(len(picks), device=picks.device)
        return self.states[picks, rows], self.times[picks, rows]


class OdeWarmupStage(Stage):
    """Train conditioner and DiT of the checkpoint folder ``base``, the student, by a frozen copy of them, the teacher.

    ``autoencoder``: folder of the one that made the latents; needed only where the base does not say which it was.
    ``student``: folder of a model of this stage to go on from, in place of the base. Raises ValueError when they do not
    belong together.
    """

    name = "ode-warmup"
    feed: BatchFeed[TeacherDraw]

    def __init__(
        self,
        base: Path,
        config: OdeWarmupConfig,
        latents: Sequence[Path],
        autoencoder: Path | None = None,
        student: Path | None = None,
    ) -> None:
        super().__init__()
        start = StartModel.open(base, latents, autoencoder)
        self.config, self.model_config, self.parents = config, few_step_config(start.config), start.parents()
        self.model: StableAudio = start.model.to(self.device)
        self.same = start.same.to(self.device)
        self.tokenizer_file = start.tokenizer_file
        self.networks = Networks.of(self.model)
        self.networks.text_encoder.requires_grad_(False)
        self.denoiser = Denoiser(self.networks.conditioner, self.networks.dit)
        self.teacher = Denoiser.frozen_copy(self.model)
        work_by_blocks(self.teacher, compiled=config.train.compile, checkpointed=False)  # most of the arithmetic
        if student is not None:
            self.model.load_state_dict(self._weights_of(student))
            self.parents["student"] = file_hash(student / WEIGHTS_FILE)
        self.rollout: Denoiser | None = None  # the student as it was at the last refresh
        if config.teacher.own_share:
            self.rollout = Denoiser.frozen_copy(self.model)
            self.denoiser.add_module("rollout", self.rollout)  # checkpoints have it so
        self.teacher_shift = diffusion_of(start.config).shift
        self.groups = {"student": Group(network=self.denoiser, optimizer=config.optimizer)}
        tokenizer = open_text(start.tokenizer_file, start.config)
        self.latents = LatentData(start.latents, tokenizer, start.config, config.clips, config.train)
        self.feed = TeacherData(config, self.latents).feed
        self._kept: dict[tuple[int, BatchSlice, str, int], Trajectory] = {}  # of the steps since the last refresh

    def _weights_of(self, student: Path) -> dict[str, Tensor]:
        model, config, _ = open_model(student)
        found, text = model.state_dict(), self.networks.text_encoder.state_dict()
        same_text = config.diffusion == self.model_config.diffusion and all(
            torch.equal(found[f"text_encoder.{name}"], value.cpu()) for name, value in text.items()
        )
        if config.same != self.model_config.same or not same_text:
            raise ValueError(f"{student}: not made of this base by `sa3 train ode-warmup`; give one that was")
        return found

    def data(self) -> tuple[Split, ...]:
        return self.latents.splits()

    def remarks(self) -> list[str]:
        return self.latents.remarks()

    def period(self) -> int:
        return self.config.teacher.refresh_rate

    @torch.no_grad()
    def begin(self, step: int) -> None:
        if self.rollout is not None and step % self.config.teacher.refresh_rate == 0:
            for name, kept in self.rollout.named_parameters():
                kept.copy_(self.denoiser.get_parameter(name))

    def losses(self, step: int) -> dict[str, Tensor]:
        config, rows = self.config, self.batch_slice.rows(self.config.train.batch)
        pick, first = item_uniforms(rows, 2, config.train.seed, Purpose.TEACHER_STATES, step).unbind(1)
        picks = (pick * config.teacher.sampling.steps).long()
        picks[first < config.teacher.first_share] = 0
        kept = self.trajectory(step - step % config.teacher.refresh_rate)
        x, t = kept.at(picks.to(self.device, non_blocking=True))
        with self.autocast():
            estimate = self.denoiser(x, t, kept.inputs)
        masks, weight = kept.masks, config.context_weight
        loss = flow_loss(estimate, kept.result, masks.generated, masks.kept, weight)
        self.notes["measured/relative_error"] = relative_error(estimate.detach(), kept)
        return {"one_step": loss}

    def trajectory(self, start: int) -> Trajectory:
        """Return the teacher's run on this slice of the batch of step ``start``; it is held until the next."""
        weights = id(self.teacher.conditioner.padding_embedding)  # others in a plan
        key = (start, self.batch_slice, self.precision, weights)
        if key not in self._kept:
            if any(other[0] != start for other in self._kept):
                self._kept.clear()
            drawn, train = self.feed.get(start, self.batch_slice), self.config.train
            rows, shape = self.batch_slice.rows(train.batch), tuple(drawn.batch.latents.shape[1:])
            noise = item_noise(rows, shape, train.seed, Purpose.TRAINING_NOISE, start, self.device)
            first = None
            if self.rollout is not None:
                first = item_noise(rows, shape, train.seed, Purpose.OWN_SAMPLES, start, self.device)
            self._kept[key] = self._run(drawn, noise, first)
        return self._kept[key]

    @torch.no_grad()
    def _run(self, drawn: TeacherDraw, noise: Tensor, first: Tensor | None = None) -> Trajectory:
        """Run the teacher's sampler from data with ``noise`` (B, T, C), on the base's schedule below its levels. Own
        data are the student's estimates of the noise ``first`` (B, T, C)."""
        config, masks, levels = self.config.teacher, drawn.masks, drawn.levels
        steps, lengths = config.sampling.steps, masks.valid.sum(1).tolist()
        schedule = sigmas(self.teacher_shift, steps, levels.tolist(), lengths, schedule="monotone")
        batch = drawn.batch.to(self.device)
        data = batch.latents
        with self.autocast():
            inputs = frozen_inputs(self.networks, batch, masks)
            if self.rollout is not None and first is not None:
                estimate = self.rollout(first, torch.ones(len(first), device=self.device), inputs)
                data = torch.where(drawn.own.to(self.device)[:, None, None], estimate, data)
            x = interpolate(data, noise, levels.to(self.device, non_blocking=True))
            states = [x]
            cond, dit = conditioning(self.teacher.conditioner, inputs), self.teacher.dit
            velocity = GuidedVelocity(
                dit=dit,
                cond=dit.prepare(cond),
                null=None if config.sampling.guidance.scale == 1 else dit.prepare(cond.unconditional()),
                guidance=config.sampling.guidance,
            )
            for state in SAMPLERS[config.sampling.sampler](velocity, x, schedule, _no_noise):
                states.append(state.x.float())
        times = torch.from_numpy(np.ascontiguousarray(schedule[:, :-1].T)).to(self.device)  # (K, B)
        return Trajectory(
            states=torch.stack(states[:-1]), times=times, result=states[-1], inputs=inputs, masks=masks.to(self.device)
        )

    def validate(self) -> dict[str, float]:
        """Measure one-step errors on held-out prompts, nothing kept: at t = 1 relative to the variance, and everywhere
        relative to those that the base itself makes in one step without guidance."""
        steps, train = self.config.teacher.sampling.steps, self.config.train
        items, seed = min(VALIDATION_ITEMS, train.batch), train.seed + 1
        shown = sorted({k * (steps - 1) // 4 for k in range(4)})  # from the last state Euler itself takes one step
        times: list[float] = []
        errors = torch.zeros(VALIDATION_BATCHES, 2, len(shown), dtype=torch.float64, device=self.device)
        spread = torch.zeros(VALIDATION_BATCHES, 3, self.latents.latents.channels).to(errors)  # count, sum and squares
        for index in range(VALIDATION_BATCHES):
            for rows in self.shares(items, train.batch):
                batch = self.latents.validation.batch(index, rows)
                shape, masks = tuple(batch.latents.shape[1:]), Masks.nothing_kept(batch.valid)
                noise = item_noise(rows, shape, seed, Purpose.HELD_OUT_NOISE, index, self.device)
                pure, own = torch.ones(len(noise)), torch.zeros(len(noise), dtype=torch.bool)
                run = self._run(TeacherDraw(batch=batch, masks=masks, levels=pure, own=own), noise)
                times = run.times[shown, 0].tolist()
                for row, denoiser in enumerate((self.denoiser, self.teacher)):
                    for column, k in enumerate(shown):
                        with self.autocast():
                            estimate = denoiser(*run.at(torch.full((len(noise),), k, device=self.device)), run.inputs)
                        generated, _ = flow_errors(estimate, run.result, run.masks.generated, run.masks.kept)
                        errors[index, row, column] += generated.double().sum()
                spread[index] += channel_moments(run.result, run.masks.generated)
        errors, spread = parallel.total(errors), parallel.total(spread)
        count, first, second = spread.unbind(1)
        variance = (second / count - (first / count).square()).mean(1)  # (batches,)
        student, base = (errors[:, :, 0] / items / variance[:, None]).mean(0).tolist()
        sums = errors.sum(0)
        ratios = (sums[0] / sums[1]).tolist()
        return {
            "one_step": student,
            "one_step_base": base,
            "one_step_ratio": ratios[0],
            "ratio": float(sums[0].sum() / sums[1].sum()),
            **{f"ratio_t{t:.3f}": ratio for t, ratio in zip(times, ratios, strict=True)},
        }

    def demo(self, folder: Path, step: int) -> None:
        write_few_step_demos(folder, step, self.networks, self.latents, self.same, self.model_config)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        export_model(folder, self.model_config, weights, self.same, self.tokenizer_file, self.parents)


def _no_noise(step: int) -> Tensor:
    raise ValueError(f"the teacher's sampler asked for noise in step {step}")


def relative_error(estimate: Tensor, run: Trajectory) -> Tensor:
    """Return the mean squared error over generated frames, divided by the variance of the teacher's results there, mean
    over channels."""
    share = run.masks.generated[..., None] / run.masks.generated.sum().clamp_min(1)  # (B, T, 1), sum 1
    mean = (share * run.result).sum((0, 1))
    error = flow_loss(estimate, run.result, run.masks.generated, run.masks.kept, 0.0)
    return error / (share * (run.result - mean).square()).sum((0, 1)).mean().clamp_min(1e-8)


@stage_command("ode-warmup")
@click.option("--model", type=MODEL, required=True, help="The flow-matching model.")
@LATENTS
@UNGATED
@AUTOENCODER
@click.option("--student", type=MODEL, default=None, help="A model of this stage to go on from; else --model.")
def ode_warmup(
    run: RunOptions,
    model: Path,
    latents: tuple[Path, ...],
    ungated: bool,
    autoencoder: Path | None,
    student: Path | None,
) -> None:
    """Teach a model to reach its guided samples in one step (stage 2)."""
    config = run.settings(OdeWarmupConfig, "ode-warmup")
    stage = OdeWarmupStage(model, config, latents, autoencoder, student)
    if not ungated:
        stage.latents.latents.check_gate()
    if run.train(stage, config, {**stage.parents, "latents": stage.latents.latents.identity()}):
        made = run.out / "model"
        sources = [word for folder in latents for word in ("--latents", folder)]
        then = ("train", "posttrain", "--model", made, "--base", name_of(model), *sources, "--out", "runs/posttrain")
        report_made("model", made, *then)
