"""In which order work is launched, waited for and used, with the next piece launched ahead and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.generation.events import AudioChunk, Sampled, Stepped
from sa3_mlx.common.generation.request import Item, Request, Residency
from sa3_mlx.common.model.sampling import SAMPLER_NAMES, Guidance, Sampling
from tests.support.twins import Twin

mx = pytest.importorskip("mlx.core")

from sa3_mlx import pipeline as module

REQUEST = Request(
    items=(Item(prompt="soft rain", seconds=2.0, seed=1), Item(prompt="bell", seconds=1.0, seed=2)),
    sampling=Sampling(sampler="pingpong", steps=4, guidance=Guidance(scale=3.0)),
    chunk_frames=16,
)


@pytest.fixture(params=[False, True])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module.Pipeline, "launches_ahead", request.param)
    return bool(request.param)


class _Log(list[str]):
    """What happens to steps and chunks, in order; a step or a chunk is known by its arrays."""

    def __init__(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._known: dict[int, str] = {}
        self._kept: list[Any] = []
        self._decode, self._numpy = pipeline._decode, pipeline._numpy
        self._chunks = 0
        monkeypatch.setattr(mx, "async_eval", self._noted("launch", mx.async_eval))
        monkeypatch.setattr(mx, "eval", self._noted("wait", mx.eval))
        monkeypatch.setattr(pipeline, "_decode", self.decode)
        monkeypatch.setattr(pipeline, "_numpy", self.numpy)
        for name, sampler in module.SAMPLERS.items():
            monkeypatch.setitem(module.SAMPLERS, name, self._sampled(sampler))

    def _sampled(self, sampler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def steps(*args: Any) -> Iterator[Any]:
            for step in sampler(*args):
                self._known[id(step.x)] = f"step {step.index}"
                self._kept.append(step)
                yield step

        return steps

    def _noted(self, word: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arrays: Any) -> Any:
            name = self._known.get(id(arrays[0])) if arrays else None
            if name is not None:
                self.append(f"{word} {name}")
            return run(*arrays)

        return noted

    def decode(self, *latents: Any) -> Any:
        array = self._decode(*latents)
        self._known[id(array)] = f"chunk {self._chunks}"
        self._kept.append(array)
        self.append(f"launch chunk {self._chunks}")
        self._chunks += 1
        return array

    def numpy(self, array: Any) -> np.ndarray:
        if self._known.get(id(array), "").startswith("chunk"):
            self.append(f"wait {self._known[id(array)]}")
        return self._numpy(array)


def _events(log: _Log, run: Iterator[Any]) -> Iterator[Any]:
    chunk = 0
    for event in run:
        if isinstance(event, Stepped):
            log.append(f"use step {event.index}")
        if isinstance(event, AudioChunk):
            log.append(f"use chunk {chunk}")
            chunk += 1
        yield event


def _order(word: str, count: int, *, ahead: bool, first_alone: bool) -> list[str]:
    """Launches one ahead of uses, or each piece by itself."""
    order, launched = [], 0
    for number in range(count):
        wanted = min(count, number + (2 if ahead and (number or not first_alone) else 1))
        order += [f"launch {word} {later}" for later in range(launched, wanted)]
        launched = wanted
        order += [f"wait {word} {number}", f"use {word} {number}"]
    return order


@pytest.mark.parametrize("model", ["tiny-s", "tiny-l"])
def test_the_next_step_and_chunk_are_launched_before_one_is_used(
    random_models: dict[str, Path], model: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the first chunk leaves at once. Nothing is announced before it is computed."""
    pipeline = Twin("mlx").pipeline(random_models[model])
    log = _Log(pipeline, monkeypatch)
    list(_events(log, pipeline.stream(REQUEST)))
    chunks = sum(entry.startswith("use chunk") for entry in log)
    assert chunks > 3
    assert [entry for entry in log if "step" in entry] == _order("step", 4, ahead=ahead, first_alone=False)
    assert [entry for entry in log if "chunk" in entry] == _order("chunk", chunks, ahead=ahead, first_alone=True)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_launching_ahead_changes_no_bit(
    random_models: dict[str, Path], sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(REQUEST, sampling=Sampling(sampler=sampler, steps=4, guidance=Guidance(scale=3.0)))
    found = []
    for ahead in (False, True):
        monkeypatch.setattr(module.Pipeline, "launches_ahead", ahead)
        events = list(Twin("mlx").pipeline(random_models["tiny-s"]).stream(request))
        steps = [np.array(event.denoised) for event in events if isinstance(event, Stepped)]
        found.append([*steps, *(event.audio for event in events if isinstance(event, AudioChunk))])
    assert len(found[0]) == len(found[1]) > 7
    for plain, other in zip(*found, strict=True):
        np.testing.assert_array_equal(other, plain)


def test_a_stopped_run_launches_no_more(
    random_models: dict[str, Path], ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step or one chunk further at most; and the pipeline is as good as new."""
    pipeline = Twin("mlx").pipeline(random_models["tiny-s"])
    wanted = pipeline.generate(REQUEST).audio[0]
    log = _Log(pipeline, monkeypatch)
    for kind, word, allowed in ((Stepped, "step", 2 if ahead else 1), (AudioChunk, "chunk", 1)):
        log.clear()
        run = pipeline.stream(REQUEST)
        next(event for event in run if isinstance(event, kind))
        run.close()
        assert sum(entry.startswith(f"launch {word}") for entry in log) == allowed
    np.testing.assert_array_equal(pipeline.generate(REQUEST).audio[0], wanted)


def test_the_decoder_is_read_in_shares_between_the_steps(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share after every step but the last; together they are all of the decoder, each tensor once."""
    from mlx.utils import tree_flatten

    pipeline = Twin("mlx").pipeline(random_models["tiny-s"])
    names = {id(array): name for name, array in tree_flatten(pipeline.load_part("same").decoder.parameters())}
    reads: list[list[str]] = []
    launch = mx.async_eval

    def noted(*arrays: Any) -> None:
        if isinstance(arrays[0], list):
            reads[-1] += [names[id(array)] for array in arrays[0]]
        launch(*arrays)

    monkeypatch.setattr(mx, "async_eval", noted)
    reads.append([])
    for event in pipeline.stream(REQUEST):
        if isinstance(event, Stepped | Sampled):
            reads.append([])
    assert sorted(name for share in reads for name in share) == sorted(names.values()) and reads[3:] == [[], [], []]
    assert max(map(len, reads[:3])) - min(map(len, reads[:3])) <= 1


def test_one_step_reads_nothing_ahead_and_freed_parts_neither(random_models: dict[str, Path]) -> None:
    one = replace(REQUEST, sampling=Sampling(sampler="pingpong", steps=1))
    for request, residency in ((one, "run"), (REQUEST, "phase"), (REQUEST, "step")):
        pipeline = Twin("mlx").pipeline(random_models["tiny-s"])
        loaded = {type(event): pipeline.loaded for event in pipeline.stream(request, residency=residency)}
        assert "same" not in loaded[Stepped]


def test_weights_are_read_once_as_long_as_they_stay(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the autoencoder, whose halves every chunk asks for."""
    reads: list[str] = []
    read = module.read_weights

    def noted(network: Any, folder: Path, prefix: str) -> None:
        reads.append(prefix)
        read(network, folder, prefix)

    monkeypatch.setattr(module, "read_weights", noted)
    pipeline = Twin("mlx").pipeline(random_models["tiny-s"])
    everything = ["conditioner.", "dit.", "same.bottleneck.", "same.decoder.", "text_encoder."]

    def found(residency: Residency) -> list[str]:
        reads.clear()
        list(pipeline.stream(REQUEST, residency=residency))
        return sorted(reads)

    assert found("run") == everything and found("run") == []
    pipeline.free("same")
    assert found("run") == everything[2:4]
    pipeline.free(*pipeline.loaded)
    assert found("phase") == found("phase") == everything
