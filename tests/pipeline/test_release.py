"""What a run is done with is gone at the event that says so, without waiting for the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.generation.events import Conditioned, Finished, Sampled, Stepped
from sa3_mlx.common.generation.request import InitAudio, Item, Request, Residency
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.adapters import adapter_config, random_adapter
from tests.support.twins import Twin

AUDIO = (0.3 * np.random.default_rng(0).standard_normal((6000, 2))).astype(np.float32)
REQUEST = Request(
    items=(Item(prompt="soft rain", seconds=0.5, seed=1, negative_prompt="drone"),),
    sampling=Sampling(sampler="pingpong", steps=3, guidance=Guidance(scale=3.0, interval=(0.0, 0.9))),
    init=InitAudio(audio=AUDIO, noise_level=0.8),
)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class _Spy:
    """Weak references to every part that is read, and to every velocity that is made."""

    def __init__(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, weakref.ref[Any]]] = []
        read, velocity = pipeline._read, pipeline.guided_velocity
        monkeypatch.setattr(pipeline, "_read", lambda part, **how: self._keep(part, read(part, **how)))
        monkeypatch.setattr(
            pipeline, "guided_velocity", lambda **parts: self._keep("velocity", velocity(**parts)), raising=False
        )

    def _keep(self, name: str, thing: Any) -> Any:
        self.made.append((name, weakref.ref(thing)))
        return thing

    @property
    def alive(self) -> set[str]:
        return {name for name, found in self.made if found() is not None}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("residency", get_args(Residency))
def test_parts_die_at_the_event_that_says_so(
    twin: Twin, random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, residency: Residency, adapted: bool
) -> None:
    adapter = random_adapter(random_models["tiny-s"], adapter_config("lora"))
    adapters = (Applied(adapter=adapter, interval=(0.0, 0.95)),) if adapted else ()
    pipeline = twin.pipeline(random_models["tiny-s"], adapters=adapters)
    spy, alive = _Spy(pipeline, monkeypatch), dict[type, set[str]]()
    for event in pipeline.stream(REQUEST, residency=residency):
        alive[type(event)] = spy.alive
    everything = {"text_encoder", "conditioner", "same", "dit"}
    if residency == "run":
        assert alive[Sampled] == alive[Finished] == everything
        return
    assert alive[Conditioned] == set() and alive[Stepped] == {"dit", "velocity"}
    assert alive[Sampled] == set() and alive[Finished] == {"same"}
    assert spy.alive == set() and {name for name, _ in spy.made} == {*everything, "velocity"}


@pytest.mark.parametrize("event", [Conditioned, Stepped, Sampled])
def test_a_stopped_run_keeps_nothing(
    twin: Twin, random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, event: type
) -> None:
    pipeline = twin.pipeline(random_models["tiny-s"])
    spy = _Spy(pipeline, monkeypatch)
    run = pipeline.stream(REQUEST, residency="phase")
    next(found for found in run if isinstance(found, event))
    run.close()
    assert spy.made and spy.alive == set()


def test_weights_of_the_dit_are_no_longer_counted(random_models: dict[str, Path]) -> None:
    """MLX's own counter at Sampled: what is left are the latents and what has not been freed before the run."""
    mx = pytest.importorskip("mlx.core")
    pipeline = Twin("mlx").pipeline(random_models["tiny-s"])
    before, found = mx.get_active_memory(), dict[type, int]()
    for event in pipeline.stream(REQUEST, residency="phase"):
        found[type(event)] = mx.get_active_memory() - before
    weights = sum(array.nbytes for _, array in _flat(pipeline.load_part("dit")))
    assert found[Stepped] > weights > 20 * found[Sampled]


def _flat(module: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return tree_flatten(module.parameters())
