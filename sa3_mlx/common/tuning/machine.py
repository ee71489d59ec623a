"""Name what a measured speed belongs to: chip, cores, system and version of the framework; nothing about its owner."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .choice import Twin


def chip() -> str:
    """Return the name of the processor, as "Apple M4 Pro"."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory() -> int:
    """Return the bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def system() -> str:
    """Return "macOS 26.2", "Linux x86_64" or the like."""
    return f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.machine()}"


def framework(twin: Twin) -> str:
    """Return the version of the framework, "unknown" where it does not tell."""
    try:
        return version(twin)
    except PackageNotFoundError:
        return "unknown"


def _sysctl(name: str) -> str:
    """Ask macOS for a text about the machine; empty where it does not tell."""
    size = ctypes.c_size_t(256)
    text = ctypes.create_string_buffer(size.value)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), text, ctypes.byref(size), None, 0)
    return "" if failed else text.value.decode(errors="replace").strip()
