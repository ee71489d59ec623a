"""Read adapter files of the official tools as ours, and write ours for them.

Theirs holds ``<module>.parametrizations.weight.<i>.<kind>`` in fp16 with modules named from inside the wrapper of the
DiT ("model.transformer...") or the conditioner ("conditioners..."), and JSON under "lora_config" in its metadata. Their
loader attaches adapters to what ``include`` and ``exclude`` select there before it reads the tensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.common.adapters.applied import check_adapter
from sa3_mlx.common.adapters.config import ADAPTED_PARTS, ADAPTER_TYPES, AdapterConfig, adaptable_layers
from sa3_mlx.common.adapters.format import (
    ADAPTER_FORMAT,
    Adapter,
    AdapterInfo,
    Float,
    open_adapter_file,
    read_adapter,
    read_finite,
)
from sa3_mlx.common.files.objects import parse_object
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import ConfigError, listed, quoted

from .keys import pairs
from .peft import holds_peft, read_peft

_KEY = re.compile(r"(.+)\.parametrizations\.weight\.\d+\.(\w+)")
_KINDS = ("lora_A", "lora_B", "M_xs", "magnitude", "magnitude_r", "magnitude_c", "U", "V")
_DERIVED = ("baked_vnorm_row", "lora_dropout_mask")  # follow from the others
_WRAPPERS = ("model.", "conditioner.")  # of their parts in a full checkpoint


def official_modules(config: ModelConfig) -> dict[str, str]:
    """Return the name of every layer's module in their adapter files, by layer."""
    layers, names = adaptable_layers(config), {}
    for pair in pairs(config, ADAPTED_PARTS):
        layer = pair.ours.removesuffix(".weight")
        if layer in layers and pair.ours.endswith(".weight"):
            module = pair.official[0].removesuffix(".weight")
            names[layer] = next(module.removeprefix(w) for w in _WRAPPERS if module.startswith(w))
    return names


def open_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """Read a file of our layout, the official one or PEFT's, or a folder of PEFT, for a model of this configuration.

    Raises FileNotFoundError, and ValueError for a file that is no adapter or that does not fit the model.
    """
    path = Path(path)
    adapter = read_peft(path, config) if path.is_dir() else _open_file(path, config)
    try:
        check_adapter(adapter, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return adapter


def _open_file(path: Path, config: ModelConfig) -> Adapter:
    with open_adapter_file(path) as file:
        if file.metadata.get("format") == ADAPTER_FORMAT:
            return read_adapter(path)
        if holds_peft(file.names()):
            return read_peft(path, config)
        if any(_KEY.fullmatch(name) for name in file.names()):
            return _from_official(file, config)
    raise ValueError(
        f"{path}: no adapter of sa3, the official tools or PEFT: no tensor is named *.parametrizations.weight.* or "
        "*.lora_A.weight"
    )


def write_official_adapter(path: Path, adapter: Adapter, config: ModelConfig) -> str:
    """Write an fp16 file for the official tools; return its hash. Raises ValueError for a model that does not fit."""
    check_adapter(adapter, config)
    modules = official_modules(config)
    entries = [
        array_entry(f"{modules[layer]}.parametrizations.weight.0.{kind}", values, "F16")
        for layer, tensors in adapter.layers.items()
        for kind, values in tensors.items()
        if kind not in ("U", "V")  # their loader computes them
    ]
    own, info = adapter.config, adapter.info
    data: dict[str, Any] = {
        "rank": own.rank,
        "alpha": own.alpha,
        "adapter_type": own.type,
        "exclude": None,
        "include": None if len(adapter.layers) == len(modules) else sorted(modules[name] for name in adapter.layers),
        "step": info.step,
        "base": info.base,
        "base_hash": info.base_hash,
        "licence": info.licence,
    }
    return write_tensors(path, entries, {"lora_config": json.dumps(data)})


def _from_official(file: TensorFile, config: ModelConfig) -> Adapter:
    layers_of = {module: layer for layer, module in official_modules(config).items()}
    layers_of |= {module.removeprefix("model."): layer for module, layer in layers_of.items()}  # of their MLX tools
    layers: dict[str, dict[str, Float]] = {}
    unknown = []
    for name in file.names():
        found = _KEY.fullmatch(name)
        if found is None or found[2] not in (*_KINDS, *_DERIVED):
            raise ValueError(f"{file.path}: tensor {listed([name])} is none of an adapter")
        if found[2] in _DERIVED:
            continue
        if found[1] not in layers_of:
            unknown.append(found[1])
            continue
        values = read_finite(file, name)
        layers.setdefault(layers_of[found[1]], {})[found[2]] = values
    if unknown:
        total = len(layers) + len(set(unknown))
        raise ValueError(
            f"{file.path}: {len(layers)} of its {total} layers are in {config.name} (not {listed(unknown[:1])}); use "
            "the model that it was trained on, or one of its size"
        )
    data = parse_object(file.metadata.get("lora_config", "{}"), f"{file.path}: lora_config")
    kind = _adapter_type(file.path, data, layers)
    squeezed = {layer: {name: _squeezed(name, v) for name, v in tensors.items()} for layer, tensors in layers.items()}
    info = AdapterInfo(
        adapter=_config(file.path, data, kind, squeezed, config),
        base=str(data.get("base") or "unknown"),
        base_hash=_text(data.get("base_hash")),
        step=data["step"] if type(data.get("step")) is int else None,
        licence=_text(data.get("licence")),
    )
    return Adapter(info=info, layers=squeezed)


def _adapter_type(path: Path, data: dict[str, Any], layers: dict[str, dict[str, Float]]) -> str:
    """Return the recorded type; "dora" means columns where an old file has magnitudes (1, I), else rows."""
    kind = data.get("adapter_type", "lora")
    if kind == "dora":
        old = [tensors["magnitude"] for tensors in layers.values() if "magnitude" in tensors]
        return "dora-cols" if old and old[0].ndim == 2 and old[0].shape[0] == 1 else "dora-rows"
    if kind not in ADAPTER_TYPES:
        raise ConfigError(f"{path}: adapter_type is {quoted(kind)}; supported: {', '.join(ADAPTER_TYPES)}")
    return str(kind)


def _squeezed(name: str, values: Float) -> Float:
    """Flatten the magnitudes of old files, which have two axes."""
    return values.reshape(-1) if name.startswith("magnitude") and values.ndim == 2 and 1 in values.shape else values


def _config(
    path: Path, data: dict[str, Any], kind: str, layers: dict[str, dict[str, Float]], model: ModelConfig
) -> AdapterConfig:
    """Take rank and alpha as recorded, else from the shapes, as their loader does; name the layers one by one."""
    tensors = next(iter(layers.values()), {})
    core = tensors.get("lora_A", tensors.get("M_xs", np.zeros((0, 0), np.float32)))
    rank = data.get("rank") or len(core)
    alpha = data.get("alpha")
    alpha = rank if alpha is None else alpha
    include = () if len(layers) == len(adaptable_layers(model)) else tuple(sorted(layers))
    values = {"type": kind, "rank": rank, "alpha": alpha, "include": include, "exclude": ()}
    return AdapterConfig.from_dict(values, where=f"{path}: lora_config")


def _text(value: object) -> str | None:
    return None if value is None else str(value)
