"""Compare models at few evaluations of the network: ``python -m benchmarks few-steps``.

All make the same prompts from the same noise. Every row is stored when it is done, so that the command goes on where
it was stopped, and adds models to a table that is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks.options import BACKEND, RENDERED, open_pipeline
from sa3_mlx.common.files.atomic import new_file, write_json, write_text
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.terminal import show
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.measures.analysis import Analyser
from sa3_torch.evaluate.real import Prompts, asked_clips, audio_of
from sa3_torch.evaluate.run import ClipItem, clip_items
from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.data.clip_cache import CachedClip, ClipSet

from .rows import Float, Judges, Row, evaluations, generated, measure, parse_setting
from .table import markdown, summary

FEW = (1, 2, 4, 8)
FRONT = (  # what a model gives without further training
    *(f"euler:{steps}:1" for steps in (1, 2, 4, 8, 16, 50)),
    *(f"pingpong:{steps}:1" for steps in (2, 4, 8, 16)),
    *(f"dpmpp:{steps}:1" for steps in (2, 4, 8, 16)),
    *(f"euler:{steps}:{scale}:0" for scale in (2, 3, 4) for steps in (4, 8, 16)),
    "euler:50:3:0",
    "dpmpp:8:2:0",
    "dpmpp:16:2:0",
    "dpmpp:16:3:0,rescale=0.7",
    "dpmpp:16:3:0,interval=0.3-0.95",
    "dpmpp:16:3:0,rescale=0.7,interval=0.3-0.95",
)


class FewSteps:
    """Make the rows of one table in a folder."""

    def __init__(self, data: Path, folder: Path, prompts: Prompts, count: int, seeds: int, batch: int) -> None:
        self.clips, self.folder, self.batch = ClipSet(data), folder, batch
        self.prompts, self.count, self.seeds = prompts, count, seeds
        self.analyser = Analyser(judge=Judge(), spaces=[])
        self._details: Float | None = None

    def chosen(self, pipeline: BasePipeline[Any]) -> list[CachedClip]:
        """Return the real clips whose captions are asked for, at most ``count``."""
        found = asked_clips(self.clips, pipeline.config, self.prompts, self.count)
        return found[:: -(-len(found) // self.count)]

    def training(self) -> Float:
        """Return details of the training clips, in which copies are searched; computed once for a folder."""
        path = self.folder / "rows" / "training.npy"
        if self._details is None and path.is_file():
            self._details = np.load(path)
        if self._details is None:
            learnt = [clip for clip in self.clips.select("train") if clip.captions]
            bar = tqdm(learnt, desc="training clips", disable=None, delay=1)
            self._details = self.analyser.analyse((self.clips.read(clip), clip) for clip in bar).detail
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as partial, partial.open("wb") as file:
                np.save(file, self._details.astype(np.float32))
        return self._details

    def references(self, pipeline: BasePipeline[Any]) -> tuple[Row, Row]:
        """Return rows of the real clips, and of these after encoding and decoding."""
        chosen, channels = self.chosen(pipeline), pipeline.config.audio_channels
        found = []
        for name in ("real clips", "rebuilt"):
            path = self.folder / "rows" / f"{name.replace(' ', '-')}.json"
            if not path.is_file():
                sounds = ((audio_of(self.clips, clip, channels), clip) for clip in self._ordered(chosen))
                if name == "rebuilt":
                    sounds = ((pipeline.decode(pipeline.encode(x))[: len(x)], clip) for x, clip in sounds)
                measure(sounds, self.analyser, Judges(chosen), self.training(), name=name).write(path)
            found.append(Row.read(path))
        return found[0], found[1]

    def _ordered(self, chosen: list[CachedClip]) -> list[CachedClip]:
        """Return the clips in the order in which they are asked for."""
        return [item.clip for item in clip_items(chosen, len(chosen), 0)]

    def _items(self, chosen: list[CachedClip]) -> list[ClipItem]:
        return [item for seed in range(self.seeds) for item in clip_items(chosen, len(chosen), seed)]

    def row(self, pipeline: BasePipeline[Any], name: str, sampling: Sampling, text: str, clap: Path | None) -> Row:
        """Return the row of a model and a sampling, measured unless it is there."""
        weights = file_hash(Path(pipeline.folder) / WEIGHTS_FILE).removeprefix("sha256:")[:12]
        path = self.folder / "rows" / f"{weights}-{text.replace(':', '_')}.json"
        if not path.is_file():
            chosen = self.chosen(pipeline)
            items, kept = self._items(chosen), {"seconds": 0.0, "latents": []}
            sounds = generated(pipeline, items, sampling, self.batch, kept)
            bar = tqdm(sounds, desc=f"{name} {text}", total=len(items), disable=None, delay=1)
            made = measure(
                bar,
                self.analyser,
                Judges(chosen),
                self.training(),
                name=name,
                setting=text,
                count=evaluations(sampling, pipeline.config),
                clap=None if clap is None else LatentClap.load(clap, autoencoder=Path(pipeline.folder)),
                kept=kept,
            )
            made.write(path)
        return Row.read(path)


def named(text: str) -> tuple[str, str, list[str]]:
    """Split "NAME=MODEL@SETTING@SETTING" into how it is called in the table, where it is, and its settings."""
    name, equals, rest = text.partition("=")
    if not equals or "@" in name or "," in name:
        name, rest = "", text
    place, *settings = rest.split("@")
    folder = Path(place)
    return name or (folder.parent.name if folder.name == "model" else folder.name), place, settings


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]MODEL[@SETTING...]...")
@BACKEND
@RENDERED
@click.option("--front", is_flag=True, help="All samplers, steps and guidances, of models without a setting.")
@click.option("--prompts", type=click.Choice(["held-out", "training"]), default="held-out", show_default=True)
@click.option("--clips", type=click.IntRange(4), default=384, show_default=True, help="Prompts, at most.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Sounds of each.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--latent-clap", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Of `sa3 train clap`."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the table.")
def few_steps(
    models: tuple[str, ...],
    backend: str,
    data: Path,
    front: bool,
    prompts: Prompts,
    clips: int,
    seeds: int,
    batch: int,
    latent_clap: Path | None,
    out: Path,
) -> None:
    """Measure models at 1, 2, 4 and 8 evaluations, by their usual sampler or by SETTINGs such as pingpong:2:1.

    The first row is what others are compared with; a star marks a difference whose 95 % interval leaves zero out.

    \b
    python -m benchmarks few-steps base=demo@euler:8:1@euler:2:1 few=runs/posttrain/model --data sounds --out table
    """
    study, rows, references = FewSteps(data, out, prompts, clips, seeds, batch), [], None
    for text in models:
        name, place, settings = named(text)
        pipeline = open_pipeline(place, backend)
        references = references or study.references(pipeline)
        usual = [f"{pipeline.config.usual_sampling.sampler}:{steps}:1" for steps in FEW]
        for setting in settings or (FRONT if front else usual):
            rows.append(study.row(pipeline, name, parse_setting(setting), setting, latent_clap))
    assert references is not None  # at least one model is required
    real, rebuilt = references
    table = summary(rows, rebuilt, real)
    write_json(out / "table.json", table)
    write_text(out / "table.md", markdown(table) + "\n")
    show(markdown(table))
    show(json.dumps({"rows": len(rows), "sounds": len(rows[0].prompts), "table": str(out / "table.md")}))
