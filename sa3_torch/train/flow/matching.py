"""Flow matching on pre-encoded latents: the step that pre-training and adapters share [T4].

One step: t (truncated logit-normal, shifted by length), eps normal;
x_t = (1 - t) z + t eps; target v = eps - z; clips are extended by silence, some frames are kept as context, the prompt
is dropped for some; squared error on valid frames.

Shapes: B global batch, b rows of it, T latent frames, C latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.run.optimizers import OptimizerConfig
from sa3_torch.train.run.random import step_generator
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
    """Hold all that is drawn for a batch, or for some rows of it."""

    batch: LatentBatch
    t: Tensor  # (B,)
    masks: Masks
    noise: Tensor  # (B, T, C)
    drop: Tensor | None = None  # (B,) bool: without prompt

    def __getitem__(self, rows: slice) -> FlowDraw:
        return replace(
            self,
            batch=self.batch[rows],
            t=self.t[rows],
            masks=self.masks[rows],
            noise=self.noise[rows],
            drop=None if self.drop is None else self.drop[rows],
        )


class FlowMatching:
    """Draw what a step needs; the same on all processes."""

    def __init__(self, config: FlowConfig, model: ModelConfig, data: LatentData) -> None:
        self.config, self.model, self.data = config, model, data
        self._drawn: tuple[int, FlowDraw] | None = None  # of the latest step, for its micro-batches

    def draw(self, step: int) -> FlowDraw:
        """Draw everything for the global batch of a step."""
        if self._drawn is None or self._drawn[0] != step:
            random, config = step_generator(self.config.train.seed, step), self.config
            batch = self.data.train.batch(step)
            t = config.times.draw(batch, self.model, random)
            masks = self.data.masks(batch, random)
            drop = torch.rand(len(t), generator=random) < config.prompt_dropout
            noise = torch.randn(batch.latents.shape, generator=random)
            self._drawn = step, FlowDraw(batch=batch, t=t, masks=masks, noise=noise, drop=drop)
        return self._drawn[1]


def velocity_errors(networks: Networks, drawn: FlowDraw) -> tuple[Tensor, Tensor]:
    """Return the squared error of the velocity of each item over generated and over kept frames, (B,) each ([T4.2]
    steps 5 to 7); see ``flow_errors``."""
    device = networks.device
    z, t, noise = (x.to(device) for x in (drawn.batch.latents, drawn.t, drawn.noise))
    masks, drop = drawn.masks.to(device), None if drawn.drop is None else drawn.drop.to(device)
    prepared = prepare_to_train(networks.dit, networks.conditioning(drawn.batch, drawn.masks, drop))
    velocity = networks.dit(interpolate(z, noise, t), t, prepared)
    return flow_errors(velocity, noise - z, masks.generated, masks.kept)


def flow_notes(drawn: FlowDraw, rows: slice, generated: Tensor, kept: Tensor, world: int) -> dict[str, Tensor]:
    """Return what the log shows of a step [T4.8], as means over the global batch ``drawn``.

    ``generated`` and ``kept`` (b,) are the errors of ``rows``, one of ``world`` slices; times and masks are known
    of all rows. Each process adds its rows; the loop averages over processes and micro-batches.
    """
    masks, device = drawn.masks, generated.device
    targets, contexts = masks.generated.any(1), masks.kept.any(1)  # (B,)
    bucket = (drawn.t * BUCKETS).long().clamp_max(BUCKETS - 1)
    groups = {"flow/generated": targets}
    groups |= {f"flow/t{k / BUCKETS}": targets & (bucket == k) for k in range(BUCKETS)}
    shares = {f"times/t{k / BUCKETS}": bucket == k for k in range(BUCKETS)} | {"masks/no_target": ~targets}
    if masks.kinds is not None:
        shares |= {f"masks/{kind}": masks.kinds == k for k, kind in enumerate(MASK_KINDS)}
    numbers = {name: float(members.float().mean()) for name, members in shares.items()}
    valid = masks.valid[rows]
    z, noise = drawn.batch.latents[rows][valid], drawn.noise[rows][valid]
    numbers |= {"data/std": float(z.std()), "target/std": float((noise - z).std())}
    notes = dict(zip(numbers, torch.tensor(list(numbers.values()), device=device), strict=True))
    present = {name: members for name, members in groups.items() if members.any()}
    for errors, found in ((generated, present), (kept, {"flow/kept": contexts} if contexts.any() else {})):
        if found:
            weights = torch.stack([world * members.float() / members.sum() for members in found.values()])
            notes |= dict(zip(found, weights[:, rows].to(device) @ errors, strict=True))
    return notes
