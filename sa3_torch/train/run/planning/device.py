"""Devices that a training is planned for: memory, and how fast they multiply."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Self

import torch

from sa3_mlx.common.chips import Chip

PRODUCT = 1024  # rows of the product that is timed where a chip's rate is not known


@dataclass(frozen=True, kw_only=True)
class Device:
    """Describe a device: ``rates`` in FLOP/s by precision, ``memory`` in bytes."""

    name: str
    gpu: bool
    memory: float
    rates: dict[str, float]
    nominal: bool  # else measured here

    @classmethod
    def find(cls, name: str | None) -> Self:
        """Return a chip with memory of its own by its name, or what this process would train on.

        Raises ValueError for an unknown name.
        """
        chips = {chip.name: chip for chip in Chip.load_all() if chip.memory_gb is not None}
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine's CPU"
        if name is None and torch.cuda.is_available():
            name = next((known for known in chips if known in here), None)
        if name is None:
            return cls._here(here)
        if name not in chips:
            raise ValueError(f"--device {name}: allowed are {', '.join(chips)}; without it, this machine's own")
        chip = chips[name]
        rates = {"fp32": chip.fp32 * 1e12, "bf16": chip.fp16 * 1e12}
        return cls(name=name, gpu=True, memory=(chip.memory_gb or 0) * 1e9, rates=rates, nominal=True)

    @classmethod
    def _here(cls, name: str) -> Self:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        rates = {"fp32": _product_rate(device, torch.float32), "bf16": _product_rate(device, torch.bfloat16)}
        return cls(name=name, gpu=device.type == "cuda", memory=memory, rates=rates, nominal=False)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a plain product, the best of a few."""
    a = torch.ones(PRODUCT, PRODUCT, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - begun)
    return 2 * PRODUCT**3 / best
