"""Measure all that concerns single clips, real or generated, in one pass that keeps no audio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_torch.evaluate.judge.classifier import Classifier, features
from sa3_torch.evaluate.judge.judge import Judge, verdict
from sa3_torch.train.data.clip_cache import CachedClip

from .faults import Faults, clip_faults, faults
from .features import FeatureSpace

Audio = NDArray[np.float32]
Float = NDArray[np.float64]
JUDGE = "judge"
_BATCH = 16  # clips that a feature space gets at once


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Describe n clips in one order.

    ``spaces``: features (n, D) by name, "judge" and what else was asked for; ``detail``: the classifier's input (n, F),
    in which copies are searched; ``faults``: shares of silent, broken and clipped ones.
    """

    clips: tuple[CachedClip, ...]
    verdicts: tuple[dict[str, Any], ...]
    spaces: dict[str, Float]
    detail: Float
    faults: Faults

    @property
    def prompts(self) -> list[str]:
        """Return the caption of every clip."""
        return [clip.caption for clip in self.clips]

    def judged(self, classifier: Classifier) -> list[tuple[CachedClip, dict[str, Any]]]:
        """Return the clips of classes that the classifier knows, with their verdicts."""
        pairs = zip(self.clips, self.verdicts, strict=True)
        return [(clip, found) for clip, found in pairs if classifier.knows(clip.label)]


@dataclass(frozen=True, kw_only=True)
class Analyser:
    """Analyse clips by the judge, and in further feature spaces."""

    judge: Judge
    spaces: Sequence[FeatureSpace]

    def analyse(
        self, sounds: Iterable[tuple[Audio, CachedClip]], advance: Callable[[int], None] = lambda _: None
    ) -> Analysis:
        """Analyse clips (L, channels), at least one; ``advance`` is called once for each.

        Raises ValueError without clips.
        """
        clips: list[CachedClip] = []
        verdicts: list[dict[str, Any]] = []
        hidden, detail, found_faults = [], [], []
        embedded: dict[str, list[Float]] = {space.name: [] for space in self.spaces}
        batch: list[Audio] = []

        def embed() -> None:
            for space in self.spaces:
                if batch:
                    embedded[space.name].append(space.embed(list(batch)))
            batch.clear()

        classifier = self.judge.classifier
        for audio, clip in sounds:
            found_faults.append(clip_faults(audio))
            finite = np.nan_to_num(audio, nan=0.0, posinf=0.0, neginf=0.0)
            x = features(finite)
            clips.append(clip)
            verdicts.append(verdict(finite, classifier.classify_features(x), clip))
            hidden.append(classifier.hidden(x))
            detail.append(x)
            batch.append(finite)
            if len(batch) == _BATCH:
                embed()
            advance(1)
        embed()
        if not clips:
            raise ValueError("no clips to analyse")
        spaces = {JUDGE: np.stack(hidden).astype(np.float64)}
        spaces |= {name: np.concatenate(parts) for name, parts in embedded.items()}
        return Analysis(
            clips=tuple(clips),
            verdicts=tuple(verdicts),
            spaces=spaces,
            detail=np.stack(detail).astype(np.float64),
            faults=faults(found_faults),
        )
