"""Compiled blocks and graphs of kernels: how many there are, and that they compute the same."""

from __future__ import annotations

import gc
import shutil
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_torch import guidance, layers
from sa3_torch.choices import using
from sa3_torch.cuda import graphs
from tests.support.tiny import TINY
from tests.support.twins import Twin, relative

from .counted import CountedPipeline

compiler = pytest.mark.skipif(
    sys.platform == "linux" and shutil.which("g++") is None, reason="PyTorch compiles with g++ on Linux"
)


def _request(seconds: float, prompt: str = "low kick", scale: float = 1.0) -> Request:
    sampling = Sampling(sampler="pingpong", steps=4, guidance=Guidance(scale=scale))
    return Request(items=(Item(prompt=prompt, seconds=seconds, seed=1),), sampling=sampling)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that PyTorch makes of blocks, which are run as they are; a break of a graph is an error."""
    made: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        made.append(len(inputs))
        return module.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: real(f, backend=backend, dynamic=dynamic, fullgraph=True))
    torch._dynamo.reset()
    layers._generated.cache_clear()
    yield made
    layers._generated.cache_clear()
    torch._dynamo.reset()


@compiler
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_blocks_are_compiled_once_for_all_lengths(
    random_models: dict[str, Path], counted: list[Any], model: str, scale: float
) -> None:
    """Graphs of the DiT's block and of its last one serve every clip and prompt; before, one of all blocks a shape.

    Sizes that are equal at first and are not later take a second pair.
    """
    pipeline, after = Twin("torch").pipeline(random_models[model]), []
    with using({"compiled_step": "compiled", "padding": "cut"}):
        for seconds, prompt in ((1.7, "kick"), (2.3, "low kick"), (3.1, "low soft kick"), (0.9, "rain"), (4.4, "hat")):
            pipeline.generate(_request(seconds, prompt, scale))
            after.append(len(counted))
    assert after[0] == 2 and after[-1] <= 4 and after[1:] == [after[1]] * 4


@compiler
@pytest.mark.parametrize("model", TINY)
def test_blocks_of_the_decoder_are_compiled_once(
    random_models: dict[str, Path], counted: list[Any], model: str
) -> None:
    pipeline = Twin("torch").pipeline(random_models[model])
    latents = np.random.default_rng(0).standard_normal((90, 16), np.float32)
    wanted = pipeline.decode(latents)
    with using({"compiled_decoder": "compiled"}):
        assert relative(pipeline.decode(latents), wanted) < 1e-6
        made = len(counted)
        for frames in (20, 34, 61):
            pipeline.decode(latents[:frames])
    assert 0 < made <= 3 and len(counted) <= made + 1


class _Stand:
    """Stands for graphs of kernels: a replay runs the function again on the inputs that the graph has."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(self, run: Any) -> tuple[Tensor, Any]:
        self.captured += 1
        output = run().clone()

        def replay() -> None:
            self.replayed += 1
            output.copy_(run())

        return output, replay


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> _Stand:
    made = _Stand()
    monkeypatch.setattr(graphs, "capture", made.capture)
    monkeypatch.setattr(graphs, "capturable", lambda _device: True)
    return made


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_runs_by_graphs_have_the_same_bits(
    random_models: dict[str, Path], stand: _Stand, model: str, scale: float
) -> None:
    """One graph a shape serves all steps and the next runs, of other prompts and seeds too."""
    pipeline = Twin("torch").pipeline(random_models[model])
    requests = [_request(1.7, "low kick", scale), _request(1.7, "soft hat", scale), _request(2.9, "low kick", scale)]
    requests[1] = replace(requests[1], items=(replace(requests[1].items[0], seed=5),))
    wanted = [pipeline.generate(request) for request in requests]
    pipeline.free("text_encoder")  # and the states that were kept
    with using({"graphs": "captured"}):
        found, counts = [], []
        for request in requests:
            found.append(pipeline.generate(request))
            counts.append((stand.captured, stand.replayed))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a.audio[0], b.audio[0])
    assert counts == [(1, 3), (3, 9), (4, 12)]  # steps; the text and the decoder from the second time on


@pytest.mark.parametrize("sampler", ["euler", "dpmpp"])
def test_a_step_is_one_graph_and_little_more(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """What another step launches, with guidance and without, where graphs are one operation: before, guidance had 25
    operations of its own outside of graphs."""
    pipeline = CountedPipeline.opened(random_models["tiny-l"])
    monkeypatch.setattr(guidance, "graphed", lambda _network, _function, x, *_inputs: torch.exp(x))
    for scale in (1.0, 3.0):
        kernels = []
        for steps in (4, 4, 5):  # the first run also encodes the text
            sampling = Sampling(sampler=sampler, steps=steps, guidance=Guidance(scale=scale))
            request = replace(_request(1.7), sampling=sampling)
            with using({"noise": "device"}):
                kernels.append(pipeline.counted(request, monkeypatch)[1]["Sampled"])
        assert kernels[2] - kernels[1] == {"euler": 7, "dpmpp": 11}[sampler]


def test_what_stays_is_copied_once(stand: _Stand) -> None:
    @dataclass(frozen=True)
    class Given:
        rows: tuple[Tensor, None]
        factor: int

    kept, copied = torch.ones(3), []
    real = torch._foreach_copy_
    made = graphs.Graphs()

    def function(x: Tensor, given: Given) -> Tensor:
        return x * given.factor + given.rows[0]

    given = Given((kept, None), 2)
    torch._foreach_copy_, before = lambda to, of: (copied.append(len(to)), real(to, of))[1], real
    try:
        for k in range(4):
            np.testing.assert_array_equal(made(function, torch.full((3,), float(k)), given), [2 * k + 1.0] * 3)
        kept.fill_(7)
        np.testing.assert_array_equal(made(function, torch.ones(3), given), [9.0] * 3)
        made(function, torch.ones(3), Given((kept, None), 3))
    finally:
        torch._foreach_copy_ = before
    assert copied == [1, 1, 2] and stand.captured == 1


def test_old_graphs_go_and_a_network_takes_its_own_along(stand: _Stand) -> None:
    network = nn.Linear(2, 2)
    made = graphs.graphs_of(network)
    assert graphs.graphs_of(network) is made
    for size in range(1, 7):
        made(network.forward, torch.zeros(size, 2))
    for _ in range(3):
        made(torch.neg, torch.zeros(6, 2))
    assert len(made._entries) == 4 and stand.captured == 1
    died = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert died() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("stand")
def test_a_shape_that_cannot_be_recorded_is_launched_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(_run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", capture)
    made = graphs.Graphs()
    with pytest.warns(UserWarning, match="no graph of kernels for this shape"):
        outputs = [made(torch.neg, torch.ones(2)) for _ in range(4)]
    assert all(output.tolist() == [-1, -1] for output in outputs)


@pytest.mark.cuda
@pytest.mark.parametrize("model", TINY)
def test_graphs_on_cuda_equal_plain_launches(random_models: dict[str, Path], model: str) -> None:
    pipeline = Twin("torch").module("pipeline").Pipeline.load(random_models[model], device="cuda")
    requests = [_request(1.7), _request(1.7, "soft hat", 3.0), _request(1.7)]
    wanted = [pipeline.generate(request) for request in requests]
    with using({"graphs": "captured"}):
        for _ in range(3):
            for request, plain in zip(requests, wanted, strict=True):
                assert relative(pipeline.generate(request).audio[0], plain.audio[0]) < 1e-4
