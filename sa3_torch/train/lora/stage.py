"""Adapters by flow matching on a frozen model: the LoRA family [T8]; the step is flow_stage.py's.

Every chosen layer reads as its adapted weight, in fp32; all that is trained, averaged and saved are the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import click
import torch
from torch import Tensor, nn

from sa3_mlx.common.adapters.format import (
    ADAPTED_PARTS,
    ADAPTER_FILE,
    ADAPTER_TYPES,
    Adapter,
    AdapterConfig,
    AdapterInfo,
    selected_layers,
    write_adapter,
)
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import ConfigError
from sa3_torch.conditioner import Conditioner
from sa3_torch.dit import DiT
from sa3_torch.lora import TrainedAdapter, add_adapter
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.train.data.batches import LatentBatch, LatentBatches
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.flow.flow_stage import FlowConfig, FlowStage
from sa3_torch.train.flow.model import autoencoder_of, diffusion_of, open_model
from sa3_torch.train.run.command import RunOptions, stage_command
from sa3_torch.train.run.optimizers import Group
from sa3_torch.train.run.options import AUTOENCODER, LATENTS, MODEL
from sa3_torch.train.run.random import Purpose, purpose_generator
from sa3_torch.train.run.recompute import checkpoint_blocks


@dataclass(frozen=True, kw_only=True)
class LoraConfig(FlowConfig):
    """Settings of ``sa3 train lora``."""

    adapter: AdapterConfig
    base_precision: Literal["fp32", "bf16"]  # of the frozen matrices in memory
    posttrained: bool  # allow a base that was post-trained: adapters of it unlearn sampling in few steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_precision == "bf16" and self.train.precision != "bf16":
            raise ConfigError(
                f"base_precision is 'bf16' with train.precision {self.train.precision!r}: it needs 'bf16'"
            )
        if self.optimizer.muon is not None:
            raise ConfigError("optimizer.muon is set: adapters have no matrices for it; leave the table out")


class Adapters(nn.Module):
    """What is trained: the adapters of some layers, which also are parts of the layers."""

    def __init__(self, paths: tuple[str, ...], adapters: list[TrainedAdapter]) -> None:
        super().__init__()
        self.paths = paths
        self.adapters = nn.ModuleList(adapters)

    def by_layer(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """A state of this module -> layer -> kind -> values."""
        layers: dict[str, dict[str, Tensor]] = {path: {} for path in self.paths}
        for name, values in weights.items():
            _, number, kind = name.split(".")
            layers[self.paths[int(number)]][kind] = values
        return layers


class LoraStage(FlowStage):
    """``folder`` is the base. ``autoencoder``: folder of the one that made the latents; needed only where the base does
    not say which it was."""

    name = "lora"

    def __init__(
        self, folder: Path, config: LoraConfig, latents: Sequence[Path], autoencoder: Path | None = None
    ) -> None:
        self.base, model_config, same = open_model(folder)
        _check_base(folder, diffusion_of(model_config).objective, config)
        opened = LatentSet(*latents, autoencoder=autoencoder_of(folder, same, autoencoder))
        super().__init__(self.base, model_config, config, opened, folder / TOKENIZER_FILE, same, train_text=False)
        self.config: LoraConfig = config
        self.base_hash = file_hash(folder / WEIGHTS_FILE)
        self.base.eval().requires_grad_(False)
        random = purpose_generator(config.train.seed, Purpose.ADAPTER_START, 0)
        layers = tuple(selected_layers(config.adapter, model_config))
        adapters = [
            add_adapter(cast(nn.Linear, self.base.get_submodule(path)), config.adapter, random) for path in layers
        ]
        self.model: nn.Module = Adapters(layers, adapters)
        if config.base_precision == "bf16":
            self._narrow_base()
        if config.train.checkpoint_blocks:
            checkpoint_blocks(self.base)
        self.groups = {"adapters": Group(network=self.model, optimizer=config.optimizer)}
        self._base_errors: dict[str, float] = {}

    @property
    def dit(self) -> DiT:
        return self.base.get_submodule("dit")  # type: ignore[return-value]

    @property
    def conditioner(self) -> Conditioner:
        return self.base.get_submodule("conditioner")  # type: ignore[return-value]

    @property
    def text_encoder(self) -> T5GemmaEncoder:
        return self.base.get_submodule("text_encoder")  # type: ignore[return-value]

    def _narrow_base(self) -> None:
        """Matrices of the frozen parts to bf16; what is trained, norms and biases stay fp32."""
        trained = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        for part in ADAPTED_PARTS:
            for parameter in self.base.get_submodule(part).parameters():
                if parameter.ndim == 2 and id(parameter) not in trained:
                    parameter.data = parameter.data.bfloat16()

    def _batches(self, latents: LatentSet, split: str, seed: int) -> LatentBatches:
        """A small set may hold nothing out: it is then validated on what it trains on."""
        held_out = any(item.split == split and item.captions for item in latents.items)
        return super()._batches(latents, split if held_out else "train", seed)

    def parents(self) -> dict[str, str]:
        return {**super().parents(), "start": self.base_hash}

    def losses(self, step: int) -> dict[str, Tensor]:
        terms = super().losses(step)
        with torch.no_grad():
            squares = [p.square().sum() for p in self.model.parameters() if p.ndim == 2]
            self.notes["adapter/norm"] = torch.stack(squares).sum().sqrt()
        return terms

    def validate(self) -> dict[str, float]:
        """As in pre-training, and the error of the base on the same batches."""
        adapters = [cast(TrainedAdapter, adapter) for adapter in cast(Adapters, self.model).adapters]
        if not self._base_errors:
            for adapter in adapters:
                adapter.on = False
            base = super().validate()
            self._base_errors = {f"base_{name}": value for name, value in base.items() if name.startswith("flow")}
            for adapter in adapters:
                adapter.on = True
        return {**super().validate(), **self._base_errors}

    def sample(self, batch: LatentBatch, sampling: Sampling) -> Tensor:
        with self.autocast():
            return super().sample(batch, sampling).float()

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """``adapter.safetensors``, in fp32 and with the frozen bases of the -xs types."""
        layers = cast(Adapters, self.model).by_layer(weights)
        info = AdapterInfo(
            adapter=self.config.adapter,
            base=self.model_config.name,
            base_hash=self.base_hash,
            step=self.config.train.steps,
            licence=None,
        )
        arrays = {
            path: {kind: values.float().cpu().numpy() for kind, values in tensors.items()}
            for path, tensors in layers.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(folder / ADAPTER_FILE, Adapter(info=info, layers=arrays))


def _check_base(folder: Path, objective: str, config: LoraConfig) -> None:
    if objective == "rf_denoiser" and not config.posttrained:
        raise ValueError(
            f"{folder} is post-trained, and flow matching would unlearn its sampling in few steps: train on its base "
            "model and use the adapter with either; --set posttrained=true trains on it all the same"
        )


@stage_command("lora")
@click.option("--model", type=MODEL, required=True, help="The base model.")
@LATENTS
@AUTOENCODER
@click.option("--type", "kind", type=click.Choice(ADAPTER_TYPES), default=None, help="Default: the settings'.")
@click.option("--rank", type=click.IntRange(1), default=None, help="Alpha becomes equal. Default: the settings'.")
def lora(
    run: RunOptions,
    model: Path,
    latents: tuple[Path, ...],
    autoencoder: Path | None,
    kind: str | None,
    rank: int | None,
) -> None:
    """Teach a model new sounds by an adapter: LoRA, DoRA, BoRA and their -xs forms."""
    given = {"type": kind, "rank": rank, "alpha": rank}
    changes = [f"adapter.{name}={value}" for name, value in given.items() if value is not None]
    config = run.settings(LoraConfig, "lora", *changes)
    stage = LoraStage(model, config, latents, autoencoder)
    if run.train(stage, config, stage.parents()):
        made = run.out / "model" / ADAPTER_FILE
        click.echo(f"adapter: {made}; next: sa3 generate PROMPT --model {model} --lora {made}")
