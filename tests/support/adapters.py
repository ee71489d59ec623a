"""Adapters with random tensors, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sa3_mlx.common.adapters.applied import singular_bases
from sa3_mlx.common.adapters.config import AdapterConfig, AdapterType, selected_layers
from sa3_mlx.common.adapters.format import Adapter, AdapterInfo
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig


def adapter_config(
    kind: AdapterType, *, rank: int = 3, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> AdapterConfig:
    return AdapterConfig(type=kind, rank=rank, alpha=2.0 * rank, include=include, exclude=exclude)


def info_of(config: AdapterConfig, base: str = "test") -> AdapterInfo:
    return AdapterInfo(adapter=config, base=base, base_hash=None, step=None, licence=None)


def layer_tensors(
    config: AdapterConfig, weight: np.ndarray, random: np.random.Generator, *, trained: float = 1.0
) -> dict[str, np.ndarray]:
    """Tensors of a layer; with ``trained`` 0 those of the start."""
    found = {}
    for kind, shape in config.shapes(weight.shape).items():
        found[kind] = trained * 0.3 * random.standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5
    if config.frozen_bases:
        found["U"], found["V"] = singular_bases(weight, config.rank)
    elif not trained:
        found["lora_A"] = random.standard_normal(found["lora_A"].shape).astype(np.float32)
    norms = {"rows": np.linalg.norm(weight, axis=1), "cols": np.linalg.norm(weight, axis=0)}
    for norm, name in config.magnitudes.items():
        found[name] = norms[norm] * (1 + trained * 0.2 * random.standard_normal(norms[norm].shape))
    return {kind: values.astype(np.float32) for kind, values in found.items()}


def random_adapter(folder: Path, config: AdapterConfig, *, seed: int = 0, trained: float = 1.0) -> Adapter:
    """For the model in ``folder``."""
    random, model = np.random.default_rng(seed), ModelConfig.load(folder)
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        layers = {
            name: layer_tensors(config, file.read(f"{name}.weight"), random, trained=trained)
            for name in selected_layers(config, model)
        }
    return Adapter(info=info_of(config, model.name), layers=layers)


def oracle(weight: np.ndarray, config: AdapterConfig, tensors: dict[str, np.ndarray], strength: float) -> np.ndarray:
    """The table of [T8], in float64."""
    if strength == 0:
        return weight
    own = {kind: values.astype(np.float64) for kind, values in tensors.items()}
    delta = own["U"] @ own["M_xs"] @ own["V"].T if "M_xs" in own else own["lora_B"] @ own["lora_A"]
    v = weight.astype(np.float64) + strength * config.alpha / config.rank * delta
    kind = config.type.removesuffix("-xs")
    if kind == "dora-rows":
        v = own["magnitude"][:, None] * v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-12)
    if kind == "dora-cols":
        v = own["magnitude"] * v / (np.linalg.norm(v, axis=0, keepdims=True) + 1e-12)
    if kind == "bora":
        v = own["magnitude_r"][:, None] * v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-12)
        v = own["magnitude_c"] * v / (np.linalg.norm(v, axis=0, keepdims=True) + 1e-12)
    return v
