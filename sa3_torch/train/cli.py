"""The ``sa3 train`` commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import torch

from sa3_mlx.spec.calibration import read_prompts, usual_prompts
from sa3_mlx.spec.clips import open_tokenizer
from sa3_mlx.spec.config import Config, ModelConfig
from sa3_mlx.spec.presets import PRESETS

from . import parallel
from .audio_data import open_audio
from .autoencoder import AutoencoderStage
from .autoencoder_config import AutoencoderConfig
from .distill_autoencoder import DistillConfig, DistillStage
from .encode import load_autoencoder
from .latents import LatentSet
from .loop import Trainer
from .pretrain import PretrainConfig, PretrainStage
from .quantize import QuantizeConfig, QuantizeStage
from .settings import load_settings, to_json
from .stage import Stage, TrainConfig
from .start import Start
from .vocabulary import save_tokenizer

FOLDER = click.Path(path_type=Path, file_okay=False)
AUDIO = "Clip cache made by `sa3 data render` or `sa3 data import`, or shards: a folder, an index, a URL, {0..9}.tar."


def _start(threads: int | None) -> None:
    """Before anything else: join the other processes of torchrun, if any."""
    if threads is not None:
        torch.set_num_threads(threads)
    parallel.start()


def _train(stage: Stage, train: TrainConfig, out: Path, settings_json: str) -> bool:
    """True in the first process when the run is finished."""
    finished, first = Trainer(stage, train, out, settings_json).run(), parallel.is_first()
    parallel.finish()
    return finished and first


def _kept(config: Config, *, data: str, start: str = "", teacher: str = "") -> str:
    """Settings of a run, with hashes of what it must go on with, where there is such a thing."""
    hashes = {"data": data, "start": start, "teacher": teacher}
    return json.dumps({**config.to_dict(), **{name: value for name, value in hashes.items() if value}}, sort_keys=True)


@click.command("autoencoder")
@click.option("--data", metavar="FOLDER|URL", required=True, help=AUDIO)
@click.option("--out", type=FOLDER, required=True, help="Run folder; an unfinished run in it goes on.")
@click.option("--model", default="demo", show_default=True, type=click.Choice(sorted(PRESETS)))
@click.option("--start", "folder", type=FOLDER, default=None,
              help="Checkpoint folder to begin with; its stride may be another one than the model's.")  # fmt: skip
@click.option("--stride", type=click.IntRange(1), default=None, help="Patches per latent. Default: the model's.")
@click.option("--settings", default="demo", show_default=True, help="Preset name or .toml file.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=100.")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads.")
def autoencoder(
    data: str, out: Path, model: str, folder: Path | None, stride: int | None, settings: str,
    changes: tuple[str, ...], threads: int | None,
) -> None:  # fmt: skip
    """Train a SAME autoencoder (stage 0)."""
    _start(threads)
    config = load_settings(AutoencoderConfig, "autoencoder", settings, changes)
    start, audio = None if folder is None else Start.open(folder), open_audio(data, out)
    sizes = PRESETS[model]
    sizes = replace(sizes, same=replace(sizes.same, stride=stride or sizes.same.stride))
    stage = AutoencoderStage(sizes, config, audio.clips, shards=audio.shards, start=start)
    if _train(stage, config.train, out, _kept(config, data=audio.digest, start=start.digest if start else "")):
        click.echo(f"autoencoder: {out / 'model'}; next: sa3 pre-encode --autoencoder {out / 'model'} --data {data}")


@click.command("distill-autoencoder")
@click.option("--data", metavar="FOLDER|URL", required=True, help=AUDIO)
@click.option("--teacher", type=FOLDER, required=True, help="Checkpoint folder with the large autoencoder.")
@click.option("--out", type=FOLDER, required=True, help="Run folder; an unfinished run in it goes on.")
@click.option("--model", default="demo", show_default=True, type=click.Choice(sorted(PRESETS)))
@click.option("--settings", default="tiny", show_default=True, help="Preset name or .toml file.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=100.")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads.")
def distill_autoencoder(
    data: str, teacher: Path, out: Path, model: str, settings: str, changes: tuple[str, ...], threads: int | None
) -> None:
    """Train a small autoencoder for the latents of a large one."""
    _start(threads)
    config = load_settings(DistillConfig, "distill-autoencoder", settings, changes)
    audio = open_audio(data, out)
    stage = DistillStage(PRESETS[model], config, audio.clips, teacher, shards=audio.shards)
    if _train(stage, config.train, out, _kept(config, data=audio.digest, teacher=stage.digest)):
        click.echo(f"autoencoder: {out / 'model'}; it reads and writes the latents of {teacher}")


@click.command("pretrain")
@click.option("--latents", type=FOLDER, required=True, help="Folder made by `sa3 pre-encode`.")
@click.option("--autoencoder", "folder", type=FOLDER, required=True, help="The autoencoder that made the latents.")
@click.option("--tokenizer", type=click.Path(path_type=Path, dir_okay=False, exists=True), default=None,
              help="tokenizer.json; without it the closed vocabulary of the demo sounds.")  # fmt: skip
@click.option("--out", type=FOLDER, required=True, help="Run folder; an unfinished run in it goes on.")
@click.option("--model", default="demo", show_default=True, type=click.Choice(sorted(PRESETS)))
@click.option("--settings", default="demo", show_default=True, help="Preset name or .toml file.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=100.")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads.")
def pretrain(
    latents: Path, folder: Path, tokenizer: Path | None, out: Path, model: str, settings: str,
    changes: tuple[str, ...], threads: int | None,
) -> None:  # fmt: skip
    """Train a diffusion model by flow matching (stage 1)."""
    _start(threads)
    config = load_settings(PretrainConfig, "pretrain", settings, changes)
    same, digest = load_autoencoder(folder)
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        tokenizer = out / "tokenizer.json"
        if parallel.is_first():
            save_tokenizer(tokenizer)
        parallel.wait()
    stage = PretrainStage(PRESETS[model], config, LatentSet(latents, autoencoder=digest), tokenizer, same)
    if _train(stage, config.train, out, to_json(config)):
        click.echo(f'model: {out / "model"}; next: sa3 generate "piano note A4" --model {out / "model"}')


@click.command("quantize")
@click.option("--model", "folder", type=FOLDER, required=True, help="Folder of the full-precision model.")
@click.option("--recipe", default=None, help="Recipe of `sa3 quantize` with equal bits. Default: the settings'.")
@click.option("--calibration", type=click.Path(path_type=Path, dir_okay=False, exists=True), default=None,
              help="File of prompts, one a line: SECONDS TEXT. Every fourth serves validation.")  # fmt: skip
@click.option("--out", type=FOLDER, required=True, help="Run folder; an unfinished run in it goes on.")
@click.option("--settings", default="demo", show_default=True, help="Preset name or .toml file.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=100.")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads.")
def quantize(
    folder: Path, recipe: str | None, calibration: Path | None, out: Path, settings: str, changes: tuple[str, ...],
    threads: int | None,
) -> None:  # fmt: skip
    """Tune a model for few bits by distillation from itself (quantization-aware tuning)."""
    _start(threads)
    if recipe is not None:
        changes = (*changes, f"recipe={recipe}")
    config = load_settings(QuantizeConfig, "quantize", settings, changes)
    prompts = (
        read_prompts(calibration) if calibration else usual_prompts(open_tokenizer(folder, ModelConfig.load(folder)))
    )
    stage = QuantizeStage(folder, config, prompts)
    if _train(stage, config.train, out, to_json(config)):
        click.echo(f"model: {out / 'model'}; next: sa3 generate PROMPT --model {out / 'model'}")


def commands() -> dict[str, click.Command]:
    """Name -> command, for the ``sa3 train`` group."""
    listed = (autoencoder, distill_autoencoder, pretrain, quantize)
    return {command.name or "": command for command in listed}
