"""Run our MLX path and the official MLX port in turn: same process, same random weights of real size.

Times are CPU seconds of the process with one BLAS thread, so that other load on the machine does not count. Absolute
numbers mean nothing for a Mac; ratios are what this is for, and beside every ratio stands how far the outputs differ.
A checkout of the port (folder ``optimized/mlx`` of Stability-AI/stable-audio-3) is imported from a path given by the
caller; nothing of it is here.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.runtime import mx

from .weights import Weights, for_dit, for_same

MODELS = {"small": "small-music", "medium": "medium"}
STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Compare two sides: each maps a round to its output; ``check`` gives outputs made to be comparable."""

    ours: Callable[[int], mx.array]
    peer: Callable[[int], mx.array]
    check: Callable[[], tuple[mx.array, mx.array]]
    note: str = ""


class Checkout:
    """Import the official port from a checkout of its repository or of ``optimized/mlx``."""

    def __init__(self, path: Path) -> None:
        inner = path / "optimized" / "mlx"
        self.root = inner if inner.is_dir() else path
        if not (self.root / "models" / "defs").is_dir():
            raise FileNotFoundError(
                f"{path}: no checkout of the official MLX port (no optimized/mlx/models/defs in it)"
            )
        sys.path.insert(0, str(self.root))

    def module(self, name: str) -> ModuleType:
        """Import a module of the port."""
        return importlib.import_module(f"models.defs.{name}")

    def dit(self, model: str, weights: Weights, frames: int, depth: int) -> Any:
        """Build the port's DiT with these weights and so many of its blocks."""
        network = self.module("dit_mlx" if model == "small" else "dit_mlx_medium").DiT(T_lat=frames)
        network.transformer.layers = network.transformer.layers[:depth]
        return _loaded(network, for_dit(weights))

    def same(self, model: str, half: str, weights: Weights, config: ModelConfig) -> Any:
        """Build the port's encoder or decoder with these weights."""
        kind = "s" if model == "small" else "l"
        module = self.module(f"same_{kind}_{half}")
        network = getattr(module, f"SAME{kind.upper()}{half.capitalize()}")()
        return _loaded(network, for_same(weights, half, config))


def _loaded(network: Any, weights: Weights) -> Any:
    """Put weights in place and check that they fit, which the port's own loader does not do."""
    from mlx.utils import tree_flatten

    network.load_weights(list(weights.items()), strict=False)
    found = dict(tree_flatten(network.parameters()))
    wrong = [name for name, array in weights.items() if name not in found or found[name].shape != array.shape]
    if wrong:
        raise ValueError(f"the port has no such weights any more: {', '.join(wrong[:5])}")
    mx.eval(network.parameters())
    return network


def frames_of(model: str, seconds: float) -> int:
    """Return latent frames by the port's own rule: as many as the duration needs, even for SAME-S."""
    frames = int(np.ceil(seconds * 44_100 / 4096))
    return frames + frames % 2 if model == "small" else frames


def config_of(model: str, depth: int | None) -> ModelConfig:
    """Return the configuration of a model, with fewer blocks of the DiT where ``depth`` is given."""
    config = PRESETS[MODELS[model]]
    if depth is None:
        return config
    diffusion = config.require_diffusion()
    return replace(config, diffusion=replace(diffusion, dit=replace(diffusion.dit, depth=depth)))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Hold CPU seconds by round and peak bytes, by side."""

    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    difference: float


def measure(sides: Sides, rounds: int) -> Measured:
    """Compare once, which warms up, then time both sides in turn, the first one of a round changing."""
    wanted, found = sides.check()
    difference = float(mx.linalg.norm((found - wanted).reshape(-1)) / mx.linalg.norm(wanted.reshape(-1)))
    del wanted, found
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    peaks: dict[str, int] = {}
    for number in range(1, rounds + 1):
        for side in ("ours", "peer") if number % 2 else ("peer", "ours"):
            run = sides.ours if side == "ours" else sides.peer
            mx.clear_cache()
            mx.reset_peak_memory()
            start = time.process_time()
            mx.eval(run(number))
            times[side].append(time.process_time() - start)
            peaks[side] = mx.get_peak_memory()
    return Measured(seconds=times, peaks=peaks, difference=difference)
