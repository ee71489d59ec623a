"""STAGES: every training stage in a tiny configuration; tests of the loop are parametrised over it.

A stage needs one line here: name -> how to build it from the workspace and ``--set`` changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.quant.calibration import CalibrationPrompt
from sa3_torch.train.autoencoder.distill import DistillConfig, DistillStage
from sa3_torch.train.autoencoder.stage import AutoencoderConfig, AutoencoderStage
from sa3_torch.train.autoencoder.start import Start
from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.clap.stage import ClapConfig, ClapStage
from sa3_torch.train.data.clip_cache import ClipSet, Draft, write_clips
from sa3_torch.train.data.encode.pre_encode import EncodeConfig, PreEncoder, load_autoencoder
from sa3_torch.train.data.encode.sources import ClipSource
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.demo_set.vocabulary import save_tokenizer
from sa3_torch.train.few_steps.ode_warmup import OdeWarmupConfig, OdeWarmupStage
from sa3_torch.train.few_steps.posttrain import PosttrainConfig, PosttrainStage
from sa3_torch.train.flow.model import open_model
from sa3_torch.train.flow.pretrain import PretrainConfig, PretrainStage
from sa3_torch.train.lora.stage import LoraConfig, LoraStage
from sa3_torch.train.networks import init
from sa3_torch.train.quantize.stage import QuantizeConfig, QuantizeStage
from sa3_torch.train.run.loop import Trainer
from sa3_torch.train.run.optimizers import Group, OptimizerConfig
from sa3_torch.train.run.parallel import follow, mean
from sa3_torch.train.run.random import step_generator
from sa3_torch.train.run.settings import load_settings
from sa3_torch.train.run.stage import Stage, StageConfig
from tests.support.tiny_checkpoint import write_checkpoint

DEMO = PRESETS["first"]
assert DEMO.diffusion is not None
MODEL = dataclasses.replace(
    DEMO,
    name="test",
    same=dataclasses.replace(DEMO.same, width=64, encoder_depth=1, decoder_depth=1, latent_channels=16),
    diffusion=dataclasses.replace(
        DEMO.diffusion, max_frames=48, dit=dataclasses.replace(DEMO.diffusion.dit, width=64, depth=1, memory_tokens=2)
    ),
)
Components = Callable[[Tensor], tuple[Tensor, Tensor]]


def _remembered(components: Components) -> Components:
    """Compute the principal components of the same crops once: they take longer than all else of a tiny autoencoder."""
    known = dict[bytes, tuple[Tensor, Tensor]]()

    def remember(rows: Tensor) -> tuple[Tensor, Tensor]:
        key = hashlib.sha256(rows.numpy().tobytes()).digest()
        if key not in known:
            known[key] = components(rows)
        return known[key]

    return remember


init._principal_components = _remembered(init._principal_components)
PICTURES = (  # what draws them
    "sa3_torch.train.run.logs.save_spectrogram",
    "sa3_torch.train.run.loop.plot_run",
    "sa3_torch.train.autoencoder.demo.draw_rows",
    "sa3_torch.train.clap.stage.plot_matrix",
)
SHORT = ("train.compile=false", "train.precision='fp32'", "train.validate_every=1000", "train.save_every=1000")


def write_tiny_clips(folder: Path) -> ClipSet:
    """Eight short tones and eight bursts of noise, a few of each held out."""
    random = np.random.default_rng(5)

    def draft(number: int) -> Draft:
        time = np.arange(16_000) / 44_100
        note = number % 2 == 0
        audio = np.sin(2 * np.pi * 220 * 2 ** (number / 12) * time) if note else random.standard_normal(16_000)
        return Draft(
            id=f"{number}",
            captions=("piano note A3",) if note else ("white noise",),
            kind="note" if note else "noise",
            label="note" if note else "white",
            instrument="piano" if note else None,
            midi=57 + number if note else None,
            split="validation" if number >= 12 else "train",
            audio=(0.3 * audio).astype(np.float32),
        )

    return write_clips(folder, map(draft, range(16)), channels=1, about={})


@contextmanager
def without_pictures() -> Iterator[None]:
    """Draw nothing inside: that would take longer than tiny trainings."""
    with ExitStack() as stack:
        for name in PICTURES:
            stack.enter_context(patch(name))
        yield


def make_workspace(folder: Path) -> None:
    """Clips, a barely trained autoencoder, its latents, a tokenizer, and a model of random weights."""
    clips = write_tiny_clips(folder / "clips")
    train(autoencoder_stage(folder, "train.steps=2"), folder / "run", evaluated=False)
    encoding = EncodeConfig(copies=2, seed=0, shard_frames=100, chunk_frames=None)
    PreEncoder(ClipSource(clips, 2), folder / "run" / "model", folder / "latents", encoding).run()
    save_tokenizer(folder / "tokenizer.json")
    write_checkpoint(folder / "random", MODEL)
    export_base(folder)


def export_base(workspace: Path) -> None:
    """The random model around the workspace's autoencoder, as pre-training exports it."""
    stage = pretrain_stage(workspace)
    stage.model.load_state_dict(open_model(workspace / "random")[0].state_dict())
    stage.export(workspace / "base", stage.model.state_dict())


def train(stage: Stage, folder: Path, *, evaluated: bool = True) -> Trainer:
    """Run a stage to the end; without measures, demos and pictures, which take most of the time, where asked to."""
    trainer = trainer_of(stage, folder)
    if not evaluated:
        trainer._evaluate = lambda _log: None  # type: ignore[method-assign]
    assert trainer.run()
    return trainer


def trainer_of(stage: Stage, folder: Path) -> Trainer:
    return Trainer(stage, stage.config, folder, {})  # type: ignore[attr-defined]


def autoencoder_config(*changes: str) -> AutoencoderConfig:
    rate = ("generator.warmup_steps=1", "generator.learning_rate=1e-4")
    settings = (*SHORT, "train.batch=4", "crop_samples=8192", *rate, *changes)
    return load_settings(AutoencoderConfig, "autoencoder", "first", settings)


def autoencoder_stage(workspace: Path, *changes: str) -> AutoencoderStage:
    return AutoencoderStage(MODEL, autoencoder_config(*changes), ClipSet(workspace / "clips"))


def started_stage(workspace: Path, *changes: str, model: ModelConfig = MODEL) -> AutoencoderStage:
    """Begin with the workspace's autoencoder."""
    config = autoencoder_config("generator.learning_rate=1e-3", *changes)
    return AutoencoderStage(model, config, ClipSet(workspace / "clips"), start=Start.open(workspace / "run" / "model"))


def complete_stage(workspace: Path, *changes: str) -> AutoencoderStage:
    """Every term of the autoencoder; discriminators from the first step, in odd ones."""
    small = (
        "train.batch=4",
        "train.steps=8",
        "crop_samples=8192",
        "generator.warmup_steps=1",
        "generator.learning_rate=1e-4",
        "discriminator.warmup_steps=1",
        "discriminator.learning_rate=1e-4",
        "spectral_start=0.0",
        "spectral_full=0.0",
        "spectral.sizes=[128, 512]",
        "semantics.detached_steps=1",
        "semantics.critic.max_rows=24",
        "semantics.alignment.width=64",
        "semantics.critic.width=64",
        "semantics.alignment.depth=1",
        "semantics.critic.depth=1",
        "adversarial.start_step=0",
        "adversarial.discriminators.transformer.depth=1",
        "adversarial.discriminators.transformer.min_width=64",
        "adversarial.discriminators.transformer.max_width=64",
        "adversarial.discriminators.transformer.head_size=32",
        "adversarial.discriminators.convolutional.width=4",
        "adversarial.discriminators.convolutional.stft_sizes=[256]",
        "adversarial.discriminators.transformer.views=[{kind='patch', size=97, stride=16, window=2}]",
    )
    config = load_settings(AutoencoderConfig, "autoencoder", "tiny", (*SHORT, *small, *changes))
    return AutoencoderStage(MODEL, config, ClipSet(workspace / "clips"))


def distill_stage(workspace: Path, *changes: str) -> DistillStage:
    """Another start than the teacher's; discriminators in odd steps."""
    small = (
        "train.batch=4",
        "train.steps=8",
        "train.seed=3",
        "crop_samples=8192",
        "generator.warmup_steps=1",
        "generator.learning_rate=1e-4",
        "discriminator.warmup_steps=1",
        "discriminator.learning_rate=1e-4",
        "spectral_start=0.0",
        "spectral_full=0.0",
        "spectral.sizes=[128, 512]",
        "adversarial.start_step=0",
        "adversarial.discriminators.transformer.views=[]",
        "adversarial.discriminators.convolutional.stft_sizes=[256]",
        "adversarial.discriminators.convolutional.width=4",
    )
    config = load_settings(DistillConfig, "distill-autoencoder", "tiny", (*SHORT, *small, *changes))
    return DistillStage(MODEL, config, ClipSet(workspace / "clips"), workspace / "run" / "model")


def pretrain_stage(workspace: Path, *changes: str) -> PretrainStage:
    settings = (*SHORT, "train.batch=4", "clips.buckets=1", "optimizer.warmup_steps=1", *changes)
    config = load_settings(PretrainConfig, "pretrain", "first", settings)
    same, digest = load_autoencoder(workspace / "run" / "model")
    latents = LatentSet(workspace / "latents", autoencoder=digest)
    start = None if config.train_text else workspace / "random"
    return PretrainStage(MODEL, config, latents, workspace / "tokenizer.json", same, start)


def text_stage(workspace: Path, *changes: str) -> PretrainStage:
    """Pre-training as at full scale, on a frozen text encoder."""
    rest = ("start='text'", "train_text=false", "times.length='duration'", "clips.mask_shares=[0.3, 0.4, 0.3]")
    return pretrain_stage(workspace, *rest, *changes)


def lora_stage(workspace: Path, *changes: str) -> LoraStage:
    settings = ("train.batch=4", "clips.buckets=1", "optimizer.warmup_steps=1", "adapter.exclude=[]", "adapter.rank=4")
    config = load_settings(LoraConfig, "lora", "demo", (*SHORT, *settings, *changes))
    return LoraStage(workspace / "base", config, [workspace / "latents"])


def clap_stage(workspace: Path, *changes: str) -> ClapStage:
    settings = ("train.batch=8", "tower.width=64", "tower.depth=1", "tower.embedding=16", "optimizer.warmup_steps=1")
    config = load_settings(ClapConfig, "clap", "first", (*SHORT, *settings, *changes))
    latents = LatentSet(workspace / "latents", autoencoder=load_autoencoder(workspace / "run" / "model")[1])
    return ClapStage(workspace / "base", config, latents)


def ode_warmup_stage(workspace: Path, *changes: str) -> OdeWarmupStage:
    """The base is a model of random weights around the workspace's autoencoder; refreshed in every second step."""
    rates = ("refresh_rate=2", "renoised_share=0.5", "first_share=0.25", "sampling.steps=3")
    teacher = [f"teacher.{rate}" for rate in rates]
    settings = (*SHORT, "train.batch=4", "clips.buckets=1", "optimizer.warmup_steps=1", *teacher, *changes)
    config = load_settings(OdeWarmupConfig, "ode-warmup", "first", settings)
    return OdeWarmupStage(workspace / "base", config, [workspace / "latents"])


def posttrain_stage(workspace: Path, *changes: str) -> PosttrainStage:
    """All terms but that of the CLAP; both models are the workspace's base; the discriminator has the odd turns.

    Under this seed two items of step 1 get another prompt.
    """
    small = (
        "train.batch=4",
        "clips.buckets=1",
        "generator.warmup_steps=1",
        "discriminator.warmup_steps=1",
        "taps=[0]",
        "head.width=16",
        "head.groups=4",
        "weights.clap=0.0",
        "weights.frechet=0.0",
        "head_start=0",
        "backbone_rate=1.0",
        "own_sample_share=0.5",
        "train.seed=1",
    )
    config = load_settings(PosttrainConfig, "posttrain", "first", (*SHORT, *small, *changes))
    clap = _clap(workspace) if config.weights.clap or config.weights.frechet else None
    return PosttrainStage(workspace / "base", workspace / "base", config, [workspace / "latents"], clap)


def _clap(workspace: Path) -> LatentClap:
    """Make a latent CLAP of random weights, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clap = clap_stage(workspace).model
        for parameter in clap.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return clap.eval().requires_grad_(False)


def frechet_stage(workspace: Path, *changes: str) -> PosttrainStage:
    """Every term of post-training; the discriminator has a head start of two steps, over blocks that are frozen."""
    terms = ("weights.clap=1.0", "weights.frechet=1.0", "head_start=2", "backbone_rate=0.0")
    rest = ("generator_noise.one_shot=0.5", "discriminator_noise.low_noise=0.25", "train.batch=8")
    return posttrain_stage(workspace, *terms, *rest, *changes)


def quantize_stage(workspace: Path, *changes: str) -> QuantizeStage:
    """Grids freeze in the middle of the run."""
    prompts = tuple(CalibrationPrompt(0.2, text) for text in ("kick", "snare", "bell low", "rain"))
    settings = (
        *SHORT,
        "train.batch=2",
        "recipe='3bit'",
        "rounds=1",
        "frozen_share=0.5",
        "optimizer.warmup_steps=1",
        *changes,
    )
    return QuantizeStage(workspace / "random", load_settings(QuantizeConfig, "quantize", "demo", settings), prompts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GameConfig(StageConfig):
    generator: OptimizerConfig
    discriminator: OptimizerConfig


class GameStage(Stage):
    """Two groups in turns, dropout-free, with a running mean of the discriminator's loss: a GAN in miniature."""

    name = "game"

    def __init__(self, config: GameConfig) -> None:
        super().__init__()
        self.config = config
        random = torch.random.fork_rng()
        with random:
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(self.device)
            self.judge = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(self.device)
        self.judge.register_buffer("loss", torch.zeros(1, device=self.device))
        self.groups = {
            "generator": Group(network=self.model, optimizer=config.generator),
            "discriminator": Group(network=self.judge, optimizer=config.discriminator),
        }

    def turn(self, step: int) -> str:
        return "discriminator" if step % 2 else "generator"

    def losses(self, step: int) -> dict[str, Tensor]:
        batch = self.config.train.batch
        noise, real = torch.randn(2, batch, 4, generator=step_generator(self.config.train.seed, step)).to(self.device)
        rows = self.batch_slice.rows(batch)
        noise, real = noise[rows], 1 + real[rows, :3]
        if self.turn(step) == "generator":
            fake = self.model(noise)
            return {
                "adversarial": self.weighted("adversarial", 0.5, nn.functional.softplus(-self.judge(fake)).mean()),
                "distance": self.weighted("distance", 2.0, (fake - real).square().mean()),
            }
        fake = self.model(noise).detach()
        loss = nn.functional.softplus(self.judge(fake) - self.judge(real)).mean()
        follow(self.judge.loss, mean(loss), 0.9)
        return {"discriminator": loss}

    def validate(self) -> dict[str, float]:
        return {"mean": float(self.model(torch.zeros(1, 4, device=self.device)).mean())}

    def demo(self, folder: Path, step: int) -> None:
        """Nothing to show."""

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(weights, folder / "weights.pt")


def game_stage(_workspace: Path, *changes: str) -> GameStage:
    optimizer = OptimizerConfig(
        learning_rate=1e-2,
        schedule="cosine",
        final_learning_rate=1e-4,
        inverse_gamma=0.0,
        warmup_steps=1,
        beta1=0.8,
        beta2=0.99,
        weight_decay=1e-3,
        clip_norm=1.0,
    )
    train = load_settings(PretrainConfig, "pretrain", "first", ("train.batch=8", *SHORT, *changes)).train
    return GameStage(GameConfig(train=train, generator=optimizer, discriminator=optimizer))


STAGES: dict[str, Callable[..., Stage]] = {
    "autoencoder": autoencoder_stage,
    "complete": complete_stage,
    "distill": distill_stage,
    "pretrain": pretrain_stage,
    "text": text_stage,
    "muon": lambda *words: pretrain_stage(*words, "optimizer.kind='muon'"),
    "clap": clap_stage,
    "ode-warmup": ode_warmup_stage,
    "own-states": lambda *words: ode_warmup_stage(*words, "teacher.own_share=1.0"),
    "posttrain": posttrain_stage,
    "frechet": frechet_stage,
    "lora": lora_stage,
    "quantize": quantize_stage,
    "game": game_stage,
}
