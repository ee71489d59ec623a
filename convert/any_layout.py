"""Convert a checkpoint of any layout that is known to a folder of ours."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from sa3_mlx.common.files.safetensors import OnTensor
from sa3_mlx.common.origin import Origin

from .diffusers.read import is_pipeline, read_pipeline
from .folder import Incoming, check_out, write_ours
from .official import read_official
from .port.read import find_port, read_port
from .report import Report
from .source import is_ours


def convert(
    source: str | Path,
    out: Path,
    *,
    name: str | None,
    force: bool,
    progress: OnTensor | None,
    origin: Origin | None = None,
) -> Report:
    """Convert a checkpoint to a folder of format sa3/1.

    ``source``: an official folder (model_config.json, weights, text encoder), a .safetensors file with
    model_config.json beside it, the official MLX port's .npz files (their folder, or the file of the DiT), or a
    pipeline of diffusers. ``name``: None takes it from the source. ``origin`` is kept beside the weights. An existing
    ``out`` is an error unless ``force`` and it is a checkpoint of ours. Nothing is left there when it fails.

    Raises FileNotFoundError, ValueError (ConfigError for a configuration) and OSError, each with a one-line message.
    """
    check_out(out, force=force, replaceable=is_ours)
    with ExitStack() as stack:
        return write_ours(_read(source, name, stack), out, progress, origin)


def _read(source: str | Path, name: str | None, stack: ExitStack) -> Incoming:
    if (dit := find_port(Path(source))) is not None:
        return read_port(dit, name, stack)
    if is_pipeline(Path(source)):
        return read_pipeline(Path(source), name, stack)
    return read_official(source, name, stack)
