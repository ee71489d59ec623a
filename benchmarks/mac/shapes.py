"""Time single operations at the models' shapes with MLX: products, attention, packed weights.

``python -m benchmarks.mac.shapes`` prints one line of JSON. What is compared here is no choice of the code yet: the
figures say where one would pay. Tokens M, width in K, width out N, heads H, head size 64.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from sa3_mlx.common.tuning.timing import interleaved
from sa3_mlx.runtime import mx

_FEWEST, _MOST, _ROUNDS = 2, 20, 7  # calls in one evaluation, so that launching it does not count
_EVALUATION = 0.05  # seconds that one should take
Make = Callable[[], mx.array]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Hold two ways to compute one thing: milliseconds of a call, and the relative error of the second."""

    name: str
    dtype: str
    ways: tuple[str, str]
    milliseconds: tuple[float, float]
    spread: tuple[float, float]
    error: float


def compare(name: str, dtype: str, ways: dict[str, Make], *, rounds: int) -> Compared:
    """Time two ways in turn."""

    def run(make: Make, calls: int) -> float:
        start = time.perf_counter()
        mx.eval([make() for _ in range(calls)])
        return (time.perf_counter() - start) / calls

    first, second = (make().astype(mx.float32) for make in ways.values())
    error = float(mx.linalg.norm((second - first).flatten(), stream=mx.cpu)) / float(
        mx.linalg.norm(first.flatten(), stream=mx.cpu)
    )
    slowest = max(run(make, _FEWEST) for make in ways.values())  # warm by now
    calls = int(np.clip(_EVALUATION / max(slowest, 1e-6), _FEWEST, _MOST))
    times = interleaved({way: partial(run, make, calls) for way, make in ways.items()}, rounds)
    (a, b), found = ways, list(times.values())
    return Compared(
        name=name,
        dtype=dtype,
        ways=(a, b),
        milliseconds=(found[0].median * 1e3, found[1].median * 1e3),
        spread=(found[0].spread * 1e3, found[1].spread * 1e3),
        error=error,
    )


def product(m: int, k: int, n: int, dtype: mx.Dtype) -> dict[str, Make]:
    """Return a product with weights (N, K), as layers hold them, and with the same weights stored as (K, N)."""
    x, weight = _normal((m, k), dtype), _normal((n, k), dtype)
    stored = mx.contiguous(weight.T)
    mx.eval(x, weight, stored)
    return {"transposed": lambda: x @ weight.T, "stored": lambda: x @ stored}


def packed(m: int, k: int, n: int, bits: int) -> dict[str, Make]:
    """Return a product with packed weights, and one that unpacks them first."""
    x, parts = _normal((m, k), mx.float16), mx.quantize(_normal((n, k), mx.float16), 64, bits)
    mx.eval(x, parts)
    return {
        "packed": lambda: mx.quantized_matmul(x, *parts, transpose=True, group_size=64, bits=bits),
        "unpacked": lambda: x @ mx.dequantize(*parts, 64, bits).T,
    }


def attention(heads: int, tokens: int) -> dict[str, Make]:
    """Return attention of a DiT with values in rows of their own, and with values as a view into all projections."""
    q, k = (_normal((1, heads, tokens, 64), mx.float16) for _ in range(2))
    both = _normal((1, tokens, 3, heads, 64), mx.float16)
    view = both[:, :, 2].transpose(0, 2, 1, 3)
    rows = mx.contiguous(view)
    mx.eval(q, k, both, rows)
    attend = partial(mx.fast.scaled_dot_product_attention, q, k, scale=0.125)
    return {"rows": lambda: attend(v=rows), "view": lambda: attend(v=view)}


def near(batch: int, heads: int, queries: int, keys: int) -> dict[str, Make]:
    """Return the attention of SAME to near tokens in fp32 and in fp16."""
    q, k, v = (_normal((batch, heads, count, 64), mx.float32) for count in (queries, keys, keys))
    half = [x.astype(mx.float16) for x in (q, k, v)]
    mx.eval(q, k, v, half)
    attend = partial(mx.fast.scaled_dot_product_attention, scale=0.125)
    return {"float32": lambda: attend(q, k, v), "float16": lambda: attend(*half)}


def _normal(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    values = np.random.default_rng(list(shape)).standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.25)
    return mx.array(values).astype(dtype)


def measure(*, short: bool) -> list[Compared]:
    """Time everything, or in short one shape of each kind."""
    dit = [(1024, 3072), (1024, 8192), (4096, 1024), (1536, 7680), (1536, 12288), (6144, 1536)]
    same = [(768, 3840), (1536, 7680), (1536, 9216), (4608, 1536)]
    works: list[tuple[str, str, Callable[[], dict[str, Make]]]] = []
    for m in (118, 387, 1356, 4156):
        works += [(f"{m} x {k} x {n}", "float16", partial(product, m, k, n, mx.float16)) for k, n in dit]
    for m in (2210, 3264, 8704):
        works += [(f"{m} x {k} x {n}", "float32", partial(product, m, k, n, mx.float32)) for k, n in same]
    works += [
        (f"attention of {heads} heads, {tokens} tokens", "float16", partial(attention, heads, tokens))
        for heads in (16, 24, 48)
        for tokens in (387, 1356)
    ]
    shapes = [(24, 192, 17, 51), (192, 24, 17, 51), (64, 24, 51, 85), (64, 24, 34, 34)]
    works += [(f"near attention {shape}", "both", partial(near, *shape)) for shape in shapes]
    works += [
        (f"{m} x 1536 x 7680 in {bits} bits", "float16", partial(packed, m, 1536, 7680, bits))
        for m in (118, 387, 1356)
        for bits in (4, 8)
    ]
    if short:
        works = [
            ("2 x 64 x 96", "float16", partial(product, 2, 64, 96, mx.float16)),
            ("attention of 2 heads, 5 tokens", "float16", partial(attention, 2, 5)),
            ("near attention (2, 2, 3, 4)", "both", partial(near, 2, 2, 3, 4)),
            ("2 x 64 x 96 in 4 bits", "float16", partial(packed, 2, 64, 96, 4)),
        ]
    return [compare(name, dtype, make(), rounds=2 if short else _ROUNDS) for name, dtype, make in works]


if __name__ == "__main__":
    print(json.dumps([asdict(compared) for compared in measure(short="--short" in sys.argv[1:])]))
