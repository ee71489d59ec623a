"""Stage 1: flow matching on pre-encoded latents (training spec, section 4).

One step: t (truncated logit-normal, shifted by length), eps (coupled to the latents by optimal transport or not);
x_t = (1 - t) z + t eps; target v = eps - z; clips are extended by silence, some frames are kept as context, the prompt
is dropped for some; squared error on valid frames. The text encoder is a pretrained one that stays as it is, or, in the
demo model, a small one that is trained here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from sa3_mlx.spec.config import Config, ConfigError, ModelConfig
from sa3_torch.same import SAME
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.weights import load_part

from .coupling import LEAST_BATCH, MOST_EXACT, Coupling, assign, transport_cost
from .data import LatentBatch
from .diffusion import ClipsConfig, DemoConfig, DiffusionStage, Draw, diffusion_of, new_model, open_model
from .flow import MASK_KINDS
from .init import init_conditioner, init_dit, init_text_encoder
from .latents import LatentSet
from .losses import Normalize
from .optimizers import Group, OptimizerConfig
from .settings import check
from .stage import TrainConfig, step_generator
from .times import TimesConfig

BUCKETS = 10  # of t, in the log


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Settings of ``sa3 train pretrain``."""

    train: TrainConfig
    optimizer: OptimizerConfig
    clips: ClipsConfig
    demo: DemoConfig
    times: TimesConfig
    start: Literal["all", "text"]  # which weights of the checkpoint to start from, where one is given
    train_text: bool  # the text encoder, too
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


class PretrainStage(DiffusionStage):
    """``start`` is a checkpoint folder of which all weights, or the text encoder, are taken (``config.start``)."""

    name = "pretrain"

    def __init__(
        self, model: ModelConfig, config: PretrainConfig, latents: LatentSet, tokenizer_file: Path, same: SAME,
        start: Path | None = None,
    ) -> None:  # fmt: skip
        network = new_model(model)
        super().__init__(
            network, model, config.train, config.clips, config.demo, latents, tokenizer_file, same,
            train_text=config.train_text,
        )  # fmt: skip
        self.config = config
        self._drawn: Drawn | None = None
        if start is None and not config.train_text:
            raise ValueError("train_text is false: give the checkpoint with the text encoder by --start FOLDER")
        init_dit(self.dit, config.train.seed)
        init_text_encoder(self.text_encoder, config.train.seed + 1)
        init_conditioner(self.conditioner, config.train.seed + 2)
        if start is not None and config.start == "all":
            self._start_from(start)
        elif start is not None:
            self._take_text_encoder(start)
        self.groups = {"diffusion": Group(network=self.model, optimizer=config.optimizer)}

    def _start_from(self, folder: Path) -> None:
        opened, config, _ = open_model(folder)
        theirs = diffusion_of(config)
        same_sizes = (theirs.dit, theirs.text_encoder) == (self.diffusion.dit, self.diffusion.text_encoder)
        if not same_sizes or config.same.latent_channels != self.model_config.same.latent_channels:
            raise ValueError(
                f"{folder} is {config.name}, which has other sizes than {self.model_config.name}; choose that one by "
                "--model, or take the text encoder alone by --set start=text"
            )
        self.model.load_state_dict(opened.state_dict())

    def _take_text_encoder(self, folder: Path) -> None:
        config = ModelConfig.load(folder)
        if diffusion_of(config).text_encoder != self.diffusion.text_encoder:
            raise ValueError(f"{folder}: its text encoder is not that of {self.model_config.name}; choose another")
        encoder = cast(T5GemmaEncoder, load_part(folder, config, "text_encoder", torch.device("cpu"), torch.float32))
        table = encoder.embed_tokens(torch.arange(encoder.config.vocab_size)[None])[0]
        self.text_encoder.load_state_dict({**encoder.state_dict(), "embed_tokens.weight": table})

    def losses(self, step: int) -> dict[str, Tensor]:
        """Everything is drawn for the global batch; the part of it is computed."""
        drawn = self._draw_step(step)
        rows = self.part.slice(len(drawn.t))
        generated, kept = self.velocity_errors(
            drawn.batch[rows], drawn.draw[rows], drawn.t[rows], drawn.noise[rows], drawn.drop[rows],
            self.config.normalize,
        )  # fmt: skip
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
        """What the log shows of a step (training spec, 4.8), as means over the global batch; ``generated`` and ``kept``
        (b,) are the errors of the rows. Times, masks and costs are known of all rows."""
        draw, world = drawn.draw, self.part.world
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
