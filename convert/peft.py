"""Read adapters of the PEFT library as ours, LoRA and DoRA, and write ours for it.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with tensors ``<module>.lora_A.weight``.
Modules are named as in the transformer of diffusers, in the official code or in sa3_torch; only the first has other
rows in the fused projection of differential self-attention. An adapter of the duration embedder lies in a folder of
that name inside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.common.adapters.applied import check_adapter
from sa3_mlx.common.adapters.config import AdapterConfig, AdapterType, adaptable_layers
from sa3_mlx.common.adapters.format import (
    PEFT_FILE,
    Adapter,
    AdapterInfo,
    Float,
    LayerTensors,
    open_adapter_file,
    read_finite,
)
from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import ConfigError, listed, quoted
from sa3_mlx.common.terminal import say

from .fields import Fields
from .keys import pairs

CONFIG_FILE, PICKLE = "adapter_config.json", "adapter_model.bin"
DURATION = "duration_embedder"
_DURATION_LAYER, _DURATION_MODULE = "conditioner.seconds_embed", "linear"
_KEY = re.compile(
    r"(?:base_model\.model\.)?(.+?)"
    r"\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_PLAIN = re.compile(r"\^?[\w.\\-]+\$?")  # of a pattern: a name, dots perhaps escaped
_KINDS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "magnitude"}
_FROM_DIFFUSERS, _TO_DIFFUSERS = (0, 2, 4, 1, 3), (0, 3, 1, 4, 2)  # blocks of rows: ours q, k, v, q', k' [A14]
_DIFFUSERS = (
    ("model.model.transformer.layers.", "transformer_blocks."),
    ("model.model.transformer.project_", "proj_"),
    ("model.model.transformer.", ""),
    ("model.model.", ""),
    (".ff.ff.0.proj", ".ff.proj_in"),
    (".ff.ff.2", ".ff.proj_out"),
)
_UNSUPPORTED = (  # field, the one supported value
    ("fan_in_fan_out", False),
    ("bias", "none"),
    ("lora_bias", False),
    ("modules_to_save", None),
    ("layer_replication", None),
    ("trainable_token_indices", None),
    ("target_parameters", None),
    ("use_qalora", False),
)


@dataclass(frozen=True)
class _Scales:
    """Say by how much the update of a module is multiplied."""

    alpha: float | None  # None: the rank
    patterns: Mapping[str, float]
    root: bool  # alpha over the root of the rank, in place of the rank

    def of(self, module: str, rank: int) -> float:
        found = (alpha for pattern, alpha in self.patterns.items() if _is_named(module, pattern))
        alpha = next(found, rank if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


def is_peft(path: Path) -> bool:
    """Tell whether a folder, or the folder of a file, has an adapter of PEFT."""
    return (path if path.is_dir() else path.parent).joinpath(CONFIG_FILE).is_file()


def holds_peft(names: Iterable[str]) -> bool:
    """Tell whether tensors are called as PEFT calls them."""
    return any(".lora_A.weight" in name or ".lora_A.default.weight" in name for name in names)


def read_peft(path: Path, config: ModelConfig) -> Adapter:
    """Read a folder, or a file with or without its configuration, for a model of this configuration.

    Modules that the model does not have are named on standard error. Raises FileNotFoundError, and ValueError where
    none is left, and for what we do not compute.
    """
    weights = path / PEFT_FILE if path.is_dir() else path
    if not weights.is_file() and weights.with_name(PICKLE).is_file():
        raise ValueError(f"{weights.with_name(PICKLE)}: only .safetensors files can be read (pickles can run code)")
    settings = read_object(weights.parent / CONFIG_FILE) if is_peft(path) else {}
    scales, dora = _settings(Fields(settings, str(weights.parent / CONFIG_FILE)))
    with open_adapter_file(weights) as file:
        found, unmatched = _layers(file, config, scales)
    beside = weights.parent / DURATION
    if (beside / PEFT_FILE).is_file():
        own, _ = _settings(Fields(read_object(beside / CONFIG_FILE), str(beside / CONFIG_FILE)))
        with open_adapter_file(beside / PEFT_FILE) as file:
            more, lost = _layers(file, config, own)
        found, unmatched = found | more, unmatched + lost
    if not found:
        raise ValueError(
            f"{weights}: none of its {len(unmatched)} modules is in {config.name} ({listed(unmatched[:3])}); use the "
            "model that it was trained on, or one of its size"
        )
    if unmatched:
        say(f"note: {weights}: {len(unmatched)} modules are not in {config.name} and left out: {listed(unmatched)}")
    return _adapter(found, config, str(settings.get("base_model_name_or_path") or "unknown"), dora=dora)


def write_peft(folder: Path, adapter: Adapter, config: ModelConfig) -> str:
    """Write a folder for the transformer of diffusers; return the hash of its weights.

    Raises ValueError for a model that does not fit, and for a type of adapter that PEFT does not have.
    """
    check_adapter(adapter, config)
    if adapter.config.type not in ("lora", "dora-rows"):
        raise ValueError(f"adapter of type {adapter.config.type}: PEFT has lora and dora-rows; merge it instead")
    names = diffusers_modules(config)
    dit = {names[layer]: (layer, tensors) for layer, tensors in adapter.layers.items() if layer in names}
    with new_folder(folder.absolute()) as new:
        if _DURATION_LAYER not in adapter.layers:
            return _write(new, adapter, dit, config)
        duration = {_DURATION_MODULE: (_DURATION_LAYER, adapter.layers[_DURATION_LAYER])}
        if not dit:
            return _write(new, adapter, duration, config)
        (new / DURATION).mkdir()
        _write(new / DURATION, adapter, duration, config)
        return _write(new, adapter, dit, config)


def diffusers_modules(config: ModelConfig) -> dict[str, str]:
    """Return the name of every layer of the DiT in the transformer of diffusers, by layer."""
    layers, names = adaptable_layers(config), {}
    for pair in pairs(config, ("dit",)):
        layer, module = pair.ours.removesuffix(".weight"), pair.official[0].removesuffix(".weight")
        if layer in layers and pair.ours.endswith(".weight"):
            for old, new in _DIFFUSERS:
                module = module.replace(old, new)
            names[layer] = module
    return names


def _modules(config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """Map every name of a module to the layer, and whether its rows may have the order of diffusers."""
    names: dict[str, tuple[str, bool]] = {_DURATION_MODULE: (_DURATION_LAYER, False)}
    for pair in pairs(config, ("dit", "conditioner")):
        layer = pair.ours.removesuffix(".weight")
        official = pair.official[0].removesuffix(".weight")
        for name in (layer, layer.removeprefix("dit."), official, *_inner(official)):
            names[name] = (layer, False)
    for layer, name in diffusers_modules(config).items():
        names[name] = names[f"transformer.{name}"] = (layer, True)  # the second in files of a whole pipeline
    return names


def _inner(official: str) -> tuple[str, ...]:
    """Return the names from inside of the wrappers of the official code."""
    return official.removeprefix("model."), official.removeprefix("model.model.")


def _is_named(module: str, pattern: str) -> bool:
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return module == name or module.endswith(f".{name}")


def _settings(fields: Fields) -> tuple[_Scales, bool]:
    """Return the scales, and whether it is DoRA. Raises ConfigError for what we do not compute."""
    fields.constant("peft_type", "LORA", default="LORA")
    for name, allowed in _UNSUPPORTED:
        fields.constant(name, allowed, default=allowed)
    patterns: dict[str, Any] = fields.optional("alpha_pattern", dict) or {}
    for pattern, alpha in patterns.items():
        if not _PLAIN.fullmatch(pattern):
            raise ConfigError(f"{fields.where}.alpha_pattern: {quoted(pattern)} is more than a name: not supported")
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ConfigError(f"{fields.where}.alpha_pattern: {quoted(alpha)} is not a positive number")
    alpha = fields.optional("lora_alpha", float)
    if alpha is not None and not 0 < alpha < math.inf:
        raise ConfigError(f"{fields.where}.lora_alpha: {quoted(alpha)} is not a positive number")
    root, dora = fields.take("use_rslora", bool, False), fields.take("use_dora", bool, False)
    return _Scales(alpha, patterns, root), dora


def _layers(file: TensorFile, config: ModelConfig, scales: _Scales) -> tuple[dict[str, _Layer], list[str]]:
    modules, found, unmatched = _modules(config), {}, []
    by_module: dict[str, dict[str, Float]] = {}
    for name in file.names():
        parts = _KEY.fullmatch(name)
        if parts is None:
            raise ValueError(f"{file.path}: tensor {listed([name])} is none of a LoRA or DoRA")
        by_module.setdefault(parts[1], {})[_KINDS[parts[2]]] = read_finite(file, name)
    for module, tensors in by_module.items():
        if module not in modules:
            unmatched.append(module)
            continue
        layer, foreign = modules[module]
        if not {"lora_A", "lora_B"} <= tensors.keys():
            raise ValueError(f"{file.path}: {module} lacks lora_A or lora_B")
        plain = {kind: _plain(kind, values) for kind, values in tensors.items()}
        if plain["lora_A"].ndim != 2 or plain["lora_B"].ndim != 2 or not len(plain["lora_A"]):
            raise ValueError(f"{file.path}: {module} has lora_A {tensors['lora_A'].shape}, must be a matrix")
        if foreign and _is_fused(layer, config):
            plain = {kind: v if kind == "lora_A" else _reordered(v, _FROM_DIFFUSERS) for kind, v in plain.items()}
        found[layer] = _Layer(plain, scales.of(module, len(plain["lora_A"])))
    return found, unmatched


@dataclass(frozen=True)
class _Layer:
    tensors: dict[str, Float]
    scale: float


def _plain(kind: str, values: Float) -> Float:
    """Return a matrix of a convolution of kernel 1 without its last axis, a magnitude with one axis."""
    if kind == "magnitude":
        return values.reshape(-1)
    return values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values


def _is_fused(layer: str, config: ModelConfig) -> bool:
    return layer.endswith("self_attn.to_qkv") and config.require_diffusion().dit.differential


def _reordered(rows: Float, order: tuple[int, ...]) -> Float:
    if len(rows) % len(order):
        return rows  # of another shape than the layer: ``check_adapter`` says so
    blocks = rows.reshape(len(order), -1, *rows.shape[1:])
    return np.ascontiguousarray(blocks[list(order)].reshape(rows.shape))


def _adapter(found: Mapping[str, _Layer], config: ModelConfig, base: str, *, dora: bool) -> Adapter:
    """Bring all layers to the largest rank and one scale: what differs goes into their matrices."""
    rank = max(len(layer.tensors["lora_A"]) for layer in found.values())
    scales = {layer.scale for layer in found.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    layers = {name: _filled(layer, rank, scale) for name, layer in found.items()}
    kind: AdapterType = "dora-rows" if dora else "lora"
    include = () if layers.keys() == adaptable_layers(config).keys() else tuple(sorted(layers))
    own = AdapterConfig(type=kind, rank=rank, alpha=scale * rank, include=include, exclude=())
    return Adapter(info=AdapterInfo(adapter=own, base=base, base_hash=None, step=None, licence=None), layers=layers)


def _filled(layer: _Layer, rank: int, scale: float) -> LayerTensors:
    tensors = dict(layer.tensors)
    a, b = tensors["lora_A"], tensors["lora_B"]
    missing = rank - len(a)
    if missing:
        tensors["lora_A"] = np.concatenate([a, np.zeros((missing, a.shape[1]), np.float32)])
        tensors["lora_B"] = b = np.concatenate([b, np.zeros((len(b), missing), np.float32)], axis=1)
    if layer.scale != scale:
        tensors["lora_B"] = b * np.float32(layer.scale / scale)
    return tensors


def _write(folder: Path, adapter: Adapter, modules: Mapping[str, tuple[str, LayerTensors]], config: ModelConfig) -> str:
    own, entries = adapter.config, []
    for module, (layer, tensors) in modules.items():
        convolution = module.endswith("process_conv")
        for kind, values in tensors.items():
            if kind != "lora_A" and _is_fused(layer, config):
                values = _reordered(values, _TO_DIFFUSERS)
            name = f"base_model.model.{module}."
            if kind == "magnitude":
                values = values.reshape(1, -1, 1) if convolution else values
                entries.append(array_entry(f"{name}lora_magnitude_vector", values, "F32"))
            else:
                entries.append(array_entry(f"{name}{kind}.weight", values[..., None] if convolution else values, "F32"))
    data = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.info.base,
        "task_type": None,
        "inference_mode": True,
        "r": own.rank,
        "lora_alpha": own.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": own.type == "dora-rows",
        "use_rslora": False,
        "target_modules": "|".join(re.escape(module) for module in sorted(modules)),  # matched as a whole
    }
    write_json(folder / CONFIG_FILE, data)
    return write_tensors(folder / PEFT_FILE, entries, {"format": "pt"})
