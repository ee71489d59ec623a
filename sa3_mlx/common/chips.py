"""List nominal peaks of chips, for floors and plans."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

CHIPS_FILE = Path(__file__).with_name("chips.json")


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Hold peaks in TFLOPS and GB/s; ``memory_gb`` where it is the chip's own, not that of the machine."""

    name: str
    gpu_cores: int | None
    fp16: float
    fp32: float
    tf32: float | None
    gb_per_s: float
    memory_gb: float | None
    source: str

    @classmethod
    def load_all(cls) -> list[Self]:
        """Read the table of all chips."""
        return [cls(**entry) for entry in json.loads(CHIPS_FILE.read_text(encoding="utf-8"))["chips"]]
