"""Flow matching on pre-encoded latents: the step that pre-training and adapters share [T4].

One step: t (truncated logit-normal, shifted by length), eps normal;
x_t = (1 - t) z + t eps; target v = eps - z; clips are extended by silence, some frames are kept as context, the prompt
is dropped for some; squared error on valid frames.

Shapes: B items of a slice of the batch, T latent frames, C latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.run.feed import BatchFeed
from sa3_torch.train.run.optimizers import OptimizerConfig
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.random import Purpose, item_noise, item_uniforms
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import StageConfig

from .conditioning import Networks, prepare_to_train
from .latent_data import ClipsConfig, LatentData
from .losses import flow_errors
from .masks import MASK_KINDS, Masks
from .path import interpolate
from .times import TimesConfig

BUCKETS = 10  # of t, in the log


@dataclass(frozen=True, kw_only=True)
class FlowConfig(StageConfig):
    """Hold the settings of every stage that learns by flow matching."""

    optimizer: OptimizerConfig
    clips: ClipsConfig
    demo: Sampling  # of the sounds of a run
    times: TimesConfig
    context_weight: float  # of the error on kept frames
    prompt_dropout: float

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "context_weight")
        check(self, 0, 1, "prompt_dropout")


@dataclass(frozen=True, kw_only=True)
class FlowDraw:
    """Hold what is drawn for a slice of a batch, but for the noise, which is drawn where it is used."""

    batch: LatentBatch
    t: Tensor  # (B,)
    masks: Masks
    drop: Tensor | None = None  # (B,) bool: without prompt


class FlowMatching:
    """Draw what a step needs, the same whatever slices of the batch it is drawn for. ``feed`` reads it ahead."""

    def __init__(self, config: FlowConfig, model: ModelConfig, data: LatentData) -> None:
        self.config, self.model, self.data = config, model, data
        self.feed = BatchFeed(self.read)

    def read(self, step: int, part: BatchSlice) -> FlowDraw:
        """Read the clips of a slice and draw times, masks and whose prompt is dropped, on the CPU."""
        config, rows = self.config, part.rows(self.config.train.batch)
        batch = self.data.train.batch(step, rows)
        time, dropped = item_uniforms(rows, 2, config.train.seed, Purpose.FLOW_DRAWS, step).unbind(1)
        t = config.times.draw(batch, self.model, time)
        masks = self.data.masks(batch, rows, step)
        return FlowDraw(batch=batch, t=t, masks=masks, drop=dropped < config.prompt_dropout)

    def draw(self, step: int, part: BatchSlice, device: torch.device) -> tuple[FlowDraw, Tensor]:
        """Return the same with the clips on the device, and their noise (B, T, C)."""
        drawn, config = self.feed.get(step, part), self.config.train
        shape = tuple(drawn.batch.latents.shape[1:])
        noise = item_noise(part.rows(config.batch), shape, config.seed, Purpose.TRAINING_NOISE, step, device)
        return replace(drawn, batch=drawn.batch.to(device)), noise


def velocity_errors(networks: Networks, drawn: FlowDraw, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared error of the velocity of each item over generated and over kept frames, (B,) each ([T4.2]
    steps 5 to 7); see ``flow_errors``. noise (B, T, C)."""
    device = networks.device
    z, t, noise = (x.to(device, non_blocking=True) for x in (drawn.batch.latents, drawn.t, noise))
    masks, drop = drawn.masks.to(device), None if drawn.drop is None else drawn.drop.to(device, non_blocking=True)
    prepared = prepare_to_train(networks.dit, networks.conditioning(drawn.batch, drawn.masks, drop))
    velocity = networks.dit(interpolate(z, noise, t), t, prepared)
    return flow_errors(velocity, noise - z, masks.generated, masks.kept)


def flow_notes(drawn: FlowDraw, noise: Tensor, generated: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Return what the log shows of a slice [T4.8]: means of groups of items as (sum, count), see ``Stage.notes``.

    ``generated`` and ``kept`` (B,) are its errors. Times and masks are looked at on the host.
    """
    masks, device, count = drawn.masks, generated.device, len(drawn.t)
    targets = masks.generated.any(1)
    bucket = (drawn.t * BUCKETS).long().clamp_max(BUCKETS - 1)
    groups = {"flow/generated": targets} | {f"flow/t{k / BUCKETS}": targets & (bucket == k) for k in range(BUCKETS)}
    shares = {f"times/t{k / BUCKETS}": bucket == k for k in range(BUCKETS)} | {"masks/no_target": ~targets}
    if masks.kinds is not None:
        shares |= {f"masks/{kind}": masks.kinds == k for k, kind in enumerate(MASK_KINDS)}
    members = torch.stack([*groups.values(), masks.kept.any(1), *shares.values()])  # (G, B)
    known, errors = members.float().to(device, non_blocking=True), torch.stack([generated, kept]).float()
    means = torch.stack([known @ errors[0], known.sum(1)], dim=1)  # (G, 2)
    first, last = len(groups), len(groups) + 1
    contexts = torch.stack([known[first] @ errors[1], known[first].sum()])
    parts = torch.stack([known[last:].sum(1), torch.full((len(shares),), count, device=device)], dim=1)
    z, valid = drawn.batch.latents, masks.valid.to(device, non_blocking=True)
    return {
        **dict(zip(groups, means, strict=False)),
        "flow/kept": contexts,
        **dict(zip(shares, parts, strict=True)),
        "data/std": _std(z, valid),
        "target/std": _std(noise - z, valid),
    }


def _std(x: Tensor, valid: Tensor) -> Tensor:
    """Return the standard deviation of (B, T, C) over valid frames, without waiting for the device."""
    shown, count = valid[..., None], valid.sum() * x.shape[-1]
    mean = torch.where(shown, x, 0.0).sum() / count
    return (torch.where(shown, x - mean, 0.0).square().sum() / (count - 1)).sqrt()
