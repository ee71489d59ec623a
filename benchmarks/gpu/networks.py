"""Make networks and pipelines with random weights on a device, without files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.speed.full_scale import randomise
from benchmarks.speed.models import write_tokenizer
from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE, Part
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.precision import choose_precision
from sa3_mlx.common.model.presets import PRESETS
from sa3_torch.dit import DiT
from sa3_torch.pipeline import DTYPES, Pipeline
from sa3_torch.weights import build_part

from .journal import Workbench


def config_of(name: str, bench: Workbench) -> ModelConfig:
    """Return a preset, in short with narrow networks of few layers."""
    config = PRESETS[name]
    if not bench.short or config.diffusion is None:
        return config
    text = replace(config.diffusion.text_encoder, depth=1, intermediate=64, vocab_size=64)
    dit = replace(config.diffusion.dit, width=128, depth=2)
    same = replace(config.same, width=128, encoder_depth=2, decoder_depth=2, sine_gate_layers=0)
    return replace(config, same=same, diffusion=replace(config.diffusion, text_encoder=text, dit=dit))


def random_part(config: ModelConfig, part: Part, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return one part whose activations keep the size of their inputs, as trained ones do."""
    with torch.device("meta"):
        module = build_part(config, part)
    module = module.to_empty(device=device).to(dtype)
    randomise(module)
    return module.eval().requires_grad_(False)


class RandomPipeline(Pipeline):
    """Generate with random weights."""

    @classmethod
    def of(cls, name: str, bench: Workbench, dtype: str = "auto") -> RandomPipeline:
        """Return the pipeline of a preset."""
        folder = bench.folder / name
        folder.mkdir(exist_ok=True)
        write_tokenizer(Path(folder) / TOKENIZER_FILE)
        precision = choose_precision(dtype, "float32", on_gpu=bench.device.type != "cpu")
        return cls(folder, config_of(name, bench), precision, bench.device)

    def _read(self, part: Part, *, streamed: bool) -> nn.Module:
        assert not streamed
        return random_part(self.config, part, self._device, DTYPES[self._number_type(part) or "float32"])

    def _ids(self, ids: Any) -> Tensor:
        return self._array(ids)

    def prefetch_decoder(self, done: int, steps: int) -> None:
        """Leave out what reads a file."""


def dit_inputs(
    config: ModelConfig, frames: int, slots: int, device: torch.device, dtype: torch.dtype
) -> tuple[DiT, Tensor, Tensor, Any]:
    """Return a DiT, latents (1, T, C), a modulation and what was prepared for a prompt of text-to-audio."""
    assert config.diffusion is not None
    dit = cast(DiT, random_part(config, "dit", device, dtype))
    width, channels = config.diffusion.text_encoder.width, config.same.latent_channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    cond: Conditioning[Tensor] = Conditioning(
        context=normal(1, slots, width),
        repeats=torch.ones(1, slots, device=device),
        seconds=normal(1, width),
        local=torch.zeros(1, 1, 1 + channels, device=device, dtype=dtype),
        valid=None,
    )
    prepared = dit.prepare(cond)
    modulation = dit.modulation(torch.full((1,), 0.7, device=device), prepared.seconds)
    return dit, normal(1, frames, channels), modulation, prepared
