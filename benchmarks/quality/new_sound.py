"""Judge an adapter on prompts of its new sound and on the old ones: ``python -m benchmarks new-sound``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.options import MODEL, SamplingChoice, show
from sa3_mlx.cli.adapters import open_adapters, parse_lora
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.models.measure import snr_db
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.quant.calibration import CalibrationPrompt, read_prompts
from sa3_mlx.common.schema import ConfigError
from sa3_mlx.pipeline import Pipeline
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.judge.training import train_classifier
from sa3_torch.evaluate.prompts import JudgedPrompt, held_out_prompts, sounds
from sa3_torch.evaluate.real import audio_of
from sa3_torch.pipeline import Pipeline as TorchPipeline
from sa3_torch.train.data.clip_cache import ClipSet

NEW = "user"  # label of all clips that `sa3 data import` makes
SAME_STEPS = 8  # of the comparison of the ways to compute it


@dataclass(frozen=True, kw_only=True)
class SoundRun:
    """Say which sounds are made and how."""

    sampling: Sampling
    seeds: int
    data_seed: int

    def heard(self, pipeline: Pipeline, prompts: list[JudgedPrompt], judge: Judge) -> dict[str, Any]:
        """Return ``Judge.evaluate`` of all prompts and seeds."""
        made = sounds(pipeline, prompts, sampling=self.sampling, seeds=self.seeds)
        return judge.evaluate(list(made))


def new_prompts(lines: Sequence[CalibrationPrompt]) -> list[JudgedPrompt]:
    """Ask for the new sound in each of these lines."""
    return [
        JudgedPrompt(caption=line.text, kind=NEW, label=NEW, instrument=None, midi=None, seconds=line.seconds)
        for line in lines
    ]


def measure(
    folder: Path,
    adapters: tuple[Applied, ...],
    run: SoundRun,
    prompts: dict[str, list[JudgedPrompt]],
    judge: Judge,
    clips: ClipSet,
) -> dict[str, Any]:
    """Measure the share of sounds that are as asked, with the adapter and without, of all groups and the old prompts.

    ``clips`` are recordings of the new sound: "new_real" and "new_rebuilt" are the held-out ones, and the same after
    encoding and decoding.
    """
    plain, adapted = Pipeline.load(folder), Pipeline.load(folder, adapters=adapters)
    old = held_out_prompts(run.data_seed)
    before, after = (run.heard(pipeline, old, judge) for pipeline in (plain, adapted))
    channels = plain.config.audio_channels
    real = [(audio_of(clips, clip, channels), clip) for clip in clips.select("validation")]
    rebuilt = [(plain.decode(plain.encode(audio))[: len(audio)], clip) for audio, clip in real]
    return {
        **{f"new_{name}": run.heard(adapted, group, judge)["class"] for name, group in prompts.items()},
        **{f"new_{name}_without": run.heard(plain, group, judge)["class"] for name, group in prompts.items()},
        "new_real": judge.evaluate(real)["class"],
        "new_rebuilt": judge.evaluate(rebuilt)["class"],
        **{f"old_{name}": after[name] for name in ("class", "all", "notes_pitch", "drums_class")},
        **{f"old_{name}_without": before[name] for name in ("class", "all", "notes_pitch", "drums_class")},
        "old_class_lost_points": 100 * (before["class"] - after["class"]),
        "old_confused": after["confused"],
    }


def same_audio(
    folder: Path, adapters: tuple[Applied, ...], run: SoundRun, prompts: list[JudgedPrompt]
) -> dict[str, float]:
    """Return the least SNR, dB, of the ways to compute it against the first one, unmerged in MLX, over the prompts."""
    items = tuple(Item(prompt=prompt.caption, seconds=prompt.seconds, seed=1) for prompt in prompts)
    request = Request(items=items, sampling=replace(run.sampling, steps=SAME_STEPS))
    reference = Pipeline.load(folder, adapters=adapters).generate(request).audio
    found = {}
    for name, load, merged in (
        ("mlx_merged", Pipeline.load, True),
        ("torch", TorchPipeline.load, False),
        ("torch_merged", TorchPipeline.load, True),
    ):
        audio = load(folder, adapters=adapters, merged=merged).generate(request).audio
        found[f"snr_{name}"] = min(snr_db(a, b) for a, b in zip(reference, audio, strict=True))
    return found


FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command(cls=TypedCommand)
@MODEL
@click.option("--lora", metavar="FILE[:STRENGTH[:FROM-TO]]", required=True, help="The adapter.")
@click.option("--sounds", "old", type=FOLDER, required=True, help="Folder made by `sa3 data render`.")
@click.option("--new", type=FOLDER, required=True, help="Folder made by `sa3 data import`: the new sound.")
@click.option(
    "--prompts",
    "files",
    type=FILE,
    multiple=True,
    required=True,
    help="Prompts of the new sound, each with its length before it; a file is a group.",
)
@click.option("--seeds", type=click.IntRange(1), default=8, show_default=True, help="Sounds per prompt.")
@click.option("--data-seed", type=int, default=0, show_default=True, help="Seed of `sa3 data render`.")
def new_sound(
    model: str,
    lora: str,
    old: Path,
    new: Path,
    files: tuple[Path, ...],
    choice: SamplingChoice,
    seeds: int,
    data_seed: int,
) -> None:
    """Measure what an adapter taught a demo model, and what it took from it."""
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"--prompts are {', '.join(map(str, files))}: their names, which the groups are called by, "
            "must differ; rename one"
        )
    found = find_model(model, generates=True)
    adapters = open_adapters([parse_lora(lora)], found.config)
    own, prompts = ClipSet(new), {file.stem: new_prompts(read_prompts(file)) for file in files}
    empty = [str(file) for file in files if not prompts[file.stem]]
    if empty or not own.select("validation"):
        raise ConfigError(
            f"{', '.join(empty) or new}: nothing to measure with; expected prompts in every file and "
            "held-out clips of the new sound; import more of them"
        )
    sampling = choice.resolved(found.config.usual_sampling)
    run = SoundRun(sampling=sampling, seeds=seeds, data_seed=data_seed)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "judge.npz"
        train_classifier([ClipSet(old), own], weights, seed=0)
        result = measure(found.folder, adapters, run, prompts, Judge(weights), own)
    result |= same_audio(found.folder, adapters, run, next(iter(prompts.values())))
    show(result)
    about = {"model": found.label, "seeds": seeds, "sampling": sampling.to_dict()}
    click.echo(json.dumps({**about, **result}))
