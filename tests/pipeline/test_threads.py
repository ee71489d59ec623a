"""A pipeline may be made in one thread and used in another, one at a time: a server has one worker for the device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from sa3_mlx.common.generation.request import InitAudio, Item, Request, Residency
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.twins import Twin

T = TypeVar("T")
AUDIO = (0.3 * np.random.default_rng(0).standard_normal((6000, 2))).astype(np.float32)
REQUEST = Request(
    items=(Item(prompt="soft rain", seconds=0.5, seed=1),),
    sampling=Sampling(sampler="pingpong", steps=2, guidance=Guidance(scale=3.0)),
)
VARIED = Request(items=REQUEST.items, sampling=REQUEST.sampling, init=InitAudio(audio=AUDIO, noise_level=0.8))


def _elsewhere(run: Callable[[], T]) -> T:
    """What ``run`` returns in a thread of its own, which ends then."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(run).result()


@pytest.mark.parametrize("model", ["tiny-s", "tiny-l"])
@pytest.mark.parametrize("residency", ["run", "step"])
def test_a_pipeline_is_used_in_another_thread(
    twin: Twin, random_models: dict[str, Path], model: str, residency: Residency
) -> None:
    """Made here, used there; made there, used here; used here after it was used there, its parts in memory."""
    pipeline = twin.pipeline(random_models[model])

    def sound() -> np.ndarray:
        *_, last = pipeline.stream(REQUEST, residency=residency)
        return last.generation.audio[0]

    wanted = sound()
    np.testing.assert_array_equal(_elsewhere(sound), wanted)
    pipeline = _elsewhere(lambda: twin.pipeline(random_models[model]))
    for run in (lambda: _elsewhere(sound), sound, lambda: _elsewhere(sound)):
        np.testing.assert_array_equal(run(), wanted)


def test_parts_that_are_not_in_memory_yet_are_read_by_the_thread_that_needs_them(
    twin: Twin, random_models: dict[str, Path]
) -> None:
    """The first run reads one half of the autoencoder; the other one comes in another thread."""
    wanted = twin.pipeline(random_models["tiny-s"]).generate(VARIED).audio[0]
    pipeline = twin.pipeline(random_models["tiny-s"])
    pipeline.load_part("same")
    _elsewhere(lambda: pipeline.generate(REQUEST))
    np.testing.assert_array_equal(pipeline.generate(VARIED).audio[0], wanted)
    np.testing.assert_array_equal(_elsewhere(lambda: pipeline.generate(VARIED)).audio[0], wanted)


def test_types_are_changed_in_any_thread(twin: Twin, random_models: dict[str, Path]) -> None:
    load = twin.module("pipeline").Pipeline.load
    pipeline = load(random_models["tiny-s"], dtype="float16")
    dit = pipeline.load_part("dit")
    assert dit is pipeline.load_part("dit")
    found = _elsewhere(lambda: pipeline.generate(REQUEST)).latents[0]
    np.testing.assert_array_equal(found, load(random_models["tiny-s"], dtype="float16").generate(REQUEST).latents[0])
