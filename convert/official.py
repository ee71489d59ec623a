"""Convert official checkpoints to ours and ours to official ones, one tensor in memory at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.safetensors import (
    OnTensor,
    TensorEntry,
    TensorFile,
    array_entry,
    watched,
    write_tensors,
)
from sa3_mlx.common.model.checkpoint import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    check_tensors,
    expected_tensors,
    parts_in,
    parts_of,
)
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.features import ROTARY_FREQUENCIES
from sa3_mlx.common.quant.format import Quantization

from .beside import read_beside, write_beside
from .export_config import official_model_config
from .fields import about
from .folder import Incoming, check_out, check_space, finite, report_of, stored_as
from .keys import (
    AUTOENCODER_PREFIX,
    TEXT_PREFIXES,
    TEXT_UNUSED,
    Shape,
    TensorPair,
    buffers,
    elements,
    fold_weight_norm,
    pairs,
    unfold_weight_norm,
)
from .model_config import TEXT_SUBFOLDER, parse_model_config
from .report import Report
from .source import MODEL_CONFIG_FILE, OfficialSource, find_source
from .text_config import official_text_config

Stored = dict[str, tuple[TensorFile, str]]  # full-file name -> where it is stored, under which name

DTYPES = ("F32", "F16", "BF16")
_BUFFER_TOLERANCE = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2}  # relative, of the RoPE frequencies


def read_official(source: str | Path, name: str | None, stack: ExitStack) -> Incoming:
    """Read an official checkpoint, or download a released one, but for the values of its tensors.

    Raises FileNotFoundError, ValueError (ConfigError for a configuration) and OSError, each with a one-line message.
    """
    found = find_source(source)
    text_config = None if found.text is None else found.text.config
    with about(found.label):
        config = parse_model_config(found.model_config, name=name or found.name_hint, text_config=text_config)
    stored, parts = _stored_tensors(found, config, stack)
    where = str(found.weights) if found.text is None else f"{found.weights} with {found.text.weights}"
    text_files = () if found.text is None else (found.text.weights,)
    return Incoming(
        label=found.label,
        config=read_beside(found.folder, config),
        parts=parts,
        dropped=check_stored(stored, config, parts, where, text_files),
        entries=[import_entry(pair, stored) for pair in pairs(config, parts)],
        tokenizer=None if found.text is None else found.text.tokenizer.read_bytes,
    )


def export_official(folder: Path, out: Path, *, force: bool, progress: OnTensor | None = None) -> Report:
    """Write a checkpoint of ours in the official layout: model_config.json, model.safetensors and, with a text encoder,
    the folder t5gemma-b-b-ul2; what that has no place for goes into a file beside (``write_beside``).

    Buffers are computed again; weight norm gets v = the kernel and g = its norms, in float32, so that the kernel comes
    back exactly. Every other tensor keeps its type. Raises FileNotFoundError, ValueError and OSError with a one-line
    message.
    """
    start = time.monotonic()
    check_out(out, force=force, replaceable=lambda path: (path / MODEL_CONFIG_FILE).is_file())
    config = ModelConfig.load(folder)
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        if Quantization.read(file) is not None:
            raise ValueError(f"{folder}: is quantized; export the model that it was made from")
        parts = parts_in(file.names()) or parts_of(config)
        check_tensors(expected_tensors(config, parts), file.shapes(), str(file.path))
        main: list[TensorEntry] = []
        encoder: list[TensorEntry] = []
        for pair in pairs(config, parts):
            (encoder if pair.ours.startswith("text_encoder.") else main).extend(_export_entries(pair, file))
        main.extend(_buffer_entry(name, shape) for name, shape in buffers(config, parts).items())
        if config.diffusion is None:  # an autoencoder alone has bare names
            main = [replace(entry, name=entry.name.removeprefix(AUTOENCODER_PREFIX)) for entry in main]
        check_space(out, [*main, *encoder])
        entries = watched([*main, *encoder], progress)
        main, encoder = entries[: len(main)], entries[len(main) :]
        with new_folder(out.absolute()) as new:
            digest = write_tensors(new / WEIGHTS_FILE, main, {"format": "pt"})
            write_json(new / MODEL_CONFIG_FILE, official_model_config(config))
            write_beside(new, config)
            if config.diffusion is not None and encoder:
                text = new / TEXT_SUBFOLDER
                text.mkdir()
                write_tensors(text / WEIGHTS_FILE, encoder, {"format": "pt"})
                write_json(text / CONFIG_FILE, official_text_config(config.diffusion.text_encoder))
                shutil.copyfile(folder / TOKENIZER_FILE, text / TOKENIZER_FILE)
    return report_of(config.name, str(folder), out, parts, [*main, *encoder], digest, start=start)


# --- reading official files -------------------------------------------------------------------------------------------


def _stored_tensors(source: OfficialSource, config: ModelConfig, stack: ExitStack) -> tuple[Stored, tuple[str, ...]]:
    """Find all tensors, under their full-file names, and the parts that are there."""
    file = stack.enter_context(TensorFile.open(source.weights))
    if config.diffusion is None:
        nested = any(name.startswith(AUTOENCODER_PREFIX) for name in file.names())
        prefix = "" if nested else AUTOENCODER_PREFIX
        return {prefix + name: (file, name) for name in file.names()}, ("same",)
    stored = {name: (file, name) for name in file.names()}
    parts: tuple[str, ...] = ("text_encoder", "conditioner", "dit")
    if any(name.startswith(AUTOENCODER_PREFIX) for name in stored):
        parts = (*parts, "same")
    if source.text is not None:
        text = stack.enter_context(TensorFile.open(source.text.weights))
        for renamed, name in text_names(text.names()).items():
            if renamed in stored:
                raise ValueError(f"{source.weights}: tensor {renamed} is in the text encoder's file too")
            stored[renamed] = (text, name)
    return stored, parts


def text_names(names: Collection[str]) -> dict[str, str]:
    """Map full-file names of a text encoder's tensors to those that its own file has."""
    prefix = next((p for p in TEXT_PREFIXES if any(name.startswith(p) for name in names)), "")
    return {
        TEXT_PREFIXES[0] + name.removeprefix(prefix) if prefix and name.startswith(prefix) else name: name
        for name in names
    }


def check_stored(
    stored: Stored, config: ModelConfig, parts: tuple[str, ...], where: str, text_files: Collection[Path]
) -> tuple[str, ...]:
    """Return the names of tensors that are dropped on purpose; of the text encoder's files its unused half.

    Raises ValueError unless every other stored tensor is mapped, and all have the right shape and type.
    """
    expected: dict[str, Shape] = {}
    for pair in pairs(config, parts):
        expected |= dict(zip(pair.official, pair.official_shapes, strict=True))
    droppable = buffers(config, parts)
    found = {name: file.info(own_name) for name, (file, own_name) in stored.items()}
    text_names = {name for name, (file, _) in stored.items() if file.path in text_files}
    unused = {name for name in text_names if name.startswith(TEXT_UNUSED)}
    shapes = {name: shape for name, (_, shape) in found.items() if name not in unused}
    check_tensors(expected | {name: droppable[name] for name in droppable if name in found}, shapes, where)
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise ValueError(f"{where}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
    dropped = [name for name in droppable if name in found]
    for name in dropped:
        _check_buffer(*stored[name], where)
    return (*dropped, *sorted(unused))


def _check_buffer(file: TensorFile, name: str, where: str) -> None:
    if not name.endswith("inv_freq"):
        return  # empty: its shape says all
    tolerance = _BUFFER_TOLERANCE[file.info(name)[0]]
    if not np.allclose(file.read(name), ROTARY_FREQUENCIES, rtol=tolerance, atol=0):
        raise ValueError(f"{where}: {name} holds other RoPE frequencies than 10000^(-2k/32), the only ones supported")


def import_entry(pair: TensorPair, stored: Stored) -> TensorEntry:
    """Return one of our tensors, made of the official one or ones when its turn comes."""
    dtype = stored[pair.official[-1]][0].info(stored[pair.official[-1]][1])[0]

    def load() -> np.ndarray:
        if pair.layout != "weight_norm":
            file, name = stored[pair.official[0]]
            return finite(file.raw(name), dtype, file.path, name).reshape(pair.shape)
        (file, name), places = stored[pair.official[-1]], [stored[key] for key in pair.official]
        g, v = (finite(there.read(key), "F32", there.path, key) for there, key in places)
        folded = finite(fold_weight_norm(g, v), "F64", file.path, name)
        return stored_as(folded, dtype)

    return TensorEntry(pair.ours, dtype, pair.shape, load)


# --- writing official files -------------------------------------------------------------------------------------------


def _export_entries(pair: TensorPair, file: TensorFile) -> list[TensorEntry]:
    dtype, _ = file.info(pair.ours)
    if pair.layout != "weight_norm":
        shape = pair.official_shapes[0]
        return [TensorEntry(pair.official[0], dtype, shape, lambda: file.raw(pair.ours).reshape(shape))]
    kernel = pair.official_shapes[1][2]
    return [
        TensorEntry(
            pair.official[0],
            "F32",
            pair.official_shapes[0],
            lambda: unfold_weight_norm(file.read(pair.ours), kernel)[0].astype(np.float32),
        ),
        TensorEntry(
            pair.official[1],
            dtype,
            pair.official_shapes[1],
            lambda: np.ascontiguousarray(unfold_weight_norm(file.raw(pair.ours), kernel)[1]),
        ),
    ]


def _buffer_entry(name: str, shape: Shape) -> TensorEntry:
    return array_entry(name, np.array(ROTARY_FREQUENCIES) if elements(shape) else np.zeros(shape, np.float32))
