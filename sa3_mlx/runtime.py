"""Import mlx, after settling what makes its matrix products fast and exact: ``from sa3_mlx.runtime import mx, nn``.

On Linux the ``mlx[cpu]`` wheel carries the reference BLAS. OpenBLAS, loaded earlier with global symbols, takes its
place: 32 to 67 times faster fp32 products, one and two threads [P5.1]. A torch that is imported later in the same
process computes its products with OpenBLAS too; the torch twin by itself never comes here.
``status()`` says what happened.

On macOS versions of MLX that compute wrongly on an Apple GPU are refused (``refusal``). There MLX gathers up to 200
operations, or 200 MB of their inputs, before it hands them to the GPU: fewer hand-overs for some memory, which the plan
counts [P8]. The user's own MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER go before.

On an M5, MLX computes fp32 products with the precision of TF32 unless MLX_ENABLE_TF32 is 0: errors of 8e-4 where the
autoencoder expects 3e-7 [P5.4]. Here it is 0 unless the user has set it: 1 is faster there.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

OLDEST = (0, 31, 2)  # of MLX, on macOS
SETTINGS = {"MLX_ENABLE_TF32": "0", "MLX_MAX_OPS_PER_BUFFER": "200", "MLX_MAX_MB_PER_BUFFER": "200"}  # of MLX on macOS
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


_STATUS = _load()
if sys.platform == "darwin":
    if (_reason := refusal(installed_version("mlx"))) is not None:
        raise ImportError(_reason)
    for _name, _value in SETTINGS.items():
        os.environ.setdefault(_name, _value)

import mlx.core as mx  # noqa: E402 (after the above, which it reads)
import mlx.nn as nn  # noqa: E402

__all__ = ["Status", "mx", "nn", "on_gpu", "refusal", "status"]


def on_gpu() -> bool:
    """Tell whether MLX computes on a GPU."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def status() -> Status:
    """Return what was found when this module was imported."""
    return _STATUS
