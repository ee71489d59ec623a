"""Time a step of stage 0, and tell the network, the losses and the networks beside it apart.

The same step runs with more and more terms switched on; a part costs the difference. All variants take turns, the
median over the rounds counts.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from benchmarks.options import show
from sa3_mlx.common.model.presets import PRESETS
from sa3_torch.train.autoencoder.stage import AutoencoderConfig, AutoencoderStage
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.run.optimizers import take_turn
from sa3_torch.train.run.planning.count import trained_of
from sa3_torch.train.run.settings import load_settings

_NO_SEMANTICS = (
    "semantics.alignment_weight=0.0",
    "semantics.regressors_weight=0.0",
    "semantics.critic_weight=0.0",
)
_NO_GAME = ("adversarial.weight=0.0", "adversarial.feature_weight=0.0")
_SPECTRAL = ("spectral_start=0.0", "spectral_full=0.0")


@dataclass(frozen=True, kw_only=True)
class StepVariant:
    """Describe a step with some of the terms, by ``changes`` of the settings."""

    name: str
    changes: tuple[str, ...]
    step: int = 0  # even: the generator's


def variants(settings: AutoencoderConfig) -> list[StepVariant]:
    """List steps from the network without losses to every term, and last the discriminators' own step."""
    semantics = _NO_SEMANTICS if settings.semantics is not None else ()
    game = _NO_GAME if settings.adversarial is not None else ()
    found = [
        StepVariant(name="network", changes=("spectral_start=1.0", "spectral_full=1.0", *semantics, *game)),
        StepVariant(name="spectral", changes=(*_SPECTRAL, *semantics, *game)),
    ]
    if semantics:
        found.append(StepVariant(name="semantic", changes=(*_SPECTRAL, "semantics.detached_steps=0", *game)))
    if game:
        all_terms = (*found[-1].changes[: -len(game)], "adversarial.start_step=0")
        found.append(StepVariant(name="adversarial", changes=all_terms))
        found.append(StepVariant(name="discriminators", changes=all_terms, step=1))
    return found


def seconds_of(stage: AutoencoderStage, step: int) -> float:
    """Time losses and gradients of the group whose turn it is, the batch included."""
    take_turn(trained_of(stage), stage.turn(step))
    begun = time.perf_counter()
    loss = torch.stack(list(stage.losses(step).values())).sum()
    loss.backward()
    float(loss.detach())  # waits for a GPU
    taken = time.perf_counter() - begun
    for group in stage.groups.values():
        group.network.zero_grad(set_to_none=True)
    return taken


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="Folder made by `sa3 data render` or `sa3 data import`.",
)
@click.option("--model", default="first", show_default=True, type=click.Choice(sorted(PRESETS)))
@click.option("--settings", default="tiny", show_default=True, help="Preset or .toml file of `sa3 train autoencoder`.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one setting.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads.")
def train_step(
    data: Path, model: str, settings: str, changes: tuple[str, ...], rounds: int, threads: int | None
) -> None:
    """Time a step of stage 0 by its parts, and count samples a second. The last line is JSON."""
    if threads is not None:
        torch.set_num_threads(threads)
    clips = ClipSet(data)
    chosen = variants(load_settings(AutoencoderConfig, "autoencoder", settings, changes))
    configs = [load_settings(AutoencoderConfig, "autoencoder", settings, (*changes, *x.changes)) for x in chosen]
    stages = [AutoencoderStage(PRESETS[model], config, clips) for config in configs]
    for stage, config in zip(stages, configs, strict=True):
        stage.precision = "fp32" if config.train.precision == "auto" else config.train.precision
    taken: list[list[float]] = [[] for _ in chosen]
    for number in range(rounds + 1):
        for variant, stage, times in zip(chosen, stages, taken, strict=True):
            seconds = seconds_of(stage, variant.step)
            if number:  # the first round compiles and warms up
                times.append(seconds)
    totals = dict(zip((variant.name for variant in chosen), map(statistics.median, taken), strict=True))
    config = configs[0]
    result: dict[str, object] = {f"{name}_seconds": value for name, value in parts_of(totals).items()}
    generator = [value for name, value in totals.items() if name != "discriminators"][-1]  # with every term
    result["generator_seconds"] = generator
    result["crops_per_second"] = config.train.batch / generator
    result["audio_seconds_per_second"] = (
        config.train.batch * config.crop_samples / PRESETS[model].sample_rate / generator
    )
    show(result)
    about = {
        "model": model,
        "settings": settings,
        "changes": changes,
        "precision": stages[0].precision,
        "batch": config.train.batch,
        "crop_samples": config.crop_samples,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "device": str(stages[0].device),
    }
    click.echo(json.dumps({**about, **result}))


def parts_of(totals: dict[str, float]) -> dict[str, float]:
    """Return what each variant costs more than the one before it; the discriminators' step is one of its own."""
    found, before = {}, 0.0
    for name, total in totals.items():
        found[name] = total if name == "discriminators" else total - before
        before = total
    return found
