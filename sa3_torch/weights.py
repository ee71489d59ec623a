"""Load and save checkpoint folders, strictly: missing, unexpected and mis-shaped tensors are errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import nn

from sa3_mlx.common.files.atomic import write_text
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.model.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Part,
    check_tensors,
    expected_tensors,
    file_of,
    parts_of,
)
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from sa3_mlx.common.quant.affine import Packed, dequantize
from sa3_mlx.common.quant.format import check_file, check_folder, read_packed

from .clap.network import ClapTowers
from .conditioner import Conditioner
from .dit import DiT, DiTBlock
from .same import SAME
from .t5gemma import FileEmbedding, T5GemmaEncoder

EMBEDDING = "text_encoder.embed_tokens.weight"
BLOCKS = "dit.layers."


def build_part(config: ModelConfig, part: Part) -> nn.Module:
    """Return one part with random weights. Raises ValueError for one that the configuration does not have."""
    if part == "same":
        return SAME(config.same, config.audio_channels)
    if config.diffusion is None:
        raise ValueError(f"{config.name} is an autoencoder alone; it has no {part}")
    text = config.diffusion.text_encoder
    if part == "text_encoder":
        return T5GemmaEncoder(text)
    if part == "conditioner":
        return Conditioner(text.width, config.diffusion.seconds_max)
    if part == "clap":
        if config.clap is None:
            raise ValueError(f"{config.name} has no latent CLAP; 'sa3 add-clap' puts one into it")
        return ClapTowers(config.clap)
    return DiT(config.diffusion.dit, config.same.latent_channels, text.width)


def load_part(
    folder: str | Path, config: ModelConfig, part: Part, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """Read one part of a checkpoint, memory-mapped; ``dtype`` None keeps the file's.

    The table of token embeddings stays in the file. Quantized layers become ordinary ones with the values that their
    packed weights stand for.

    Raises FileNotFoundError without the file of the part, ValueError for tensors that do not fit.
    """
    path = Path(folder) / file_of(part)
    with torch.device("meta"):
        module = build_part(config, part)
    left = set()
    if isinstance(module, T5GemmaEncoder):
        left.add(EMBEDDING)
        module.embed_tokens = FileEmbedding(path, EMBEDDING, dtype, device)
    module.load_state_dict(_read_part(path, config, part, device, dtype, left), strict=True, assign=True)
    return module.eval().requires_grad_(False)


def load_streamed_dit(folder: str | Path, config: ModelConfig, device: torch.device, dtype: torch.dtype | None) -> DiT:
    """Read the DiT without its blocks, which stay in the file: each is read whenever it computes something."""
    path = Path(folder) / WEIGHTS_FILE
    with torch.device("meta"):
        module = cast(DiT, build_part(config, "dit"))
    del module.layers
    blocks = {name for name in expected_tensors(config, ["dit"]) if name.startswith(BLOCKS)}
    module.load_state_dict(_read_part(path, config, "dit", device, dtype, blocks), strict=True, assign=True)
    module.layers = cast(nn.ModuleList, _BlocksInFile(path, config, device, dtype))
    return module.eval().requires_grad_(False)


class _BlocksInFile:
    """Stand for ``DiT.layers``: every request reads a block again, and nothing keeps it."""

    def __init__(self, path: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype | None) -> None:
        assert config.diffusion is not None
        self._path, self._config, self._device, self._dtype = path, config, device, dtype
        self._dit, self._latent_channels = config.diffusion.dit, config.same.latent_channels

    def __len__(self) -> int:
        return self._dit.depth

    def __getitem__(self, index: int) -> DiTBlock:
        if index >= len(self):
            raise IndexError(index)
        prefix = f"{BLOCKS}{index}."
        with torch.device("meta"):
            block = DiTBlock(self._dit, self._latent_channels)
        others = {name for name in expected_tensors(self._config, ["dit"]) if not name.startswith(prefix)}
        state = _read_part(self._path, self._config, "dit", self._device, self._dtype, others)
        inner = prefix.removeprefix("dit.")
        block.load_state_dict({name.removeprefix(inner): tensor for name, tensor in state.items()}, assign=True)
        return block.eval().requires_grad_(False)


def _read_part(
    path: Path, config: ModelConfig, part: Part, device: torch.device, dtype: torch.dtype | None, left: set[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a part by their names in it, without those that are ``left`` in the file."""
    with TensorFile.open(path) as tensors:
        grids = check_file(tensors, config, [part])
        wanted = {layer: grid for layer, grid in grids.items() if f"{layer}.weight" not in left}
        packed = {layer: read_packed(tensors, layer, grid) for layer, grid in wanted.items()}
    names = [name for name in expected_tensors(config, [part]) if name.removesuffix(".weight") not in grids]
    with safe_open(path, framework="pt", device=str(device)) as file:
        state = {name.removeprefix(part + "."): file.get_tensor(name) for name in names if name not in left}
    for layer, matrix in packed.items():
        state[f"{layer.removeprefix(part + '.')}.weight"] = _unpacked(matrix, device, dtype)
    return state if dtype is None else {name: tensor.to(dtype) for name, tensor in state.items()}


def _unpacked(packed: Packed, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the values of a quantized matrix, in ``dtype`` or in the type of its scales."""
    own = torch.bfloat16 if packed.storage == "BF16" else torch.float16
    return torch.from_numpy(dequantize(packed, "F32")).to(device, own if dtype is None else dtype)


class StableAudio(nn.Module):
    """Hold all parts as one module whose parameter names are those of the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for part in parts_of(config):
            self.add_module(part, build_part(config, part))


def save_checkpoint(folder: str | Path, config: ModelConfig, state: dict[str, torch.Tensor], dtype: str) -> str:
    """Write config.json and model.safetensors (``dtype`` "F32", "F16" or "BF16") from checkpoint-named tensors.

    A latent CLAP is not written: it belongs to the weights that it was trained with.
    Returns the hash of the weights. Raises ValueError for tensors that do not fit the configuration.
    """
    folder = Path(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_tensors(expected_tensors(config), shapes, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.detach().to("cpu", torch.float32).numpy() for name, tensor in state.items()}
    entries = [array_entry(name, array, dtype) for name, array in arrays.items()]
    digest = write_tensors(folder / WEIGHTS_FILE, entries, {"format": FORMAT})
    write_text(folder / CONFIG_FILE, replace(config, clap=None).to_json())
    return digest


def load_model(folder: str | Path, device: torch.device) -> StableAudio:
    """Read the whole checkpoint in fp32, for training and tests."""
    config = ModelConfig.load(folder)
    check_folder(Path(folder), config)
    model = StableAudio(config)
    for part in parts_of(config):
        state = _read_part(Path(folder) / WEIGHTS_FILE, config, part, device, torch.float32, set())
        model.get_submodule(part).load_state_dict(state, strict=True)
    return model.to(device)
