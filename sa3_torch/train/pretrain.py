"""Stage 1, first version: flow matching on pre-encoded latents (training spec, section 4).

One step: t (truncated logit-normal, shifted by length), eps; x_t = (1 - t) z + t eps; target v = eps - z; clips are
extended by silence, some frames are kept as context, the prompt is dropped for some; squared error on valid frames.
The demo model has no pretrained text encoder: its own small one is trained here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sa3_mlx.spec.config import Config, ConfigError, ModelConfig
from sa3_mlx.spec.noise import INITIAL, batch_noise
from sa3_mlx.spec.request import Guidance
from sa3_mlx.spec.schedule import sigmas
from sa3_mlx.spec.tokenizer import Tokenizer
from sa3_torch.conditioner import Conditioner
from sa3_torch.dit import Conditioning, DiT
from sa3_torch.guidance import GuidedVelocity, unconditional
from sa3_torch.same import SAME
from sa3_torch.samplers import euler
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.weights import StableAudio, save_checkpoint

from .data import LatentBatch, LatentBatches, SharesConfig
from .flow import MASK_KINDS, extend_valid, inpaint_masks, shift_times, truncated_logit_normal
from .init import init_conditioner, init_dit, init_text_encoder
from .latents import LatentSet
from .logs import save_sound
from .losses import flow_loss
from .optimizers import Group, OptimizerConfig
from .settings import check
from .stage import Stage, TrainConfig, step_generator

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
VALIDATION_BATCHES = 2
DEMO_STEPS = 30
DEMO_PROMPTS = 6


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Settings of ``sa3 train pretrain``."""

    train: TrainConfig
    optimizer: OptimizerConfig
    shift_min_frames: int
    shift_max_frames: int
    silence_seconds: float  # mean of the exponential extension
    mask_shares: tuple[float, ...]  # segments, full, causal
    context_weight: float  # of the error on kept frames
    prompt_dropout: float
    buckets: int  # of similar lengths
    shares: SharesConfig

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "shift_min_frames", "buckets")
        check(self, self.shift_min_frames + 1, math.inf, "shift_max_frames")
        check(self, 0, math.inf, "silence_seconds", "context_weight")
        check(self, 0, 1, "prompt_dropout")
        if len(self.mask_shares) != len(MASK_KINDS) or min(self.mask_shares) < 0 or not sum(self.mask_shares):
            raise ConfigError(f"mask_shares is {self.mask_shares}: expected shares of {', '.join(MASK_KINDS)}")


class PretrainStage(Stage):
    name = "pretrain"

    def __init__(
        self, model: ModelConfig, config: PretrainConfig, latents: LatentSet, tokenizer_file: Path, same: SAME
    ) -> None:
        super().__init__()
        if model.diffusion is None:
            raise ValueError(f"{model.name} has no diffusion model to train")
        if same.config != model.same:
            raise ValueError(f"the autoencoder is not that of {model.name}: train or choose one of its size")
        self.model_config, self.config, self.diffusion = model, config, model.diffusion
        self.tokenizer_file, self.same = tokenizer_file, same.to(self.device)
        self.tokenizer = Tokenizer(tokenizer_file, self.diffusion.text_encoder.max_length)
        if self.tokenizer.vocab_size > self.diffusion.text_encoder.vocab_size:
            raise ValueError(
                f"{tokenizer_file}: has {self.tokenizer.vocab_size} ids, the text encoder of {model.name} "
                f"{self.diffusion.text_encoder.vocab_size}"
            )
        self.model: nn.Module = StableAudio(model)
        del self.model.same  # frozen, not trained and not averaged
        init_dit(self.dit, config.train.seed)
        init_text_encoder(self.text_encoder, config.train.seed + 1)
        init_conditioner(self.conditioner, config.train.seed + 2)
        self.model.to(self.device)
        self.groups = {"diffusion": Group(network=self.model, optimizer=config.optimizer)}
        self.batches = self._batches(latents, "train", config.train.seed)
        self.validation = self._batches(latents, "validation", config.train.seed + 1)

    @property
    def dit(self) -> DiT:
        return self.model.get_submodule("dit")  # type: ignore[return-value]

    @property
    def conditioner(self) -> Conditioner:
        return self.model.get_submodule("conditioner")  # type: ignore[return-value]

    @property
    def text_encoder(self) -> T5GemmaEncoder:
        return self.model.get_submodule("text_encoder")  # type: ignore[return-value]

    def _batches(self, latents: LatentSet, split: str, seed: int) -> LatentBatches:
        head_room = int(self.diffusion.head_room_seconds * self.model_config.frames_per_second)
        return LatentBatches(
            latents, self.tokenizer, split=split, batch=self.config.train.batch, seed=seed,
            max_frames=self.diffusion.max_frames, head_room_frames=head_room, buckets=self.config.buckets,
            multiple=8, shares=self.config.shares.to_dict(),
        )  # fmt: skip

    def losses(self, step: int) -> dict[str, Tensor]:
        """Everything is drawn for the global batch; the part of it is computed."""
        random, config = step_generator(self.config.train.seed, step), self.config
        batch = self.batches.batch(step)
        t = truncated_logit_normal(len(batch.latents), random)
        t = shift_times(t, batch.valid.sum(1).float(), config.shift_min_frames, config.shift_max_frames)
        valid = extend_valid(batch.valid, config.silence_seconds * self.model_config.frames_per_second, random)
        keep = inpaint_masks(valid, config.mask_shares, random)
        drop = torch.rand(len(t), generator=random) < config.prompt_dropout
        noise = torch.randn(batch.latents.shape, generator=random)
        rows = self.part.slice(len(t))
        return {"flow": self._flow_loss(batch[rows], t[rows], noise[rows], valid[rows], keep[rows], drop[rows])}

    def _flow_loss(
        self, batch: LatentBatch, t: Tensor, noise: Tensor, valid: Tensor, keep: Tensor, drop: Tensor
    ) -> Tensor:
        z, t, noise, valid, keep, drop = (x.to(self.device) for x in (batch.latents, t, noise, valid, keep, drop))
        time = t[:, None, None]
        with self.autocast():
            context, seconds = self._context(batch)
            context = torch.where(drop[:, None, None], 0.0, context)  # the global duration is kept
            mask = keep[..., None].float()
            local = torch.cat([mask, mask * z], dim=-1)
            cond = Conditioning(context=context, seconds=seconds, local=local, valid=valid)
            velocity = self.dit((1 - time) * z + time * noise, t, self.dit.prepare(cond))
        return flow_loss(velocity, noise - z, valid & ~keep, valid & keep, self.config.context_weight)

    def _context(self, batch: LatentBatch) -> tuple[Tensor, Tensor]:
        ids, mask = batch.ids.to(self.device), batch.mask.to(self.device)
        return self.conditioner(self.text_encoder(ids, mask), mask, batch.seconds.numpy())

    def validate(self) -> dict[str, float]:
        """Error by time with nothing kept, and how much worse it gets with the captions of other items."""
        errors = {t: [] for t in VALIDATION_TIMES}  # type: dict[float, list[float]]
        shuffled: list[float] = []
        for index in range(VALIDATION_BATCHES):
            batch = self.validation.batch(index)
            random = step_generator(self.config.train.seed + 1, index)
            noise = torch.randn(batch.latents.shape, generator=random)
            nothing = torch.zeros_like(batch.valid)
            drop = torch.zeros(len(batch.latents), dtype=torch.bool)
            order = torch.randperm(len(drop), generator=random)
            other = LatentBatch(
                batch.latents, batch.valid, batch.ids[order], batch.mask[order], batch.seconds, batch.items
            )
            for time in VALIDATION_TIMES:
                t = torch.full((len(drop),), time)
                errors[time].append(float(self._flow_loss(batch, t, noise, batch.valid, nothing, drop)))
                shuffled.append(float(self._flow_loss(other, t, noise, batch.valid, nothing, drop)))
        mean = float(np.mean([np.mean(values) for values in errors.values()]))
        by_time = {f"flow_t{time}": float(np.mean(values)) for time, values in errors.items()}
        return {"flow": mean, "shuffled_ratio": float(np.mean(shuffled)) / mean, **by_time}

    def demo(self, folder: Path, step: int) -> None:
        """Some held-out prompts in turn, 30 Euler steps at guidance 4."""
        batch = self.validation.batch(10**6)
        count = min(DEMO_PROMPTS, len(batch.items))
        context, seconds = self._context(batch)
        frames = int(batch.valid.sum(1).max())
        cond = Conditioning(
            context=context[:count], seconds=seconds[:count], valid=None,
            local=torch.zeros(count, 1, self.model_config.same.latent_channels + 1, device=self.device),
        )  # fmt: skip
        velocity = GuidedVelocity(
            dit=self.dit, cond=self.dit.prepare(cond), null=self.dit.prepare(unconditional(cond)),
            guidance=Guidance(scale=4.0),
        )  # fmt: skip
        start = torch.from_numpy(batch_noise(range(count), INITIAL, frames, self.model_config.same.latent_channels))
        start = start.to(self.device)
        schedule = sigmas(self.diffusion.shift, DEMO_STEPS, 1.0, [frames] * count)
        *_, last = euler(velocity, start, schedule, lambda _: start)
        audio = self.same.decode(last.x)  # (6, L, channels)
        pieces = [
            audio[i, : int(item.seconds * self.model_config.sample_rate)] for i, item in enumerate(batch.items[:count])
        ]
        captions = [item.captions[0] for item in batch.items[:count]]
        save_sound(
            folder / f"{step:06d}.wav", torch.cat(pieces).float().cpu().numpy(), self.model_config.sample_rate,
            title=f"step {step}: {', '.join(captions)}",
        )  # fmt: skip
        (folder / f"{step:06d}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The whole model: text encoder, conditioner, DiT and the frozen autoencoder, in fp16, with the tokenizer."""
        state = {**weights, **{f"same.{k}": v for k, v in self.same.state_dict().items()}}
        save_checkpoint(folder, self.model_config, state, "F16")
        (folder / "tokenizer.json").write_bytes(self.tokenizer_file.read_bytes())
