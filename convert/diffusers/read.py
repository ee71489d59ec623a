"""Read a diffusers pipeline of Stable Audio 3 as an official checkpoint under other names, one tensor at a time.

Its fused projections of differential self-attention have the order q, q', k, k', v, ours q, k, v, q', k' [A14].
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import TensorEntry, TensorFile
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, PARTS, TOKENIZER_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import listed, quoted

from ..fields import about
from ..folder import Incoming
from ..keys import AUTOENCODER_PREFIX, TensorPair, pairs
from ..official import Stored, check_stored, import_entry, text_names
from .config import parse_pipeline

INDEX_FILE = "model_index.json"
_COMPONENTS = ("transformer", "vae", "duration_embedder", "text_encoder", "scheduler", "tokenizer")
_WEIGHTS = ("transformer", "vae", "duration_embedder", "text_encoder")
_NAMES = ("diffusion_pytorch_model", "model")  # of their files
_PIPELINE = re.compile(r"StableAudio3\w*Pipeline")
_ORDER = (0, 2, 4, 1, 3)  # where q, k, v, q', k' lie among q, q', k, k', v

_TRANSFORMER = (
    (r"^prompt_padding_embedding$", "conditioner.conditioners.prompt.padding_embedding"),
    (r"^transformer_blocks\.", "model.model.transformer.layers."),
    (r"^(global_cond_embedder\.|memory_tokens$|rotary_pos_emb\.)", r"model.model.transformer.\1"),
    (r"^proj_(in|out)\.", r"model.model.transformer.project_\1."),
    (r"^(to_\w+_embed\.|\w+process_conv\.)", r"model.model.\1"),
    (r"\.ff\.proj_in\.", ".ff.ff.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.ff.2."),
)
_AUTOENCODER = (
    (r"^bottleneck\.scale$", "bottleneck.scaling_factor"),
    (r"^encoder\.blocks\.0\.", "encoder.layers.0."),
    (r"^decoder\.blocks\.0\.", "decoder.layers.3."),
    (r"^encoder\.proj\.", "encoder.layers.2."),
    (r"^decoder\.proj\.", "decoder.layers.1."),
    (r"\.norm_attn\.", ".pre_norm."),
    (r"\.norm_ff\.", ".ff_norm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ff\.proj_in\.", ".ff.ff.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.ff.2."),
    (r"^", AUTOENCODER_PREFIX),
)
_DURATION = ((r"^linear\.", "conditioner.conditioners.seconds_total.embedder.embedding.1."),)


def is_pipeline(folder: Path) -> bool:
    """Tell whether a diffusers pipeline lies there."""
    return (folder / INDEX_FILE).is_file()


def read_pipeline(folder: Path, name: str | None, stack: ExitStack) -> Incoming:
    """Read a pipeline but for the values of its tensors; weights are one file a component, or several with an index.

    Raises FileNotFoundError for a missing component and ValueError for one that does not fit, with a one-line message.
    """
    kind = read_object(folder / INDEX_FILE).get("_class_name")
    if not isinstance(kind, str) or not _PIPELINE.fullmatch(kind):
        raise ValueError(f"{folder}: a pipeline {quoted(kind)}; supported: those of Stable Audio 3")
    for component in _COMPONENTS:
        if not (folder / component).is_dir():
            raise FileNotFoundError(f"{folder}: no folder {component} there")
    configs = {component: read_object(folder / component / CONFIG_FILE) for component in _WEIGHTS}
    configs["scheduler"] = read_object(folder / "scheduler" / "scheduler_config.json")
    with about(str(folder)):
        config = parse_pipeline(configs, name=name, fallback=folder.resolve().name.lower() or "model")
    tokenizer = folder / "tokenizer" / TOKENIZER_FILE
    if not isinstance(read_object(tokenizer).get("model"), dict):
        raise ValueError(f"{tokenizer}: not a tokenizer of the tokenizers library (no 'model' in it)")
    stored: Stored = {}
    text_files: set[Path] = set()
    for component in _WEIGHTS:
        tensors = _tensors(folder / component, stack)
        for official, own in _official_names(component, list(tensors)).items():
            stored[official] = (tensors[own], own)
        if component == "text_encoder":
            text_files = {file.path for file in tensors.values()}
    constants = ("freqs",) if stored.pop("freqs", None) else ()  # of the duration; the configuration gave them
    dropped = check_stored(stored, config, PARTS, str(folder), text_files)
    return Incoming(
        label=str(folder),
        config=config,
        parts=PARTS,
        entries=[_entry(pair, stored, config) for pair in pairs(config, PARTS)],
        tokenizer=tokenizer.read_bytes,
        dropped=(*constants, *dropped),
    )


def _tensors(folder: Path, stack: ExitStack) -> dict[str, TensorFile]:
    """Return the file of every tensor of a component, one or several with an index. Raises what the caller says."""
    for stem in _NAMES:
        path = folder / f"{stem}.safetensors"
        if path.is_file():
            file = stack.enter_context(TensorFile.open(path))
            return dict.fromkeys(file.names(), file)
        index = path.with_name(f"{path.name}.index.json")
        if index.is_file():
            return _shards(index, stack)
    names = ", ".join(f"{stem}.safetensors" for stem in _NAMES)
    raise FileNotFoundError(f"{folder}: no weights there ({names}, or either with .index.json)")


def _shards(index: Path, stack: ExitStack) -> dict[str, TensorFile]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: no weight_map of names in it")
    files: dict[str, TensorFile] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {quoted(name)} is not the name of a .safetensors file beside it")
        files[name] = stack.enter_context(TensorFile.open(index.with_name(name)))
    found = {tensor: name for name, file in files.items() for tensor in file.names()}
    wrong = sorted(tensor for tensor in {*found, *places} if found.get(tensor) != places.get(tensor))
    if wrong or len(found) != sum(len(file.names()) for file in files.values()):
        raise ValueError(f"{index}: its files do not hold what it says ({listed(wrong[:3])})")
    return {tensor: files[name] for tensor, name in places.items()}


def _official_names(component: str, names: Collection[str]) -> dict[str, str]:
    if component == "text_encoder":
        return text_names(names)
    rules = {"transformer": _TRANSFORMER, "vae": _AUTOENCODER, "duration_embedder": _DURATION}[component]
    official: dict[str, str] = {}
    for name in names:
        renamed = name
        for pattern, words in rules:
            renamed = re.sub(pattern, words, renamed)
        official[renamed] = name
    return official


def _entry(pair: TensorPair, stored: Stored, config: ModelConfig) -> TensorEntry:
    entry = import_entry(pair, stored)
    differential = pair.ours.startswith("same.") or config.require_diffusion().dit.differential
    if not pair.ours.endswith("self_attn.to_qkv.weight") or not differential:
        return entry

    def load() -> np.ndarray:
        fused = entry.load()
        parts = fused.reshape(len(_ORDER), -1, fused.shape[1])
        return np.ascontiguousarray(parts[list(_ORDER)].reshape(fused.shape))

    return replace(entry, load=load)
