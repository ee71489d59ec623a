"""Find generated clips that are copies of training clips: nearest neighbours, beside those of held-out real clips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

QUANTILE = 0.05  # of the held-out clips lie so near to a training clip by chance
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Describe a near copy: clip ``index`` of the generated ones lies ``distance`` from training clip ``nearest``.

    ``ratio`` is the distance to the median distance of held-out clips: 0 is a copy.
    """

    index: int
    nearest: int
    distance: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Hold how near generated clips lie to training clips.

    ``share`` of generated clips lie nearer to a training clip than all but 5 % of the held-out ones do: 0.05 is what
    chance gives. ``ratio``: median distance of generated clips to that of held-out clips.
    """

    share: float
    ratio: float
    threshold: float
    worst: tuple[Copy, ...]


def nearest(features: NDArray[np.floating], training: NDArray[np.floating]) -> tuple[NDArray[np.int64], Float]:
    """Find for each row of (n, D) the nearest of (m, D) -> its index and the distance, (n,) each."""
    x, y = features.astype(np.float64), training.astype(np.float64)
    length = np.square(y).sum(axis=1)
    index = np.concatenate([(length - 2 * x[i : i + _BLOCK] @ y.T).argmin(axis=1) for i in range(0, len(x), _BLOCK)])
    return index, np.linalg.norm(x - y[index], axis=1)


def memorisation(
    made: NDArray[np.floating], training: NDArray[np.floating], held_out: NDArray[np.floating], *, worst: int = 5
) -> Memorisation:
    """Compare features (n, D) of generated, all training and held-out real clips; the ``worst`` nearest are named.

    Raises ValueError where one of the three is empty.
    """
    for name, values in (("generated", made), ("training", training), ("held-out", held_out)):
        if not len(values):
            raise ValueError(f"memorisation needs {name} clips; there are none")
    index, distance = nearest(made, training)
    _, usual = nearest(held_out, training)
    middle, threshold = max(float(np.median(usual)), 1e-12), float(np.quantile(usual, QUANTILE))
    order = np.argsort(distance, kind="stable")[:worst]
    return Memorisation(
        share=float((distance < threshold).mean()),
        ratio=float(np.median(distance)) / middle,
        threshold=threshold,
        worst=tuple(
            Copy(index=int(i), nearest=int(index[i]), distance=float(distance[i]), ratio=float(distance[i]) / middle)
            for i in order
        ),
    )
