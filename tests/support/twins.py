"""Both twins with one small interface, so that a test is written once and runs on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sa3_mlx import runtime  # noqa: F401 (before any test imports mlx)
from sa3_mlx.cli.models.verify.twin import Twin as VerifiedTwin
from sa3_mlx.common.adapters.applied import Applied

KEPT = Path(__file__).parents[1] / "goldens"
TINY = ("tiny-s", "tiny-l")


class Twin(VerifiedTwin):
    """Give a test one framework; arrays go in and out as numpy."""

    def pipeline(self, folder: Path, *, adapters: Sequence[Applied] = (), merged: bool = False) -> Any:
        """The pipeline of this framework, on the CPU where there is a choice."""
        load = self.module("pipeline").Pipeline.load
        if self.name == "torch":
            return load(folder, adapters=adapters, merged=merged, device="cpu")
        return load(folder, adapters=adapters, merged=merged)

    def bump(self, module: Any, name: str, amount: float) -> None:
        """Add ``amount`` to one element of the parameter ``name`` of ``module``: what a parity test must notice."""
        values = self.numpy(getattr(module, name)).copy()
        values.reshape(-1)[77 % values.size] += amount
        if self.name == "torch":
            getattr(module, name).data = self.array(values)
        else:
            setattr(module, name, self.array(values))

    def tap(self, parent: Any, name: str) -> list[np.ndarray]:
        """Record what the child ``name`` (an attribute, or an index of a list of layers) returns from now on."""
        outputs: list[np.ndarray] = []
        if self.name == "torch":
            parent.get_submodule(name).register_forward_hook(lambda _m, _i, out: outputs.append(self.numpy(out)))
        elif isinstance(parent, list):
            parent[int(name)] = _Recorder(parent[int(name)], outputs, self)
        else:
            setattr(parent, name, _Recorder(getattr(parent, name), outputs, self))
        return outputs

    def rope(self, start: int, stop: int) -> Any:
        if self.name == "torch":
            import torch

            return self.module("layers").rope(start, stop, torch.device("cpu"))
        return self.module("layers").rope(start, stop)

    def window_mask(self, groups: int, group: int) -> Any:
        if self.name == "torch":
            import torch

            return self.module("attention").window_mask(groups, group, torch.device("cpu"))
        return self.module("attention").window_mask(groups, group)


class _Recorder:
    """Stands for an MLX module, which has no hooks, and keeps what it returns."""

    def __init__(self, inner: Any, outputs: list[np.ndarray], twin: Twin) -> None:
        self._inner, self._outputs, self._twin = inner, outputs, twin

    def __call__(self, *args: Any) -> Any:
        out = self._inner(*args)
        self._outputs.append(self._twin.numpy(out))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True)
class Cases:
    """One area of one golden folder. Official tensors are channels-first; ``channels_last`` swaps the last two axes."""

    tensors: dict[str, np.ndarray]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            pytest.skip(f"{name} is not among the goldens kept with the tests")
        return self.tensors[name]

    def channels_last(self, name: str) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(self[name], 1, 2))


def load_cases(golden: Path, model: str, area: str) -> Cases:
    """From the folder of goldens, else from the few kept with the tests, else a skip."""
    for path in (golden / model / f"{area}.safetensors", KEPT / f"{model}-{area}.safetensors"):
        if path.is_file():
            return Cases(load_file(path))
    pytest.skip(f"no goldens of {model}, area {area}, beside the repository or kept with the tests")


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative L2 difference."""
    assert found.shape == wanted.shape, f"shape {found.shape}, wanted {wanted.shape}"
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))
