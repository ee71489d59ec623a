"""One model with one sampling and one seed: sounds of prompts of real clips and every measure on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.generation.events import Event, Generation
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.judge.judge import shares
from sa3_torch.evaluate.measures.by_class import by_class
from sa3_torch.evaluate.measures.diversity import diversity
from sa3_torch.evaluate.measures.frechet import frechet, frechet_with_interval
from sa3_torch.evaluate.measures.inpainting import SHORTEST_SAMPLES, measure_inpainting
from sa3_torch.evaluate.measures.latent_clap import LatentClap, clap_adherence
from sa3_torch.evaluate.measures.listening import JUDGE, Ear, Heard
from sa3_torch.evaluate.measures.memorisation import memorisation
from sa3_torch.train.data.clip_cache import Clip, ClipSet
from sa3_torch.train.run.random import Purpose, generator

from .real import Prompts, Real, audio_of, check_rate

Audio = NDArray[np.float32]
SEEDS_APART = 1_000_000  # between repetitions


class Pipeline(Protocol):
    """Either twin's."""

    folder: Path
    config: ModelConfig

    def generate(self, request: Request) -> Generation: ...
    def stream(self, request: Request) -> Iterator[Event]: ...
    def encode(self, audio: Audio) -> NDArray[np.float32]: ...
    def decode(self, latents: NDArray[np.float32]) -> Audio: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """A sound to make: the caption and the duration of a real clip, and a seed."""

    clip: Clip
    item: Item


@dataclass(frozen=True, kw_only=True)
class Options:
    """``clips`` of a run, of what ``prompts``, made ``batch`` at a time, ``inpaint`` clips of which a part is made anew
    (0: none)."""

    prompts: Prompts
    clips: int
    batch: int
    inpaint: int

    def __post_init__(self) -> None:
        if self.clips < 2 or self.batch < 1 or self.inpaint < 0:
            raise ValueError(
                f"clips {self.clips}, batch {self.batch}, inpaint {self.inpaint}: at least 2, 1 and 0 are allowed"
            )


@dataclass
class _Kept:
    """What is noted while sounds are made."""

    seconds: float = 0.0
    latents: dict[int, NDArray[np.float32]] = field(default_factory=dict)


def jobs(clips: Sequence[Clip], count: int, seed: int) -> list[Job]:
    """Prompts as frequent as among ``clips``, which are gone through again and again in a random order."""
    rng = generator(seed, Purpose.CLIP_ORDER)
    found: list[Clip] = []
    while len(found) < count:
        found += [clips[i] for i in rng.permutation(len(clips))]
    return [
        Job(clip=clip, item=Item(prompt=clip.caption, seconds=clip.seconds, seed=SEEDS_APART * seed + number))
        for number, clip in enumerate(found[:count])
    ]


def batches(chosen: Sequence[Job], size: int) -> list[list[int]]:
    """Indices of jobs of similar durations."""
    order = sorted(range(len(chosen)), key=lambda i: chosen[i].item.seconds)
    return [order[i : i + size] for i in range(0, len(order), size)]


class Evaluator:
    """What runs share: ``ear``, ``real`` clips, ``clips`` (the data), and a CLAP on latents where there is one."""

    def __init__(self, ear: Ear, real: Real, clips: ClipSet, options: Options, clap: LatentClap | None = None) -> None:
        self.ear, self.real, self.clips, self.options, self.clap = ear, real, clips, options, clap

    def count(self) -> int:
        """How many clips ``run`` announces."""
        return self.options.clips + len(self._inpainted())

    def run(
        self, pipeline: Pipeline, sampling: Sampling, seed: int, advance: Callable[[int], None] = lambda _: None
    ) -> tuple[dict[str, float | None], dict[str, Any]]:
        """Measures by name, and their details; ``advance`` hears how many clips are done, ``count`` in all.

        Raises ValueError for a model of another sample rate, or that cannot make clips of these durations.
        """
        check_rate(pipeline.config)
        chosen, kept = jobs(self.real.asked.clips, self.options.clips, seed), _Kept()
        order = [i for rows in batches(chosen, self.options.batch) for i in rows]
        heard = self.ear.listen(self._sounds(pipeline, sampling, chosen, kept), advance)
        seeds = [chosen[i].item.seed for i in order]
        measures: dict[str, float | None] = {"sample_seconds_per_clip": kept.seconds / len(chosen)}
        details: dict[str, Any] = {"seed": seed}
        self._judged(heard, measures, details)
        self._compared(heard, seeds, measures, details)
        if self.clap is not None:
            found = clap_adherence(self.clap, [kept.latents[i] for i in order], heard.prompts, seed=seed)
            measures |= {"clap_own": found.own, "clap_first": found.first}
            details["latent_clap"] = asdict(found)
        if inpainted := self._inpainted():
            pairs = [(audio_of(self.clips, clip, pipeline.config.audio_channels), clip) for clip in inpainted]
            inpainting = measure_inpainting(
                pipeline, pairs, sampling, seed=SEEDS_APART * seed, batch=self.options.batch, advance=advance
            )
            measures |= {"kept_error": inpainting.kept_error, "seam": inpainting.seam}
            details["inpainting"] = asdict(inpainting)
        return measures, details

    def _inpainted(self) -> list[Clip]:
        """Real clips of which a part is made anew: long enough ones, spread over the set; may be none."""
        long = [clip for clip in self.real.asked.clips if clip.samples >= SHORTEST_SAMPLES]
        return long[:: -(-len(long) // self.options.inpaint)] if long and self.options.inpaint else []

    def _sounds(
        self, pipeline: Pipeline, sampling: Sampling, chosen: list[Job], kept: _Kept
    ) -> Iterator[tuple[Audio, Clip]]:
        for rows in batches(chosen, self.options.batch):
            made = pipeline.generate(Request(items=tuple([chosen[i].item for i in rows]), sampling=sampling))
            kept.seconds += made.timings["text"] + made.timings["sample"]
            for row, i in enumerate(rows):
                if self.clap is not None:
                    kept.latents[i] = made.latents[row]
                yield made.audio[row], chosen[i].clip

    def _judged(self, heard: Heard, measures: dict[str, float | None], details: dict[str, Any]) -> None:
        judged = heard.judged(self.ear.judge)
        if judged:
            found = shares(judged)
            details["judge"] = found
            names = ("all", "class", "notes_pitch", "notes_instrument", "chords_name", "drums_class", "noises_class")
            measures |= {name: found[name] for name in names}
        measures |= asdict(heard.health)

    def _compared(
        self, heard: Heard, seeds: list[int], measures: dict[str, float | None], details: dict[str, Any]
    ) -> None:
        real, training = self.real.asked, self.real.training
        for name, features in heard.spaces.items():
            distance = frechet_with_interval(features, real.spaces[name])
            measures[f"frechet_{name}"] = distance.value
            measures[f"frechet_{name}_rebuilt"] = frechet(features, self.real.rebuilt.spaces[name])
            details[f"frechet_{name}"] = asdict(distance) | {"enough": distance.enough}
        spread = diversity(heard.spaces[JUDGE], heard.prompts, real.spaces[JUDGE], real.prompts)
        measures["diversity"] = spread.ratio
        details["diversity"] = asdict(spread)
        details["by_class"] = {label: asdict(found) for label, found in by_class(heard, self.real.rebuilt).items()}
        if training is None:
            return
        copies = memorisation(heard.detail, training.detail, real.detail)
        measures |= {"copies": copies.share, "copy_ratio": copies.ratio}
        details["memorisation"] = asdict(copies) | {
            "worst": [
                {
                    "prompt": heard.clips[copy.index].caption,
                    "seed": seeds[copy.index],
                    "training": training.clips[copy.nearest].id,
                    "distance": copy.distance,
                    "ratio": copy.ratio,
                }
                for copy in copies.worst
            ]
        }
