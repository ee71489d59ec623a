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
        from sa3_mlx.runtime import mx

        return mx.array(values)

    def times(self, t: np.ndarray) -> Any:
        """Return times in the form that the DiT takes: a tensor in torch, host values in MLX."""
        return self.array(t) if self.name == "torch" else t

    def numpy(self, array: Any) -> np.ndarray:
        """Turn an array of the framework into float32 values."""
        if self.name == "torch":
            return np.asarray(array.detach().float().cpu())
        from sa3_mlx.runtime import mx

        return np.array(array.astype(mx.float32))

    def dtype(self, name: str) -> Any:
        """Return a number type of the framework by its name, such as "float32"."""
        if self.name == "torch":
            import torch

            return getattr(torch, name)
        from sa3_mlx.runtime import mx

        return getattr(mx, name)

    def load(self, folder: Path, part: str, dtype: str | None = "float32") -> Any:
        """Load a network of a checkpoint folder; None keeps the number types of the file."""
        config, kind = ModelConfig.load(folder), None if dtype is None else self.dtype(dtype)
        if self.name == "torch":
            import torch

            return self.module("weights").load_part(folder, config, part, torch.device("cpu"), kind)
        return self.module("weights").load_part(folder, config, part, kind)
