"""Adapters by flow matching on a frozen model: the LoRA family [T8].

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

from sa3_mlx.common.adapters.config import ADAPTED_PARTS, ADAPTER_TYPES, AdapterConfig, selected_layers
from sa3_mlx.common.adapters.format import ADAPTER_FILE, Adapter, AdapterInfo, write_adapter
from sa3_mlx.common.installed import name_of
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import ConfigError
from sa3_torch.lora import TrainedAdapter, add_adapter
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.flow.conditioning import Networks
from sa3_torch.train.flow.demo import demo_batch, sample, write_demo
from sa3_torch.train.flow.latent_data import LatentData
from sa3_torch.train.flow.matching import FlowConfig, FlowMatching, flow_notes, velocity_errors
from sa3_torch.train.flow.model import StartModel, diffusion_of, open_text
from sa3_torch.train.flow.validation import FlowValidation
from sa3_torch.train.run import parallel
from sa3_torch.train.run.blocks import work_by_blocks
from sa3_torch.train.run.command import RunOptions, report_made, stage_command
from sa3_torch.train.run.optimizers import Group
from sa3_torch.train.run.options import AUTOENCODER, LATENTS, MODEL
from sa3_torch.train.run.random import Purpose, purpose_generator
from sa3_torch.train.run.stage import Split, Stage


@dataclass(frozen=True, kw_only=True)
class LoraConfig(FlowConfig):
    """Hold the settings of ``sa3 train lora``."""

    adapter: AdapterConfig
    base_precision: Literal["fp32", "bf16"]  # of the frozen matrices in memory
    posttrained: bool  # allow a base that was post-trained: adapters of it unlearn sampling in few steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_precision == "bf16" and self.train.precision != "bf16":
            raise ConfigError(
                f"base_precision is 'bf16' with train.precision {self.train.precision!r}: it needs 'bf16'"
            )


class Adapters(nn.Module):
    """Hold the adapters of some layers, which also are parts of the layers."""

    def __init__(self, paths: tuple[str, ...], adapters: list[TrainedAdapter]) -> None:
        super().__init__()
        self.paths = paths
        self.adapters = nn.ModuleList(adapters)

    def switch(self, *, on: bool) -> None:
        """Let the layers read as adapted or as they were."""
        for adapter in self.adapters:
            cast(TrainedAdapter, adapter).on = on

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the norm of all matrices together."""
        squares = [p.square().sum() for p in self.parameters() if p.ndim == 2]
        return torch.stack(squares).sum().sqrt()

    def by_layer(self, weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Sort a state of this module: layer -> kind -> values."""
        layers: dict[str, dict[str, Tensor]] = {path: {} for path in self.paths}
        for name, values in weights.items():
            _, number, kind = name.split(".")
            layers[self.paths[int(number)]][kind] = values
        return layers


def add_adapters(base: nn.Module, config: LoraConfig, model: ModelConfig) -> Adapters:
    """Adapt the chosen layers of ``base``. Raises ValueError where none is chosen."""
    random = purpose_generator(config.train.seed, Purpose.ADAPTER_START, 0)
    paths = tuple(selected_layers(config.adapter, model))
    layers = (cast(nn.Linear, base.get_submodule(path)) for path in paths)
    return Adapters(paths, [add_adapter(layer, config.adapter, random) for layer in layers])


class LoraStage(Stage):
    """Train adapters of the model in ``folder``. ``autoencoder``: folder of the one that made the latents; needed only
    where the base does not say which it was."""

    name = "lora"

    def __init__(
        self, folder: Path, config: LoraConfig, latents: Sequence[Path], autoencoder: Path | None = None
    ) -> None:
        super().__init__()
        start = StartModel.open(folder, latents, autoencoder)
        _check_base(folder, diffusion_of(start.config).objective, config)
        self.config, self.model_config, self.parents = config, start.config, start.parents()
        self.base = start.model.to(self.device).eval().requires_grad_(False)
        self.same = start.same.to(self.device)
        self.networks = Networks.of(self.base)
        self.adapters = add_adapters(self.base, config, start.config)
        self.model: nn.Module = self.adapters
        if config.base_precision == "bf16":
            self._narrow_base()
        train = config.train  # the base is no network of a group, which the trainer looks after
        work_by_blocks(self.base, compiled=train.compile, checkpointed=train.checkpoint_blocks)
        self.groups = {"adapters": Group(network=self.model, optimizer=config.optimizer)}
        self.latents = LatentData(
            start.latents,
            open_text(start.tokenizer_file, start.config),
            start.config,
            config.clips,
            config.train,
            held_out=_held_out(start.latents),
        )
        self.flow = FlowMatching(config, start.config, self.latents)
        self.feed = self.flow.feed
        self.validation = FlowValidation(self.networks, self.latents, config.train.seed + 1)
        self._base_errors: dict[str, float] = {}

    def _narrow_base(self) -> None:
        """Keep matrices of the frozen parts in bf16; what is trained, norms and biases stay fp32."""
        trained = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        for part in ADAPTED_PARTS:
            for parameter in self.base.get_submodule(part).parameters():
                if parameter.ndim == 2 and id(parameter) not in trained:
                    parameter.data = parameter.data.bfloat16()

    def data(self) -> tuple[Split, ...]:
        return self.latents.splits()

    def remarks(self) -> list[str]:
        return self.latents.remarks()

    def losses(self, step: int) -> dict[str, Tensor]:
        drawn, noise = self.flow.draw(step, self.batch_slice, self.device)
        with self.autocast():
            generated, kept = velocity_errors(self.networks, drawn, noise)
        self.notes |= flow_notes(drawn, noise, generated.detach(), kept.detach())
        self.notes["adapter/norm"] = self.adapters.norm()
        return {"flow": generated.mean() + self.config.context_weight * kept.mean()}

    def validate(self) -> dict[str, float]:
        """Measure as in pre-training, and the error of the base on the same batches."""
        shares = self.shares(self.config.train.batch, self.config.train.batch)
        with self.autocast():
            if not self._base_errors:
                self.adapters.switch(on=False)
                base = self.validation.measure(shares)
                self._base_errors = {f"base_{name}": value for name, value in base.items() if name.startswith("flow")}
                self.adapters.switch(on=True)
            return {**self.validation.measure(shares), **self._base_errors}

    def demo(self, folder: Path, step: int) -> None:
        """Write sounds for some held-out prompts in turn."""
        batch = demo_batch(self.latents)
        rows, shift = parallel.own_rows(len(batch.items)), diffusion_of(self.model_config).shift
        with self.autocast():
            latents = sample(self.networks, batch, rows, self.config.demo, shift).float()
        write_demo(folder, f"{step:06d}", batch, latents, self.same, self.model_config.sample_rate)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write ``adapter.safetensors``, in fp32 and with the frozen bases of the -xs types."""
        info = AdapterInfo(
            adapter=self.config.adapter,
            base=self.model_config.name,
            base_hash=self.parents["start"],
            step=self.config.train.steps,
            licence=None,
        )
        layers = {
            path: {kind: values.float().cpu().numpy() for kind, values in tensors.items()}
            for path, tensors in self.adapters.by_layer(weights).items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(folder / ADAPTER_FILE, Adapter(info=info, layers=layers))


def _held_out(latents: LatentSet) -> str:
    """Return the split to measure on: a small set may hold nothing out, and is then validated on what it trains on."""
    held_out = any(item.split == "validation" and item.captions for item in latents.items)
    return "validation" if held_out else "train"


def _check_base(folder: Path, objective: str, config: LoraConfig) -> None:
    if objective == "rf_denoiser" and not config.posttrained:
        raise ValueError(
            f"{folder} is post-trained, and flow matching would unlearn its sampling in few steps: train on its base "
            "model and use the adapter with either; --set posttrained=true trains on it all the same"
        )


@stage_command("lora", preset="demo")
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
    if run.train(stage, config, {**stage.parents, "latents": stage.latents.latents.identity()}):
        made = run.out / "model" / ADAPTER_FILE
        report_made("adapter", made, "generate", "PROMPT", "--model", name_of(model), "--lora", made)
