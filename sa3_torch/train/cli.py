"""The ``sa3 train`` commands, listed in ``sa3_mlx/cli/train/stages.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch

from sa3_mlx.common.adapters.format import ADAPTER_FILE, ADAPTER_TYPES
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.quant.calibration import read_prompts, usual_prompts
from sa3_mlx.common.schema import Config
from sa3_torch.train.autoencoder.config import AutoencoderConfig
from sa3_torch.train.autoencoder.distill import DistillConfig, DistillStage
from sa3_torch.train.autoencoder.stage import AutoencoderStage
from sa3_torch.train.autoencoder.start import Start
from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.clap.stage import ClapConfig, ClapStage
from sa3_torch.train.data.audio_data import open_audio
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.data.pre_encode import load_autoencoder
from sa3_torch.train.demo_set.vocabulary import save_tokenizer
from sa3_torch.train.few_steps.ode_warmup import WarmupConfig, WarmupStage
from sa3_torch.train.few_steps.posttrain import PosttrainConfig, PosttrainStage
from sa3_torch.train.few_steps.shared import autoencoder_of
from sa3_torch.train.flow.pretrain import PretrainConfig, PretrainStage
from sa3_torch.train.lora.stage import LoraConfig, LoraStage
from sa3_torch.train.quantize.stage import QuantizeConfig, QuantizeStage
from sa3_torch.train.run.command import FOLDER, MODEL, RunOptions, run_options
from sa3_torch.train.run.loop import Trainer
from sa3_torch.train.run.planning.plan import Device, make_plan
from sa3_torch.train.run.settings import load_settings, to_json
from sa3_torch.train.run.stage import Stage, TrainConfig

from .run import parallel

FindModel = Callable[[str], Path]  # an installed model's name, or a path -> its folder
AUDIO = "Clip cache made by `sa3 data render` or `sa3 data import`, or shards: a folder, an index, a URL, {0..9}.tar."
LATENTS = click.option(
    "--latents",
    type=FOLDER,
    multiple=True,
    required=True,
    help="Folder made by `sa3 pre-encode`; repeatable, then mixed by the kinds in clips.shares.",
)
AUTOENCODER = "The autoencoder that made the latents, where the model does not record it."


def _start() -> RunOptions:
    """Before anything else: join the other processes of torchrun, if any."""
    run = RunOptions.given()
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    parallel.start()
    return run


def _train(stage: Stage, train: TrainConfig, run: RunOptions, settings_json: str) -> bool:
    """True in the first process when the run is finished. A dry run prints its plan and is refused if it cannot be."""
    if run.dry_run is not None:
        asked = run.dry_run
        device = Device.find(asked.device)
        plan = make_plan(stage, train, processes=asked.processes, device=device, timed=asked.timed)
        click.echo(str(plan))
        plan.check()
        return False
    finished, first = Trainer(stage, train, run.out, settings_json).run(), parallel.is_first()
    parallel.finish()
    return finished and first


def _kept(config: Config, *, data: str, start: str = "", teacher: str = "", stride: int | None = None) -> str:
    """Settings of a run, with what else it must go on with, hashes mostly, where there is such a thing."""
    more = {"data": data, "start": start, "teacher": teacher, "stride": stride}
    return json.dumps({**config.to_dict(), **{name: value for name, value in more.items() if value}}, sort_keys=True)


@click.command("autoencoder")
@click.option("--data", metavar="FOLDER|URL", required=True, help=AUDIO)
@click.option("--model", default="demo", show_default=True, type=click.Choice(sorted(PRESETS)))
@click.option(
    "--start",
    "folder",
    type=MODEL,
    default=None,
    help="Checkpoint folder to begin with; its stride may be another one than the model's.",
)
@click.option("--stride", type=click.IntRange(1), default=None, help="Patches per latent. Default: the model's.")
@run_options()
def autoencoder(data: str, model: str, folder: Path | None, stride: int | None) -> None:
    """Train a SAME autoencoder (stage 0)."""
    run = _start()
    config = load_settings(AutoencoderConfig, "autoencoder", run.settings, run.changes)
    start, audio = None if folder is None else Start.open(folder), open_audio(data, run.out)
    sizes = PRESETS[model]
    sizes = replace(sizes, same=replace(sizes.same, stride=stride or sizes.same.stride))
    stage = AutoencoderStage(sizes, config, audio.clips, shards=audio.shards, start=start)
    kept = _kept(config, data=audio.digest, start=start.digest if start else "", stride=stride)
    if _train(stage, config.train, run, kept):
        made = run.out / "model"
        click.echo(f"autoencoder: {made}; next: sa3 pre-encode --autoencoder {made} --data {data}")


@click.command("distill-autoencoder")
@click.option("--data", metavar="FOLDER|URL", required=True, help=AUDIO)
@click.option("--teacher", type=MODEL, required=True, help="The large autoencoder, or a model with it.")
@click.option("--model", default="demo", show_default=True, type=click.Choice(sorted(PRESETS)))
@run_options(settings="tiny")
def distill_autoencoder(data: str, teacher: Path, model: str) -> None:
    """Train a small autoencoder for the latents of a large one."""
    run = _start()
    config = load_settings(DistillConfig, "distill-autoencoder", run.settings, run.changes)
    audio = open_audio(data, run.out)
    stage = DistillStage(PRESETS[model], config, audio.clips, teacher, shards=audio.shards)
    if _train(stage, config.train, run, _kept(config, data=audio.digest, teacher=stage.digest)):
        click.echo(f"autoencoder: {run.out / 'model'}; it reads and writes the latents of {teacher}")


@click.command("pretrain")
@LATENTS
@click.option("--autoencoder", "folder", type=MODEL, required=True, help="The autoencoder that made the latents.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    default=None,
    help="tokenizer.json; else that of --start, else the closed vocabulary of the demo sounds.",
)
@click.option(
    "--start",
    type=MODEL,
    default=None,
    help="Checkpoint whose weights, or text encoder (setting start), are the beginning.",
)
@click.option("--model", default="demo", show_default=True, type=click.Choice(sorted(PRESETS)))
@run_options()
def pretrain(latents: tuple[Path, ...], folder: Path, tokenizer: Path | None, start: Path | None, model: str) -> None:
    """Train a diffusion model by flow matching (stage 1)."""
    run = _start()
    config = load_settings(PretrainConfig, "pretrain", run.settings, run.changes)
    same, digest = load_autoencoder(folder)
    run.out.mkdir(parents=True, exist_ok=True)
    if tokenizer is None and start is not None:
        tokenizer = start / "tokenizer.json"
    elif tokenizer is None:
        tokenizer = run.out / "tokenizer.json"
        if parallel.is_first():
            save_tokenizer(tokenizer)
        parallel.wait()
    stage = PretrainStage(PRESETS[model], config, LatentSet(*latents, autoencoder=digest), tokenizer, same, start)
    if _train(stage, config.train, run, to_json(config)):
        click.echo(f'model: {run.out / "model"}; next: sa3 generate "piano note A4" --model {run.out / "model"}')


@click.command("lora")
@click.option("--model", "name", metavar="NAME|PATH", required=True, help="The base model.")
@LATENTS
@click.option("--autoencoder", type=MODEL, default=None, help=AUTOENCODER)
@click.option("--type", "kind", type=click.Choice(ADAPTER_TYPES), default=None, help="Default: the settings'.")
@click.option("--rank", type=click.IntRange(1), default=None, help="Alpha becomes equal. Default: the settings'.")
@run_options()
@click.pass_obj
def lora(
    find: FindModel, name: str, latents: tuple[Path, ...], autoencoder: Path | None, kind: str | None, rank: int | None
) -> None:
    """Teach a model new sounds by an adapter: LoRA, DoRA, BoRA and their -xs forms."""
    run, base = _start(), find(name)
    changes = run.changes if kind is None else (*run.changes, f"adapter.type={kind}")
    changes = changes if rank is None else (*changes, f"adapter.rank={rank}", f"adapter.alpha={rank}")
    config = load_settings(LoraConfig, "lora", run.settings, changes)
    stage = LoraStage(base, config, latents, autoencoder)
    if _train(stage, config.train, run, json.dumps({**config.to_dict(), **stage.parents()}, sort_keys=True)):
        made = run.out / "model" / ADAPTER_FILE
        click.echo(f"adapter: {made}; next: sa3 generate PROMPT --model {name} --lora {made}")


@click.command("clap")
@click.option(
    "--model", "name", metavar="NAME|PATH", required=True, help="A model on these latents; it gives the text encoder."
)
@LATENTS
@click.option("--autoencoder", type=MODEL, default=None, help=AUTOENCODER)
@run_options()
@click.pass_obj
def clap(find: FindModel, name: str, latents: tuple[Path, ...], autoencoder: Path | None) -> None:
    """Train a model of how well texts describe latents, noisy ones too (latent CLAP)."""
    run, folder = _start(), find(name)
    config = load_settings(ClapConfig, "clap", run.settings, run.changes)
    made_with = autoencoder_of(folder, load_autoencoder(folder)[0], autoencoder)
    stage = ClapStage(folder, config, LatentSet(*latents, autoencoder=made_with))
    kept = json.dumps({**config.to_dict(), "model": file_hash(folder / WEIGHTS_FILE)}, sort_keys=True)
    if _train(stage, config.train, run, kept):
        click.echo(f"latent CLAP: {run.out / 'model'}")


@click.command("warmup")
@click.option("--model", "name", metavar="NAME|PATH", required=True, help="The flow-matching model.")
@LATENTS
@click.option("--autoencoder", type=MODEL, default=None, help=AUTOENCODER)
@run_options()
@click.pass_obj
def warmup(find: FindModel, name: str, latents: tuple[Path, ...], autoencoder: Path | None) -> None:
    """Teach a model to reach its guided samples in one step (stage 2)."""
    run, folder = _start(), find(name)
    config = load_settings(WarmupConfig, "warmup", run.settings, run.changes)
    stage = WarmupStage(folder, config, latents, autoencoder)
    if _train(stage, config.train, run, json.dumps({**config.to_dict(), **stage.parents()}, sort_keys=True)):
        click.echo(f"model: {run.out / 'model'}; next: sa3 train posttrain --model {run.out / 'model'} --base {name}")


@click.command("posttrain")
@click.option("--model", "name", metavar="NAME|PATH", required=True, help="The model of `sa3 train warmup`.")
@click.option("--base", metavar="NAME|PATH", required=True, help="The flow-matching model.")
@LATENTS
@click.option(
    "--clap",
    "clap_folder",
    type=FOLDER,
    default=None,
    help="Latent CLAP of `sa3 train clap`; without it set weights.clap=0.",
)
@click.option("--autoencoder", type=MODEL, default=None, help=AUTOENCODER)
@run_options()
@click.pass_obj
def posttrain(
    find: FindModel, name: str, base: str, latents: tuple[Path, ...], clap_folder: Path | None, autoencoder: Path | None
) -> None:
    """Make a model good in few steps, without guidance (stage 3)."""
    run, folder, teacher = _start(), find(name), find(base)
    config = load_settings(PosttrainConfig, "posttrain", run.settings, run.changes)
    clap, hashes = None, {}
    if clap_folder is not None:
        clap = LatentClap.load(clap_folder, autoencoder=teacher, device=str(parallel.own_device()))
        hashes["clap"] = file_hash(clap_folder / WEIGHTS_FILE)
    stage = PosttrainStage(folder, teacher, config, latents, clap, autoencoder)
    kept = {**config.to_dict(), **stage.parents(), **hashes}
    if _train(stage, config.train, run, json.dumps(kept, sort_keys=True)):
        click.echo(f'model: {run.out / "model"}; next: sa3 generate "piano note A4" --model {run.out / "model"}')


@click.command("quantize")
@click.option("--model", "name", metavar="NAME|PATH", required=True, help="The full-precision model.")
@click.option("--recipe", default=None, help="Recipe of `sa3 quantize` with equal bits. Default: the settings'.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    default=None,
    help="File of prompts, one a line: SECONDS TEXT. Every fourth serves validation.",
)
@run_options()
@click.pass_obj
def quantize(find: FindModel, name: str, recipe: str | None, calibration: Path | None) -> None:
    """Tune a model for few bits by distillation from itself (quantization-aware tuning)."""
    run, folder = _start(), find(name)
    changes = run.changes if recipe is None else (*run.changes, f"recipe={recipe}")
    config = load_settings(QuantizeConfig, "quantize", run.settings, changes)
    prompts = (
        read_prompts(calibration) if calibration else usual_prompts(open_tokenizer(folder, ModelConfig.load(folder)))
    )
    stage = QuantizeStage(folder, config, prompts)
    if _train(stage, config.train, run, to_json(config)):
        click.echo(f"model: {run.out / 'model'}; next: sa3 generate PROMPT --model {run.out / 'model'}")
