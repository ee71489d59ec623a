"""Evaluate one model with one sampling and one seed: make sounds for captions of real clips, take every measure of
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.judge.judge import right, shares
from sa3_torch.evaluate.measures.analysis import JUDGE, Analyser, Analysis
from sa3_torch.evaluate.measures.by_class import by_class
from sa3_torch.evaluate.measures.diversity import diversity
from sa3_torch.evaluate.measures.frechet import frechet, frechet_with_interval
from sa3_torch.evaluate.measures.inpainting import SHORTEST_SAMPLES, measure_inpainting
from sa3_torch.evaluate.measures.latent_clap import clap_adherence
from sa3_torch.evaluate.measures.memorisation import memorisation
from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.data.clip_cache import CachedClip, ClipSet
from sa3_torch.train.run.random import Purpose, generator

from .real import Prompts, Real, audio_of, check_rate

Audio = NDArray[np.float32]
SEEDS_APART = 1_000_000  # between repetitions


@dataclass(frozen=True, kw_only=True)
class ClipItem:
    """Describe a sound to make: the caption and the duration of a real clip, and a seed."""

    clip: CachedClip
    item: Item


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Say how many ``clips`` a run has, of what ``prompts``, made ``batch`` at a time, and how many clips to
    ``inpaint``."""

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
    """Note what else is measured while sounds are made."""

    seconds: float = 0.0
    latents: dict[int, NDArray[np.float32]] = field(default_factory=dict)


def clip_items(clips: Sequence[CachedClip], count: int, seed: int) -> list[ClipItem]:
    """Return ``count`` sounds to make, prompts as frequent as among ``clips``, which are gone through in
    random order."""
    rng = generator(seed, Purpose.CLIP_ORDER)
    found: list[CachedClip] = []
    while len(found) < count:
        found += [clips[i] for i in rng.permutation(len(clips))]
    return [
        ClipItem(clip=clip, item=Item(prompt=clip.caption, seconds=clip.seconds, seed=SEEDS_APART * seed + number))
        for number, clip in enumerate(found[:count])
    ]


def batches(chosen: Sequence[ClipItem], size: int) -> list[list[int]]:
    """Group sounds of similar durations; return their indices."""
    order = sorted(range(len(chosen)), key=lambda i: chosen[i].item.seconds)
    return [order[i : i + size] for i in range(0, len(order), size)]


class Evaluator:
    """Hold what runs share: the analyser, ``real`` clips, ``clips`` (the data), and a latent CLAP where
    there is one."""

    def __init__(
        self,
        analyser: Analyser,
        real: Real,
        clips: ClipSet,
        options: EvaluateOptions,
        clap: LatentClap | None = None,
    ) -> None:
        self.analyser, self.real, self.clips, self.options, self.clap = analyser, real, clips, options, clap

    def count(self) -> int:
        """Return how many clips ``run`` announces."""
        return self.options.clips + len(self._inpainted())

    def run(
        self,
        pipeline: BasePipeline[Any],
        sampling: Sampling,
        seed: int,
        advance: Callable[[int], None] = lambda _: None,
    ) -> tuple[dict[str, float | None], dict[str, Any]]:
        """Return measures by name, and their details; ``advance`` is called with the number of clips done, ``count`` in
        all.

        Raises ValueError for a model of another sample rate, or that cannot make clips of these durations.
        """
        check_rate(pipeline.config)
        chosen, kept = clip_items(self.real.asked.clips, self.options.clips, seed), _Kept()
        order = [i for rows in batches(chosen, self.options.batch) for i in rows]
        made = self.analyser.analyse(self._sounds(pipeline, sampling, chosen, kept), advance)
        seeds = [chosen[i].item.seed for i in order]
        measures: dict[str, float | None] = {"sample_seconds_per_clip": kept.seconds / len(chosen)}
        details: dict[str, Any] = {"seed": seed, "sounds": [{"prompt": prompt} for prompt in made.prompts]}
        self._judged(made, measures, details)
        self._compared(made, seeds, measures, details)
        if self.clap is not None:
            found = clap_adherence(self.clap, [kept.latents[i] for i in order], made.prompts, seed=seed)
            measures |= {"clap_own": found.own, "clap_first": found.first}
            details["latent_clap"] = asdict(found)
            for sound, own, nearest in zip(details["sounds"], found.own_of, found.first_of, strict=True):
                sound |= {"clap_own": own, "clap_first": nearest}
        if inpainted := self._inpainted():
            pairs = [(audio_of(self.clips, clip, pipeline.config.audio_channels), clip) for clip in inpainted]
            inpainting = measure_inpainting(
                pipeline, pairs, sampling, seed=SEEDS_APART * seed, batch=self.options.batch, advance=advance
            )
            measures |= {"kept_error": inpainting.kept_error, "seam": inpainting.seam}
            details["inpainting"] = asdict(inpainting)
        return measures, details

    def _inpainted(self) -> list[CachedClip]:
        """Return the real clips of which a part is made again: long enough ones, spread over the set; may be none."""
        long = [clip for clip in self.real.asked.clips if clip.samples >= SHORTEST_SAMPLES]
        return long[:: -(-len(long) // self.options.inpaint)] if long and self.options.inpaint else []

    def _sounds(
        self, pipeline: BasePipeline[Any], sampling: Sampling, chosen: list[ClipItem], kept: _Kept
    ) -> Iterator[tuple[Audio, CachedClip]]:
        for rows in batches(chosen, self.options.batch):
            made = pipeline.generate(Request(items=tuple([chosen[i].item for i in rows]), sampling=sampling))
            kept.seconds += made.timings["text"] + made.timings["sample"]
            for row, i in enumerate(rows):
                if self.clap is not None:
                    kept.latents[i] = made.latents[row]
                yield made.audio[row], chosen[i].clip

    def _judged(self, made: Analysis, measures: dict[str, float | None], details: dict[str, Any]) -> None:
        judged = made.judged(self.analyser.judge.classifier)
        if judged:
            found = shares(judged)
            details["judge"] = found
            names = ("all", "class", "notes_pitch", "notes_instrument", "chords_name", "drums_class", "noises_class")
            measures |= {name: found[name] for name in names}
            for sound, clip, verdict in zip(details["sounds"], made.clips, made.verdicts, strict=True):
                sound |= right(clip, verdict) if self.analyser.judge.classifier.knows(clip.label) else {}
        measures |= asdict(made.faults)

    def _compared(
        self, made: Analysis, seeds: list[int], measures: dict[str, float | None], details: dict[str, Any]
    ) -> None:
        real, training = self.real.asked, self.real.training
        for name, features in made.spaces.items():
            distance = frechet_with_interval(features, real.spaces[name])
            measures[f"frechet_{name}"] = distance.value
            measures[f"frechet_{name}_rebuilt"] = frechet(features, self.real.rebuilt.spaces[name])
            details[f"frechet_{name}"] = asdict(distance) | {"enough": distance.enough}
        spread = diversity(made.spaces[JUDGE], made.prompts, real.spaces[JUDGE], real.prompts)
        measures["diversity"] = spread.ratio
        details["diversity"] = asdict(spread)
        details["by_class"] = {label: asdict(found) for label, found in by_class(made, self.real.rebuilt).items()}
        if training is None:
            return
        copies = memorisation(made.detail, training.detail, real.detail)
        measures |= {"copies": copies.share, "copy_ratio": copies.ratio}
        details["memorisation"] = asdict(copies) | {
            "worst": [
                {
                    "prompt": made.clips[copy.index].caption,
                    "seed": seeds[copy.index],
                    "training": training.clips[copy.nearest].id,
                    "distance": copy.distance,
                    "ratio": copy.ratio,
                }
                for copy in copies.worst
            ]
        }
