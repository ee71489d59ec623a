"""Stable Audio 3 on MLX. Importing the package is light: nothing is loaded before it is asked for.

``sa3_mlx.common`` holds the facts that both twins share and needs numpy alone, so machines without mlx can import it.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {  # public name -> module that defines it
    "Pipeline": ".pipeline",
    "Request": ".common.generation.request",
    "Item": ".common.generation.request",
    "Guidance": ".common.model.sampling",
    "Sampling": ".common.model.sampling",
    "InitAudio": ".common.generation.request",
    "Inpaint": ".common.generation.request",
    "Patch": ".common.generation.request",
    "TimedPrompt": ".common.generation.request",
    "LongForm": ".common.generation.request",
    "Loop": ".common.generation.loop",
    "extend": ".common.generation.request",
    "ModelConfig": ".common.model.config",
    "PRESETS": ".common.model.presets",
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
        version: str = importlib.import_module(".common.version", __name__).version()
        return version
    if name not in _LAZY:
        raise AttributeError(f"module 'sa3_mlx' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
