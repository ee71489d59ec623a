"""Count what a block launches, copies and moves beside its arithmetic: ``python -m benchmarks graph``.

Nothing is computed. MLX builds a graph, and its nodes are counted as a GPU would run them, also where there is none:
attention, norms and own kernels are one node each, and elementwise operations are joined as ``mx.compile`` joins those
of a whole network. It is compared with a network that has more blocks: what lies between blocks counts too.

- nodes: kernels without copies;
- copies: kernels that only bring numbers into another place. What is a view and what is a copy follows the rules of
  MLX 0.32 on Metal from the strides of every array: a norm and an own kernel copy what is not contiguous, attention
  leaves tokens before heads, a concatenation copies every input;
- passes: numbers read and written, in units of tokens times width, without weights and what stays inside attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest.mock import patch

import click
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.lib.stride_tricks import as_strided

from sa3_mlx.choices import CHOICES, using
from sa3_mlx.cli.models.listing import table
from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.model.config import DiTConfig, SAMEConfig
from sa3_mlx.common.model.presets import SAME_L, SAME_S
from sa3_mlx.dit import DiT
from sa3_mlx.kernels import heads, window
from sa3_mlx.kernels.checked import Checked
from sa3_mlx.lora import AdaptedLinear, Update
from sa3_mlx.runtime import mx, nn
from sa3_mlx.same import SAMEBlock, run_blocks

WIDTH, CONTEXT, LATENT, FRAMES = 256, 128, 64, 136  # small: numbers of kernels do not depend on them
MARKS = (
    "attention",
    "norm",
    "own kernel",
    "own kernel on views",
)  # stand in the graph as Depends, the kind as the rank of the last input
VIEWS = {"AsStrided", "Broadcast", "BroadcastAxes", "ExpandDims", "Slice", "Split", "Squeeze", "Transpose"}
RESHAPES = {"Flatten", "Reshape", "Unflatten"}
ELEMENTWISE = {
    *("Abs", "Add", "AsType", "Divide", "Equal", "Exp", "Greater", "GreaterEqual", "Less", "LessEqual", "Log"),
    *("LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "Power", "Select"),
    *("Sigmoid", "Sin", "Cos", "Sqrt", "Square", "StopGradient", "Subtract", "Tanh"),
}
JOINED, DEEPEST = 24, 11  # the most inputs and the deepest chain of one compiled kernel
Network = Callable[..., mx.array]


@dataclass(frozen=True)
class Node:
    """Hold one operation of a graph; arrays are known by their names."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: list[Any] = field(default_factory=list)


@dataclass
class KernelCount:
    """Hold what a graph costs."""

    nodes: float = 0
    copies: float = 0
    passes: float = 0
    kinds: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, numbers: float, *, copies: int = 0) -> None:
        """Count one kernel, or so many copies, and the numbers that it moves."""
        self.nodes += not copies
        self.copies += copies
        self.passes += numbers
        kind = f"copy by {kind}" if copies else kind
        self.kinds[kind] = self.kinds.get(kind, 0) + (copies or 1)

    def per_block(self, shallow: KernelCount, blocks: int, unit: float) -> KernelCount:
        """Return what each of so many more blocks costs, passes in units of so many numbers."""
        kinds = {kind: (n - shallow.kinds.get(kind, 0)) / blocks for kind, n in sorted(self.kinds.items())}
        return KernelCount(
            nodes=(self.nodes - shallow.nodes) / blocks,
            copies=(self.copies - shallow.copies) / blocks,
            passes=round((self.passes - shallow.passes) / blocks / unit, 1),
            kinds={kind: n for kind, n in kinds.items() if n},
        )


class Graph:
    """Hold the operations of a function of arrays, in the order in which they would run."""

    def __init__(self, function: Network, weights: dict[str, mx.array], *arrays: mx.array) -> None:
        self.nodes: list[Node] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.results: set[str] = set()
        self.weights: set[str] = set()
        names = list(weights)

        def called(*given: mx.array) -> mx.array:
            return function(dict(zip(names, given[: len(names)], strict=True)), *given[len(names) :])

        with _marked():
            mx.export_function(self._read, called, *weights.values(), *arrays)
        self.weights = set(list(self._inputs)[: len(names)])
        self._join()

    def _read(self, part: dict[str, Any]) -> None:
        if part["type"] == "inputs":
            self._inputs = [name for name, _, _ in part["inputs"]]
        if part["type"] == "outputs":
            self.results = {name for name, _, _ in part["outputs"]}
        if part["type"] == "constants":
            self.shapes |= {name: tuple(array.shape) for name, array in part["constants"]}
        for name, shape, _ in [*part.get("inputs", ()), *part.get("outputs", ())]:
            self.shapes[name] = tuple(shape)
        if part["type"] == "primitive":
            inputs, outputs = ([name for name, _, _ in part[side]] for side in ("inputs", "outputs"))
            kind = part["name"]
            if kind == "Depends":
                kind = MARKS[len(self.shapes[inputs.pop()]) - 1]
                if kind.startswith("own"):
                    inputs = inputs[len(outputs) :]  # the first stand for the outputs
            self.nodes.append(Node(kind, tuple(inputs), tuple(outputs), part["arguments"]))

    def _join(self) -> None:
        """Join elementwise operations as ``mx.compile`` does: backwards, where nothing else reads what is between."""
        made = {name: node for node in self.nodes for name in node.outputs}
        readers: dict[str, set[str]] = {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, set()).update(node.outputs)
        joined: list[Node] = []
        done: set[str] = set()
        for node in reversed(self.nodes):
            if node.outputs[0] in done:
                continue
            group: set[str] = set()
            if node.name in ELEMENTWISE:
                self._collect(node.outputs[0], 0, made, readers, group, set())
            if len(group) < 2:
                joined.append(node)
                continue
            done |= group - {node.outputs[0]}
            inputs = dict.fromkeys(given for name in group for given in made[name].inputs if given not in group)
            results = [
                name
                for name in made
                if name in group
                and made[name].name != "Broadcast"  # one that others read too is theirs as well, a view
                and (name in self.results or readers.get(name, set()) - group)
            ]
            joined.append(Node("elementwise", tuple(inputs), tuple(results)))
        self.nodes = joined[::-1]

    def _collect(
        self,
        name: str,
        depth: int,
        made: dict[str, Node],
        readers: dict[str, set[str]],
        group: set[str],
        inputs: set[str],
    ) -> None:
        node = made.get(name)
        fits = node is not None and (node.name in ELEMENTWISE or node.name == "Broadcast")
        if name in group or not fits or depth >= DEEPEST:
            inputs.add(name)
            return
        assert node is not None
        if depth and not readers[name] <= group and not (node.name == "Broadcast" and len(inputs) < JOINED):
            inputs.add(name)
            return
        if len(inputs) >= JOINED:
            return
        group.add(name)
        for given in node.inputs:
            self._collect(given, depth + 1, made, readers, group, inputs)

    def count(self) -> KernelCount:
        """Return what it costs on Metal."""
        count, layouts = KernelCount(), {name: _contiguous(self.shapes[name]) for name in self.shapes}
        weights = set(self.weights)
        for node in self.nodes:
            given = [layouts[name] for name in node.inputs]
            read = sum(_numbers(layouts[name]) for name in node.inputs if name not in weights)
            outputs = [_contiguous(self.shapes[name]) for name in node.outputs]
            written = sum(output.size for output in outputs)
            if node.name in VIEWS:
                outputs = _views(node, given[0], [output.shape for output in outputs])
                weights |= set(node.outputs) if node.inputs[0] in weights else set()
            elif node.name in RESHAPES:
                view = _reshaped(given[0], outputs[0].shape)
                if view is None:
                    count.add(node.name, 2 * written, copies=1)
                else:
                    outputs = [view]
                    weights |= set(node.outputs) if node.inputs[0] in weights else set()
            elif node.name == "Concatenate":
                count.add(node.name, read + written, copies=len(node.inputs))
            elif node.name == "Pad":
                count.add(node.name, read + written, copies=2)  # the frame and the middle
            else:
                if node.name in ("norm", "own kernel"):
                    for array in given:
                        if not array.flags.c_contiguous:
                            count.add(node.name, 2 * array.size, copies=1)
                if node.name == "attention":
                    outputs = [_contiguous(np.array(outputs[0].shape)[[0, 2, 1, 3]]).transpose(0, 2, 1, 3)]
                count.add(node.name, read + written)
            layouts |= dict(zip(node.outputs, outputs, strict=True))
        return count


def _contiguous(shape: Any) -> np.ndarray:
    """Return an array of this shape without memory: only its strides are looked at."""
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    return as_strided(np.zeros(1, np.int8), tuple(shape), strides)


def _numbers(layout: np.ndarray) -> int:
    """Count the numbers of an array, each of those that a broadcast repeats once."""
    return int(
        np.prod([size for size, stride in zip(layout.shape, layout.strides, strict=True) if stride or size == 1])
    )


def _reshaped(layout: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    view = layout.view()
    try:
        view.shape = shape
    except AttributeError:
        return None
    return view


def _views(node: Node, layout: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    if node.name == "Transpose":
        return [layout.transpose(node.arguments[0])]
    if node.name == "Slice":
        return [layout[tuple(slice(*ends) for ends in zip(*node.arguments, strict=True))]]
    if node.name == "Split":
        return np.split(layout, list(node.arguments[0]), axis=node.arguments[1])
    if node.name == "AsStrided":
        shape, strides, _ = node.arguments
        return [as_strided(layout, tuple(shape), tuple(strides))]
    if node.name in ("ExpandDims", "Squeeze"):
        return [layout.reshape(shapes[0])]
    return [np.broadcast_to(layout, shapes[0])]


@contextmanager
def _marked() -> Iterator[None]:
    """Put one node in the place of what a CPU would take apart or cannot run."""

    def mark(kind: str, outputs: list[mx.array], *inputs: mx.array | None) -> list[mx.array]:
        tag = mx.zeros((1,) * (1 + MARKS.index(kind)))
        mx.eval(tag)
        return mx.depends(outputs, [*(array for array in inputs if array is not None), tag])

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
        assert scale
        return mark("attention", [q], k, v, mask)[0]

    def norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        assert eps
        return mark("norm", [x], weight)[0]

    def metal_kernel(*, ensure_row_contiguous: bool = True, **_: object) -> Callable[..., list[mx.array]]:
        kind = "own kernel" if ensure_row_contiguous else "own kernel on views"

        def run(*, inputs: list[Any], output_shapes: Any, output_dtypes: Any, **_: object) -> list[mx.array]:
            outputs = [mx.broadcast_to(mx.array(0, t), s) for s, t in zip(output_shapes, output_dtypes, strict=True)]
            return mark(kind, outputs, *(array for array in inputs if isinstance(array, mx.array)))

        return run

    with (
        patch.object(mx.fast, "scaled_dot_product_attention", attention),
        patch.object(mx.fast, "rms_norm", norm),
        patch.object(mx.fast, "metal_kernel", metal_kernel),
        patch.object(Checked, "__call__", lambda kernel, variant, arrays: kernel.kernel(variant, arrays)),
    ):
        for compiled in (heads.compiled, window.compiled):
            compiled.cache_clear()
        try:
            yield
        finally:
            for compiled in (heads.compiled, window.compiled):
                compiled.cache_clear()


def _weights(module: nn.Module) -> dict[str, mx.array]:
    mx.eval(module.parameters())
    return dict(tree_flatten(module.parameters()))


def count_dit(*, differential: bool) -> KernelCount:
    """Count a block of the DiT in the middle of a step from text, without guidance."""

    def whole(depth: int) -> KernelCount:
        config = DiTConfig(width=WIDTH, depth=depth, memory_tokens=64, differential=differential)
        dit = DiT(config, LATENT, CONTEXT)
        dit.set_dtype(mx.float16)
        cond = Conditioning(
            context=mx.zeros((1, 26, CONTEXT), mx.float16),
            repeats=mx.ones((1, 26)),
            seconds=mx.zeros((1, CONTEXT), mx.float16),
            valid=None,
            local=mx.zeros((1, 1, LATENT + 1), mx.float16),
        )
        prepared = dit.prepare(cond)
        mx.eval(*prepared.local, *(array for c in prepared.contexts if c for array in (c.keys, c.values, c.bias)))

        def step(weights: dict[str, mx.array], x: mx.array, modulation: mx.array) -> mx.array:
            dit.update(tree_unflatten(list(weights.items())))
            return dit.velocity(x, modulation, prepared)

        x, modulation = mx.zeros((1, FRAMES, LATENT), mx.float16), mx.zeros((1, 6 * WIDTH), mx.float16)
        return Graph(step, _weights(dit), x, modulation).count()

    return whole(4).per_block(whole(3), 1, (64 + FRAMES) * WIDTH)


def count_same(size: SAMEConfig) -> KernelCount:
    """Count a block of SAME in the middle of a decoder."""
    config = replace(size, width=WIDTH)
    tokens = FRAMES * (config.stride + 1)

    def whole(depth: int) -> KernelCount:
        stack = nn.Module()
        stack.layers = [SAMEBlock(config, sine_gate=False) for _ in range(depth)]

        def run(weights: dict[str, mx.array], x: mx.array) -> mx.array:
            stack.update(tree_unflatten(list(weights.items())))
            return run_blocks(stack.layers, x, config, None, latents_only=False)

        return Graph(run, _weights(stack), mx.zeros((1, tokens, WIDTH))).count()

    return whole(6).per_block(whole(4), 2, tokens * WIDTH)


def count_lora(*, rank: int = 16) -> KernelCount:
    """Count a linear map with bias that keeps its width, with an adapter beside it."""
    layer = AdaptedLinear(nn.Linear(WIDTH, WIDTH), [Update(mx.zeros((rank, WIDTH)), mx.zeros((WIDTH, rank)), {})])

    def run(weights: dict[str, mx.array], x: mx.array) -> mx.array:
        layer.update(tree_unflatten(list(weights.items())))
        return layer(x)

    return Graph(run, _weights(layer), mx.zeros((1, FRAMES, WIDTH))).count().per_block(KernelCount(), 1, FRAMES * WIDTH)


COUNTS: dict[str, Callable[[], KernelCount]] = {
    "DiT block": lambda: count_dit(differential=False),
    "DiT block, differential": lambda: count_dit(differential=True),
    "SAME-S block": lambda: count_same(SAME_S),
    "SAME-L block": lambda: count_same(SAME_L),
    "linear map with LoRA": count_lora,
}


@click.command()
@click.option(
    "--choose",
    "chosen",
    multiple=True,
    metavar="PLACE=WAY",
    help="Count with this way of a place of sa3_mlx/choices.py.",
)
def graph(chosen: tuple[str, ...]) -> None:
    """Print kernels, copies and passes of every kind of block, and which they are. The last line is JSON."""
    ways = {place: way for place, _, way in (text.partition("=") for text in chosen)}
    with using({name: CHOICES.place(name).usual["gpu"] for name in ("two_maps", "window_layout")} | ways):
        counts = {name: count() for name, count in COUNTS.items()}
    rows = [("block", "kernels", "copies", "passes", "which")]
    for name, count in counts.items():
        which = ", ".join(f"{n:g} {kind}" for kind, n in count.kinds.items())
        rows.append((name, f"{count.nodes:g}", f"{count.copies:g}", f"{count.passes:g}", which))
    click.echo(table(rows))
    click.echo(json.dumps({name: asdict(count) for name, count in counts.items()}))
