"""Flow matching on pre-encoded latents: the step that pre-training and adapters share [T4].

One step: t (truncated logit-normal, shifted by length), eps (coupled to the latents by optimal transport or not);
x_t = (1 - t) z + t eps; target v = eps - z; clips are extended by silence, some frames are kept as context, the prompt
is dropped for some; squared error on valid frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.same import SAME
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.run.optimizers import OptimizerConfig
from sa3_torch.train.run.random import step_generator
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import TrainConfig

from .choices import MASK_KINDS
from .coupling import LEAST_BATCH, MOST_EXACT, Coupling, assign, transport_cost
from .diffusion import ClipsConfig, DiffusionStage, Draw
from .losses import Normalize
from .times import TimesConfig

BUCKETS = 10  # of t, in the log


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Config):
    """Settings of every stage that learns by flow matching."""

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


@dataclass(frozen=True)
class Drawn:
    """All that is drawn for the global batch of a step."""

    step: int
    batch: LatentBatch
    t: Tensor  # (B,)
    draw: Draw
    drop: Tensor  # (B,) bool: without prompt
    noise: Tensor  # (B, T, C)
    costs: tuple[float, ...]  # mean (z - noise)^2 before and after coupling, where there is one


class FlowStage(DiffusionStage):
    """The step of flow matching, whatever is trained by it."""

    config: FlowConfig

    def __init__(
        self,
        network: nn.Module,
        model: ModelConfig,
        config: FlowConfig,
        latents: LatentSet,
        tokenizer_file: Path,
        same: SAME,
        *,
        train_text: bool,
    ) -> None:
        super().__init__(
            network,
            model,
            config.train,
            config.clips,
            config.demo,
            latents,
            tokenizer_file,
            same,
            train_text=train_text,
        )
        self.config = config
        self._drawn: Drawn | None = None

    def losses(self, step: int) -> dict[str, Tensor]:
        """Everything is drawn for the global batch; the slice of it is computed."""
        drawn = self._draw_step(step)
        rows = self.batch_slice.rows(len(drawn.t))
        generated, kept = self.velocity_errors(
            drawn.batch[rows],
            drawn.draw[rows],
            drawn.t[rows],
            drawn.noise[rows],
            drawn.drop[rows],
            self.config.normalize,
        )
        self._note(drawn, rows, generated.detach(), kept.detach())
        return {"flow": generated.mean() + self.config.context_weight * kept.mean()}

    def _draw_step(self, step: int) -> Drawn:
        """Kept for the micro-batches of a step."""
        if self._drawn is None or self._drawn.step != step:
            random, config = step_generator(self.config.train.seed, step), self.config
            batch = self.batches.batch(step)
            t = config.times.draw(batch, self.model_config, random)
            draw = self.draw(batch, random)
            drop = torch.rand(len(t), generator=random) < config.prompt_dropout
            noise = torch.randn(batch.latents.shape, generator=random)
            noise, costs = self._couple(batch.latents, noise, draw.valid)
            self._drawn = Drawn(step, batch, t, draw, drop, noise, costs)
        return self._drawn

    def _couple(self, z: Tensor, noise: Tensor, valid: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        """The noise of the global batch in another order, the same on all processes, and what it cost before and
        after."""
        if self.config.coupling == "off":
            return noise, ()
        cost = transport_cost(z.to(self.device), noise.to(self.device), valid.to(self.device))
        order = assign(cost, valid, self.config.coupling)
        return noise[order], (float(cost.diagonal().mean()), float(cost.cpu().gather(1, order[:, None]).mean()))

    def _note(self, drawn: Drawn, rows: slice, generated: Tensor, kept: Tensor) -> None:
        """What the log shows of a step [T4.8], as means over the global batch; ``generated`` and ``kept``
        (b,) are the errors of the rows. Times, masks and costs are known of all rows."""
        draw, world = drawn.draw, self.batch_slice.world
        targets, contexts = draw.generated.any(1), (draw.valid & draw.keep).any(1)  # (B,)
        bucket = (drawn.t * BUCKETS).long().clamp_max(BUCKETS - 1)
        groups = {"flow/generated": targets}
        groups |= {f"flow/t{k / BUCKETS}": targets & (bucket == k) for k in range(BUCKETS)}
        shares = {f"times/t{k / BUCKETS}": bucket == k for k in range(BUCKETS)} | {"masks/no_target": ~targets}
        if draw.kinds is not None:
            shares |= {f"masks/{kind}": draw.kinds == k for k, kind in enumerate(MASK_KINDS)}
        notes = {name: float(members.float().mean()) for name, members in shares.items()}
        valid = draw.valid[rows]
        z, noise = drawn.batch.latents[rows][valid], drawn.noise[rows][valid]
        notes |= {"data/std": float(z.std()), "target/std": float((noise - z).std())}
        notes |= dict(zip(("coupling/before", "coupling/after"), drawn.costs, strict=False))
        self.notes |= dict(zip(notes, torch.tensor(list(notes.values()), device=self.device), strict=True))
        present = {name: members for name, members in groups.items() if members.any()}
        for errors, found in ((generated, present), (kept, {"flow/kept": contexts} if contexts.any() else {})):
            if found:  # each process adds its rows; the loop averages over processes and micro-batches
                weights = torch.stack([world * members.float() / members.sum() for members in found.values()])
                self.notes |= dict(zip(found, weights[:, rows].to(errors.device) @ errors, strict=True))
