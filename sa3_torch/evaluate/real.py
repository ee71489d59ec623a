"""Analyse real clips, which models are compared with, what the autoencoder makes of them, and what models
learnt from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.model.config import ModelConfig
from sa3_torch.evaluate.judge.judge import shares
from sa3_torch.evaluate.measures.analysis import Analyser, Analysis
from sa3_torch.evaluate.measures.frechet import ENOUGH, equal_floor, frechet
from sa3_torch.evaluate.measures.latent_clap import clap_adherence
from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, CachedClip, ClipSet
from sa3_torch.train.run.random import Purpose, generator

Audio = NDArray[np.float32]
Advance = Callable[[int], None]
Prompts = Literal["held-out", "training"]


@dataclass(frozen=True, kw_only=True)
class Real:
    """Hold the analyses of real clips.

    ``asked``: the clips whose captions models are asked for; ``rebuilt``: these after encoding and decoding, the best
    that a model of latents can come to; ``training``: all training clips, None when ``asked`` are some of them;
    ``about``: floors and the judge's shares.
    """

    asked: Analysis
    rebuilt: Analysis
    training: Analysis | None
    about: dict[str, Any]


def check_rate(config: ModelConfig) -> None:
    """Raise ValueError for a model whose rate is not that of the clips and of the judge."""
    if config.sample_rate != SAMPLE_RATE:
        raise ValueError(f"{config.name} works at {config.sample_rate} Hz: evaluation is for {SAMPLE_RATE} Hz")


def captioned(clips: ClipSet, config: ModelConfig, split: str) -> list[CachedClip]:
    """Return the clips of a split ("train", "validation") that have a caption and are not too long for the model.

    Raises ValueError when there are less than two, or the rate does not fit.
    """
    check_rate(config)
    found = [clip for clip in clips.select(split) if clip.captions and clip.seconds <= config.max_seconds]
    if len(found) < 2:
        raise ValueError(f"{len(found)} {split} clips with a caption fit {config.name}: at least 2 are needed")
    return found


def asked_clips(clips: ClipSet, config: ModelConfig, prompts: Prompts, count: int) -> list[CachedClip]:
    """Return all held-out clips with a caption, or ``count`` of the training clips.

    Training clips do to choose between recipes: what is reported is then not what was chosen by. Raises ValueError as
    ``captioned`` does.
    """
    if prompts == "held-out":
        return captioned(clips, config, "validation")
    found = captioned(clips, config, "train")
    return [found[i] for i in generator(0, Purpose.REAL_CLIPS).permutation(len(found))[:count]]


def audio_of(clips: ClipSet, clip: CachedClip, channels: int) -> Audio:
    """Read a clip as (L, channels); a mono clip on all channels."""
    audio = clips.read(clip)
    return audio if audio.shape[1] == channels else np.repeat(audio[:, :1], channels, axis=1)


def analyse_real(
    analyser: Analyser,
    pipeline: BasePipeline[Any],
    clips: ClipSet,
    prompts: Prompts,
    count: int,
    *,
    clap: LatentClap | None = None,
    advance: Advance = lambda _: None,
) -> Real:
    """Analyse the clips that ``asked_clips`` chooses and those that models learnt from.

    ``advance`` is called once for each, for the former twice (see ``real_count``).
    """
    config = pipeline.config
    chosen = asked_clips(clips, config, prompts, count)
    asked = analyser.analyse(((audio_of(clips, clip, config.audio_channels), clip) for clip in chosen), advance)
    latents: list[NDArray[np.float32]] = []
    rebuilt = analyser.analyse(_rebuilt(pipeline, clips, chosen, latents), advance)
    training = None
    if prompts == "held-out":
        learnt = ((clips.read(clip), clip) for clip in _training(clips))
        training = Analyser(judge=analyser.judge, spaces=()).analyse(learnt, advance)
    about: dict[str, Any] = {"clips": len(chosen), "enough": len(chosen) >= ENOUGH}
    about["floor_clips"] = min(count, len(chosen) // 2)
    for name, features in asked.spaces.items():
        again = rebuilt.spaces[name]
        about[f"frechet_{name}"] = {"real_halves": _floor(features, count), "autoencoder": frechet(again, features)}
        about[f"frechet_{name}_rebuilt"] = {"real_halves": _floor(again, count), "autoencoder": 0.0}
    for name, analysis in (("real", asked), ("autoencoder", rebuilt)):
        judged = analysis.judged(analyser.judge.classifier)
        about[f"judge_{name}"] = shares(judged) if judged else None
    about["latent_clap"] = None if clap is None else asdict(clap_adherence(clap, latents, asked.prompts))
    return Real(asked=asked, rebuilt=rebuilt, training=training, about=about)


def real_count(clips: ClipSet, config: ModelConfig, prompts: Prompts, count: int) -> int:
    """Return how many clips ``analyse_real`` announces."""
    asked = 2 * len(asked_clips(clips, config, prompts, count))
    return asked + len(_training(clips)) if prompts == "held-out" else asked


def _training(clips: ClipSet) -> list[CachedClip]:
    found = [clip for clip in clips.select("train") if clip.captions]
    if not found:
        raise ValueError("the data holds no training clips with a caption to look for copies in")
    return found


def _floor(features: NDArray[np.float64], count: int) -> float | None:
    """Return what ``count`` real clips, or half of them, are measured at against as many others."""
    return equal_floor(features, min(count, len(features) // 2)) if len(features) >= 4 else None


def _rebuilt(
    pipeline: BasePipeline[Any], clips: ClipSet, chosen: list[CachedClip], latents: list[NDArray[np.float32]]
) -> Iterator[tuple[Audio, CachedClip]]:
    """Yield the clips after encoding and decoding, and note their latents."""
    for clip in chosen:
        audio = audio_of(clips, clip, pipeline.config.audio_channels)
        latents.append(pipeline.encode(audio))
        yield pipeline.decode(latents[-1])[: len(audio)], clip
