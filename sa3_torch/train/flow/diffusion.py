"""What the stages that train a diffusion model on pre-encoded latents share: their data, condition, measures, demos.

Shapes: B batch, T latent frames, C latent channels. t = 0 is data, t = 1 noise [T0.2].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sa3_mlx.common.generation.noise import INITIAL, Purpose, batch_noise
from sa3_mlx.common.generation.noise import step as noise_of_step
from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import Config, ConfigError
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_torch.conditioner import Conditioner
from sa3_torch.dit import Conditioning, DiT
from sa3_torch.guidance import GuidedVelocity
from sa3_torch.same import SAME
from sa3_torch.samplers import SAMPLERS
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.train.data.batches import LatentBatch, LatentBatches
from sa3_torch.train.data.clip_cache import write_json
from sa3_torch.train.data.drawing import SharesConfig
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.run.logs import save_sound
from sa3_torch.train.run.random import step_generator
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import Split, Stage, TrainConfig
from sa3_torch.weights import save_checkpoint

from .choices import MASK_KINDS, extend_valid, inpaint_masks, mask_kinds
from .losses import Normalize, flow_errors
from .model import AUTOENCODER, PARENTS_FILE, diffusion_of
from .path import interpolate
from .wiener import FRAMES_MOST, WienerBaseline

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
VALIDATION_BATCHES = 2
DEMO_PROMPTS = 6


@dataclass(frozen=True, kw_only=True)
class ClipsConfig(Config):
    """Which latents make a batch and which of their frames are to be generated."""

    silence_seconds: float  # mean of the exponential extension of every clip
    mask_shares: tuple[float, ...]  # segments, full, causal and, where given, spans
    buckets: int  # of similar lengths
    shares: SharesConfig

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "silence_seconds")
        check(self, 1, math.inf, "buckets")
        allowed = (len(MASK_KINDS) - 1, len(MASK_KINDS))
        if len(self.mask_shares) not in allowed or min(self.mask_shares) < 0 or not sum(self.mask_shares):
            raise ConfigError(f"mask_shares is {self.mask_shares}: expected shares of {', '.join(MASK_KINDS)}")


@dataclass(frozen=True)
class Draw:
    """What is drawn for a batch: ``valid`` (B, T), silence behind the clips included, and ``keep`` (B, T), the frames
    that are given as context and not generated; ``kinds`` (B,) of MASK_KINDS, where masks were drawn."""

    valid: Tensor
    keep: Tensor
    kinds: Tensor | None = None

    def __getitem__(self, rows: slice) -> Draw:
        return Draw(self.valid[rows], self.keep[rows], None if self.kinds is None else self.kinds[rows])

    @property
    def generated(self) -> Tensor:
        return self.valid & ~self.keep


class DiffusionStage(Stage):
    """Latents, tokenizer, the trained ``model`` (text encoder, conditioner, DiT) and the frozen autoencoder of demos.

    ``model`` is a StableAudio without its autoencoder, on the CPU, with weights. The text encoder is trained only where
    ``train_text``; a pretrained one stays as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        model_config: ModelConfig,
        train: TrainConfig,
        clips: ClipsConfig,
        demo: Sampling,
        latents: LatentSet,
        tokenizer_file: Path,
        same: SAME,
        *,
        train_text: bool,
    ) -> None:
        super().__init__()
        self.model_config, self.diffusion = model_config, diffusion_of(model_config)
        if same.config != model_config.same:
            raise ValueError(f"the autoencoder is not that of {model_config.name}: train or choose one of its size")
        self.model = model.to(self.device)
        self.text_encoder.requires_grad_(train_text)
        self.train_config, self.clips_config, self.demo_config = train, clips, demo
        self.tokenizer_file, self.same = tokenizer_file, same.to(self.device)
        self.tokenizer = Tokenizer(tokenizer_file, self.diffusion.text_encoder.max_length)
        if self.tokenizer.vocab_size > self.diffusion.text_encoder.vocab_size:
            raise ValueError(
                f"{tokenizer_file}: has {self.tokenizer.vocab_size} ids, the text encoder of {model_config.name} "
                f"{self.diffusion.text_encoder.vocab_size}"
            )
        self.latents = latents
        self.batches = self._batches(latents, "train", train.seed)
        self.validation = self._batches(latents, "validation", train.seed + 1)

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
            latents,
            self.tokenizer,
            split=split,
            batch=self.train_config.batch,
            seed=seed,
            max_frames=self.diffusion.max_frames,
            head_room_frames=head_room,
            buckets=self.clips_config.buckets,
            multiple=8,
            shares=self.clips_config.shares.to_dict(),
        )

    def data(self) -> tuple[Split, ...]:
        return tuple(
            Split(name=name, items=len(batches.items), seconds=sum(item.seconds for item in batches.items))
            for name, batches in (("train", self.batches), ("validation", self.validation))
        )

    def draw(self, batch: LatentBatch, random: torch.Generator) -> Draw:
        """Silence extension and inpainting masks of a global batch ([T4.2] steps 3 and 4)."""
        mean_frames = self.clips_config.silence_seconds * self.model_config.frames_per_second
        valid = extend_valid(batch.valid, mean_frames, random)
        kinds = mask_kinds(len(valid), self.clips_config.mask_shares, random)
        return Draw(valid, inpaint_masks(valid, kinds, random), kinds)

    def conditioning(self, batch: LatentBatch, draw: Draw, drop: Tensor | None = None) -> Conditioning:
        """What the DiT is told of a batch. Where ``drop`` (B,) is true its text and seconds token are zeros; the global
        duration and the local input stay."""
        context, seconds = self.context(batch)
        if drop is not None:
            context = torch.where(drop.to(self.device)[:, None, None], 0.0, context)
        mask = draw.keep[..., None].float().to(self.device)
        local = torch.cat([mask, mask * batch.latents.to(self.device)], dim=-1)  # (B, T, 1 + C)
        return Conditioning(context=context, seconds=seconds, local=local, valid=draw.valid.to(self.device))

    def context(self, batch: LatentBatch) -> tuple[Tensor, Tensor]:
        """Cross-attention context (B, S + 1, D) and duration (B, D)."""
        ids, mask = batch.ids.to(self.device), batch.mask.to(self.device)
        return self.conditioner(self.text_encoder(ids, mask), mask, batch.seconds.numpy())

    def velocity_error(
        self, batch: LatentBatch, draw: Draw, t: Tensor, noise: Tensor, drop: Tensor | None, context_weight: float
    ) -> Tensor:
        """Flow-matching loss at times t (B,) ([T4.2] steps 5 to 7): mean over generated frames, plus
        ``context_weight`` times that over kept ones."""
        generated, kept = self.velocity_errors(batch, draw, t, noise, drop, "none")
        return generated.mean() + context_weight * kept.mean()

    def velocity_errors(
        self, batch: LatentBatch, draw: Draw, t: Tensor, noise: Tensor, drop: Tensor | None, normalize: Normalize
    ) -> tuple[Tensor, Tensor]:
        """Errors of each item over generated and over kept frames, (B,) each; see ``losses.flow_errors``."""
        z, t, noise = (x.to(self.device) for x in (batch.latents, t, noise))
        with self.autocast():
            prepared = self.dit.prepare(self.conditioning(batch, draw, drop))
            velocity = self.dit(interpolate(z, noise, t), t, prepared)
        kept = (draw.valid & draw.keep).to(self.device)
        return flow_errors(velocity, noise - z, draw.generated.to(self.device), kept, normalize)

    def validate(self) -> dict[str, float]:
        """Error by time with nothing kept and independent noise; how much worse it gets with the captions of other
        items, and with none (neither prompt nor duration token); and, by the error of the best linear velocity of
        single frames, the ratio at the time where it is largest."""
        errors = {t: [] for t in VALIDATION_TIMES}  # type: dict[float, list[float]]
        linear = {t: [] for t in VALIDATION_TIMES}  # type: dict[float, list[float]]
        shuffled: list[float] = []
        dropped: list[float] = []
        for index in range(VALIDATION_BATCHES):
            batch = self.validation.batch(index)
            random = step_generator(self.train_config.seed + 1, index)
            noise = torch.randn(batch.latents.shape, generator=random)
            draw = Draw(batch.valid, torch.zeros_like(batch.valid))
            order = torch.randperm(len(batch.items), generator=random)
            other = LatentBatch(
                batch.latents, batch.valid, batch.ids[order], batch.mask[order], batch.seconds, batch.items
            )
            for time in VALIDATION_TIMES:
                t = torch.full((len(order),), time)
                known = batch.latents.numpy(), batch.valid.numpy(), noise.numpy()
                linear[time].append(float(self.wiener.errors(*known, time).mean()))
                errors[time].append(float(self.velocity_error(batch, draw, t, noise, None, 0.0)))
                shuffled.append(float(self.velocity_error(other, draw, t, noise, None, 0.0)))
                dropped.append(float(self.velocity_error(batch, draw, t, noise, torch.ones_like(t).bool(), 0.0)))
        mean = float(np.mean([np.mean(values) for values in errors.values()]))
        by_time = {f"flow_t{time}": float(np.mean(values)) for time, values in errors.items()}
        ratios = {
            "shuffled_ratio": float(np.mean(shuffled)) / mean,
            "dropped_ratio": float(np.mean(dropped)) / mean,
            "wiener_ratio": max(sum(errors[t]) / sum(linear[t]) for t in VALIDATION_TIMES),
        }
        return {"flow": mean, **ratios, **by_time}

    @cached_property
    def wiener(self) -> WienerBaseline:
        """Fitted to the frames of evenly chosen training items."""
        items = [item for item in self.latents.items if item.split == "train"]
        every = max(1, sum(item.frames for item in items) // FRAMES_MOST)
        return WienerBaseline([self.latents.read(item).numpy() for item in items[::every]], "frame")

    def demo(self, folder: Path, step: int) -> None:
        """Some held-out prompts in turn."""
        self.write_demo(folder, f"{step:06d}", self.demo_config)

    def write_demo(self, folder: Path, name: str, sampling: Sampling) -> None:
        """``name``.wav with its spectrogram, and the prompts in ``name``.txt."""
        batch = self.validation.batch(10**6)[: min(DEMO_PROMPTS, self.train_config.batch)]
        with torch.no_grad():
            audio = self.same.decode(self.sample(batch, sampling))  # (6, L, channels)
        lengths = [int(item.seconds * self.model_config.sample_rate) for item in batch.items]
        captions = [item.captions[0] for item in batch.items]
        save_sound(
            folder / f"{name}.wav",
            torch.cat([sound[:length] for sound, length in zip(audio, lengths, strict=True)]).float().cpu().numpy(),
            self.model_config.sample_rate,
            title=f"step {name}: {', '.join(captions)}",
        )
        (folder / f"{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")

    def sample(self, batch: LatentBatch, sampling: Sampling) -> Tensor:
        """Latents (B, T, C) for the prompts and durations of a batch, from fixed seeds."""
        channels = self.model_config.same.latent_channels
        seeds, frames = range(len(batch.items)), int(batch.valid.sum(1).max())
        context, seconds = self.context(batch)
        local = torch.zeros(len(seeds), 1, channels + 1, device=self.device)
        cond = Conditioning(context=context, seconds=seconds, valid=None, local=local)
        velocity = GuidedVelocity(
            dit=self.dit,
            cond=self.dit.prepare(cond),
            null=None if sampling.guidance.scale == 1 else self.dit.prepare(cond.unconditional()),
            guidance=sampling.guidance,
        )

        def noise(purpose: Purpose) -> Tensor:
            return torch.from_numpy(batch_noise(seeds, purpose, frames, channels)).to(self.device)

        schedule = sigmas(self.diffusion.shift, sampling.steps, 1.0, [frames] * len(seeds))
        steps = SAMPLERS[sampling.sampler](velocity, noise(INITIAL), schedule, lambda k: noise(noise_of_step(k)))
        *_, last = steps
        return last.x

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The whole model: text encoder, conditioner, DiT and the frozen autoencoder, in fp16, with the tokenizer."""
        state = {**weights, **{f"same.{k}": v for k, v in self.same.state_dict().items()}}
        save_checkpoint(folder, self.model_config, state, "F16")
        (folder / "tokenizer.json").write_bytes(self.tokenizer_file.read_bytes())
        write_json(folder / PARENTS_FILE, self.parents())

    def parents(self) -> dict[str, str]:
        """Hashes of the frozen models that this one was made with, for the export: role -> "sha256:..."."""
        return {AUTOENCODER: self.latents.autoencoder}
