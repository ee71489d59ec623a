"""Twin sa3_mlx in PyTorch: the same model files, plus every training stage under ``sa3_torch.train``.

Never imports mlx; shared facts come from ``sa3_mlx.common`` (numpy only). Importing the package is light:
torch is loaded when the first name that needs it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {  # public name -> module that defines it
    "Pipeline": "sa3_torch.pipeline",
    "Request": "sa3_mlx.common.generation.request",
    "Item": "sa3_mlx.common.generation.request",
    "Guidance": "sa3_mlx.common.model.sampling",
    "Sampling": "sa3_mlx.common.model.sampling",
    "InitAudio": "sa3_mlx.common.generation.request",
    "Inpaint": "sa3_mlx.common.generation.request",
    "Patch": "sa3_mlx.common.generation.request",
    "TimedPrompt": "sa3_mlx.common.generation.request",
    "LongForm": "sa3_mlx.common.generation.request",
    "Loop": "sa3_mlx.common.generation.loop",
    "extend": "sa3_mlx.common.generation.request",
    "ModelConfig": "sa3_mlx.common.model.config",
    "PRESETS": "sa3_mlx.common.model.presets",
}

__all__ = [
    "PRESETS",
    "Guidance",
    "InitAudio",
    "Inpaint",
    "Item",
    "LongForm",
    "Loop",
    "ModelConfig",
    "Patch",
    "Pipeline",
    "Request",
    "Sampling",
    "TimedPrompt",
    "extend",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        version: str = importlib.import_module("sa3_mlx.common.version").version()
        return version
    if name not in _LAZY:
        raise AttributeError(f"module 'sa3_torch' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
