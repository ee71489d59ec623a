"""Stage 1: flow matching on pre-encoded latents, from the beginning or on from a checkpoint [T4].

The text encoder is a pretrained one that stays as it is, or, in the demo model, a small one that is trained here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import click
import torch
from torch import Tensor

from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.schema import ConfigError
from sa3_torch.same import SAME
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.demo_set.sets import save_tokenizer
from sa3_torch.train.networks.init import init_conditioner, init_dit, init_text_encoder
from sa3_torch.train.run import parallel
from sa3_torch.train.run.command import RunOptions, report_made, stage_command
from sa3_torch.train.run.optimizers import Group
from sa3_torch.train.run.options import FILE, LATENTS, MODEL, UNGATED
from sa3_torch.train.run.settings import read_settings
from sa3_torch.train.run.stage import Split, Stage
from sa3_torch.weights import StableAudio, load_part

from .conditioning import Networks
from .demo import demo_batch, sample, write_demo
from .latent_data import LatentData
from .matching import FlowConfig, FlowMatching, flow_notes, velocity_errors
from .model import AUTOENCODER, diffusion_of, export_model, new_model, open_model, open_text
from .validation import FlowValidation


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(FlowConfig):
    """Hold the settings of ``sa3 train pretrain``."""

    start: Literal["all", "text"]  # which weights of the checkpoint to start from, where one is given
    train_text: bool  # the text encoder, too


class PretrainStage(Stage):
    """Train text encoder, conditioner and DiT of a model of size ``model``.

    ``start`` is a checkpoint folder of which all weights, or the text encoder, are taken (``config.start``); ``same``
    the autoencoder of the latents, for demos and for the export.
    """

    name = "pretrain"

    def __init__(
        self,
        model: ModelConfig,
        config: PretrainConfig,
        latents: LatentSet,
        tokenizer_file: Path,
        same: SAME,
        start: Path | None = None,
    ) -> None:
        super().__init__()
        if same.config != model.same:
            raise ValueError(f"the autoencoder is not that of {model.name}: train or choose one of its size")
        self.config, self.model_config, self.tokenizer_file = config, model, tokenizer_file
        self.model: StableAudio = _start(model, config, start).to(self.device)
        self.same = same.to(self.device)
        self.networks = Networks.of(self.model)
        self.networks.text_encoder.requires_grad_(config.train_text)
        trained = self.model if config.train_text else self.networks.without_text()
        self.groups = {"diffusion": Group(network=trained, optimizer=config.optimizer)}
        self.latents = LatentData(latents, open_text(tokenizer_file, model), model, config.clips, config.train)
        self.flow = FlowMatching(config, model, self.latents)
        self.feed = self.flow.feed
        self.validation = FlowValidation(self.networks, self.latents, config.train.seed + 1)

    def data(self) -> tuple[Split, ...]:
        return self.latents.splits()

    def remarks(self) -> list[str]:
        return self.latents.remarks()

    def losses(self, step: int) -> dict[str, Tensor]:
        drawn, noise = self.flow.draw(step, self.batch_slice, self.device)
        with self.autocast():
            generated, kept = velocity_errors(self.networks, drawn, noise)
        self.notes |= flow_notes(drawn, noise, generated.detach(), kept.detach())
        return {"flow": generated.mean() + self.config.context_weight * kept.mean()}

    def validate(self) -> dict[str, float]:
        with self.autocast():
            return self.validation.measure(self.shares(self.config.train.batch, self.config.train.batch))

    def demo(self, folder: Path, step: int) -> None:
        """Write sounds for some held-out prompts in turn."""
        batch = demo_batch(self.latents)
        rows, shift = parallel.own_rows(len(batch.items)), diffusion_of(self.model_config).shift
        latents = sample(self.networks, batch, rows, self.config.demo, shift)
        write_demo(folder, f"{step:06d}", batch, latents, self.same, self.model_config.sample_rate)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        parents = {AUTOENCODER: self.latents.latents.autoencoder}
        export_model(folder, self.model_config, weights, self.same, self.tokenizer_file, parents)


def _start(model: ModelConfig, config: PretrainConfig, folder: Path | None) -> StableAudio:
    """Return a new model, with all weights or the text encoder of a checkpoint folder where one is given."""
    if folder is None and not config.train_text:
        raise ValueError("train_text is false: give the checkpoint with the text encoder by --start FOLDER")
    made, seed = new_model(model), config.train.seed
    networks = Networks.of(made)
    init_dit(networks.dit, seed)
    init_text_encoder(networks.text_encoder, seed + 1)
    init_conditioner(networks.conditioner, seed + 2)
    if folder is not None and config.start == "all":
        made.load_state_dict(_weights_of(folder, model))
    elif folder is not None:
        networks.text_encoder.load_state_dict(_text_encoder_of(folder, model))
    return made


def _weights_of(folder: Path, model: ModelConfig) -> dict[str, Tensor]:
    opened, config, _ = open_model(folder)
    own, theirs = diffusion_of(model), diffusion_of(config)
    same_sizes = (theirs.dit, theirs.text_encoder) == (own.dit, own.text_encoder)
    if not same_sizes or config.same.latent_channels != model.same.latent_channels:
        raise ValueError(
            f"{folder} is {config.name}, which has other sizes than {model.name}; choose that one by --model, or take "
            "the text encoder alone by --set start=text"
        )
    return opened.state_dict()


def _text_encoder_of(folder: Path, model: ModelConfig) -> dict[str, Tensor]:
    config = ModelConfig.load(folder)
    if diffusion_of(config).text_encoder != diffusion_of(model).text_encoder:
        raise ValueError(f"{folder}: its text encoder is not that of {model.name}; choose another")
    encoder = cast(T5GemmaEncoder, load_part(folder, config, "text_encoder", torch.device("cpu"), torch.float32))
    table = encoder.embed_tokens(torch.arange(encoder.config.vocab_size)[None])[0]
    return {**encoder.state_dict(), "embed_tokens.weight": table}


@stage_command("pretrain")
@LATENTS
@UNGATED
@click.option("--autoencoder", type=MODEL, required=True, help="The autoencoder that made the latents.")
@click.option(
    "--tokenizer",
    type=FILE,
    default=None,
    help="tokenizer.json; else that of --start, else the words of the set first, or music for that model.",
)
@click.option(
    "--start",
    type=MODEL,
    default=None,
    help="Checkpoint whose weights, or text encoder (setting start), are the beginning.",
)
@click.option("--model", "size", default="first", show_default=True, type=click.Choice(sorted(PRESETS)))
def pretrain(
    run: RunOptions,
    latents: tuple[Path, ...],
    ungated: bool,
    autoencoder: Path,
    tokenizer: Path | None,
    start: Path | None,
    size: str,
) -> None:
    """Train a diffusion model by flow matching (stage 1)."""
    config = run.settings(PretrainConfig, "pretrain")
    same, digest = load_autoencoder(autoencoder)
    opened = LatentSet(*latents, autoencoder=digest)
    if not ungated:
        opened.check_gate()
    if tokenizer is None:
        tokenizer = start / TOKENIZER_FILE if start is not None else _write_tokenizer(size, run.out / TOKENIZER_FILE)
    stage = PretrainStage(PRESETS[size], config, opened, tokenizer, same, start)
    belongings = {
        "latents": opened.identity(),
        "autoencoder": digest,
        "tokenizer": file_hash(tokenizer),
        "start_weights": "" if start is None else file_hash(start / WEIGHTS_FILE),
    }
    if run.train(stage, config, belongings):
        report_made("model", run.out / "model", "generate", "piano note A4", "--model", run.out / "model")


def _write_tokenizer(size: str, path: Path) -> Path:
    """Write the vocabulary of the sounds that a model is for, in the first process; return its path.

    That of a run stays as it is, also where a later version has other words. Raises ConfigError for a run without one.
    """
    if not path.is_file() and read_settings(path.parent):
        raise ConfigError(f"{path.parent} holds a run with words from elsewhere: give its --start or --tokenizer")
    if parallel.is_first() and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tokenizer("music" if size == "music" else "first", path)
    parallel.wait()
    return path
