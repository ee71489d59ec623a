"""Find the noise levels behind ``--strength`` for a model: ``sa3 calibrate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from sa3_mlx.cli import backend
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.atomic import write_text
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.installed import DEMO_FOLDER, Model
from sa3_mlx.common.measures.strength import Changes, fit, measure_changes, runs
from sa3_mlx.common.model.checkpoint import CONFIG_FILE
from sa3_mlx.common.model.dial import NOTCHES, SCHEDULES, Dial, Schedule
from sa3_mlx.common.quant.calibration import read_prompts, requests, usual_prompts
from sa3_mlx.common.terminal import report


@click.command(cls=TypedCommand)
@click.argument("model_name", metavar="MODEL")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="File of prompts, one a line: SECONDS TEXT. Every fourth only judges. Default: music and effects.",
)
@click.option("--dry-run", is_flag=True, help="Measure and print; leave the model as it is.")
@click.option("--backend", "chosen", type=click.Choice(["auto", *backend.BACKENDS]), default="auto", show_default=True)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
def calibrate(model_name: str, prompts: Path | None, dry_run: bool, chosen: str, quiet: bool) -> None:
    """Find which noise levels make MODEL's variations change in equal steps, for --strength.

    The model varies sounds that it made itself, at many noise levels and by every schedule. What is found goes into
    its config.json. Prompts that the dial was not found on tell how well it holds.

    \b
    sa3 calibrate small-music
    sa3 vary take.wav "marimba note A4" --strength 0.3
    """
    found = find_model(model_name, generates=True)
    if found.folder == DEMO_FOLDER and not dry_run:
        raise ValueError("the demo is part of the package and has its dial; --dry-run measures it again")
    texts = read_prompts(prompts) if prompts else usual_prompts(open_tokenizer(found.folder, found.config))
    asked = {held_out: requests(texts, found.config, held_out=held_out) for held_out in (False, True)}
    pipeline = backend.load(found.folder, backend.choose(chosen))
    with Progress(quiet=quiet).bar("measure", runs(len(asked[False])), "runs") as bar:
        dial = fit(measure_changes(pipeline, asked[False], advance=bar.update))
    held: dict[Schedule, NDArray[np.float64]] = {}
    with Progress(quiet=quiet).bar("judge", len(SCHEDULES) * runs(len(asked[True]), NOTCHES, 1), "runs") as bar:
        for name in SCHEDULES:
            held |= measure_changes(pipeline, asked[True], getattr(dial, name), [name], bar.update)
    _show(dial, held)
    if dry_run:
        report(f"dial   {json.dumps(dial.to_dict())}")
    else:
        _store(found, dial)


def _show(dial: Dial, held_out: Changes) -> None:
    """Print levels by strength and, of prompts that only judge, the change that they made, in percent."""
    report("strength  " + "".join(f"{name:>20}" for name in SCHEDULES))
    for notch in range(NOTCHES):
        cells = (f"{getattr(dial, name)[notch]:.3f} ({100 * held_out[name][notch]:.0f} %)" for name in SCHEDULES)
        report(f"{(notch + 1) / NOTCHES:8.1f}  " + "".join(f"{cell:>20}" for cell in cells))
    report("change goes from 0 %, the source through the autoencoder, to 100 %, a sound that knows nothing of it")
    worst = {name: 100 * _unevenness(held_out[name]) for name in SCHEDULES}
    best = min(worst, key=worst.__getitem__)
    report(f"evenest  {best}: off by {worst[best]:.0f} points at most on prompts that it was not found on")


def _unevenness(change: Sequence[float] | NDArray[np.float64]) -> float:
    """Return how far the change is from equal steps, at the worst notch."""
    return float(np.abs(np.asarray(change) - np.arange(1, NOTCHES + 1) / NOTCHES).max())


def _store(model: Model, dial: Dial) -> None:
    path = model.folder / CONFIG_FILE
    write_text(path, replace(model.config, dial=dial).to_json())
    report(f"file   {path}\nnext   sa3 vary SOUND.wav --model {model.name} --strength 0.5")
