"""Convert official checkpoints to ours and ours to official ones, one tensor in memory at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from sa3_mlx.common.files.atomic import new_folder, write_json, write_text
from sa3_mlx.common.files.safetensors import (
    STORAGE,
    OnTensor,
    TensorEntry,
    TensorFile,
    all_finite,
    array_entry,
    to_bf16_bits,
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
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from sa3_mlx.common.model.features import ROTARY_FREQUENCIES
from sa3_mlx.common.quant.format import Quantization

from .export_config import official_model_config
from .fields import about
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
from .source import MODEL_CONFIG_FILE, OfficialSource, find_source, is_ours
from .text_config import official_text_config

Stored = dict[str, tuple[TensorFile, str]]  # full-file name -> where it is stored, under which name

DTYPES = ("F32", "F16", "BF16")
_BUFFER_TOLERANCE = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2}  # relative, of the RoPE frequencies


def convert(source: str | Path, out: Path, *, name: str | None, force: bool, progress: OnTensor | None) -> Report:
    """Convert an official checkpoint to a folder of format sa3/1.

    ``source``: a folder (model_config.json, weights, text encoder), a .safetensors file with model_config.json beside
    it, or the name of a released model (downloaded). ``name``: None takes it from the source. An existing ``out`` is an
    error unless ``force`` and it is a checkpoint of ours. Nothing is left at ``out`` when the conversion fails.

    Raises FileNotFoundError, ValueError (ConfigError for a configuration) and OSError, each with a one-line message.
    """
    start = time.monotonic()
    check_out(out, force=force, replaceable=is_ours)
    found = find_source(source)
    text_config = None if found.text is None else found.text.config
    with about(found.label):
        config = parse_model_config(found.model_config, name=name or found.name_hint, text_config=text_config)
    with ExitStack() as stack:
        stored, parts = _stored_tensors(found, config, stack)
        dropped = _check_official(stored, config, parts, found)
        entries = [_import_entry(pair, stored) for pair in pairs(config, parts)]
        _check_space(out, entries)
        with new_folder(out.absolute()) as folder:
            digest = write_tensors(folder / WEIGHTS_FILE, watched(entries, progress), {"format": FORMAT})
            write_text(folder / CONFIG_FILE, config.to_json())
            if found.text is not None:
                shutil.copyfile(found.text.tokenizer, folder / TOKENIZER_FILE)
            with TensorFile.open(folder / WEIGHTS_FILE) as written:
                check_tensors(expected_tensors(config, parts), written.shapes(), str(out))
    return _report(config.name, found.label, out, parts, entries, digest, dropped, start)


def export_official(folder: Path, out: Path, *, force: bool, progress: OnTensor | None = None) -> Report:
    """Write a checkpoint of ours in the official layout: model_config.json, model.safetensors and, with a text encoder,
    the folder t5gemma-b-b-ul2.

    Buffers are computed again; weight norm gets v = the kernel and g = its norms. Every tensor keeps its type. Raises
    FileNotFoundError, ValueError and OSError with a one-line message.
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
        _check_space(out, [*main, *encoder])
        entries = watched([*main, *encoder], progress)
        main, encoder = entries[: len(main)], entries[len(main) :]
        with new_folder(out.absolute()) as new:
            digest = write_tensors(new / WEIGHTS_FILE, main, {"format": "pt"})
            write_json(new / MODEL_CONFIG_FILE, official_model_config(config))
            if config.diffusion is not None and encoder:
                text = new / TEXT_SUBFOLDER
                text.mkdir()
                write_tensors(text / WEIGHTS_FILE, encoder, {"format": "pt"})
                write_json(text / CONFIG_FILE, official_text_config(config.diffusion.text_encoder))
                shutil.copyfile(folder / TOKENIZER_FILE, text / TOKENIZER_FILE)
    return _report(config.name, str(folder), out, parts, [*main, *encoder], digest, (), start)


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
        prefix = next((p for p in TEXT_PREFIXES if any(name.startswith(p) for name in text.names())), "")
        for name in text.names():
            renamed = TEXT_PREFIXES[0] + name.removeprefix(prefix) if prefix and name.startswith(prefix) else name
            if renamed in stored:
                raise ValueError(f"{source.weights}: tensor {renamed} is in the text encoder's file too")
            stored[renamed] = (text, name)
    return stored, parts


def _check_official(
    stored: Stored, config: ModelConfig, parts: tuple[str, ...], source: OfficialSource
) -> tuple[str, ...]:
    """Return the names of tensors that are dropped on purpose.

    Raises ValueError unless every other stored tensor is mapped, and all have the right shape and type.
    """
    where = str(source.weights) if source.text is None else f"{source.weights} with {source.text.weights}"
    expected: dict[str, Shape] = {}
    for pair in pairs(config, parts):
        expected |= dict(zip(pair.official, pair.official_shapes, strict=True))
    droppable = buffers(config, parts)
    found = {name: file.info(own_name) for name, (file, own_name) in stored.items()}
    text_names = {name for name, (file, _) in stored.items() if source.text and file.path == source.text.weights}
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


def _import_entry(pair: TensorPair, stored: Stored) -> TensorEntry:
    dtype = stored[pair.official[-1]][0].info(stored[pair.official[-1]][1])[0]

    def load() -> np.ndarray:
        if pair.layout != "weight_norm":
            file, name = stored[pair.official[0]]
            return _finite(file.raw(name), dtype, file, name).reshape(pair.shape)
        g, v = (_finite(file.read(name), "F32", file, name) for file, name in (stored[key] for key in pair.official))
        folded = _finite(fold_weight_norm(g, v), "F64", *stored[pair.official[-1]])
        return _stored_as(folded, dtype)

    return TensorEntry(pair.ours, dtype, pair.shape, load)


def _finite(array: np.ndarray, dtype: str, file: TensorFile, name: str) -> np.ndarray:
    """Return the array. Raises ValueError that names the tensor when it has a NaN or an infinity."""
    if not all_finite(array, dtype):
        raise ValueError(f"{file.path}: tensor {name} has NaN or infinite values; the file is damaged")
    return array


def _stored_as(values: np.ndarray, dtype: str) -> np.ndarray:
    return to_bf16_bits(values) if dtype == "BF16" else values.astype(STORAGE[dtype])


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
            dtype,
            pair.official_shapes[0],
            lambda: _stored_as(unfold_weight_norm(file.read(pair.ours), kernel)[0], dtype),
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


# --- the new folder ---------------------------------------------------------------------------------------------------


def check_out(out: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise ValueError when ``out`` exists and may not be replaced, before any work."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise ValueError(f"{out}: exists already; give another folder, or --force to replace it")
    if not out.is_dir() or not replaceable(out):
        raise ValueError(f"{out}: exists and is not a converted checkpoint, so it is not replaced")


def _check_space(out: Path, entries: list[TensorEntry]) -> None:
    """Raise OSError when the disk has no room for these tensors."""
    parent, size = out.absolute().parent, sum(entry.nbytes for entry in entries)
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < size:
        raise OSError(f"{parent}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def _report(
    name: str,
    source: str,
    out: Path,
    parts: tuple[str, ...],
    entries: list[TensorEntry],
    digest: str,
    dropped: tuple[str, ...],
    start: float,
) -> Report:
    """Count what was written since ``start``."""
    dtypes: dict[str, int] = {}
    for entry in entries:
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + elements(entry.shape)
    return Report(
        name=name,
        source=source,
        folder=out,
        parts=parts,
        tensors=len(entries),
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        bytes=sum(entry.nbytes for entry in entries),
        hash=digest,
        dropped=dropped,
        seconds=time.monotonic() - start,
    )
