"""A pipeline of the PyTorch twin on the device "meta": nothing is computed, everything is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.model.checkpoint import Part
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.precision import choose_precision
from sa3_torch import pipeline as torch_pipeline
from sa3_torch.weights import load_part

from .operations import Operations

META, CPU = torch.device("meta"), torch.device("cpu")


class CountedPipeline(torch_pipeline.Pipeline):
    """Reads weights with the CPU and forgets them; what comes back to the host is zeros."""

    @classmethod
    def opened(cls, folder: Path, *, dtype: str = "auto") -> CountedPipeline:
        """With all parts in memory, as on a GPU."""
        made = cls(folder, ModelConfig.load(folder), choose_precision(dtype, "auto", on_gpu=True), META)
        for part in ("text_encoder", "conditioner", "dit", "same"):
            made.load_part(part)
        return made

    def _read(self, part: Part, *, streamed: bool) -> nn.Module:
        assert not streamed
        name = self._number_type(part)
        module = load_part(self.folder, self.config, part, CPU, name and torch_pipeline.DTYPES[name])
        if part == "text_encoder":
            module.get_submodule("embed_tokens").device = META
        return module.to(META)

    def counted(self, request: Request, patch: pytest.MonkeyPatch) -> tuple[Operations, dict[str, int]]:
        """Run to the end: what was asked for, and how much until sampling, the last step and the end."""

        def zeros(tensor: Tensor) -> Any:
            values = np.zeros(tensor.shape, np.float32)
            return lambda: values

        patch.setattr(torch_pipeline, "fetch", zeros)
        kernels: dict[str, int] = {}
        with Operations() as seen:
            for event in self.stream(request):
                kernels[type(event).__name__] = seen.kernels
        return seen, kernels
