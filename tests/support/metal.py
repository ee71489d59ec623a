"""Run Metal kernels on a CPU: the same source, translated by a header to C++ and compiled with g++."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HEADER = Path(__file__).with_name("metal.h")
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="kernels are translated with g++")
TYPES = {"float32": "float", "float16": "float16_t"}
GUARD = 64  # numbers before and after every array; those of inputs are NaN, those of outputs must stay


class Metal:
    """Stand for ``mx.fast``'s kernels: what ``metal_kernel`` returns computes at once, on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0

    def metal_kernel(
        self,
        *,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
    ) -> Callable[..., list[Any]]:
        """Return a callable with the arguments of MLX's."""
        import mlx.core as mx

        def run(
            *,
            inputs: Sequence[Any],
            template: Sequence[tuple[str, Any]],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[Any],
        ) -> list[Any]:
            assert grid[0] == threadgroup[0] == 32, "a row of threads is a simdgroup"
            assert np.prod(threadgroup) <= 1024
            self.runs += 1
            arrays = [mx.array(values, mx.float32) if isinstance(values, float) else values for values in inputs]
            mx.eval(arrays)
            given = [_strided(array, ensure_row_contiguous) for array in arrays]
            made = [
                _guarded(np.zeros(shape), _name(dtype))
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            text = _source(
                header + source,
                [(n, TYPES[str(a.dtype)], a.ndim) for n, (a, _) in zip(input_names, given, strict=True)],
                [(n, TYPES[_name(dtype)]) for n, dtype in zip(output_names, output_dtypes, strict=True)],
                [(key, TYPES[_name(value)] if isinstance(value, mx.Dtype) else value) for key, value in template],
            )
            call = _built(self.folder, name, text)
            shapes = [(ctypes.c_int * max(a.ndim, 1))(*a.shape) for a, _ in given]
            strides = [(ctypes.c_int64 * max(a.ndim, 1))(*(s // a.itemsize for s in a.strides)) for a, _ in given]
            pointers = [ctypes.c_void_p(a.ctypes.data) for a, _ in (*given, *made)]
            sizes = (ctypes.c_uint * 3)(*grid)
            call(
                (ctypes.c_void_p * len(pointers))(*pointers),
                (ctypes.c_void_p * len(shapes))(*(ctypes.addressof(shape) for shape in shapes)),
                (ctypes.c_void_p * len(strides))(*(ctypes.addressof(stride) for stride in strides)),
                sizes,
            )
            for array, whole in made:
                assert np.isnan(whole[:GUARD]).all() and np.isnan(whole[-GUARD:]).all(), "written outside of an output"
                assert not np.isnan(array).any(), "a number was not written, or comes from outside of an input"
            return [mx.array(np.ascontiguousarray(array)) for array, _ in made]

        return run


def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def _guarded(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return an array of NaN of this shape, and the longer one that it is a part of."""
    whole = np.full(values.size + 2 * GUARD, np.nan, dtype)
    return whole[GUARD : whole.size - GUARD].reshape(values.shape), whole


def _strided(array: Any, contiguous: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of an MLX array with its strides, inside of a longer array of NaN."""
    values = np.array(array)
    if values.ndim != 4 or contiguous:
        inner, whole = _guarded(values, str(values.dtype))
        inner[...] = values
        return inner, whole
    view = np.asarray(memoryview(array))
    order = np.argsort([-stride for stride in view.strides], kind="stable")
    inner, whole = _guarded(values.transpose(order), str(values.dtype))
    inner[...] = values.transpose(order)
    return inner.transpose(np.argsort(order)), whole


def _source(
    source: str, inputs: list[tuple[str, str, int]], outputs: list[tuple[str, str]], template: list[tuple[str, Any]]
) -> str:
    """Write the kernel as a function, with what MLX passes beside the arrays where the source names it."""
    included = [line for line in source.splitlines() if line.startswith("#")]
    body = "\n".join(line for line in source.splitlines() if not line.startswith("#"))
    lines = [f'#include "{HEADER}"', *(line for line in included if "<metal_" not in line)]
    for key, value in template:
        lines.append(f"typedef {value} {key};" if isinstance(value, str) else f"constexpr int {key} = {int(value)};")
    lines += ["static void** arrays; static void** shapes; static void** all_strides;", "static void whole() {"]
    for i, (name, kind, rank) in enumerate(inputs):
        lines.append(f"const {kind}{'*' if rank else '&'} {name} = {'' if rank else '*'}(const {kind}*)arrays[{i}];")
        if rank:
            lines.append(f"const int* {name}_shape = (const int*)shapes[{i}];")
            lines.append(f"const int64_t* {name}_strides = (const int64_t*)all_strides[{i}];")
    for i, (name, kind) in enumerate(outputs):
        lines.append(f"{kind}* {name} = ({kind}*)arrays[{len(inputs) + i}];")
    lines += [body, "}", 'extern "C" void run(void** given, void** given_shapes, void** strides, const uint* grid) {']
    lines += ["arrays = given; shapes = given_shapes; all_strides = strides; lanes::body = whole;"]
    lines += [
        "for (uint z = 0; z < grid[2]; z++) for (uint y = 0; y < grid[1]; y++) lanes::run_simdgroup(0, y, z);",
        "}",
    ]
    return "\n".join(lines)


def _built(folder: Path, name: str, text: str) -> Any:
    stem = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    library = stem.with_suffix(".so")
    if not library.exists():
        stem.with_suffix(".cpp").write_text(text)
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
        command = ["g++", *flags, str(stem.with_suffix(".cpp")), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library)).run
