"""Read and write files of latents: .safetensors, or .npy with its tags in a JSON file beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.arrays import map_array, save_array
from sa3_mlx.common.files.atomic import new_file
from sa3_mlx.common.files.audio import check_target
from sa3_mlx.common.files.objects import parse_object
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.generation.events import Latents
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import samples_to_frames
from sa3_mlx.common.schema import listed, quoted
from sa3_mlx.common.terminal import excerpt, one_line

_FORMAT = "sa3-encoded/1"
_NO_LATENTS = "not a file of latents, or damaged; expected numbers (frames, channels) as numpy saves them"
_SUFFIXES = (".safetensors", ".npy")


def check_latents_file(path: Path, *, force: bool) -> None:
    """Refuse a file that cannot be written. Raises ValueError or FileNotFoundError, one line."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: unknown extension {path.suffix!r} for latents; allowed: {', '.join(_SUFFIXES)}")
    check_target(path, overwrite=force)
    if path.suffix == ".npy":
        check_target(_sidecar(path), overwrite=force)


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def write_latents(path: Path, latents: Latents, tags: dict[str, str]) -> None:
    """Write latents (T, C) with tags: in a safetensors file, or as .npy with its tags in a JSON file beside it."""
    tags = {"format": _FORMAT, **tags}
    if path.suffix == ".safetensors":
        write_tensors(path, [array_entry("latents", latents)], tags)
        return
    with new_file(_sidecar(path)) as sidecar:
        sidecar.write_text(json.dumps(tags, indent=1), encoding="utf-8")
        save_array(path, latents)


def read_latents(path: Path) -> tuple[Latents, dict[str, str]]:
    """Read latents (T, C) and the tags that came with them. Raises FileNotFoundError or ValueError, one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of latents")
    if _kind(path) == ".safetensors":
        with TensorFile.open(path) as file:
            if file.names() != ["latents"]:
                raise ValueError(f"{path}: expected one tensor 'latents', found {listed(file.names()) or 'none'}")
            _check_format(path, file.metadata)
            return _checked(path, file.read("latents")), file.metadata
    tags = _read_sidecar(_sidecar(path))
    return _checked(path, map_array(path, _NO_LATENTS)), tags


def _kind(path: Path) -> str:
    """Return which kind of file it is, by its extension, or by its first bytes where it has none, as what is piped."""
    if path.suffix in _SUFFIXES:
        return path.suffix
    with path.open("rb") as file:
        head = file.read(9)
    if not path.suffix and (head.startswith(b"\x93NUMPY") or head[8:] == b"{"):
        return ".safetensors" if head[8:] == b"{" else ".npy"
    raise ValueError(f"{path}: unknown extension {path.suffix!r} for latents; allowed: {', '.join(_SUFFIXES)}")


def _read_sidecar(path: Path) -> dict[str, str]:
    """Read the tags beside a .npy file; none without the file."""
    if not path.is_file():
        return {}
    data = parse_object(path.read_bytes(), f"{path}: not the tags of latents")
    tags = {key: str(value) for key, value in data.items()}
    _check_format(path, tags)
    return tags


def _check_format(path: Path, tags: dict[str, str]) -> None:
    """Refuse tags of another format; latents without any are welcome, they come from elsewhere."""
    if tags and tags.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: its format is {quoted(tags.get('format'))}, expected {_FORMAT!r} as 'sa3 encode' writes it"
        )


def _checked(path: Path, latents: NDArray[np.generic]) -> Latents:
    """Return them as float32. Raises ValueError unless they are (frames, channels) finite numbers."""
    if latents.ndim != 2 or not latents.shape[0] or latents.dtype.kind != "f":
        raise ValueError(f"{path}: latents are (frames, channels) numbers, found {latents.dtype} {latents.shape}")
    with np.errstate(over="ignore"):
        result = latents.astype(np.float32)
    if not np.isfinite(result).all():
        raise ValueError(f"{path}: the latents have NaN or infinite values, or values beyond float32")
    return result


def output_samples(path: Path, latents: Latents, tags: dict[str, str], config: ModelConfig) -> int:
    """Return the length of their audio in samples. Raises ValueError for latents that do not fit the model."""
    if latents.shape[1] != config.same.latent_channels:
        raise ValueError(f"{path}: {latents.shape[1]} channels, {config.name} has {config.same.latent_channels}")
    text = tags.get("samples")
    if text is None:
        return len(latents) * config.same.samples_per_latent
    if not re.fullmatch(r"[0-9]{1,18}", text) or samples_to_frames(int(text), config.same) != len(latents):
        raise ValueError(
            f"{path}: its tags say {excerpt(one_line(text))} samples, which does not fit {len(latents)} frames"
        )
    return int(text)
