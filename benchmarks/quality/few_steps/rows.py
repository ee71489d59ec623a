"""Sounds of one model and one sampling as ``python -m benchmarks few-steps`` measures and stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_torch.evaluate.judge.classifier import attack_brightness, tail_level
from sa3_torch.evaluate.judge.independent import BasicPitch
from sa3_torch.evaluate.judge.judge import all_right
from sa3_torch.evaluate.judge.music.judge import MusicJudge
from sa3_torch.evaluate.measures.analysis import JUDGE, Analyser
from sa3_torch.evaluate.measures.latent_clap import clap_adherence
from sa3_torch.evaluate.measures.memorisation import nearest
from sa3_torch.evaluate.run import ClipItem, batches
from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.data.clip_cache import Audio, CachedClip

Float = NDArray[np.float64]
Made = Iterable[tuple[Audio, CachedClip]]
MUSIC = ("line", "loop", "music")  # kinds of clips that only the set "music" has


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold what was measured of n sounds, in an order that depends on the prompts alone.

    ``features``: of the classifier (n, D); ``nearest``: distance to the nearest training clip; ``tail`` and ``attack``
    in dB; ``verdicts``: what each judge found right.
    """

    name: str
    setting: str
    evaluations: int  # of the network for a sound
    seconds: float  # of text encoder and sampling for a sound
    clap: float | None  # mean cosine of sounds and prompts
    prompts: list[str]
    labels: list[str]
    features: list[list[float]]
    nearest: list[float]
    tail: list[float]
    attack: list[float]
    verdicts: list[dict[str, bool]]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what ``write`` wrote."""
        return cls(**read_object(path))

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @property
    def space(self) -> Float:
        """Return the features as an array."""
        return np.array(self.features)


def parse_setting(text: str) -> Sampling:
    """Read "SAMPLER:STEPS:SCALE[:APG]", and after it ",rescale=SHARE" or ",interval=START-END".

    Raises ConfigError or ValueError for anything else.
    """
    first, *more = text.split(",")
    found = Sampling.parse(first)
    guidance = found.guidance.to_dict()
    for part in more:
        name, _, value = part.partition("=")
        if name not in ("rescale", "interval"):
            raise ValueError(f"{part!r} in {text!r}: allowed are rescale=SHARE and interval=START-END")
        guidance[name] = [float(bound) for bound in value.split("-")] if name == "interval" else float(value)
    full = Sampling(sampler=found.sampler, steps=found.steps, guidance=Guidance.from_dict(guidance))
    full.check()
    return full


def evaluations(sampling: Sampling, config: ModelConfig) -> int:
    """Count how often a sampling evaluates the network for one sound: twice a step where it guides."""
    assert config.diffusion is not None
    times = sigmas(config.diffusion.shift, sampling.steps, 1.0, [config.diffusion.max_frames])[0, :-1]
    start, end = sampling.guidance.interval
    guided = int(((times >= start) & (times <= end)).sum()) if sampling.guidance.scale != 1 else 0
    return (sampling.steps + guided) * (4 if sampling.sampler == "rk4" else 1)


def generated(
    pipeline: BasePipeline[Any], items: Sequence[ClipItem], sampling: Sampling, batch: int, kept: dict[str, Any]
) -> Iterator[tuple[Audio, CachedClip]]:
    """Make every item's sound; note seconds and latents in ``kept``."""
    for rows in batches(items, batch):
        made = pipeline.generate(Request(items=tuple([items[i].item for i in rows]), sampling=sampling))
        kept["seconds"] += made.timings["text"] + made.timings["sample"]
        for row, i in enumerate(rows):
            kept["latents"].append(made.latents[row])
            yield made.audio[row], items[i].clip


class Judges:
    """Judge sounds of either set, with basic-pitch where it is installed."""

    def __init__(self, clips: Sequence[CachedClip]) -> None:
        self.music = MusicJudge() if any(clip.kind in MUSIC for clip in clips) else None
        try:
            self.basic_pitch: BasicPitch | None = BasicPitch()
        except (ImportError, FileNotFoundError):
            self.basic_pitch = None

    def heard(self, audio: Audio, clip: CachedClip) -> dict[str, bool]:
        """Return what judges beside the classifier find right, by the kind of the clip and what was judged."""
        found = {} if self.music is None else self.music.check(audio, clip)
        named = {f"{clip.kind} {name}": bool(right) for name, right in found.items()}
        if self.basic_pitch is not None and clip.kind == "note" and clip.midi is not None:
            named["note basic-pitch"] = self.basic_pitch.note(audio) == clip.midi
        return named

    def classified(self, verdict: dict[str, Any]) -> dict[str, bool]:
        """Return what the classifier of the set "first" says; nothing for the set "music", whose classes it lacks."""
        if self.music is not None:
            return {}
        shown = {"all right": all_right(verdict)}
        for name in ("class", "instrument", "pitch", "chord"):
            if name in verdict:
                shown[name] = bool(verdict[name])
        return shown


def measure(
    made: Made,
    analyser: Analyser,
    judges: Judges,
    training: NDArray[np.floating],
    *,
    name: str,
    setting: str = "",
    count: int = 0,
    clap: LatentClap | None = None,
    kept: dict[str, Any] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Row:
    """Measure sounds; ``training`` (m, F): details of the training clips, in which copies are searched."""
    heard: list[dict[str, bool]] = []

    def listened() -> Iterator[tuple[Audio, CachedClip]]:
        for audio, clip in made:
            heard.append(judges.heard(audio, clip))
            yield audio, clip

    found = analyser.analyse(listened(), advance)
    kept = kept or {"seconds": 0.0, "latents": []}
    cosine = clap_adherence(clap, kept["latents"], found.prompts).own if clap is not None and kept["latents"] else None
    return Row(
        name=name,
        setting=setting,
        evaluations=count,
        seconds=kept["seconds"] / len(heard),
        clap=cosine,
        prompts=found.prompts,
        labels=[clip.label for clip in found.clips],
        features=[[round(float(x), 5) for x in row] for row in found.spaces[JUDGE]],
        nearest=[float(x) for x in nearest(found.detail, training)[1]],
        tail=[float(tail_level(x)) for x in found.detail],
        attack=[float(attack_brightness(x)) for x in found.detail],
        verdicts=[
            {**judges.classified(verdict), **other} for verdict, other in zip(found.verdicts, heard, strict=True)
        ],
    )
