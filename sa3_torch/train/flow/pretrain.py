"""Stage 1: flow matching from the beginning, or on from a checkpoint; its step is in flow_stage.py.

The text encoder is a pretrained one that stays as it is, or, in the demo model, a small one that is trained here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import click
import torch

from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_torch.same import SAME
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.data.pre_encode import load_autoencoder
from sa3_torch.train.demo_set.vocabulary import save_tokenizer
from sa3_torch.train.networks.init import init_conditioner, init_dit, init_text_encoder
from sa3_torch.train.run import parallel
from sa3_torch.train.run.command import RunOptions, stage_command
from sa3_torch.train.run.optimizers import Group
from sa3_torch.train.run.options import FILE, LATENTS, MODEL
from sa3_torch.weights import load_part

from .flow_stage import FlowConfig, FlowStage
from .model import diffusion_of, new_model, open_model


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(FlowConfig):
    """Settings of ``sa3 train pretrain``."""

    start: Literal["all", "text"]  # which weights of the checkpoint to start from, where one is given
    train_text: bool  # the text encoder, too


class PretrainStage(FlowStage):
    """``start`` is a checkpoint folder of which all weights, or the text encoder, are taken (``config.start``)."""

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
        super().__init__(new_model(model), model, config, latents, tokenizer_file, same, train_text=config.train_text)
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


@stage_command("pretrain")
@LATENTS
@click.option("--autoencoder", type=MODEL, required=True, help="The autoencoder that made the latents.")
@click.option(
    "--tokenizer",
    type=FILE,
    default=None,
    help="tokenizer.json; else that of --start, else the closed vocabulary of the demo sounds.",
)
@click.option(
    "--start",
    type=MODEL,
    default=None,
    help="Checkpoint whose weights, or text encoder (setting start), are the beginning.",
)
@click.option("--model", "size", default="demo", show_default=True, type=click.Choice(sorted(PRESETS)))
def pretrain(
    run: RunOptions,
    latents: tuple[Path, ...],
    autoencoder: Path,
    tokenizer: Path | None,
    start: Path | None,
    size: str,
) -> None:
    """Train a diffusion model by flow matching (stage 1)."""
    config = run.settings(PretrainConfig, "pretrain")
    same, digest = load_autoencoder(autoencoder)
    run.out.mkdir(parents=True, exist_ok=True)
    if tokenizer is None and start is not None:
        tokenizer = start / TOKENIZER_FILE
    elif tokenizer is None:
        tokenizer = run.out / TOKENIZER_FILE
        if parallel.is_first():
            save_tokenizer(tokenizer)
        parallel.wait()
    stage = PretrainStage(PRESETS[size], config, LatentSet(*latents, autoencoder=digest), tokenizer, same, start)
    if run.train(stage, config, {}):
        click.echo(f'model: {run.out / "model"}; next: sa3 generate "piano note A4" --model {run.out / "model"}')
