"""Make a smaller checkpoint of a checkpoint: ``sa3 quantize``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sa3_mlx.cli.backend import choose
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.output import CommonOptions
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.report import first_command
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common import terminal
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.installed import Model, models_folder
from sa3_mlx.common.quant.calibration import CalibrationPrompt, read_prompts, usual_prompts
from sa3_mlx.common.quant.recipes import GROUP, RECIPES, PartRecipe, Recipe, find_recipe, layers_of_recipe

if TYPE_CHECKING:
    from tqdm import tqdm

KEEP = "keep"
_PARTS = {"dit": ("--recipe", "DiT"), "text_encoder": ("--text-encoder", "text encoder"), "same": ("--codec", "codec")}


@click.command(cls=TypedCommand)
@click.argument("model", metavar="MODEL")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--recipe", required=True, type=click.Choice(list(RECIPES)), help="How the DiT is quantized.")
@click.option("--text-encoder", type=click.Choice([KEEP, *RECIPES]), help="Another recipe for it. Default: 8 bits.")
@click.option("--codec", type=click.Choice([KEEP, *RECIPES]), help="Another recipe for it. Default: the recipe's.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="File of prompts, one a line: SECONDS TEXT. Every fourth serves judging alone.",
)
def quantize(
    model: str,
    out: Path | None,
    recipe: str,
    text_encoder: str | None,
    codec: str | None,
    calibration: Path | None,
    common: CommonOptions,
) -> None:
    """Quantize MODEL, an installed model or a folder, to the folder OUT.

    Without OUT it is installed as MODEL-RECIPE. A quantized model needs less memory and loads sooner; on M1 to M4 it
    does not compute faster. The report is printed and stored as quantization.json.

    \b
    sa3 quantize medium --recipe 8bit
    sa3 quantize demo demo-small --recipe 4bit-gptq
    """
    choose("mlx")
    from sa3_mlx.quantize import QuantizeOptions, quantize_model

    found = find_model(model, generates=False)
    progress = Progress(quiet=common.quiet)
    asked = {"dit": recipe, "text_encoder": text_encoder, "same": codec}
    chosen, name = _combined(recipe, text_encoder, codec)
    _check_parts(found, chosen, asked, progress)
    prompts: tuple[CalibrationPrompt, ...] = ()
    if found.config.diffusion is not None:
        prompts = (
            read_prompts(calibration) if calibration else usual_prompts(open_tokenizer(found.folder, found.config))
        )
    options = QuantizeOptions(
        source=found.folder,
        out=out or models_folder() / f"{Path(model).name}-{recipe}",
        name=name,
        recipe=chosen,
        prompts=prompts,
        force=common.force,
    )
    with _Bars(progress) as bars:
        report = quantize_model(options, bars.show)
    terminal.report(f"{report}\n  next {first_command(options.out)}")


def _combined(recipe: str, text_encoder: str | None, codec: str | None) -> tuple[Recipe, str]:
    """Return the recipe with other parts for text encoder and codec, and what it is called then."""
    chosen, name = find_recipe(recipe), recipe
    if text_encoder is not None:
        part = None if text_encoder == KEEP else _nearest(text_encoder, "--text-encoder")
        chosen, name = dataclasses.replace(chosen, text_encoder=part), f"{name}, text encoder {text_encoder}"
    if codec is not None:
        part = None if codec == KEEP else _nearest(codec, "--codec")
        chosen, name = dataclasses.replace(chosen, same=part), f"{name}, codec {codec}"
    return chosen, name


def _check_parts(model: Model, recipe: Recipe, asked: Mapping[str, str | None], progress: Progress) -> None:
    """Raise ValueError for a part that was asked for and has no layer to quantize; say that one not asked for stays."""
    for part, layers in layers_of_recipe(model.config, recipe).items():
        if layers or (model.config.diffusion is None and part == "dit"):
            continue
        option, words = _PARTS[part]
        reason = f"{model.name} has no layer in its {words} whose rows groups of {GROUP} fill"
        if asked[part]:
            raise ValueError(f"{option} {asked[part]}: {reason}; choose another model, or leave it out")
        if model.config.diffusion is not None:
            progress.line(f"note: {reason}: it stays as it is")


def _nearest(name: str, option: str) -> PartRecipe:
    """Return the DiT's part of a recipe for another part, which has no calibration. Raises ValueError."""
    part = find_recipe(name).dit
    if part is None or part.measures:
        raise ValueError(f"{option} {name}: only rounding to nearest (8bit, 6bit, 5bit, 4bit, 3bit) works there")
    return part


class _Bars:
    """Show one progress bar for everything that is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, tqdm] = {}

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, what: str, done: int, total: int) -> None:
        if what not in self._bars:
            self._bars[what] = self._progress.bar(what, total, "")
        self._bars[what].update(done - self._bars[what].n)
