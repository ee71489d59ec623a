"""Quantization-aware tuning: the DiT learns to say on the runtime's grid what it said in full precision.

Teacher: the checkpoint itself. Student: the same DiT whose layers read as quantized values, with a straight-through
gradient. Neither sounds nor captions are needed: states come from the teacher's own runs over calibration prompts, some
of them moved by one step of the student's error. Everything but the quantized matrices stays as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from sa3_mlx.spec.affine import Float, Packed, Storage
from sa3_mlx.spec.calibration import Prompt, requests
from sa3_mlx.spec.config import Config, ConfigError
from sa3_mlx.spec.quantization import Grid
from sa3_mlx.spec.quantized_file import Quantizer, VelocityReport, check_source, nearest, write_quantized
from sa3_mlx.spec.recipes import find_recipe, layers_of
from sa3_mlx.spec.request import defaults
from sa3_torch.dit import Conditioning, DiT
from sa3_torch.fake_quant import add_fake_quant, latent_weight
from sa3_torch.pipeline import Pipeline
from sa3_torch.states import State, visit

from .logs import save_sound
from .optimizers import Group, OptimizerConfig
from .stage import Stage, TrainConfig, step_generator


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(Config):
    """Settings of ``sa3 train quantize``. A batch is so many states, of up to four clips each."""

    train: TrainConfig
    optimizer: OptimizerConfig
    recipe: str  # of ``sa3 quantize``; one that rounds to nearest with equal bits
    rounds: int  # runs over the calibration prompts, each with seeds of its own
    student_share: float  # of steps whose states are moved by the student's own error


class QuantizeStage(Stage):
    name = "quantize"

    def __init__(self, folder: Path, config: QuantizeConfig, prompts: tuple[Prompt, ...]) -> None:
        super().__init__()
        self.folder, self.config = folder, config
        self.recipe = find_recipe(config.recipe)
        if self.recipe.dit is None or self.recipe.dit.measures:
            raise ConfigError(f"recipe {config.recipe!r}: tuning starts from rounding with equal bits, such as '4bit'")
        self.storages = check_source(folder)
        self.pipeline = Pipeline.load(folder)
        self.model_config = self.pipeline.config
        self.grids = dict.fromkeys(layers_of(self.model_config, "dit"), self.recipe.dit.grid)
        if not self.grids:
            raise ValueError(f"{self.model_config.name} has no layer that recipe {config.recipe} can quantize")
        rounds = (self._visited(prompts, number, held_out=False) for number in range(config.rounds))
        self.states = [self._with_context(state) for states in rounds for state in states]
        self.held_out = list(self._visited(prompts, 0, held_out=True))
        self.prompts = sum(len(run.items) for run in requests(prompts, self.model_config, held_out=True))
        self.teacher = cast(DiT, self.pipeline.load_part("dit"))
        self.model: nn.Module = self._student()
        self.groups = {"student": Group(network=self.model, optimizer=config.optimizer)}
        self.rounded_error = self._error(self.held_out)

    def _visited(self, prompts: tuple[Prompt, ...], number: int, *, held_out: bool) -> Iterator[State]:
        for request in requests(prompts, self.model_config, held_out=held_out):
            items = tuple(replace(item, seed=item.seed + 10_000 * number) for item in request.items)
            yield from visit(self.pipeline, replace(request, items=items))

    def _with_context(self, state: State) -> State:
        """Zeros for no context are the same to the model, and every parameter has a part in every loss."""
        if state.cond.context is not None:
            return state
        seconds = state.cond.seconds  # (B, D)
        return replace(state, cond=replace(state.cond, context=torch.zeros_like(seconds)[:, None]))

    def _student(self) -> DiT:
        """The teacher's weights; the quantized matrices alone are trained."""
        student = copy.deepcopy(self.teacher).requires_grad_(False)
        for path, grid in self.grids.items():
            layer = self._layer(student, path)
            add_fake_quant(layer, bits=grid.bits, group=grid.group, storage=self.storages[path])
            latent_weight(layer).requires_grad_(True)
        return student

    @staticmethod
    def _layer(dit: nn.Module, path: str) -> nn.Linear:
        return cast(nn.Linear, dit.get_submodule(path.removeprefix("dit.")))

    def losses(self, step: int) -> dict[str, Tensor]:
        random, batch = step_generator(self.config.train.seed, step), self.config.train.batch
        rows = self.part.slice(batch)
        chosen = torch.randint(len(self.states), (batch,), generator=random)[rows]
        moved = float(torch.rand((), generator=random)) < self.config.student_share  # all of them: processes in step
        terms = []
        for index in chosen.tolist():
            state = self._moved(self.states[index]) if moved else self.states[index]
            error = (self._velocity(state) - state.velocity).square()
            terms.append(_over_valid(error, state.cond) / _over_valid(state.velocity.square(), state.cond))
        return {"velocity": torch.stack(terms).mean()}

    @torch.no_grad()
    def _moved(self, state: State) -> State:
        """The state that the student would come to instead, by its own error over one step; the teacher says more."""
        step = 1 / defaults(self.model_config).steps
        x = state.x + step * (self._velocity(state) - state.velocity)
        velocity = self.teacher(x, torch.from_numpy(state.t).to(x.device), self.teacher.prepare(state.cond))
        return replace(state, x=x, velocity=velocity)

    def _velocity(self, state: State) -> Tensor:
        dit = cast(DiT, self.model)
        velocity: Tensor = dit(state.x, torch.from_numpy(state.t).to(state.x.device), dit.prepare(state.cond))
        return velocity.float()

    @torch.no_grad()
    def _error(self, states: list[State]) -> float:
        """Relative L2 error of the student's velocities over these states."""
        wrong = sum(float((self._velocity(state) - state.velocity).square().sum()) for state in states)
        return math.sqrt(wrong / sum(float(state.velocity.square().sum()) for state in states))

    def validate(self) -> dict[str, float]:
        """Error on runs of other prompts, and that of rounding without tuning."""
        error = self._error(self.held_out)
        return {"velocity_error": error, "snr_db": -20 * math.log10(error), "rounded_error": self.rounded_error}

    @torch.no_grad()
    def demo(self, folder: Path, step: int) -> None:
        """The end of a run that was not trained on, as the teacher and as the student sees it, one after the other."""
        state = next(s for s in reversed(self.held_out) if s.cond is self.held_out[0].cond)
        t = torch.from_numpy(state.t).to(state.x.device)[:, None, None]
        same = self.pipeline.autoencoder("decoder")
        sounds = [
            same.decode(state.x - t * velocity).flatten(0, 1) for velocity in (state.velocity, self._velocity(state))
        ]
        save_sound(
            folder / f"{step:06d}.wav", torch.cat(sounds).float().cpu().numpy(), self.model_config.sample_rate,
            title=f"step {step}: end of a run, as the teacher and as the student sees it",
        )  # fmt: skip

    @torch.no_grad()
    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """A quantized checkpoint whose packed weights are the values of the forward pass."""
        quantizers: dict[str, Quantizer] = {}
        grids: dict[str, Grid] = {}
        for part, recipe in self.recipe.parts().items():
            for path in layers_of(self.model_config, part):
                grids[path] = recipe.grid
                quantizers[path] = partial(nearest, grid=recipe.grid)
        for path, grid in self.grids.items():
            weight = weights[f"{path.removeprefix('dit.')}.parametrizations.weight.original"].float().numpy()
            quantizers[path] = partial(_tuned, tuned=np.ascontiguousarray(weight), grid=grid)
        steps = sorted({state.index for state in self.held_out})
        velocity = VelocityReport(
            prompts=self.prompts, error=self._error(self.held_out), nearest_error=self.rounded_error,
            error_per_step=tuple(self._error([s for s in self.held_out if s.index == step]) for step in steps),
        )  # fmt: skip
        write_quantized(
            self.folder, folder, recipe=f"{self.config.recipe}-qat", grids=grids, quantizers=quantizers,
            velocity=velocity, force=True,
        )  # fmt: skip


def _tuned(weight: Float, storage: Storage, *, tuned: Float, grid: Grid) -> Packed:  # noqa: ARG001 (as every quantizer)
    return nearest(tuned, storage, grid=grid)


def _over_valid(values: Tensor, cond: Conditioning) -> Tensor:
    """Mean over the frames that are real."""
    return values.mean() if cond.valid is None else values[cond.valid].mean()
