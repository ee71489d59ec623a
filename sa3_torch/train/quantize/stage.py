"""Tune for quantization: the DiT learns to say on the runtime's grid what it said in full precision [T9].

Teacher: the checkpoint itself. Student: the same DiT whose layers read as quantized values, with a straight-through
gradient; it starts from the weights that the recipe makes, by rounding or by GPTQ. Neither sounds nor captions are
needed: states come from the teacher's own runs over calibration prompts, some of them moved by one step of the
student's error. Everything but the quantized matrices stays as it is.

    loss = mean |v_student - v_teacher|^2 + end_weight mean |x - t v_student - end of the teacher's run|^2

Scales and biases follow the weights and are frozen for the last part of the run; those of GPTQ stay as they are.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import click
import torch
from torch import Tensor, nn

from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.quant.calibration import CalibrationPrompt, continued, read_prompts, requests, usual_prompts
from sa3_mlx.common.quant.format import Grid
from sa3_mlx.common.quant.recipes import find_recipe, layers_of
from sa3_mlx.common.quant.writer import Quantizer, VelocityReport, check_source, nearest, packed_before, write_quantized
from sa3_mlx.common.schema import ConfigError
from sa3_torch.dit import Conditioning, DiT
from sa3_torch.fake_quant import add_fake_quant, fake_quant, latent_weight
from sa3_torch.pipeline import Pipeline
from sa3_torch.train.run import parallel
from sa3_torch.train.run.command import RunOptions, report_made, stage_command
from sa3_torch.train.run.logs import save_sound
from sa3_torch.train.run.optimizers import Group, OptimizerConfig
from sa3_torch.train.run.options import FILE, MODEL
from sa3_torch.train.run.random import step_generator
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import Split, Stage, StageConfig
from sa3_torch.trajectory import State, visit

from .calibrate import gptq_starts, layer_at, sensitive_grids, velocity_at, velocity_error


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(StageConfig):
    """Hold the settings of ``sa3 train quantize``. A batch is so many states, of up to four clips each."""

    optimizer: OptimizerConfig
    recipe: str  # of ``sa3 quantize``: bits of every layer, and how the weights begin
    rounds: int  # runs over the calibration prompts, each with seeds of its own
    student_share: float  # of steps whose states are moved by the student's own error
    end_weight: float  # of the distance to the end of the teacher's run; guided runs have no such term
    frozen_share: float  # of the run, at its end, in which scales and biases stay as they are

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "rounds")
        check(self, 0, math.inf, "end_weight")
        check(self, 0, 1, "student_share", "frozen_share")
        if self.train.precision != "fp32":
            raise ConfigError(f"train.precision is {self.train.precision!r}: values of a grid need 'fp32'")


class QuantizeStage(Stage):
    """Tune a student on states of its teacher's runs."""

    name = "quantize"

    def __init__(self, folder: Path, config: QuantizeConfig, prompts: tuple[CalibrationPrompt, ...]) -> None:
        super().__init__()
        self.folder, self.config = folder, config
        self.recipe = find_recipe(config.recipe)
        if self.recipe.dit is None:
            raise ConfigError(f"recipe {config.recipe!r} leaves the DiT as it is: choose another, such as '4bit'")
        self.dit_recipe = self.recipe.dit
        self.storages = check_source(folder)
        # The student is a copy of its DiT: "auto" would be half precision on a GPU, or where memory is short.
        self.pipeline = Pipeline.load(folder, dtype="float32", device=str(self.device))
        self.model_config = self.pipeline.config
        self.paths = list(layers_of(self.model_config, "dit"))
        if not self.paths:
            raise ValueError(f"{self.model_config.name} has no layer that recipe {config.recipe} can quantize")
        rounds = (self._visited(prompts, number, held_out=False) for number in range(config.rounds))
        self.states = [self._with_context(state) for states in rounds for state in states]
        self.held_out = list(self._visited(prompts, 0, held_out=True))
        self.prompts = sum(len(run.items) for run in requests(prompts, self.model_config, held_out=True))
        self.teacher = cast(DiT, self.pipeline.load_part("dit"))
        self.grids = self._grids()
        self.student = self._student()
        self.model: nn.Module = self.student
        self.groups = {"student": Group(network=self.model, optimizer=config.optimizer)}
        self.rounded_error = self.start_error = velocity_error(self.student, self.held_out)
        if self.dit_recipe.method == "gptq":
            self._start_from_gptq()
        self.frozen_from = round((1 - config.frozen_share) * config.train.steps)

    # --- data ---------------------------------------------------------------------------------------------------------

    def _visited(self, prompts: tuple[CalibrationPrompt, ...], number: int, *, held_out: bool) -> Iterator[State]:
        """Yield the states of runs over the prompts; the first clips come twice, then with their first half kept."""
        first, *_ = runs = requests(prompts, self.model_config, held_out=held_out)
        for request in runs:
            items = tuple(replace(item, seed=item.seed + 10_000 * number) for item in request.items)
            run = replace(request, items=items)
            yield from visit(self.pipeline, run)
            if not held_out and request is first:
                yield from visit(self.pipeline, continued(run, self.pipeline.generate(run).audio))

    def _with_context(self, state: State) -> State:
        """Put zeros where there is no context: the same to the model, and every parameter has a part in every loss."""
        if state.cond.context is not None:
            return state
        seconds = state.cond.seconds  # (B, D)
        return replace(state, cond=replace(state.cond, context=torch.zeros_like(seconds)[:, None]))

    def data(self) -> tuple[Split, ...]:
        """Count states of the teacher's own runs."""
        rate = self.model_config.frames_per_second
        return tuple(
            Split(name=name, items=len(states), seconds=sum(s.x.shape[0] * s.x.shape[1] for s in states) / rate)
            for name, states in (("states", self.states), ("held-out states", self.held_out))
        )

    # --- the student --------------------------------------------------------------------------------------------------

    def _grids(self) -> dict[str, Grid]:
        """Return equal bits, or as many for each layer as the velocity asks for."""
        if self.dit_recipe.target is None:
            return dict.fromkeys(self.paths, self.dit_recipe.grid)
        return sensitive_grids(self.teacher, self.states, self.paths, self.storages, self.dit_recipe.target)

    def _student(self) -> DiT:
        """Copy the teacher; only the quantized matrices are trained."""
        student = copy.deepcopy(self.teacher).requires_grad_(False)
        for path, grid in self.grids.items():
            layer = layer_at(student, path)
            add_fake_quant(layer, bits=grid.bits, group=grid.group, storage=self.storages[path])
            latent_weight(layer).requires_grad_(True)
        return student

    @torch.no_grad()
    def _start_from_gptq(self) -> None:
        """Start from the values that GPTQ rounded, on its grid."""
        for path, packed, values in gptq_starts(self.teacher, self.states, self.grids, self.storages):
            layer = layer_at(self.student, path)
            fake_quant(layer).hold(packed)
            latent_weight(layer).copy_(torch.from_numpy(values))
        self.start_error = velocity_error(self.student, self.held_out)

    def _freeze(self) -> None:
        for path in self.grids:
            layer = layer_at(self.student, path)
            fake_quant(layer).freeze(parallel.whole(latent_weight(layer)))

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, step: int) -> dict[str, Tensor]:
        random, batch = step_generator(self.config.train.seed, step), self.config.train.batch
        rows = self.batch_slice.rows(batch)
        chosen = torch.randint(len(self.states), (batch,), generator=random)[rows]
        moved = float(torch.rand((), generator=random)) < self.config.student_share  # all of them: processes in step
        if step == self.frozen_from and self.dit_recipe.method == "nearest":
            self._freeze()
        errors, ends = [], []
        for index in chosen.tolist():
            state = self._moved(self.states[index]) if moved else self.states[index]
            velocity = velocity_at(self.student, state)
            errors.append(_over_valid((velocity - state.velocity).square(), state.cond))
            if state.end is not None:
                t = torch.from_numpy(state.t).to(velocity.device)[:, None, None]
                ends.append(_over_valid((state.x - t * velocity - state.end).square(), state.cond))
        terms = {"velocity": torch.stack(errors).mean()}
        if ends:
            terms["end"] = self.weighted("end", self.config.end_weight, torch.stack(ends).mean())
        return terms

    @torch.no_grad()
    def _moved(self, state: State) -> State:
        """Return the state that the student would come to instead, by its error over one step, with the teacher's
        velocity."""
        step = 1 / self.model_config.usual_sampling.steps
        moved = replace(state, x=state.x + step * (velocity_at(self.student, state) - state.velocity))
        return replace(moved, velocity=velocity_at(self.teacher, moved))

    # --- validation and export ----------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Return the error on runs of other prompts, that of rounding without tuning, and where tuning began."""
        error = velocity_error(self.student, self.held_out)
        return {
            "velocity_error": error,
            "snr_db": -20 * math.log10(error),
            "rounded_error": self.rounded_error,
            "start_error": self.start_error,
        }

    @torch.no_grad()
    def demo(self, folder: Path, step: int) -> None:
        """Write the end of a run that was not trained on, as the teacher and as the student sees it, one after the
        other."""
        if not parallel.is_first():
            return
        state = next(s for s in reversed(self.held_out) if s.cond is self.held_out[0].cond)
        t = torch.from_numpy(state.t).to(state.x.device)[:, None, None]
        same = self.pipeline.autoencoder("decoder")
        sounds = [
            same.decode(state.x - t * velocity).flatten(0, 1)
            for velocity in (state.velocity, velocity_at(self.student, state))
        ]
        save_sound(
            folder / f"{step:06d}.wav",
            torch.cat(sounds).float().cpu().numpy(),
            self.model_config.sample_rate,
            title=f"step {step}: end of a run, as the teacher and as the student sees it",
        )

    @torch.no_grad()
    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:  # noqa: ARG002 (the student holds them too)
        """Write a quantized checkpoint whose packed weights are the values of the forward pass."""
        quantizers: dict[str, Quantizer] = {}
        grids: dict[str, Grid] = {}
        for part, recipe in self.recipe.parts().items():
            for path in layers_of(self.model_config, part):
                grids[path] = recipe.grid
                quantizers[path] = partial(nearest, grid=recipe.grid)
        for path, grid in self.grids.items():
            layer = layer_at(self.student, path)
            grids[path] = grid
            quantizers[path] = partial(packed_before, packed=fake_quant(layer).packed(latent_weight(layer)))
        steps = sorted({state.index for state in self.held_out})
        velocity = VelocityReport(
            prompts=self.prompts,
            error=velocity_error(self.student, self.held_out),
            nearest_error=self.rounded_error,
            error_per_step=tuple(
                velocity_error(self.student, [s for s in self.held_out if s.index == step]) for step in steps
            ),
        )
        write_quantized(
            self.folder,
            folder,
            recipe=f"{self.config.recipe}-qat",
            grids=grids,
            quantizers=quantizers,
            velocity=velocity,
            force=True,
        )


def _over_valid(values: Tensor, cond: Conditioning) -> Tensor:
    """Average over the frames that are real."""
    if cond.valid is None:
        return values.mean()
    return (values.mean(-1) * cond.valid).sum() / cond.valid.sum()


@stage_command("quantize", preset="demo")
@click.option("--model", type=MODEL, required=True, help="The full-precision model.")
@click.option("--recipe", default=None, help="Recipe of `sa3 quantize` with equal bits. Default: the settings'.")
@click.option(
    "--calibration",
    type=FILE,
    default=None,
    help="File of prompts, one a line: SECONDS TEXT. Every fourth serves validation.",
)
def quantize(run: RunOptions, model: Path, recipe: str | None, calibration: Path | None) -> None:
    """Tune a model for few bits by distillation from itself (quantization-aware tuning)."""
    config = run.settings(QuantizeConfig, "quantize", *(() if recipe is None else (f"recipe={recipe}",)))
    prompts = (
        read_prompts(calibration) if calibration else usual_prompts(open_tokenizer(model, ModelConfig.load(model)))
    )
    stage = QuantizeStage(model, config, prompts)
    asked = hashlib.sha256(repr(prompts).encode("utf-8")).hexdigest()
    belongings = {"model": file_hash(model / WEIGHTS_FILE), "prompts": f"sha256:{asked}"}
    if run.train(stage, config, belongings):
        report_made("model", run.out / "model", "generate", "PROMPT", "--model", run.out / "model")
