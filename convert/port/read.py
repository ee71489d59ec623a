"""Read the .npz files of the official MLX port, one array in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.common.files.objects import parse_object, read_object
from sa3_mlx.common.files.safetensors import TensorEntry
from sa3_mlx.common.model.checkpoint import check_tensors
from sa3_mlx.common.model.config import ROTARY_SIZE, ModelConfig
from sa3_mlx.common.model.features import FREQUENCIES
from sa3_mlx.common.model.presets import PRESETS, T5GEMMA
from sa3_mlx.common.schema import ConfigError, listed

from ..beside import read_beside
from ..fields import about
from ..folder import Incoming, finite
from ..keys import Shape
from ..model_config import parse_model_config
from ..source import MODEL_CONFIG_FILE
from ..text_config import official_text_config, parse_text_config
from .layout import META, PARTS, ROLES, TOKENIZER, ArrayPlace, Role, also_in, file_names, places
from .npz import ArrayFile
from .sentencepiece import tokenizer_json

_DIT_FILE = re.compile(r"dit_(.+)_f(?:16|32)\.npz")
_FLOATS = ("F32", "F16")
_BYTES_MAX = 1 << 26  # of a SentencePiece model; Gemma's has 4 MB
_TOLERANCE = {"F32": 1e-5, "F16": 2e-3}  # relative, of frequencies that a file repeats


def find_port(source: Path) -> Path | None:
    """Return the DiT's file of a folder of the port's files, or of one of its files; None for all else.

    Raises ValueError for a folder with several models, and for a file of the port that is no DiT.
    """
    if source.suffix == ".npz" and source.is_file():
        if _DIT_FILE.fullmatch(source.name) is None:
            raise ValueError(f"{source}: give the file of the DiT, dit_NAME_f16.npz, or the folder of all files")
        return source
    if not source.is_dir():
        return None
    found = sorted(path for path in source.glob("dit_*.npz") if _DIT_FILE.fullmatch(path.name))
    if len(found) > 1:
        raise ValueError(f"{source}: several models ({listed(path.name for path in found)}); give the file of one")
    return found[0] if found else None


def read_port(dit: Path, name: str | None, stack: ExitStack) -> Incoming:
    """Read a model whose DiT lies in this file and whose other files lie beside it, but for the values of its arrays.

    The architecture is that of the released model of this name, or what a model_config.json beside says. Raises
    FileNotFoundError and ValueError with a one-line message: missing, unexpected, mis-shaped and mis-typed arrays.
    """
    text_file = stack.enter_context(ArrayFile.open(_beside(dit, "text", "t5gemma_f16.npz")))
    config = _config(dit, name, _text_sizes(text_file))
    files: dict[Role, ArrayFile] = {"text": text_file, "dit": stack.enter_context(ArrayFile.open(dit))}
    for role in ("encoder", "decoder"):
        files[role] = stack.enter_context(ArrayFile.open(_beside(dit, role, file_names(config)[role])))
    listing = places(config)
    dropped = [f"{role}: {array}" for role in ROLES for array in _check(role, files[role], listing, config)]
    blob = text_file.read_bytes(TOKENIZER, _BYTES_MAX)
    return Incoming(
        label=str(dit),
        config=config,
        parts=PARTS,
        entries=[_entry(place, files) for place in listing],
        tokenizer=lambda: tokenizer_json(blob, f"{text_file.path}: {TOKENIZER}").encode(),
        dropped=tuple(dropped),
    )


def _beside(dit: Path, role: Role, name: str) -> Path:
    """Return the file of another part, whichever type is in its name. Raises FileNotFoundError."""
    names = [name, re.sub(r"_f(16|32)\.npz$", lambda found: f"_f{48 - int(found[1])}.npz", name)]
    for path in (dit.with_name(candidate) for candidate in names):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{dit.parent}: no {name}, so the {_WORDS[role]} is missing")


_WORDS: dict[Role, str] = {
    "text": "text encoder with its tokenizer",
    "encoder": "autoencoder's encoder",
    "decoder": "autoencoder's decoder",
    "dit": "DiT",
}


def _text_sizes(file: ArrayFile) -> dict[str, Any]:
    """Return what META says of the text encoder; the port assumes T5Gemma's for what is not in it."""
    for name in (META, TOKENIZER):
        if name not in file.names():
            raise ValueError(f"{file.path}: no {name} in it; it cannot be the port's text encoder")
    meta = parse_object(file.read_bytes(META, 1 << 20), f"{file.path}: {META}")
    if meta.get("pad_token_id", 0) != 0:
        raise ConfigError(f"{file.path}: {META}.pad_token_id: got {meta['pad_token_id']!r}, supported: 0")
    return {"encoder": {**official_text_config(T5GEMMA)["encoder"], **meta}}


def _config(dit: Path, name: str | None, text: dict[str, Any]) -> ModelConfig:
    found = _DIT_FILE.fullmatch(dit.name)
    assert found is not None
    own = re.sub(r"^sm\b", "small", found[1])
    path = dit.with_name(MODEL_CONFIG_FILE)
    if path.is_file():
        with about(str(path)):
            config = parse_model_config(read_object(path), name=name or own, text_config=text)
        return read_beside(dit.parent, config)
    preset = PRESETS.get(own) or PRESETS.get(name or "")
    if preset is None or preset.diffusion is None:
        raise ValueError(
            f"{dit}: no released model is called {own!r}, and no {MODEL_CONFIG_FILE} lies beside it; rename it, "
            "such as dit_medium_f16.npz, or give --name with the name of a released model"
        )
    with about(f"{dit.parent}: {META}"):
        if parse_text_config(text, max_length=T5GEMMA.max_length) != preset.diffusion.text_encoder:
            raise ConfigError("the text encoder has other sizes than T5Gemma b-b-ul2, which the released models use")
    return replace(preset, name=name or own)


def _check(role: Role, file: ArrayFile, listing: list[ArrayPlace], config: ModelConfig) -> list[str]:
    """Return the arrays that repeat what is known. Raises ValueError unless all others are what is expected."""
    expected = {place.name: place for place in listing if role in (place.role, also_in(place))}
    shapes: dict[str, Shape] = {}
    dropped = []
    for name in file.names():
        if name in (META, TOKENIZER) and role == "text":
            continue
        if name not in expected and _is_known(file, name, config):
            dropped.append(name)
            continue
        shape = file.shape(name)
        shapes[name] = expected[name].shape if name in expected and _fits(shape, expected[name]) else shape
    if role == "text" and "norm" in shapes and "norm.weight" not in shapes:  # both names are read by the port
        shapes["norm.weight"] = shapes.pop("norm")
    check_tensors({name: place.shape for name, place in expected.items()}, shapes, str(file.path))
    for name in expected:
        dtype = file.dtype(_stored_name(file, name))
        if dtype not in _FLOATS:
            raise ValueError(f"{file.path}: array {name} has type {dtype}; supported: {', '.join(_FLOATS)}")
    return dropped


def _stored_name(file: ArrayFile, name: str) -> str:
    return "norm" if name == "norm.weight" and name not in file.names() else name


def _fits(shape: Shape, place: ArrayPlace) -> bool:
    """Tell whether a shape is the expected one but for axes of length 1, or a kernel in MLX's order."""
    return _long(shape) == _long(place.shape) or _is_mlx_kernel(shape, place)


def _long(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def _is_mlx_kernel(shape: Shape, place: ArrayPlace) -> bool:
    """Tell whether the kernel (out, in, taps) of a convolution is stored as (out, taps, in)."""
    return len(place.shape) == 3 and place.shape[2] > 1 and shape == (place.shape[0], place.shape[2], place.shape[1])


def _is_known(file: ArrayFile, name: str, config: ModelConfig) -> bool:
    """Tell whether an array holds nothing, or frequencies that are constants of the architecture."""
    shape, dtype = file.shape(name), file.dtype(name)
    if 0 in shape:
        return True
    wanted = _frequencies(name, config)
    if wanted is None or dtype not in _FLOATS or shape != wanted.shape:
        return False
    if not np.allclose(file.read(name), wanted, rtol=_TOLERANCE[dtype], atol=0):
        raise ValueError(f"{file.path}: {name} holds other frequencies than the architecture has")
    return True


def _frequencies(name: str, config: ModelConfig) -> np.ndarray | None:
    if name == "timestep_features.freqs":
        return np.asarray(FREQUENCIES, np.float64) * 2 * np.pi  # [B5]
    if not name.endswith("inv_freq"):
        return None
    text = config.require_diffusion().text_encoder
    size = text.width // text.heads if name == "rope_inv_freq" else ROTARY_SIZE
    return 10_000.0 ** -(np.arange(0, size, 2) / size)


def _entry(place: ArrayPlace, files: Mapping[Role, ArrayFile]) -> TensorEntry:
    name = _stored_name(files[place.role], place.name)
    return TensorEntry(place.pair.ours, files[place.role].dtype(name), place.pair.shape, partial(_load, place, files))


def _load(place: ArrayPlace, files: Mapping[Role, ArrayFile]) -> np.ndarray:
    file = files[place.role]
    array = _read(place, file)
    other = also_in(place)
    if other is not None and not np.array_equal(array, _read(place, files[other])):
        raise ValueError(
            f"{files[other].path}: {place.name} differs from the one in {file.path.name}; not of one model"
        )
    return array


def _read(place: ArrayPlace, file: ArrayFile) -> np.ndarray:
    name = _stored_name(file, place.name)
    array = finite(file.read(name), file.dtype(name), file.path, name)
    if place.pair.layout == "weight_norm" and place.shape[2] > 1 and not _is_mlx_kernel(array.shape, place):
        array = np.ascontiguousarray(array.transpose(0, 2, 1))
    return array.reshape(place.pair.shape)
