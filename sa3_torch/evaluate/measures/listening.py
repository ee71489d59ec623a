"""All that is measured on single clips, real or generated, in one pass: nothing of the audio is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_torch.evaluate.judge.judge import Judge, features, verdict
from sa3_torch.train.data.clip_cache import Clip

from .features import FeatureSpace
from .health import Health, condition, health

Audio = NDArray[np.float32]
Float = NDArray[np.float64]
JUDGE = "judge"
_PART = 16  # clips that a feature space gets at once


@dataclass(frozen=True, kw_only=True)
class Heard:
    """Clips in one order. ``spaces``: features (n, D) by name, "judge" and what else was asked for; ``detail``: the
    judge's input (n, F), in which copies are searched; ``health``: silent, broken and clipped ones."""

    clips: tuple[Clip, ...]
    verdicts: tuple[dict[str, Any], ...]
    spaces: dict[str, Float]
    detail: Float
    health: Health

    @property
    def prompts(self) -> list[str]:
        return [clip.caption for clip in self.clips]

    def judged(self, judge: Judge) -> list[tuple[Clip, dict[str, Any]]]:
        """Clips of classes that the judge knows, with its verdicts."""
        pairs = zip(self.clips, self.verdicts, strict=True)
        return [(clip, found) for clip, found in pairs if judge.knows(clip.label)]


@dataclass(frozen=True, kw_only=True)
class Ear:
    """Listens to clips."""

    judge: Judge
    spaces: Sequence[FeatureSpace]

    def listen(self, sounds: Iterable[tuple[Audio, Clip]], advance: Callable[[int], None] = lambda _: None) -> Heard:
        """Clips (L, channels), at least one; ``advance`` hears of each."""
        clips: list[Clip] = []
        verdicts: list[dict[str, Any]] = []
        hidden, detail, conditions = [], [], []
        embedded: dict[str, list[Float]] = {space.name: [] for space in self.spaces}
        part: list[Audio] = []

        def embed() -> None:
            for space in self.spaces:
                if part:
                    embedded[space.name].append(space.embed(list(part)))
            part.clear()

        for audio, clip in sounds:
            conditions.append(condition(audio))
            finite = np.nan_to_num(audio, nan=0.0, posinf=0.0, neginf=0.0)
            x = features(finite)
            clips.append(clip)
            verdicts.append(verdict(finite, self.judge.classify_features(x), clip))
            hidden.append(self.judge.hidden(x))
            detail.append(x)
            part.append(finite)
            if len(part) == _PART:
                embed()
            advance(1)
        embed()
        if not clips:
            raise ValueError("no clips to listen to")
        spaces = {JUDGE: np.stack(hidden).astype(np.float64)}
        spaces |= {name: np.concatenate(parts) for name, parts in embedded.items()}
        return Heard(
            clips=tuple(clips),
            verdicts=tuple(verdicts),
            spaces=spaces,
            detail=np.stack(detail).astype(np.float64),
            health=health(conditions),
        )
