"""Hash a model's weights and check that they are finite; both read the whole file, so the result is remembered.

$SA3_HOME/fingerprints.json maps path, size and time of a weight file to its hash. A file that changes is read again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.safetensors import FLOATS, TensorFile, all_finite, file_hash
from sa3_mlx.common.installed import home
from sa3_mlx.common.model.checkpoint import CLAP_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.quant.format import check_folder

_PATIENCE = 2.0  # seconds before a bar appears
_STORE_MAX = 1 << 24  # bytes


def fingerprint(folder: Path, config: ModelConfig, *, quiet: bool = False) -> str:
    """Return the hash of ``model.safetensors``, "sha256:..."; a bar shows the first, long look unless ``quiet``.

    A latent CLAP is checked too. Raises FileNotFoundError without a file; ValueError when tensors do not fit the
    configuration or are not finite.
    """
    check_folder(folder, config)
    if config.clap is not None:
        _checked(folder / CLAP_FILE, "put the latent CLAP into the model again", quiet=quiet)
    return _checked(folder / WEIGHTS_FILE, "convert the checkpoint again", quiet=quiet)


def clap_fingerprint(folder: Path) -> str:
    """Return the hash of the file of a latent CLAP. Raises as ``fingerprint``."""
    return _checked(folder / CLAP_FILE, "put the latent CLAP into the model again", quiet=True)


def _checked(path: Path, advice: str, *, quiet: bool) -> str:
    """Return the hash of a weight file. Raises ValueError, with advice, for values that are not finite."""
    with TensorFile.open(path) as file:
        stat, key = path.stat(), str(path.resolve())
        entry = [stat.st_size, stat.st_mtime_ns]
        known = _read().get(key)
        if isinstance(known, list) and known[:2] == entry and len(known) == 3:
            return str(known[2])
        bar = Progress(quiet=quiet).bar("weights", 2 * stat.st_size / 1e6, "MB", delay=_PATIENCE)
        with bar:
            _check_finite(file, advice, lambda size: bar.update(size / 1e6))
            digest = file_hash(path, lambda size: bar.update(size / 1e6))
    _remember(key, [*entry, digest])
    return digest


def _check_finite(file: TensorFile, advice: str, advance: Callable[[int], object]) -> None:
    for name in file.names():
        dtype, _ = file.info(name)
        if dtype not in FLOATS:
            continue
        values = file.raw(name)
        advance(values.nbytes)
        if not all_finite(values, dtype):
            raise ValueError(f"{file.path}: tensor {name} has NaN or infinite values; {advice}")


def _store() -> Path:
    return home() / "fingerprints.json"


def _read() -> dict[str, object]:
    """Return what is remembered; nothing where that is no file of a sensible size with an object in it."""
    try:
        if not _store().is_file() or _store().stat().st_size > _STORE_MAX:  # a pipe would be waited for
            return {}
        data = json.loads(_store().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _remember(key: str, entry: list[object]) -> None:
    """Store one entry. A home that cannot be written costs speed, not correctness."""
    with contextlib.suppress(OSError):
        home().mkdir(parents=True, exist_ok=True)
        write_json(_store(), _read() | {key: entry})
