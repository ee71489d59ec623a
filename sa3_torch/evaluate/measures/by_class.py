"""Tell where a distance comes from: how the sounds of one class differ on average from the real clips of that class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sa3_torch.evaluate.judge.classifier import attack_brightness, tail_level

from .analysis import JUDGE, Analysis

FEWEST = 2  # clips of a class on either side


@dataclass(frozen=True, kw_only=True)
class ClassShift:
    """Compare ``clips`` generated sounds of a class with the real ones.

    ``shift``: squared distance of the class's mean from that of the real clips, in the judge's space, the part of the
    Frechet distance within the class that neither few clips nor variety explain. ``tail`` and ``attack``: how much
    louder, in dB, its tail and the top of its attack are (``tail_level``, ``attack_brightness``).
    """

    clips: int
    shift: float
    tail: float
    attack: float


def by_class(made: Analysis, real: Analysis) -> Mapping[str, ClassShift]:
    """Compare each class of which both have at least ``FEWEST`` clips, in the order of the alphabet."""
    found = {}
    labels, real_labels = _labels(made), _labels(real)
    for label in sorted(set(labels) & set(real_labels)):
        ours, theirs = labels == label, real_labels == label
        if min(ours.sum(), theirs.sum()) < FEWEST:
            continue
        shift = made.spaces[JUDGE][ours].mean(0) - real.spaces[JUDGE][theirs].mean(0)
        tail, attack = (
            float(np.mean([of(x) for x in made.detail[ours]]) - np.mean([of(x) for x in real.detail[theirs]]))
            for of in (tail_level, attack_brightness)
        )
        found[label] = ClassShift(clips=int(ours.sum()), shift=float(shift @ shift), tail=tail, attack=attack)
    return found


def _labels(analysis: Analysis) -> NDArray[np.str_]:
    return np.array([clip.label for clip in analysis.clips])
