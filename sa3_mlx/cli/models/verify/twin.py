"""Give both frameworks the few calls that ``verify`` needs; arrays go in and out as numpy."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sa3_mlx.cli.backend import Backend
from sa3_mlx.common.model.config import ModelConfig


@dataclass(frozen=True)
class Twin:
    """Run the networks of one framework in fp32, on the default device of MLX or on the CPU in torch."""

    name: Backend

    def module(self, name: str) -> ModuleType:
        """Import a module of the twin by its name, such as "dit"."""
        return importlib.import_module(f"sa3_{self.name}.{name}")

    def array(self, values: np.ndarray) -> Any:
        """Turn numpy values into an array of the framework."""
        values = np.ascontiguousarray(values)
        if self.name == "torch":
            import torch

            return torch.from_numpy(values)
        import mlx.core as mx

        return mx.array(values)

    def times(self, t: np.ndarray) -> Any:
        """Return times in the form that the DiT takes: a tensor in torch, host values in MLX."""
        return self.array(t) if self.name == "torch" else t

    def numpy(self, array: Any) -> np.ndarray:
        """Turn an array of the framework into float32 values."""
        if self.name == "torch":
            return np.asarray(array.detach().float().cpu())
        import mlx.core as mx

        return np.array(array.astype(mx.float32))

    def load(self, folder: Path, config: ModelConfig, part: str) -> Any:
        """Load a network with its weights."""
        weights = self.module("weights")
        if self.name == "torch":
            import torch

            return weights.load_part(folder, config, part, torch.device("cpu"), torch.float32)
        import mlx.core as mx

        return weights.load_part(folder, config, part, mx.float32)
