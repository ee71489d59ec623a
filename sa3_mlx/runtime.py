"""Import mlx, after settling what makes its matrix products fast and exact: ``from sa3_mlx.runtime import mx, nn``.

On Linux the ``mlx[cpu]`` wheel carries the reference BLAS. OpenBLAS, loaded earlier with global symbols, takes its
place: 32 to 67 times faster fp32 products, one and two threads [P5.1]. A torch that is imported later in the same
process computes its products with OpenBLAS too; the torch twin by itself never comes here.
``status()`` says what happened.

On macOS versions of MLX that compute wrongly on an Apple GPU are refused (``refusal``), and these are set unless the
user, or what ``sa3 tune`` found, has set them (``settings``):

- MLX_ENABLE_TF32=0: on an M5, MLX would compute fp32 products with the precision of TF32, errors of 8e-4 where the
  autoencoder expects 3e-7 [P5.4]; 1 is faster there.
- MLX_MAX_OPS_PER_BUFFER=200, MLX_MAX_MB_PER_BUFFER=200, where the machine has memory for it: MLX gathers more
  operations, counted and by their inputs, before it hands them to the GPU [P8.2].
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

from sa3_mlx.common.memory.metal import OWN_BUFFER_MB, OWN_OPERATIONS, Metal
from sa3_mlx.common.tuning.table import environment

OLDEST = (0, 31, 2)  # of MLX, on macOS
LARGE_BUFFERS = 12 * 10**9  # bytes of memory from which command buffers may be large
_OPERATIONS, _MEGABYTES = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
_NAMES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")  # Debian and most others, Fedora, conda


@dataclass(frozen=True, kw_only=True)
class Status:
    """Say whether fp32 products run at full speed, and in one line what to do if they do not."""

    fast: bool
    message: str


def _candidates() -> list[str]:
    """Look inside this environment (conda), then wherever the system's loader finds it."""
    inside = [Path(sys.prefix) / "lib" / name for name in _NAMES]
    return [*(str(path) for path in inside if path.is_file()), *_NAMES]


def _load() -> Status:
    if sys.platform != "linux":
        return Status(fast=True, message="not needed on this system")
    if "mlx.core" in sys.modules:
        return Status(
            fast=False, message="mlx was imported before sa3_mlx, so OpenBLAS cannot serve it; swap the imports"
        )
    for name in _candidates():
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(library, "cblas_sgemm"):  # some builds export prefixed names only, which mlx does not look for
            return Status(fast=True, message=f"{name} serves mlx")
    return Status(
        fast=False,
        message="OpenBLAS not found: mlx is 30 times slower or worse; Debian, Ubuntu: apt install libopenblas0-pthread",
    )


def refusal(version: str) -> str | None:
    """Say why this version of MLX must not be used on an Apple GPU, in one line; None where it may."""
    found = tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])
    if found < OLDEST:
        reason = "its attention on an Apple GPU rounds queries to 16 bits, and it lacks what sa3 calls"
    elif found == (0, 32, 0):
        reason = "its compiled kernels are wrong on an Apple GPU"
    else:
        return None
    return f"mlx {version} is installed: {reason}; pip install -U 'mlx>={'.'.join(map(str, OLDEST))},!=0.32.0'"


def settings(memory: int) -> dict[str, str]:
    """Return what MLX is told on macOS, on a machine with this many bytes of memory, as environment variables."""
    large = {_OPERATIONS: "200", _MEGABYTES: "200"} if memory >= LARGE_BUFFERS else {}
    return {"MLX_ENABLE_TF32": "0", **large}


def _memory() -> int:
    """Return the bytes of memory of this machine, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


_STATUS = _load()
if sys.platform == "darwin":
    if (_reason := refusal(installed_version("mlx"))) is not None:
        raise ImportError(_reason)
    _settings = settings(_memory())
    for _name, _value in {**_settings, **environment()}.items():
        os.environ.setdefault(_name, _value)

import mlx.core as mx  # noqa: E402 (after the above, which it reads)
import mlx.nn as nn  # noqa: E402

__all__ = ["Status", "apple_gpu", "mx", "nn", "on_gpu", "refusal", "settings", "status"]


def on_gpu() -> bool:
    """Tell whether MLX computes on a GPU."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def status() -> Status:
    """Return what was found when this module was imported."""
    return _STATUS


def apple_gpu(*, long_chunks: bool = True) -> Metal | None:
    """Describe the Apple GPU that MLX computes on; None where it computes on something else."""
    if not (on_gpu() and mx.metal.is_available()):
        return None
    info = mx.device_info()
    return Metal(
        memory=int(info["memory_size"]),
        working_set=int(info["max_recommended_working_set_size"]),
        operations=_number(_OPERATIONS, OWN_OPERATIONS),
        buffer_bytes=_number(_MEGABYTES, OWN_BUFFER_MB) * 2**20,
        long_chunks=long_chunks,
    )


def _number(name: str, other: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else other
