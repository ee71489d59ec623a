"""Measure how good a model is: ``sa3 evaluate``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sa3_mlx.cli import backend
from sa3_mlx.cli.home import find_model
from sa3_mlx.common.terminal import one_line, report, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from sa3_mlx.common.generation.pipeline import BasePipeline
    from sa3_torch.evaluate.comparison import Entry
    from sa3_torch.evaluate.measures.flow import FlowLosses
    from sa3_torch.evaluate.real import Prompts
    from sa3_torch.train.data.clip_cache import ClipSet

FOLDER = click.Path(path_type=Path, file_okay=False)
CLIPS = 384


@dataclass(frozen=True, kw_only=True)
class _Models:
    """Open every model once."""

    backend: backend.Backend
    device: str
    opened: dict[str, BasePipeline[Any]]

    def pipeline(self, name: str) -> BasePipeline[Any]:
        if name not in self.opened:
            folder = find_model(name, generates=True).folder
            self.opened[name] = backend.load(folder, self.backend, device=self.device)
        return self.opened[name]

    def entries(self, text: str, samplings: tuple[str, ...]) -> list[Entry]:
        """Return MODEL with every sampling, or with its usual one; MODEL@SAMPLER:STEPS:GUIDANCE with that one."""
        from sa3_mlx.common.model.sampling import Sampling
        from sa3_torch.evaluate.comparison import Entry

        name, _, own = text.partition("@")
        pipeline = self.pipeline(name)
        chosen = [own] if own else list(samplings)
        found = [Sampling.parse(sampling) for sampling in chosen] or [pipeline.config.usual_sampling]
        label = Path(name).parent.name if Path(name).name == "model" else Path(name).name
        return [Entry(name=label, pipeline=pipeline, sampling=sampling) for sampling in found]


@click.command()
@click.argument("model", metavar="MODEL[@SETTING]")
@click.option("--data", type=FOLDER, required=True, help="Clip cache made by `sa3 data render` or `sa3 data import`.")
@click.option(
    "--latents",
    type=FOLDER,
    default=None,
    help="Made by `sa3 pre-encode` with the model's autoencoder: adds the flow-matching loss.",
)
@click.option(
    "--setting",
    "samplings",
    multiple=True,
    metavar="SAMPLER:STEPS:GUIDANCE[:APG]",
    help="Such as euler:50:3; repeatable. Default: the model's own.",
)
@click.option(
    "--against", multiple=True, metavar="MODEL[@SETTING]", help="Another model for the same table; repeatable."
)
@click.option(
    "--teacher",
    default=None,
    metavar="MODEL@SETTING",
    help="Adds the error of one step against what this model makes of the same noise.",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Repetitions.")
@click.option("--clips", type=click.IntRange(2), default=CLIPS, show_default=True, help="Sounds of a repetition.")
@click.option(
    "--prompts",
    type=click.Choice(["held-out", "training"]),
    default="held-out",
    show_default=True,
    help="training: to choose between recipes without a look at the held-out prompts.",
)
@click.option("--inpaint", type=click.IntRange(0), default=32, show_default=True, help="Clips to inpaint; 0: none.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Sounds made at once.")
@click.option("--clap", type=FOLDER, default=None, help="Folder of a CLAP in the transformers layout: a second space.")
@click.option(
    "--latent-clap",
    type=FOLDER,
    default=None,
    help="Made by `sa3 train clap` on such latents: adherence to prompts of any kind.",
)
@click.option("--backend", "wanted", type=click.Choice(["auto", *backend.BACKENDS]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="For PyTorch: auto, cpu, cuda.")
@click.option("--out", type=FOLDER, required=True, help="Folder of report.json, report.txt and report.png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def evaluate(
    model: str,
    data: Path,
    latents: Path | None,
    samplings: tuple[str, ...],
    against: tuple[str, ...],
    teacher: str | None,
    seeds: int,
    clips: int,
    prompts: Prompts,
    inpaint: int,
    batch: int,
    clap: Path | None,
    latent_clap: Path | None,
    wanted: str,
    device: str,
    out: Path,
    as_json: bool,
) -> None:
    """Measure how good MODEL is on prompts of DATA, held-out ones by default.

    Frechet distance, adherence to prompts, diversity, nearness to training clips, inpainting, and with --latents the
    flow-matching loss, as a table.

    \b
    sa3 evaluate demo --data sounds --setting euler:50:3 --setting euler:8:1 --out evaluation
    """
    if find_spec("torch") is None or find_spec("scipy") is None:
        raise click.ClickException("evaluation needs the training extra: pip install 'sa3[train]'")
    from sa3_torch.evaluate.comparison import compare, compare_one_step
    from sa3_torch.evaluate.judge.judge import Judge
    from sa3_torch.evaluate.measures.analysis import Analyser
    from sa3_torch.evaluate.measures.features import ClapSpace
    from sa3_torch.evaluate.real import analyse_real, real_count
    from sa3_torch.evaluate.report import report as summarise
    from sa3_torch.evaluate.report import save_report, table
    from sa3_torch.evaluate.run import EvaluateOptions, Evaluator
    from sa3_torch.train.clap.network import LatentClap
    from sa3_torch.train.data.clip_cache import ClipSet

    models = _Models(backend=backend.choose(wanted, device), device=device, opened={})
    entries = [entry for name in (model, *against) for entry in models.entries(name, samplings)]
    guide = None if teacher is None else _teacher(models, teacher)
    sounds, options = ClipSet(data), EvaluateOptions(prompts=prompts, clips=clips, batch=batch, inpaint=inpaint)
    analyser = Analyser(judge=Judge(), spaces=[] if clap is None else [ClapSpace(clap)])
    first, latent_space = entries[0].pipeline, None
    if latent_clap is not None:
        for entry in entries:  # one that was trained on latents of another autoencoder is refused
            latent_space = LatentClap.load(latent_clap, autoencoder=entry.pipeline.folder)
    flow = {} if latents is None else _flow(models, entries, latents, sounds)
    with _bar("real clips", real_count(sounds, first.config, prompts, clips)) as advance:
        real = analyse_real(analyser, first, sounds, prompts, clips, clap=latent_space, advance=advance)
    evaluator, rows = Evaluator(analyser, real, sounds, options, latent_space), []
    errors: dict[str, list[float]] = {}
    if guide is not None:
        with _bar("one step", seeds * clips * (1 + len({entry.name for entry in entries}))) as advance:
            errors = compare_one_step(entries, guide, evaluator, seeds, advance)
    for entry in entries:
        with _bar(entry.label, seeds * evaluator.count()) as advance:
            rows.append(compare(evaluator, entry, seeds, advance))
        found = summarise(rows, real, options, seeds, flow, errors, None if guide is None else guide.label)
        save_report(out, found)  # after every row: a long table can be stopped
    report(json.dumps(found) if as_json else table(found))
    say(f"stored in {out}")


def _teacher(models: _Models, text: str) -> Entry:
    if "@" not in text:
        raise click.UsageError(
            f"--teacher is {text!r}: expected MODEL@SAMPLER:STEPS:GUIDANCE[:APG] such as base@euler:50:3"
        )
    return models.entries(text, ())[0]


def _flow(models: _Models, entries: list[Entry], folder: Path, sounds: ClipSet) -> dict[str, FlowLosses]:
    """Return the loss of every model, by name; computed with PyTorch whatever the backend."""
    from sa3_torch.evaluate.measures.flow import TorchFlow, flow_losses
    from sa3_torch.evaluate.stored import check_latents, open_latents, split_latents
    from sa3_torch.pipeline import Pipeline as TorchPipeline

    latents, found = open_latents(folder), {}
    diffusion = entries[0].pipeline.config.diffusion
    assert diffusion is not None  # find_model asked for it
    held_out, training = split_latents(latents, diffusion.max_frames)
    for name, pipeline in {entry.name: entry.pipeline for entry in entries}.items():
        check_latents(latents, sounds, pipeline)
        with _bar(f"{name}: loss", len(held_out)) as advance:
            twin = TorchPipeline.load(pipeline.folder, dtype="float32", device=models.device)
            found[name] = flow_losses(TorchFlow(twin), held_out, training, advance=advance)
    return found


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=one_line(name), unit="clip", mininterval=1.0) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
