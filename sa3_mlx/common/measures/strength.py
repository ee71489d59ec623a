"""Find a model's dial of strengths: how far audio-to-audio goes from its source at every noise level.

Change is the log-mel distance to the source, as a share of the way from a source that only went through the autoencoder
(0) to a sound of the same prompt that knows nothing of the source (1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import InitAudio, Request
from sa3_mlx.common.model.dial import NOTCHES, SCHEDULES, Dial, Schedule

from .spectra import log_mel

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
_OTHER_SEEDS = 1_000_000  # from the seeds of the sources to those of the variations

Changes = Mapping[Schedule, NDArray[np.float64]]  # (levels,) each


def measure_changes(
    pipeline: BasePipeline[Any],
    requests: Sequence[Request],
    levels: Sequence[float] = LEVELS,
    schedules: Sequence[Schedule] = SCHEDULES,
    advance: Callable[[], object] = lambda: None,
) -> Changes:
    """Return the mean change at every level; the last of the levels must be 1.

    Sources are what the model makes of the requests; variations have the same prompts and other seeds. ``advance`` is
    called after every run, of which ``runs`` says the number.
    """
    totals: dict[Schedule, NDArray[np.float64]] = {name: np.zeros(len(levels)) for name in schedules}
    floor = 0.0
    for request in requests:
        sources = pipeline.generate(request).audio
        advance()
        mels = [_mel(pipeline, audio) for audio in sources]
        coded = [_coded(pipeline, audio) for audio in sources]
        floor += sum(_distance(pipeline, *pair) for pair in zip(mels, coded, strict=True))
        items = tuple(replace(item, seed=item.seed + _OTHER_SEEDS) for item in request.items)
        for number, level in enumerate(levels):
            init = tuple(InitAudio(audio=audio, noise_level=level) for audio in sources)
            for name in schedules:
                varied = pipeline.generate(replace(request, items=items, init=init, schedule=name)).audio
                totals[name][number] += sum(_distance(pipeline, *pair) for pair in zip(mels, varied, strict=True))
                advance()
    return {name: (total - floor) / (total[-1] - floor) for name, total in totals.items()}


def runs(requests: int, levels: int = len(LEVELS), schedules: int = len(SCHEDULES)) -> int:
    """Count the runs of ``measure_changes``."""
    return requests * (1 + levels * schedules)


def fit(changes: Changes, levels: Sequence[float] = LEVELS) -> Dial:
    """Return the dial whose notches make equal steps of the measured change, forced to rise with the level."""
    return Dial(**{name: _invert(changes[name], levels) for name in SCHEDULES})


def _invert(change: NDArray[np.float64], levels: Sequence[float]) -> tuple[float, ...]:
    rising = np.maximum.accumulate(np.clip([0.0, *change], 0.0, 1.0)) + 1e-6 * np.arange(len(levels) + 1)
    wanted = np.arange(1, NOTCHES) / NOTCHES
    found = np.interp(wanted, rising, [0.0, *levels])
    return (*(round(float(level), 4) for level in found), 1.0)


def _mel(pipeline: BasePipeline[Any], audio: Audio) -> NDArray[np.float64]:
    return log_mel(audio, pipeline.config.sample_rate)


def _distance(pipeline: BasePipeline[Any], source: NDArray[np.float64], audio: Audio) -> float:
    return float(np.abs(source - _mel(pipeline, audio)).mean())


def _coded(pipeline: BasePipeline[Any], audio: Audio) -> Audio:
    return pipeline.decode(pipeline.encode(audio))[: len(audio)]
