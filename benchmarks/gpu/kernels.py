"""Measure kernels and single networks on a GPU: facts, attention, steps, SAME, small parts, fp8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sa3_mlx.common.generation.noise import INITIAL
from sa3_torch.attention import attend_window, window_mask
from sa3_torch.choices import using
from sa3_torch.cuda.transfer import fetch
from sa3_torch.layers import graphed, halve_products
from sa3_torch.philox import DeviceNoise
from sa3_torch.same import SAME

from .journal import Row, Workbench
from .networks import config_of, dit_inputs, random_part

HALF = torch.float16
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def facts(bench: Workbench) -> Iterator[Row]:
    """Versions, the cost of a launch, copies, and the largest product."""
    x = torch.zeros(8, device=bench.device)
    size = 64 if bench.short else 8192
    row: Row = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if bench.device.type == "cuda":
        row |= {
            "device": torch.cuda.get_device_name(bench.device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "memory": torch.cuda.get_device_properties(bench.device).total_memory,
        }
    yield row
    launches = 10 if bench.short else 1000
    took = bench.timed(lambda: [x.add_(1) for _ in range(launches)])
    yield {"what": "tiny operation", "us": 1e3 * took["host_ms"] / launches}
    for dtype in (HALF, torch.float32):
        a = torch.randn(size, size, device=bench.device, dtype=dtype)
        took = bench.timed(partial(torch.matmul, a, a))
        yield {"what": f"product of {size}", "dtype": str(dtype), **took, "tflops": 2e-9 * size**3 / took["ms"]}
    sound = torch.zeros(1000 if bench.short else 33_500_000, device=bench.device)
    yield {"what": "fetch, pinned", "bytes": 4 * len(sound), **bench.timed(lambda: fetch(sound)())}
    yield {"what": "fetch, pageable", "bytes": 4 * len(sound), **bench.timed(lambda: sound.cpu())}


def attention(bench: Workbench) -> Iterator[Row]:
    """Every kernel of attention at the strides of the networks: error against fp64, and rate."""
    heads, lengths = (2, (40,)) if bench.short else (48, (184, 452, 1422, 4160))
    cross = (26,) if bench.short else (26, 64, 257)
    cases: list[tuple[str, int, int, str]] = []
    for n in lengths:
        cases += [("self", n, n, "none"), ("self", n, n, "mask")]
        cases += [("cross", n, s, "bias") for s in cross]
    for kind, n, s, mask in cases:
        q, k, v = (_strided(bench, heads, count) for count in (n, s, s))
        given = None
        if mask == "mask":
            given = (torch.arange(s, device=bench.device) < s - 1)[None, None, None]
        elif mask == "bias":
            given = torch.zeros(1, 1, 1, s, device=bench.device, dtype=HALF)
        wanted = None
        if n <= 1500:
            wide = given if given is None or given.dtype == torch.bool else given.double()
            wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=wide)
        for backend in (*BACKENDS, None):
            row = {"kind": kind, "queries": n, "keys": s, "mask": mask, "backend": backend.name if backend else "usual"}
            try:
                with sdpa_kernel(backend) if backend is not None else nullcontext():
                    out = F.scaled_dot_product_attention(q, k, v, attn_mask=given)
                    took = bench.timed(partial(F.scaled_dot_product_attention, q, k, v, attn_mask=given))
            except RuntimeError:
                yield {**row, "refused": True}
                continue
            error = None if wanted is None else float((out - wanted).norm() / wanted.norm())
            yield {**row, **took, "error": error, "tflops": 4e-9 * heads * n * s * 64 / took["ms"]}
    groups = 4 if bench.short else 1304
    for dtype in (HALF, torch.float32):
        q, k = (_strided(bench, 2 * heads // 2, groups * 17).to(dtype) for _ in range(2))
        v = _strided(bench, heads // 2, groups * 17).to(dtype)
        band = window_mask(groups, 17, bench.device)
        took = bench.timed(partial(attend_window, q, k, v, band))
        yield {"kind": "window of SAME-L", "groups": groups, "dtype": str(dtype), **took}


def _strided(bench: Workbench, heads: int, tokens: int) -> Tensor:
    """Return (1, H, N, 64) as a projection lays it out."""
    return torch.randn(1, tokens, heads, 64, device=bench.device, dtype=HALF).transpose(1, 2)


def steps(bench: Workbench, ways: dict[str, dict[str, str]]) -> Iterator[Row]:
    """Velocities of both DiTs in each of these ways."""
    dtype = torch.float32 if bench.device.type == "cpu" else HALF
    for name in ("small-music", "medium"):
        config = config_of(name, bench)
        for frames in (6, 10) if bench.short else (54, 388, 1292, *((4096,) if name == "medium" else ())):
            dit, x, modulation, prepared = dit_inputs(config, frames, 64, bench.device, dtype)
            plain = dit.velocity(x, modulation, prepared).float()
            for label, way in ways.items():

                def run(network: Any = dit, given: tuple[Any, ...] = (x, modulation, prepared)) -> Tensor:
                    return graphed(network, network.velocity, *given)

                with using(way):
                    run()
                    found = run().float()
                    took = bench.timed(run)
                error = float((found - plain).norm() / plain.norm())
                yield {"model": name, "frames": frames, "way": label, **took, "error": error}


def eager(bench: Workbench) -> Iterator[Row]:
    """Steps launched piece by piece."""
    yield from steps(bench, {"plain": {}})


def compiled(bench: Workbench) -> Iterator[Row]:
    """Steps by graphs of kernels, plain and compiled for any length."""
    graphs = {"graphs": "captured"}
    ways = {"graphs": graphs}
    if not bench.short:  # a compiler takes half a minute
        ways |= {"compiled": {"compiled_step": "compiled"}, "compiled, graphs": {"compiled_step": "compiled", **graphs}}
    yield from steps(bench, ways)


def autoencoder(bench: Workbench) -> Iterator[Row]:
    """Decode with SAME in each of its number types, whole and by chunks, and by a graph."""
    for name, lengths in (("medium", (66, 335, 1304, 4092)), ("small-music", (56, 1292))):
        config = config_of(name, bench)
        for numbers in ("float32", "tf32", "products", "float16"):
            same = cast(SAME, random_part(config, "same", bench.device, torch.float32))
            if numbers in ("products", "float16"):
                halve_products(same.decoder.layers, HALF, wide=numbers == "products")
            for frames in (8,) if bench.short else lengths:
                z = torch.randn(1, frames, config.same.latent_channels, device=bench.device)
                torch.backends.cuda.matmul.allow_tf32 = numbers == "tf32"
                try:
                    took = bench.timed(partial(same.decode, z))
                finally:
                    torch.backends.cuda.matmul.allow_tf32 = False
                yield {"model": name, "frames": frames, "numbers": numbers, **took}
                if numbers == "float16":
                    with using({"graphs": "captured"}):
                        graphed(same, same.decode, z)
                        took = bench.timed(partial(graphed, same, same.decode, z))
                    yield {"model": name, "frames": frames, "numbers": "float16, graph", **took}
                    pieces = [z[:, k : k + 192] for k in range(0, frames, 160)]
                    took = bench.timed(partial(_each, same, pieces))
                    yield {"model": name, "frames": frames, "numbers": "float16, chunks", **took}


def _each(same: SAME, pieces: list[Tensor]) -> list[Tensor]:
    return [same.decode(piece) for piece in pieces]


def small_parts(bench: Workbench) -> Iterator[Row]:
    """Text encoder, what is prepared for a prompt, and the noise of a run."""
    config = config_of("medium", bench)
    dtype = torch.float32 if bench.device.type == "cpu" else HALF
    text = random_part(config, "text_encoder", bench.device, torch.float32)
    ids = torch.ones(1, 63, dtype=torch.long, device=bench.device)
    mask = torch.ones(1, 63, dtype=torch.bool, device=bench.device)
    for label, way in {"plain": "plain", "graph": "captured"}.items():
        with using({"graphs": way}):
            text(ids, mask)
            yield {"what": "text encoder", "way": label, **bench.timed(lambda: text(ids, mask))}
    yield {
        "what": "DiT, inputs and weights made and prepared",
        **bench.timed(lambda: dit_inputs(config, 8, 64, bench.device, dtype)),
    }
    frames = 8 if bench.short else 4096

    def drawn() -> Tensor:
        return DeviceNoise(seeds=[1], device=bench.device, frames=frames, channels=256, steps=7).batch(INITIAL)

    yield {"what": "noise of a run", "frames": frames, **bench.timed(drawn)}
    host = np.zeros((frames, 256), np.float32)
    yield {"what": "copy of noise to the device", **bench.timed(lambda: torch.from_numpy(host).to(bench.device))}


def fp8(bench: Workbench) -> Iterator[Row]:
    """Products of a feed-forward in fp8 by rows, beside fp16."""
    sizes: tuple[int, ...] = (16,) if bench.short else (184, 1422, 4160)
    width, inner = (32, 64) if bench.short else (1536, 12288)
    for rows in sizes:
        x = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16)
        w = torch.randn(inner, width, device=bench.device, dtype=torch.bfloat16)
        plain = bench.timed(partial(torch.matmul, x, w.T))
        row: Row = {"rows": rows, "fp16_ms": plain["ms"]}
        run = _in_fp8(x, w)
        yield {**row, **bench.timed(run)}


def _in_fp8(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    kind, top = torch.float8_e4m3fn, 448.0
    scale_w = w.abs().amax(1, keepdim=True).float() / top
    weight = (w / scale_w).to(kind)

    def run() -> Tensor:
        scale = x.abs().amax(1, keepdim=True).float() / top
        return torch._scaled_mm((x / scale).to(kind), weight.T, scale, scale_w.T, out_dtype=torch.bfloat16)

    return run
