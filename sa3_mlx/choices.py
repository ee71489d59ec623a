"""List the places of the MLX twin that have several ways to the same result: ``way("compiled_step")``.

A place is one line here and an ``if way(...) == ...`` where it computes. ``sa3 tune`` checks and times every way of
every place and needs no other word; ``common/tuning/choice.py`` says what the fields mean.
"""

from __future__ import annotations

import ctypes
import sys

from sa3_mlx.common.tuning.choice import Choice, Choices, Kind
from sa3_mlx.common.tuning.chunk import CHUNKS, CHUNKS_TOLERANCE, FACTORS
from sa3_mlx.common.tuning.threads import thread_counts
from sa3_mlx.runtime import on_gpu

KIND: Kind = "gpu" if on_gpu() else "cpu"
_LIBRARY = ctypes.CDLL(None)  # with the OpenBLAS that serves MLX on Linux, see runtime.py
_THREADS = thread_counts(_LIBRARY.openblas_get_num_threads() if hasattr(_LIBRARY, "openblas_get_num_threads") else 1)


def _set_threads(way: str) -> None:
    _LIBRARY.openblas_set_num_threads(_THREADS[way])


_ON_A_CPU = (
    Choice(
        name="threads",
        about="threads of a product of matrices",
        ways=tuple(_THREADS),
        usual={"cpu": "all"},
        work=("step", "decode", "encode"),
        tolerance=5e-6,
        apply=_set_threads,
    ),
)
_ON_A_MAC = (
    Choice(
        name="buffers",
        about="operations, and MB of their inputs, that MLX gathers before it hands them to the GPU",
        ways=("40", "200", "400"),
        usual={"gpu": "40"},
        work=("step", "decode"),
        environment={
            size: {"MLX_MAX_OPS_PER_BUFFER": size, "MLX_MAX_MB_PER_BUFFER": size} for size in ("40", "200", "400")
        },
    ),
    Choice(
        name="tf32",
        about="fp32 products in the matrix units of an M5, with the mantissa of fp16",
        ways=("off", "on"),
        usual={"gpu": "off"},
        work=("decode", "encode"),
        asked={"on": 3e-2},  # of the demo's sounds [P8.4]
        environment={"off": {"MLX_ENABLE_TF32": "0"}, "on": {"MLX_ENABLE_TF32": "1"}},
    ),
)
CHOICES = Choices(
    "mlx",
    KIND,
    (
        Choice(
            name="compiled_step",
            about="a velocity of the DiT as one compiled graph; on Linux it needs g++ at run time",
            ways=("plain", "compiled"),
            usual={"cpu": "plain", "gpu": "compiled"},
            work=("step",),
            tolerance=5e-6,
        ),
        Choice(
            name="compiled_pointwise",
            about="groups of elementwise operations as one kernel each; on Linux it needs g++ at run time",
            ways=("plain", "compiled"),
            usual={"cpu": "plain", "gpu": "compiled"},
            work=("step", "decode"),
            tolerance=5e-6,
        ),
        Choice(
            name="launches",
            about="a step or chunk launched by itself, or before the one before it is brought back",
            ways=("single", "ahead"),
            usual={"cpu": "single", "gpu": "ahead"},
            work=("step", "decode"),
        ),
        Choice(
            name=CHUNKS,
            about="the autoencoder by 192 (SAME-L) or 128 frames, or SAME-L by up to 512 where an Apple GPU has room",
            ways=("usual", "long", *FACTORS),
            usual={"cpu": "usual", "gpu": "long"},
            work=("decode", "encode"),
            tolerance=CHUNKS_TOLERANCE,
        ),
        Choice(
            name="head_norm_rope",
            about="norm, rotary positions and layout of queries and keys in one Metal kernel of our own",
            ways=("plain", "kernel"),
            usual={"cpu": "plain", "gpu": "plain"},  # no Metal device has run the kernel yet
            work=("step", "decode", "encode"),
            tolerance=5e-6,
        ),
        Choice(
            name="two_maps",
            about="both maps of differential attention: together over a copy of V for each, or apart over the one V",
            ways=("together", "apart"),
            usual={"cpu": "together", "gpu": "apart"},
            work=("step", "decode", "encode"),
        ),
        Choice(
            name="window_layout",
            about="what is the batch of window attention (SAME-L): the heads, or the groups of tokens",
            ways=("heads", "groups"),
            usual={"cpu": "heads", "gpu": "groups"},
            work=("decode", "encode"),
            tolerance=5e-6,
        ),
        Choice(
            name="window_attention",
            about="attention to near tokens in SAME: MLX's, a Metal kernel of our own, or MLX's in 16 bits",
            ways=("plain", "kernel", "float16"),
            usual={"cpu": "plain", "gpu": "plain"},  # no Metal device has run the kernel yet
            work=("decode", "encode"),
            tolerance=5e-6,
            asked={"float16": 3e-2},  # of the demo's sounds [P8.4]
        ),
        Choice(
            name="packed_products",
            about="products with packed weights: unpacked for each of them never, where they are small, or always",
            ways=("packed", "small_unpacked", "unpacked"),
            usual={"cpu": "unpacked", "gpu": "packed"},
            work=("step", "decode", "encode"),
            tolerance=5e-6,
        ),
        *(_ON_A_CPU if KIND == "cpu" and len(_THREADS) > 1 else ()),
        *(_ON_A_MAC if KIND == "gpu" and sys.platform == "darwin" else ()),
    ),
)
way, use, using = CHOICES.way, CHOICES.use, CHOICES.using
