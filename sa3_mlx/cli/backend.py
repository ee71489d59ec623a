"""Choose the framework, and make the few calls that differ between the twins."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.memory.metal import Metal
from sa3_mlx.common.memory.prediction import MemoryPlan
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.tuning.choice import Choices
from sa3_mlx.common.tuning.table import find_ways

if TYPE_CHECKING:
    from sa3_mlx.pipeline import Pipeline

Backend = Literal["mlx", "torch"]
DEVICES = ("auto", "cpu", "cuda", "mps")
BACKENDS: tuple[Backend, ...] = ("mlx", "torch")
_NEEDS = {"mlx": "mlx.core", "torch": "torch"}
INSTALL = {"mlx": "pip install sa3", "torch": "pip install 'sa3[torch]'"}
_NVIDIA = Path("/dev/nvidiactl")


def available(backend: Backend) -> bool:
    """Return whether the framework is installed, without importing it."""
    try:
        return importlib.util.find_spec(_NEEDS[backend]) is not None
    except ImportError:
        return False


def choose(wanted: str, device: str = "auto", *, compiled: bool = False) -> Backend:
    """Return the backend to use for "mlx", "torch" or "auto".

    Auto is MLX, but PyTorch where it is installed and MLX would crawl: beside an NVIDIA GPU, and on Linux without
    OpenBLAS. Raises ImportError for one that is not installed, ValueError for a device or compiling with MLX.
    """
    backend = _choose(wanted)
    if backend == "mlx" and device != "auto":
        raise ValueError(f"device is {device!r}: MLX chooses its own; leave --device out, or add --backend torch")
    if backend == "mlx" and compiled:
        raise ValueError("--compile is for --backend torch; MLX compiles by itself on a GPU")
    if backend == "torch":
        _share_cores()
    return backend


def _share_cores() -> None:
    """Let threads of PyTorch that wait sleep soon, unless the user chose; to be called before it is imported.

    Where others work on the same cores too, threads that wait by counting take most of them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # longer than from one operation to the next


def _choose(wanted: str) -> Backend:
    for backend in BACKENDS:
        if wanted == backend:
            if not available(backend):
                raise ImportError(f"{backend} is not installed: {INSTALL[backend]}")
            return backend
    if available("torch") and (not available("mlx") or _NVIDIA.exists() or _slow_mlx()):
        return "torch"
    if available("mlx"):
        return "mlx"
    raise ImportError(f"neither mlx nor torch is installed: {INSTALL['mlx']}, or {INSTALL['torch']}")


def _slow_mlx() -> bool:
    if sys.platform != "linux":
        return False
    from sa3_mlx import runtime

    return not runtime.status().fast


def load(
    folder: Path,
    backend: Backend,
    dtype: str = "auto",
    text_dtype: str = "auto",
    device: str = "auto",
    *,
    adapters: Sequence[Applied] = (),
    merged: bool = False,
    compiled: bool = False,
) -> Pipeline:
    """Open the pipeline of that backend; ``device`` and ``compiled`` are for PyTorch only."""
    usual = {"dtype": dtype, "text_dtype": text_dtype, "adapters": adapters, "merged": merged}
    kind = importlib.import_module(f"sa3_{backend}.pipeline").Pipeline
    pipeline: Pipeline
    if backend == "torch":
        from sa3_torch.choices import use

        for place in ("compiled_step", "compiled_decoder"):
            use(place, "compiled" if compiled else "plain")
        use("graphs", "captured" if compiled else "plain")
        pipeline = kind.load(folder, **usual, device=device)
    else:
        pipeline = kind.load(folder, **usual)
    return pipeline


def choices(backend: Backend) -> Choices:
    """Return the table of places that have several ways."""
    found: Choices = importlib.import_module(f"sa3_{backend}.choices").CHOICES
    return found


def tuned_ways(backend: Backend, device: str, config: ModelConfig) -> dict[str, str]:
    """Return the ways that ``sa3 tune`` found fastest for such a model on this device."""
    if backend == "mlx":
        return find_ways(choices(backend), choices(backend).kind, config)
    from sa3_torch.pipeline import choose_device, device_name

    return find_ways(choices(backend), device_name(choose_device(device)), config)


def on_gpu(backend: Backend, device: str) -> bool:
    """Return whether it computes on a GPU. Raises ValueError for a device that is not there."""
    if backend == "torch":
        from sa3_torch.pipeline import choose_device

        return choose_device(device).type != "cpu"
    from sa3_mlx import runtime

    return runtime.on_gpu()


def metal(backend: Backend) -> Metal | None:
    """Describe the Apple GPU that this backend computes on; None where MLX does not, or is not asked."""
    if backend != "mlx":
        return None
    from sa3_mlx.choices import way
    from sa3_mlx.runtime import apple_gpu

    return apple_gpu(long_chunks=way("chunks") == "long")


def memory_note(backend: Backend, device: str) -> str:
    """Say what a predicted peak leaves out or is worth."""
    if backend == "mlx":
        top = "Python and MLX come on top"
        return top if metal(backend) is None else f"estimated, not measured on an Apple GPU; {top}"
    from sa3_torch.pipeline import choose_device

    if choose_device(device).type == "cuda":
        return "estimated; CUDA refuses more than the limit"
    return "estimated; PyTorch comes on top, and nothing enforces the limit"


def hold_memory(backend: Backend, device: str, plan: MemoryPlan, limit: int | None) -> None:
    """Prepare the framework for a run with this plan, within ``limit`` bytes if there is one.

    MLX keeps weights in an Apple GPU's memory wired, so that the system cannot page them out between steps, and few
    freed buffers; with a limit on a CPU too. CUDA refuses more than the limit; PyTorch on a CPU or an Apple GPU has no
    such setting.
    """
    if backend == "mlx":
        from sa3_mlx.runtime import mx

        gpu, peak = metal(backend), plan.peak
        if gpu is not None:
            limits = gpu.limits(peak=peak, weights=plan.weights, activations=plan.activations, limit=limit)
            mx.set_memory_limit(limits.memory)
            mx.set_cache_limit(limits.cache)
            mx.set_wired_limit(limits.wired)
        elif limit is not None:
            mx.set_memory_limit(limit)
            mx.set_cache_limit(max(0, limit - peak))
    elif limit is not None:
        import torch

        from sa3_torch.pipeline import choose_device

        if choose_device(device).type == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
