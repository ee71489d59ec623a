"""Train latent CLAP: sounds and texts that belong together become close vectors [T6].

One step: pre-encoded latents with captions; half of them clean, the others with noise of a level from a scrambled Sobol
sequence; InfoNCE over the whole batch, whatever processes and micro-batches it is spread over. Clips with equal
captions belong together. The text encoder is that of a model folder and stays as it is.

Shapes: B batch, T latent frames, C latent channels, E size of the shared vectors. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import click
import torch
from torch import Tensor

from sa3_mlx.common.files.safetensors import file_hash, tensors_hash
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.installed import DEMO_FOLDER, name_of
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.config import LatentClapConfig, ModelConfig, TowerConfig
from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.data.batches import LatentBatch, LatentBatches, unknown_words
from sa3_torch.train.data.drawing import SharesConfig
from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.data.latents import LatentItem, LatentSet
from sa3_torch.train.flow.model import autoencoder_of
from sa3_torch.train.flow.path import interpolate
from sa3_torch.train.networks.init import seeded
from sa3_torch.train.run import parallel
from sa3_torch.train.run.command import RunOptions, report_made, stage_command
from sa3_torch.train.run.feed import BatchFeed
from sa3_torch.train.run.optimizers import Group, OptimizerConfig
from sa3_torch.train.run.options import AUTOENCODER, LATENTS, MODEL, UNGATED
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.plot import plot_matrix
from sa3_torch.train.run.random import Purpose, generator, item_noise, purpose_generator
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import Split, Stage, StageConfig

from .contrastive import alignment, draw_times, equal_pairs, info_nce, numbered, retrieval, uniformity
from .network import LatentClap, open_text_encoder

VALIDATION_TIMES = (0.0, 0.25, 0.5)
VALIDATION_ROUNDS = 4  # with another clip of every caption and other noise
Vectors = tuple[Tensor, Tensor]  # of sounds and of texts, (B, E) each


@dataclass(frozen=True, kw_only=True)
class ClapConfig(StageConfig):
    """Hold the settings of ``sa3 train clap``."""

    optimizer: OptimizerConfig
    tower: TowerConfig
    max_frames: int  # of longer clips a random part is taken
    buckets: int  # of similar lengths, one for each batch
    shares: SharesConfig
    noisy_share: float  # of the items
    alignment_weight: float
    uniformity_weight: float  # of sounds and of texts
    cross_weight: float  # of the uniformity between both
    validation_captions: int  # retrieval is among at most so many

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "max_frames", "buckets")
        check(self, 2, math.inf, "validation_captions")
        check(self, 0, 1, "noisy_share")
        check(self, 0, math.inf, "alignment_weight", "uniformity_weight", "cross_weight")
        if self.train.batch < 2:
            raise ConfigError(f"train.batch is {self.train.batch}: other clips of the batch are needed, at least 2")


@dataclass(frozen=True, kw_only=True)
class ClapDraw:
    """Hold what is drawn for a slice of the batch, but for the noise."""

    batch: LatentBatch
    t: Tensor  # (B,)
    names: Tensor  # (batch,) of the whole batch, equal for equal canonical captions
    texts: Tensor  # (batch,) the same of the texts that were drawn, as the text encoder reads them


class ClapData:
    """Draw the slices of a step, from training clips. ``feed`` reads them ahead."""

    def __init__(self, config: ClapConfig, batches: LatentBatches) -> None:
        self.config, self.batches = config, batches
        self.feed = BatchFeed(self.read)
        self._whole = lru_cache(2)(self._draw_whole)

    def read(self, step: int, part: BatchSlice) -> ClapDraw:
        """Read the clips of a slice on the CPU."""
        rows, (t, names, texts) = part.rows(self.config.train.batch), self._whole(step)
        return ClapDraw(batch=self.batches.batch(step, rows), t=t[rows], names=names, texts=texts)

    def _draw_whole(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise levels, which spread evenly over the whole batch, and the numbers of its captions and texts."""
        config, plan = self.config, self.batches.plan(step)
        random = purpose_generator(config.train.seed, Purpose.CLAP_TIMES, step)
        ids, _ = self.batches.texts(plan.texts)
        return (
            draw_times(len(plan.items), config.noisy_share, random),
            numbered(item.captions[0] for item in plan.items),
            numbered(row.tobytes() for row in ids.numpy()),
        )


class ClapStage(Stage):
    """Train on latents of the model ``base``, which gives the frozen text encoder and its tokenizer."""

    name = "clap"
    model: LatentClap
    feed: BatchFeed[ClapDraw]

    def __init__(self, base: Path, config: ClapConfig, latents: LatentSet) -> None:
        super().__init__()
        self.config, self.latents, self.tokenizer_file = config, latents, base / TOKENIZER_FILE
        model_config = ModelConfig.load(base)
        self.text_encoder = open_text_encoder(base, model_config)
        about = LatentClapConfig(
            tower=config.tower,
            latent_channels=latents.channels,
            text=self.text_encoder.config,
            autoencoder=tensors_hash(base / WEIGHTS_FILE, "same."),
            text_encoder=tensors_hash(base / WEIGHTS_FILE, "text_encoder."),
            max_frames=config.max_frames,
        )
        with seeded(config.train.seed):
            self.model = LatentClap(about, self.text_encoder, open_tokenizer(base, model_config)).to(self.device)
        self.groups = {"clap": Group(network=self.model, optimizer=config.optimizer)}
        self.batches = LatentBatches(
            latents,
            self.model.tokenizer,
            split="train",
            batch=config.train.batch,
            seed=config.train.seed,
            max_frames=config.max_frames,
            head_room_frames=0,
            buckets=config.buckets,
            multiple=config.tower.frames_per_token,
            shares=config.shares.to_dict(),
        )
        self.feed = ClapData(config, self.batches).feed
        self.rounds = self._rounds()
        self._kept: Vectors | None = None  # of the whole batch, before its micro-batches

    # --- data ---------------------------------------------------------------------------------------------------------

    def _rounds(self) -> list[list[LatentItem]]:
        """Choose one clip for each of some held-out captions; in every round another clip where there are several."""
        clips: dict[str, list[LatentItem]] = defaultdict(list)
        for item in self.latents.items:
            if item.split == "validation" and item.captions:
                clips[item.captions[0]].append(item)
        if len(clips) < 2:
            raise ValueError(f"{self.latents}: retrieval needs 2 held-out captions or more, got {len(clips)}")
        names, most = sorted(clips), self.config.validation_captions
        if len(names) > most:
            random = generator(self.config.train.seed, Purpose.CLAP_CAPTIONS)
            names = [names[i] for i in sorted(random.choice(len(names), most, replace=False))]
        return [[clips[name][turn % len(clips[name])] for name in names] for turn in range(VALIDATION_ROUNDS)]

    def data(self) -> tuple[Split, ...]:
        held_out = self.rounds[0]
        return tuple(
            Split(name=name, items=len(items), seconds=sum(item.seconds for item in items))
            for name, items in (("train", self.batches.items), ("validation", held_out))
        )

    def remarks(self) -> list[str]:
        return unknown_words(self.model.tokenizer, (*self.batches.items, *self.rounds[0]))

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, step: int) -> dict[str, Tensor]:
        """Return the terms of the whole batch, which this process knows; its own rows carry the gradient."""
        config, drawn = self.config, self.feed.get(step, self.batch_slice)
        audio, text = self._of_whole_batch(self._embed(drawn, step, self.batch_slice))
        names, texts = (x.to(self.device, non_blocking=True) for x in (drawn.names, drawn.texts))
        positives = equal_pairs(names, texts)
        scale, apart = self.model.scale, ~positives
        self.notes["measured/scale"] = scale.detach().mean()
        uniform = uniformity(audio, audio, apart) + uniformity(text, text, apart)
        terms = {
            "contrastive": (1.0, info_nce(audio, text, scale, positives)),
            "alignment": (config.alignment_weight, alignment(audio, text)),
            "uniformity": (config.uniformity_weight, uniform),
            "cross": (config.cross_weight, uniformity(audio, text, apart)),
        }
        return {name: self.weighted(name, weight, value) for name, (weight, value) in terms.items()}

    def prepare(self, step: int, slices: list[BatchSlice]) -> None:
        """Keep the vectors of the whole batch: each micro-batch has its gradient against all others."""
        audio, text = zip(*(self._embed(self.feed.get(step, each), step, each) for each in slices), strict=True)
        self._kept = self._gathered(torch.cat(audio)), self._gathered(torch.cat(text))

    def _embed(self, drawn: ClapDraw, step: int, part: BatchSlice) -> Vectors:
        """Embed a slice, with noise."""
        batch, train = drawn.batch.to(self.device), self.config.train
        t, valid = (x.to(self.device, non_blocking=True) for x in (drawn.t, batch.valid))
        shape = tuple(batch.latents.shape[1:])
        noise = item_noise(part.rows(train.batch), shape, train.seed, Purpose.CLAP_NOISE, step, self.device)
        with self.autocast():
            x = interpolate(batch.latents, noise, t)
            return self.model.embed_audio(x, valid, t), self.model.embed_text(batch.ids, batch.mask)

    def _of_whole_batch(self, own: Vectors) -> Vectors:
        """Put the rows of this slice among those of all, with a gradient that is the sum over what each slice says of
        them."""
        count = self.batch_slice.world
        if count == parallel.own_slice().world:  # no micro-batches
            return parallel.gather_rows(own[0]), parallel.gather_rows(own[1])
        kept = self._kept or (self._gathered(own[0].detach()), self._gathered(own[1].detach()))  # when only timed
        rows = self.batch_slice.rows(len(kept[0]))

        def put(whole: Tensor, part: Tensor) -> Tensor:
            part = part + (count - 1) * (part - part.detach())  # the mean over parts follows
            return torch.cat([whole[: rows.start], part, whole[rows.stop :]])

        return put(kept[0], own[0]), put(kept[1], own[1])

    def _gathered(self, rows: Tensor) -> Tensor:
        """Gather the rows of all processes; those of this one stand for others, which are missing in a plan."""
        found = parallel.gather_rows(rows)
        missing = self.config.train.batch // len(found)
        return found if missing == 1 else found.repeat(missing, 1)

    # --- validation and export ----------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Measure retrieval among held-out captions in both directions, by noise level; the scale; uniformity at level
        0."""
        sums: dict[str, float] = defaultdict(float)
        for turn in range(VALIDATION_ROUNDS):
            for time in VALIDATION_TIMES:
                audio, text = self._held_out(turn, time)
                relevant = torch.eye(len(text), dtype=torch.bool, device=text.device)
                similarity = (text.double() @ audio.double().T).float()
                for query, table in (("text", similarity), ("audio", similarity.T)):
                    for name, value in retrieval(table, relevant).items():
                        sums[f"{query}_query_{name}_t{time:g}"] += value / VALIDATION_ROUNDS
                if time == 0:
                    for name, x in (("audio", audio), ("text", text)):
                        value = float(uniformity(x.double(), x.double(), ~relevant))
                        sums[f"uniformity_{name}"] += value / VALIDATION_ROUNDS
        return {**sums, "scale": float(self.model.scale)}

    def _held_out(self, turn: int, time: float) -> Vectors:
        """Embed the clips of a round, with noise of level ``time``, and their canonical captions."""
        items, seed = self.rounds[turn], self.config.train.seed + 1
        frames = min(max(item.frames for item in items), self.config.max_frames)
        audio, text = [], []
        for rows in self.shares(len(items), self.config.train.batch):
            parts = [self.latents.read(item, 0, frames) for item in items[rows]]
            z = torch.zeros(len(parts), frames, self.latents.channels)
            for row, part in enumerate(parts):
                z[row, : len(part)] = part
            valid = torch.arange(frames) < torch.tensor([len(part) for part in parts])[:, None]
            noise = item_noise(rows, tuple(z.shape[1:]), seed, Purpose.CLAP_NOISE, turn, self.device)
            t = torch.full((len(parts),), time, device=self.device)
            audio.append(self.model.embed_audio(interpolate(z.to(self.device), noise, t), valid.to(self.device), t))
            text.append(self.model.embed_text(*self.model.encode([item.captions[0] for item in items[rows]])))
        none = torch.zeros(0, self.config.tower.embedding, device=self.device)
        return tuple(parallel.gather_shares(torch.cat(found or [none]), len(items)) for found in (audio, text))  # type: ignore[return-value]

    def demo(self, folder: Path, step: int) -> None:
        """Draw a picture of how similar held-out captions and clips are."""
        audio, text = self._held_out(0, 0.0)
        if not parallel.is_first():
            return
        names = [item.captions[0] for item in self.rounds[0]]
        similarity = (text.double() @ audio.double().T).cpu().numpy()
        plot_matrix(folder / f"{step:06d}.png", similarity, names, title=f"step {step}: captions (rows), their clips")

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.model.save(folder, weights, self.tokenizer_file)


@stage_command("clap")
@click.option("--model", type=MODEL, required=True, help="A model on these latents; it gives the text encoder.")
@LATENTS
@UNGATED
@AUTOENCODER
def clap(run: RunOptions, model: Path, latents: tuple[Path, ...], ungated: bool, autoencoder: Path | None) -> None:
    """Train a model of how well texts describe latents, noisy ones too (latent CLAP)."""
    config = run.settings(ClapConfig, "clap")
    made_with = autoencoder_of(model, load_autoencoder(model)[0], autoencoder)
    opened = LatentSet(*latents, autoencoder=made_with)
    if not ungated:
        opened.check_gate()
    stage = ClapStage(model, config, opened)
    belongings = {"model": file_hash(model / WEIGHTS_FILE), "latents": opened.identity()}
    if run.train(stage, config, belongings):
        made = run.out / "model"
        then = () if model == DEMO_FOLDER else ("add-clap", name_of(model), made)  # which the package's own cannot take
        report_made("latent CLAP", made, *then)
