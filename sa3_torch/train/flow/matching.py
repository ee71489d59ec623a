"""Flow matching on pre-encoded latents: the step that pre-training and adapters share [T4].

One step: t (truncated logit-normal, shifted by length), eps (coupled to the latents by optimal transport or not);
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
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.run.optimizers import OptimizerConfig
from sa3_torch.train.run.random import step_generator
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import TrainConfig

from .conditioning import Networks
from .coupling import LEAST_BATCH, MOST_EXACT, Coupling, assign, transport_cost
from .latent_data import ClipsConfig, LatentData
from .losses import Normalize, flow_errors
from .masks import MASK_KINDS, Masks
from .path import interpolate
from .times import TimesConfig

BUCKETS = 10  # of t, in the log


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Config):
    """Hold the settings of every stage that learns by flow matching."""

    train: TrainConfig
    optimizer: OptimizerConfig
    clips: ClipsConfig
    demo: Sampling  # of the sounds of a run
    times: TimesConfig
    coupling: Coupling  # of noise and latents, over the global batch
    normalize: Normalize  # errors by the variance of the target
    context_weight: float  # of the error on kept frames
    prompt_dropout: float

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "context_weight")
        check(self, 0, 1, "prompt_dropout")
        if self.coupling != "off" and self.train.batch < LEAST_BATCH:
            raise ConfigError(
                f"coupling is {self.coupling!r} with train.batch {self.train.batch}: in batches of less than "
                f"{LEAST_BATCH} the noise would tell which sound it goes with; choose 'off' or a larger batch"
            )
        if self.coupling == "exact" and self.train.batch > MOST_EXACT:
            raise ConfigError(
                f"coupling is 'exact' with train.batch {self.train.batch}: allowed is up to {MOST_EXACT}; "
                "choose 'sinkhorn'"
            )


@dataclass(frozen=True, kw_only=True)
class FlowDraw:
    """Hold all that is drawn for a batch, or for some rows of it."""

    batch: LatentBatch
    t: Tensor  # (B,)
    masks: Masks
    noise: Tensor  # (B, T, C)
    drop: Tensor | None = None  # (B,) bool: without prompt
    costs: tuple[float, ...] = ()  # mean (z - noise)^2 before and after coupling, where there is one

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

    def __init__(self, config: FlowConfig, model: ModelConfig, data: LatentData, device: torch.device) -> None:
        self.config, self.model, self.data, self.device = config, model, data, device
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
            noise, costs = self._couple(batch.latents, noise, masks.valid)
            self._drawn = step, FlowDraw(batch=batch, t=t, masks=masks, noise=noise, drop=drop, costs=costs)
        return self._drawn[1]

    def _couple(self, z: Tensor, noise: Tensor, valid: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        """Reorder the noise of the global batch; return what it cost before and after, too."""
        if self.config.coupling == "off":
            return noise, ()
        cost = transport_cost(z.to(self.device), noise.to(self.device), valid.to(self.device))
        order = assign(cost, valid, self.config.coupling)
        return noise[order], (float(cost.diagonal().mean()), float(cost.cpu().gather(1, order[:, None]).mean()))


def velocity_errors(networks: Networks, drawn: FlowDraw, normalize: Normalize = "none") -> tuple[Tensor, Tensor]:
    """Return the squared error of the velocity of each item over generated and over kept frames, (B,) each ([T4.2]
    steps 5 to 7); see ``flow_errors``."""
    device = networks.device
    z, t, noise = (x.to(device) for x in (drawn.batch.latents, drawn.t, drawn.noise))
    masks, drop = drawn.masks.to(device), None if drawn.drop is None else drawn.drop.to(device)
    prepared = networks.dit.prepare(networks.conditioning(drawn.batch, masks, drop))
    velocity = networks.dit(interpolate(z, noise, t), t, prepared)
    return flow_errors(velocity, noise - z, masks.generated, masks.kept, normalize)


def flow_notes(drawn: FlowDraw, rows: slice, generated: Tensor, kept: Tensor, world: int) -> dict[str, Tensor]:
    """Return what the log shows of a step [T4.8], as means over the global batch ``drawn``.

    ``generated`` and ``kept`` (b,) are the errors of ``rows``, one of ``world`` slices; times, masks and costs are
    known of all rows. Each process adds its rows; the loop averages over processes and micro-batches.
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
    numbers |= dict(zip(("coupling/before", "coupling/after"), drawn.costs, strict=False))
    notes = dict(zip(numbers, torch.tensor(list(numbers.values()), device=device), strict=True))
    present = {name: members for name, members in groups.items() if members.any()}
    for errors, found in ((generated, present), (kept, {"flow/kept": contexts} if contexts.any() else {})):
        if found:
            weights = torch.stack([world * members.float() / members.sum() for members in found.values()])
            notes |= dict(zip(found, weights[:, rows].to(device) @ errors, strict=True))
    return notes
