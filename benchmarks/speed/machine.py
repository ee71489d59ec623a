"""Describe a machine: chip, cores, memory, system, versions; nothing that names its owner."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_WATCH_SECONDS = 0.5
_PACKAGES = ("sa3", "mlx", "torch", "numpy")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Describe the machine of a measurement."""

    chip: str
    cpu_cores: str  # such as "10 (4 performance, 6 efficiency)"
    gpu: str | None
    gpu_cores: int | None
    memory_bytes: int
    system: str
    python: str
    versions: Mapping[str, str]
    blas: str  # what computes MLX's fp32 products on a CPU
    settings: Mapping[str, str]  # environment variables that change speed or precision

    def slug(self) -> str:
        """Return a name for files, such as "apple-m4-10-gpu-cores"."""
        name = self.gpu or self.chip
        cores = f" {self.gpu_cores} gpu cores" if self.gpu_cores else ""
        return re.sub(r"[^a-z0-9]+", "-", f"{name}{cores}".lower()).strip("-")

    def to_dict(self) -> dict[str, object]:
        """Return what results keep."""
        return asdict(self)

    def text(self) -> str:
        """Return one line for people."""
        gpu = "" if self.gpu is None else f", GPU {self.gpu}" + (f" ({self.gpu_cores} cores)" if self.gpu_cores else "")
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        memory = f"{self.memory_bytes / 1e9:.0f} GB"
        return f"{self.chip}, {self.cpu_cores} cores{gpu}, {memory}, {self.system}, Python {self.python}, {packages}"


_SETTINGS = (
    "MLX_ENABLE_TF32",
    "MLX_MAX_MB_PER_BUFFER",
    "MLX_MAX_OPS_PER_BUFFER",
    "MLX_METAL_FAST_SYNCH",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PYTORCH_ENABLE_MPS_FALLBACK",
)


def describe(backend: str) -> Machine:
    """Describe this machine, as far as it tells, for runs of one backend."""
    from sa3_mlx import runtime

    on_mac = sys.platform == "darwin"
    gpu, gpu_cores = parse_displays(run(["system_profiler", "SPDisplaysDataType", "-json"])) if on_mac else (None, None)
    if backend == "torch" and (
        found := run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    ):
        gpu = found.strip().splitlines()[0].split(",")[0]
    return Machine(
        chip=_mac_sysctl("machdep.cpu.brand_string") if on_mac else parse_cpuinfo(_read("/proc/cpuinfo")),
        cpu_cores=_cores(),
        gpu=gpu,
        gpu_cores=gpu_cores,
        memory_bytes=_memory(),
        system=_system(),
        python=platform.python_version(),
        versions=_versions(),
        blas=runtime.status().message if backend == "mlx" else "",
        settings={name: os.environ[name] for name in _SETTINGS if name in os.environ},
    )


def parse_displays(text: str) -> tuple[str | None, int | None]:
    """Read name and core count of the GPU from ``system_profiler SPDisplaysDataType -json``."""
    try:
        devices = json.loads(text)["SPDisplaysDataType"]
        device = next(entry for entry in devices if "sppci_cores" in entry)
        return str(device["sppci_model"]), int(device["sppci_cores"])
    except (ValueError, KeyError, TypeError, StopIteration):
        return None, None


def parse_cpuinfo(text: str) -> str:
    """Read the processor's name from /proc/cpuinfo."""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def parse_memory(text: str) -> int:
    """Read the bytes of memory from /proc/meminfo, 0 if it does not say."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def busy_cores() -> float:
    """Count the cores that other programs keep busy just now; takes half a second on Linux."""
    if sys.platform == "darwin":
        return parse_shares(run(["ps", "-A", "-o", "%cpu="]))
    first = parse_cpu_seconds(_read("/proc/stat"))
    time.sleep(_WATCH_SECONDS)
    return (parse_cpu_seconds(_read("/proc/stat")) - first) / _WATCH_SECONDS


def parse_cpu_seconds(text: str) -> float:
    """Read the seconds that all cores together have worked, from /proc/stat."""
    fields = [int(word) for word in text.splitlines()[0].split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def parse_shares(text: str) -> float:
    """Sum up the per cent of a core that ``ps`` gives for every process, in cores."""
    return sum(float(word.replace(",", ".")) for word in text.split()) / 100


def run(command: Sequence[str]) -> str:
    """Return the standard output of a command, empty when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""


def _mac_sysctl(name: str) -> str:
    return run(["sysctl", "-n", name]).strip()


def _cores() -> str:
    if sys.platform != "darwin":
        return str(len(os.sched_getaffinity(0)))
    fast, slow = _mac_sysctl("hw.perflevel0.physicalcpu"), _mac_sysctl("hw.perflevel1.physicalcpu")
    return f"{os.cpu_count()}" + (f" ({fast} performance, {slow} efficiency)" if fast and slow else "")


def _memory() -> int:
    if sys.platform == "darwin":
        return int(_mac_sysctl("hw.memsize") or 0)
    return parse_memory(_read("/proc/meminfo"))


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.machine()}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
