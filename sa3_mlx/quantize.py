"""Quantize a checkpoint by a recipe, with what its methods need to know from runs of the model.

Shapes: B batch, T latent frames, C latent channels, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.quant.affine import Float, Packed, Storage, dequantize, round_to
from sa3_mlx.common.quant.calibration import SENSITIVITY_STATES, CalibrationPrompt, continued, requests
from sa3_mlx.common.quant.format import Grid
from sa3_mlx.common.quant.gptq import gptq, passes
from sa3_mlx.common.quant.recipes import GROUP, MIXED_BITS, Recipe, choose_bits, layers_of_recipe
from sa3_mlx.common.quant.writer import (
    Quantizer,
    QuantizeReport,
    VelocityReport,
    check_source,
    check_target,
    nearest,
    packed_before,
    write_quantized,
)
from sa3_mlx.runtime import mx, nn

from .dit import Conditioning, Context, DiT, DiTBlock, Prepared
from .dit import Sequence as Tokens
from .pipeline import Pipeline
from .trajectory import State, visit

Progress = Callable[[str, int, int], None]  # what is done, done so far, in all


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Say where from, where to and how."""

    source: Path
    out: Path
    name: str  # of the recipe
    recipe: Recipe
    prompts: tuple[CalibrationPrompt, ...]  # to calibrate on and to judge by
    force: bool


def quantize_model(options: QuantizeOptions, progress: Progress) -> QuantizeReport:
    """Quantize the checkpoint ``source`` to the folder ``out``.

    Raises FileNotFoundError, and ValueError for a source that is quantized, for an ``out`` that is in the way and for a
    recipe that finds no layer.
    """
    check_target(options.out, force=options.force)
    storages = check_source(options.source)
    pipeline = Pipeline.load(options.source)
    config = pipeline.config
    layers = layers_of_recipe(config, options.recipe)
    if not any(layers.values()):
        raise ValueError(f"{config.name}: recipe {options.name} finds no layer whose rows groups of {GROUP} fill")
    grids = {path: options.recipe.parts()[part].grid for part, paths in layers.items() for path in paths}
    quantizers: dict[str, Quantizer] = {}
    velocity = None
    if layers.get("dit"):
        calibration = _DiTCalibration(pipeline, options, storages, progress)
        grids |= calibration.grids(layers["dit"])
        quantizers = calibration.quantizers({path: grids[path] for path in layers["dit"]})
        velocity = calibration.judge({path: grids[path] for path in layers["dit"]}, quantizers)
        pipeline.free("dit")
    quantizers = {path: partial(nearest, grid=grid) for path, grid in grids.items()} | quantizers
    return write_quantized(
        options.source,
        options.out,
        recipe=options.name,
        grids=grids,
        quantizers=quantizers,
        velocity=velocity,
        force=options.force,
    )


class _DiTCalibration:
    """Run the full-precision model and derive what follows from its runs: sensitivities, Hessians, errors."""

    def __init__(
        self, pipeline: Pipeline, options: QuantizeOptions, storages: Mapping[str, Storage], progress: Progress
    ) -> None:
        self.pipeline, self.options, self.storages, self.progress = pipeline, options, storages, progress
        recipe = options.recipe.dit
        assert recipe is not None
        self.recipe = recipe
        self.states = list(self._visited(held_out=False)) if recipe.measures else []
        self.held_out = list(self._visited(held_out=True))
        self.dit = cast(DiT, pipeline.load_part("dit"))

    def _visited(self, *, held_out: bool) -> Iterator[State]:
        """Yield the states of the runs that judge, or of the others; one run of the others keeps half of its clips."""
        runs = requests(self.options.prompts, self.pipeline.config, held_out=held_out)
        for number, request in enumerate(runs):
            self.progress("judging runs" if held_out else "calibration runs", number, len(runs))
            yield from visit(self.pipeline, request)
            if number == 0 and not held_out:  # one run that keeps half of a clip, for the layers that see it
                yield from visit(self.pipeline, continued(request, self.pipeline.generate(request).audio))
        self.progress("judging runs" if held_out else "calibration runs", len(runs), len(runs))

    def grids(self, layers: Mapping[str, tuple[int, ...]]) -> dict[str, Grid]:
        """Return the grid of the recipe for all layers, or one for each by what it does to the velocity."""
        if self.recipe.target is None:
            return dict.fromkeys(layers, self.recipe.grid)
        chosen = self.states[:: max(1, len(self.states) // SENSITIVITY_STATES)]
        damage: dict[str, dict[int, float]] = {}
        for number, path in enumerate(layers):
            self.progress("sensitivities", number, len(layers))
            weight = _weight(self.dit, path)
            damage[path] = {}
            for bits in MIXED_BITS:
                packed = nearest(weight, self.storages[path], grid=Grid(bits=bits, group=GROUP))
                with _substituted(self.dit, {path: dequantize(packed, "F32")}):
                    damage[path][bits] = _error(self.dit, chosen) ** 2
        self.progress("sensitivities", len(layers), len(layers))
        return choose_bits(damage, {path: math.prod(shape) for path, shape in layers.items()}, self.recipe.target)

    def quantizers(self, grids: Mapping[str, Grid]) -> dict[str, Quantizer]:
        """Return the quantizer of every layer. Those of GPTQ are done here, as their Hessians are large."""
        if self.recipe.method == "nearest":
            return {path: partial(nearest, grid=grid) for path, grid in grids.items()}
        done: dict[str, Packed] = {}
        for paths in passes({path: _layer(self.dit, path).weight.shape[1] for path in grids}):
            for path, hessian in hessians(self.dit, self.states, paths).items():
                self.progress("gptq", len(done), len(grids))
                grid, storage = grids[path], self.storages[path]
                weight = round_to(_weight(self.dit, path), storage)
                done[path] = gptq(weight, hessian, bits=grid.bits, group=grid.group, storage=storage)
        self.progress("gptq", len(grids), len(grids))
        return {path: partial(packed_before, packed=packed) for path, packed in done.items()}

    def judge(self, grids: Mapping[str, Grid], quantizers: Mapping[str, Quantizer]) -> VelocityReport:
        """Measure velocity errors on runs that were not calibrated on, of this method and of rounding to nearest."""
        values = self._values(quantizers)
        steps = sorted({state.index for state in self.held_out})
        with _substituted(self.dit, values):
            error = _error(self.dit, self.held_out)
            by_step = tuple(_error(self.dit, [s for s in self.held_out if s.index == step]) for step in steps)
        rounded = None
        if self.recipe.method != "nearest":
            plain = {path: partial(nearest, grid=grid) for path, grid in grids.items()}
            with _substituted(self.dit, self._values(plain)):
                rounded = _error(self.dit, self.held_out)
        runs = requests(self.options.prompts, self.pipeline.config, held_out=True)
        return VelocityReport(
            prompts=sum(len(run.items) for run in runs), error=error, error_per_step=by_step, nearest_error=rounded
        )

    def _values(self, quantizers: Mapping[str, Quantizer]) -> dict[str, Float]:
        """Return the weights that each layer will have."""
        return {
            path: dequantize(quantizer(_weight(self.dit, path), self.storages[path]), "F32")
            for path, quantizer in quantizers.items()
        }


def evaluate(dit: DiT, states: Iterable[State]) -> Iterator[tuple[State, mx.array]]:
    """Yield the velocities (B, T, C) that this DiT gives at states of another one."""
    last: tuple[Conditioning, Prepared] | None = None
    for state in states:
        if last is None or last[0] is not state.cond:
            last = (state.cond, dit.prepare(state.cond))
        yield state, dit(state.x, state.t, last[1]).astype(mx.float32)


def _error(dit: DiT, states: Sequence[State]) -> float:
    """Return the relative L2 error of the velocities over all states."""
    sums = [
        (mx.square(velocity - state.velocity).sum(), mx.square(state.velocity).sum())
        for state, velocity in evaluate(dit, sorted(states, key=lambda state: id(state.cond)))
    ]
    mx.eval(sums)
    return math.sqrt(sum(float(a) for a, _ in sums) / sum(float(b) for _, b in sums))


def hessians(dit: DiT, states: Sequence[State], paths: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return the sum of x x^T over the inputs x of each layer, in all states: (I, I) by path.

    Raises ValueError for a layer that no state runs through.
    """
    watches = {path: InputProducts(_layer(dit, path)) for path in paths}
    blocks, last = cast(list[nn.Module], dit.layers), dit.layers[-1]
    try:
        for path, watch in watches.items():
            _put(dit, path, watch)
        blocks[-1] = _WholeBlock(last)
        for _, velocity in evaluate(dit, sorted(states, key=lambda state: id(state.cond))):
            mx.eval(velocity, [watch.total for watch in watches.values()])
    finally:
        blocks[-1] = last
        for path, watch in watches.items():
            _put(dit, path, watch.layer)
    unseen = [path for path, watch in watches.items() if not watch.rows]
    if unseen:
        raise ValueError(f"calibration never ran through {', '.join(unseen)}")
    return {path: np.array(watch.total).astype(np.float64) for path, watch in watches.items()}


class InputProducts(nn.Module):
    """Sum the outer products of the inputs of a linear map."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.rows = layer, 0
        self.total = mx.zeros((layer.weight.shape[1], layer.weight.shape[1]))

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.rows += len(flat)
        self.total = self.total + flat.T @ flat
        return self.layer(x)


class _WholeBlock(nn.Module):
    """Run the last block without its shortcut, which takes rows of a matrix past the layer that owns it."""

    def __init__(self, block: DiTBlock) -> None:
        super().__init__()
        self.block = block
        self.cross_attn, self.local_embed = block.cross_attn, block.local_embed  # what ``DiT.prepare`` runs

    def __call__(
        self,
        x: mx.array,
        modulation: mx.array,
        context: Context | None,
        local: mx.array | None,
        sequence: Tokens,
        last: bool = False,
    ) -> mx.array:
        out = self.block(x, modulation, context, local, sequence)
        return out[:, sequence.memory :] if last else out


def _layer(dit: DiT, path: str) -> nn.Linear:
    """Return the layer of a checkpoint path such as "dit.layers.0.ff.proj_in"."""
    parent, name = _place(dit, path)
    return parent[name]


def _place(dit: DiT, path: str) -> tuple[Any, str]:
    parent: Any = dit
    *names, last = path.split(".")[1:]
    for name in names:
        parent = parent[int(name)] if name.isdigit() else parent[name]
    return parent, last


def _put(dit: DiT, path: str, layer: nn.Module) -> None:
    parent, name = _place(dit, path)
    parent[name] = layer


def _weight(dit: DiT, path: str) -> Float:
    return np.array(_layer(dit, path).weight.astype(mx.float32))


@contextmanager
def _substituted(dit: DiT, values: Mapping[str, Float]) -> Iterator[None]:
    """Put other weights into some layers of the DiT."""
    before = {path: _layer(dit, path).weight for path in values}
    try:
        for path, value in values.items():
            _layer(dit, path).weight = mx.array(value)
        yield
    finally:
        for path, weight in before.items():
            _layer(dit, path).weight = weight
