"""Say what this machine has, how fast it is and what to install: ``sa3 doctor``."""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import click

from sa3_mlx.cli import backend
from sa3_mlx.cli.output.speaker import library
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.installed import home, installed, models_folder
from sa3_mlx.common.memory.metal import Metal
from sa3_mlx.common.memory.prediction import size_text
from sa3_mlx.common.terminal import labelled, show
from sa3_mlx.common.tuning import machine
from sa3_mlx.common.tuning.table import read_table, table_file
from sa3_mlx.common.version import version

_FOR_TRAINING = ("torch", "scipy", "mido", "tensorboard", "webdataset")
_TRAIN = "pip install 'sa3[train]'"
_SIZE = 1024


@click.command(cls=TypedCommand)
def doctor() -> int:
    """Check this machine. Exit code 1 when something keeps sa3 from working well."""
    problems: list[str] = []
    _line("sa3", version())
    place = f"{machine.chip()}, {machine.cores()} cores"
    _line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {place}")
    _backend("mlx", _mlx, problems)
    _blas(problems)
    _backend("torch", _torch, problems)
    try:
        _line("default", backend.choose("auto"))
    except ImportError as error:
        problems.append(str(error))
    _models(problems)
    _tunings()
    _line("speaker", _speaker())
    for package in _FOR_TRAINING[1:]:
        _line(package, _package(package) or f"not installed; for training: {_TRAIN}")
    for problem in problems:
        show(f"problem: {problem}")
    show(_verdict() if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


def _verdict() -> str:
    """Say what everything that is here is enough for."""
    missing = [package for package in _FOR_TRAINING if not _package(package)]
    if missing:
        return f"everything needed to make sounds is here; training needs {', '.join(missing)}: {_TRAIN}"
    return "everything needed is here"


def _backend(name: backend.Backend, measure: Callable[[], str], problems: list[str]) -> None:
    if not backend.available(name):
        _line(name, f"not installed: {backend.INSTALL[name]}")
        return
    try:
        _line(name, f"{_package(name)}, {measure()}")
    except Exception as error:  # whatever a broken installation raises
        first = (str(error).splitlines() or [type(error).__name__])[0]
        problems.append(f"{name} is installed and does not work: {first}")


def _mlx() -> str:
    from sa3_mlx.runtime import apple_gpu, mx

    a = mx.random.normal((_SIZE, _SIZE))
    mx.eval(a)
    rate = _gflops(lambda: mx.eval(a @ a))
    gpu = apple_gpu()
    memory = "" if gpu is None else f"; {_metal(gpu)}"
    return f"device {mx.default_device().type.name}, {rate:,.0f} GFLOP/s in a product of {_SIZE} x {_SIZE}{memory}"


def _metal(gpu: Metal) -> str:
    """Say how much memory an Apple GPU has and how MLX is told to use it."""
    cache = size_text(gpu.limits(peak=0, weights=0, activations=0, limit=None).cache)
    handed = f"{gpu.operations} operations or {size_text(gpu.buffer_bytes)}"
    return f"{size_text(gpu.working_set)} of {size_text(gpu.memory)} for it, {cache} kept for reuse, {handed} at a time"


def _torch() -> str:
    import torch

    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    a = torch.randn(_SIZE, _SIZE, device=kind)
    rate = _gflops(lambda: (a @ a)[0, 0].item())
    name = torch.cuda.get_device_name() if kind == "cuda" else kind
    return f"device {name}, {rate:,.0f} GFLOP/s in a product of {_SIZE} x {_SIZE}"


def _gflops(run: Callable[[], object]) -> float:
    """Return the best rate of a few runs within about a second."""
    run()
    best, begin = float("inf"), time.perf_counter()
    for _ in range(20):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > 1:
            break
    return 2 * _SIZE**3 / best / 1e9


def _blas(problems: list[str]) -> None:
    if sys.platform != "linux" or not backend.available("mlx"):
        return
    from sa3_mlx import runtime

    status = runtime.status()
    _line("openblas", status.message)
    if not status.fast:
        problems.append(status.message)


def _models(problems: list[str]) -> None:
    folder = home()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    _line("home", f"{folder} (set SA3_HOME to change it), {free / 1e9:.1f} GB free")
    found = installed()
    _line("models", ", ".join(found) or f"none in {models_folder()}")
    if not found:
        problems.append("no model is installed: sa3 get small-music")
    if free < 1e9:
        problems.append(f"only {free / 1e9:.2f} GB free at {existing}")


def _tunings() -> None:
    """Show what was tuned on this machine; what belongs to others, or to other versions, is only counted."""
    table = read_table()
    here = [tuning for tuning in table if tuning.key.is_here]
    for tuning in here:
        _line("tuned", tuning.text())
    others = "" if len(here) == len(table) else f"; {len(table) - len(here)} of other machines or versions, not used"
    if not here or others:
        _line("tuned", f"{'nothing yet: sa3 tune' if not here else table_file()}{others}")


def _speaker() -> str:
    """Say which device --play uses, or what it needs."""
    try:
        return str(library().query_devices(kind="output")["name"])
    except ImportError as error:
        return f"none; {error}"
    except Exception as error:  # a class of the library, which comes from there
        return f"none ({error})"


def _package(name: str) -> str | None:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return None


def _line(label: str, text: str) -> None:
    show(labelled(label, text, 12))
