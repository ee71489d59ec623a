"""Read a folder of reference outputs of the official code, and say how far a case is from them.

Official tensors are channels-first; ``last`` swaps the last two axes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sa3_convert.keys import pairs

from sa3_mlx.cli.models.measure import relative_l2
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig

AREAS = ("schedule", "text", "cond", "dit", "guidance", "same", "samplers", "e2e")


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """Hold the ``error`` of a case in ``unit`` against ``limit``; ``skipped`` says why it was not compared."""

    area: str
    case: str
    error: float = 0.0
    limit: float = 0.0
    unit: str = "relative"
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Tell whether nothing is wrong, as far as it was compared."""
        return bool(self.skipped) or self.error <= self.limit


@dataclass
class Golden:
    """Give cases by "area:name" and their tensors, read when they are needed."""

    folder: Path
    cases: Mapping[str, dict[str, Any]]
    _files: dict[str, TensorFile] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(cls, folder: Path) -> Golden:
        """Open a folder. Raises FileNotFoundError or ValueError for one that does not hold reference outputs."""
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise FileNotFoundError(f"{folder}: no manifest.json there; expected a folder of reference outputs")
        try:
            cases = json.loads(manifest.read_text(encoding="utf-8"))["cases"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest}: not a manifest of reference outputs ({error})") from error
        found = {area for area in AREAS if (folder / f"{area}.safetensors").is_file()}
        if not isinstance(cases, dict) or not found or not (folder / "weights.safetensors").is_file():
            raise ValueError(f"{folder}: expected weights.safetensors and one file per area ({', '.join(AREAS)})")
        return cls(folder, {name: case for name, case in cases.items() if name.split(":", 1)[0] in found})

    def __enter__(self) -> Golden:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self, area: str) -> Iterator[str]:
        """Yield the names of the cases of an area."""
        for name in self.cases:
            if name.startswith(f"{area}:"):
                yield name.split(":", 1)[1]

    def has(self, area: str, case: str, tensor: str) -> bool:
        """Tell whether a case has a tensor."""
        return f"{case}.{tensor}" in self._file(area).shapes()

    def get(self, area: str, case: str, tensor: str) -> np.ndarray:
        """Read a tensor. Raises ValueError for one that a case of the manifest should have and its file has not."""
        if not self.has(area, case, tensor):
            raise ValueError(
                f"{self.folder / area}.safetensors: has no tensor '{case}.{tensor}', which case '{area}:{case}' of the "
                f"manifest needs; get the complete folder"
            )
        return self._file(area).read(f"{case}.{tensor}")

    def last(self, area: str, case: str, tensor: str) -> np.ndarray:
        """Read a tensor (B, C, T) as (B, T, C)."""
        return np.ascontiguousarray(np.swapaxes(self.get(area, case, tensor), 1, 2))

    def _file(self, area: str) -> TensorFile:
        if area not in self._files:
            self._files[area] = self._stack.enter_context(TensorFile.open(self.folder / f"{area}.safetensors"))
        return self._files[area]

    def check_weights(self, folder: Path, config: ModelConfig) -> None:
        """Raise ValueError unless the model was converted from the weights that these outputs were made with."""
        parts = ("conditioner", "dit", "same")
        with (
            TensorFile.open(self.folder / "weights.safetensors") as official,
            TensorFile.open(folder / WEIGHTS_FILE) as ours,
        ):
            official_shapes, our_shapes = official.shapes(), ours.shapes()
            for pair in pairs(config, parts if config.diffusion is not None else ("same",)):
                if pair.layout == "weight_norm":
                    continue
                name = pair.official[0]
                same = official_shapes.get(name) == pair.official_shapes[0] and our_shapes.get(pair.ours) == pair.shape
                if not same or not np.array_equal(official.raw(name).reshape(pair.shape), ours.raw(pair.ours)):
                    raise ValueError(
                        f"{folder} was not converted from the weights of {self.folder} (tensor {pair.ours} differs); "
                        f"convert {self.folder / 'weights.safetensors'} first"
                    )


def relative_error(area: str, case: str, found: np.ndarray, wanted: np.ndarray, limit: float) -> CaseResult:
    """Compare by relative L2, which is inf where the shapes differ."""
    return CaseResult(area=area, case=case, error=relative_l2(wanted, found), limit=limit)


def absolute_error(area: str, case: str, found: np.ndarray, wanted: np.ndarray, limit: float) -> CaseResult:
    """Compare by the largest absolute difference, which is inf where the shapes differ."""
    error = float(np.abs(found.astype(np.float64) - wanted).max()) if found.shape == wanted.shape else float("inf")
    return CaseResult(area=area, case=case, error=error, limit=limit, unit="absolute")
