"""Counting kernels and copies: small graphs whose numbers are known, and whole networks joined as MLX joins them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
graph = pytest.importorskip("benchmarks.speed.graph")


def _count(function: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[float, float, float]:
    found = graph.Graph(lambda _, *arrays: function(*arrays), {}, *(mx.zeros(shape) for shape in shapes)).count()
    return found.nodes, found.copies, found.passes


def test_numbers_of_small_graphs() -> None:
    x, n = (2, 3, 4, 64), 2 * 3 * 4 * 64
    assert _count(lambda a: a.transpose(0, 2, 1, 3), x) == (0, 0, 0)
    assert _count(lambda a: a.transpose(0, 2, 1, 3).flatten(2), x) == (0, 1, 2 * n)
    assert _count(lambda a: mx.exp(a) * 2 + a, x) == (1, 0, 2 * n + 1)  # with the constant
    assert _count(lambda a, b: mx.concatenate([a, b], axis=1) + 1, x, x) == (1, 2, 4 * n + 4 * n + 1)
    assert _count(lambda a: mx.pad(a, [(0, 0), (1, 1), (0, 0), (0, 0)]), x)[:2] == (0, 2)
    w = mx.ones(64)
    mx.eval(w)
    assert _count(lambda a: mx.fast.rms_norm(a, w, 1e-5), x) == (1, 0, 2 * n + 64)
    assert _count(lambda a: mx.fast.rms_norm(a[:, :, ::2], w, 1e-5), x) == (1, 1, 2 * n + 64)


def test_attention_leaves_tokens_first() -> None:
    """So heads are merged without a copy, but not where every head is an item of its own."""

    def merged(a: Any) -> Any:
        return mx.fast.scaled_dot_product_attention(a, a, a, scale=1.0).transpose(0, 2, 1, 3).flatten(2)

    def apart(a: Any) -> Any:
        return mx.fast.scaled_dot_product_attention(a, a, a, scale=1.0).reshape(1, 3, -1, 64)

    assert _count(merged, (2, 3, 16, 64))[:2] == (1, 0)
    assert _count(apart, (3, 4, 16, 64))[:2] == (1, 1)


@pytest.mark.parametrize("name", ["DiT block", "DiT block, differential", "SAME-S block", "SAME-L block"])
def test_kernels_are_joined_as_mlx_joins_them(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same function compiled by MLX and drawn: as many nodes that are no views."""
    counted: list[tuple[int, int]] = []

    class Both(graph.Graph):  # type: ignore[name-defined, misc]
        def __init__(self, function: Any, weights: dict[str, Any], *arrays: Any) -> None:
            super().__init__(function, weights, *arrays)
            ours = sum(node.name not in graph.VIEWS | graph.RESHAPES for node in self.nodes)
            with graph._marked():
                mx.export_to_dot(str(tmp_path / "drawn.dot"), mx.compile(function)(weights, *arrays))
            labels = [
                line.split('"')[1] for line in (tmp_path / "drawn.dot").read_text().splitlines() if "label" in line
            ]
            others = graph.VIEWS | graph.RESHAPES | {"Full"}  # which makes the mark of attention and norms
            counted.append((ours, sum(label not in others for label in labels)))

    monkeypatch.setattr(graph, "Graph", Both)
    graph.COUNTS[name]()
    assert len(counted) == 2
    for ours, drawn in counted:
        assert ours == drawn and ours > 40


@pytest.mark.parametrize("size", ["SAME_S", "SAME_L"])
def test_compiled_groups_of_same_leave_nothing_to_join(size: str, tmp_path: Path) -> None:
    """Compiling whole blocks makes as many kernels as compiling the groups only."""
    config = replace(getattr(graph, size), width=graph.WIDTH)
    layers = [graph.SAMEBlock(config, sine_gate=False) for _ in range(4)]
    x, drawn = mx.zeros((1, 4 * 17, config.width)), []
    mx.eval(x, *(layer.parameters() for layer in layers))

    def run(x: Any) -> Any:
        return graph.run_blocks(layers, x, config, None, latents_only=False)

    for function, ways in ((run, {"compiled_pointwise": "compiled"}), (mx.compile(run), {})):
        with graph._marked(), graph.using({"two_maps": "apart"} | ways):
            mx.export_to_dot(str(tmp_path / "drawn.dot"), function(x))
        labels = [line.split('"')[1] for line in (tmp_path / "drawn.dot").read_text().splitlines() if "label" in line]
        drawn.append(sum(label not in graph.VIEWS | graph.RESHAPES | {"Full"} for label in labels))
    assert drawn[0] == drawn[1]


def test_a_block_is_the_difference_of_two_networks() -> None:
    deep, shallow = graph.KernelCount(), graph.KernelCount()
    for _ in range(5):
        deep.add("norm", 20)
    deep.add("Flatten", 8, copies=1)
    shallow.add("norm", 20)
    found = deep.per_block(shallow, 2, 4)
    assert (found.nodes, found.copies, found.passes) == (2, 0.5, 11)
    assert found.kinds == {"norm": 2, "copy by Flatten": 0.5}
    assert np.isfinite(found.passes)
