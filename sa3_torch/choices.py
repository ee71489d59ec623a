"""List the places of the PyTorch twin that have several ways to the same result; the twin of ``sa3_mlx/choices.py``."""

from __future__ import annotations

import torch

from sa3_mlx.common.tuning.choice import Choice, Choices, Kind
from sa3_mlx.common.tuning.chunk import CHUNKS, CHUNKS_TOLERANCE, FACTORS
from sa3_mlx.common.tuning.threads import thread_counts

WHOLE = "whole"
KIND: Kind = "gpu" if torch.cuda.is_available() else "cpu"
_THREADS = thread_counts(torch.get_num_threads())


def _set_threads(way: str) -> None:
    torch.set_num_threads(_THREADS[way])


def _set_attention(way: str) -> None:
    for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        enable(way == "fused")
    torch.backends.cuda.enable_cudnn_sdp(way == "fused")


def _set_tf32(way: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = way == "on"


_ON_A_CPU = (
    Choice(
        name="threads",
        about="threads of an operation",
        ways=tuple(_THREADS),
        usual={"cpu": "all"},
        work=("step", "decode", "encode"),
        tolerance=5e-6,
        apply=_set_threads,
    ),
)
_ON_CUDA = (
    Choice(
        name="tf32",
        about="fp32 products with the mantissa of fp16",
        ways=("off", "on"),
        usual={"gpu": "off"},
        work=("decode", "encode"),
        asked={"on": 3e-2},
        apply=_set_tf32,
    ),
)
# Compiling takes up to minutes for every new length, which only repeated runs win back: ``--compile`` asks for it.
CHOICES = Choices(
    "torch",
    KIND,
    (
        Choice(
            name=CHUNKS,
            about="the autoencoder by 192 (SAME-L) or 128 frames, by more or fewer, or as many as half of a GPU holds",
            ways=("usual", *FACTORS, WHOLE),
            usual={"cpu": "usual", "gpu": WHOLE},
            work=("decode", "encode"),
            tolerance=CHUNKS_TOLERANCE,
        ),
        Choice(
            name="noise",
            about="normals of a run drawn by numpy, or where the network is, in one go",
            ways=("host", "device"),
            usual={"cpu": "host", "gpu": "device"},
            work=("step",),
            tolerance=1e-7,
        ),
        Choice(
            name="padding",
            about="frames of a single clip that mean nothing masked in attention, or cut",
            ways=("masked", "cut"),
            usual={"cpu": "masked", "gpu": "cut"},
            work=("step",),
            tolerance=1e-5,
        ),
        Choice(
            name="unequal",
            about="padding in attention masked, or clips and padding each a sequence of its own",
            ways=("masked", "apart"),
            usual={"cpu": "masked", "gpu": "apart"},
            work=("step",),
            tolerance=1e-5,
        ),
        Choice(
            name="context",
            about="as many text tokens as a prompt has, or 32, 64, 128 or 257 with fillers that weigh nothing",
            ways=("own", "buckets"),
            usual={"cpu": "own", "gpu": "buckets"},
            work=("step",),
            tolerance=1e-5,
        ),
        Choice(
            name="autoencoder",
            about="fp32; 16-bit inputs of its products; or of its attention too, with the rest fp32",
            ways=("float32", "products", "float16"),
            usual={"cpu": "float32", "gpu": "float16"},
            work=("decode", "encode"),
            tolerance=1e-2,  # random weights: up to 2.6e-3 was measured with products alone
        ),
        Choice(
            name="attention",
            about="PyTorch's products and softmax one by one, or what kernel it takes for all of them",
            ways=("math", "fused"),
            usual={"cpu": "fused", "gpu": "fused"},
            work=("step", "decode"),
            tolerance=1e-5,
            apply=_set_attention,
        ),
        Choice(
            name="compiled_step",
            about="the blocks of the DiT compiled, once for all lengths",
            ways=("plain", "compiled"),
            usual={"cpu": "plain", "gpu": "plain"},
            work=("step",),
            asked={"compiled": 1e-5},
        ),
        Choice(
            name="compiled_decoder",
            about="the blocks of SAME compiled, once for all lengths",
            ways=("plain", "compiled"),
            usual={"cpu": "plain", "gpu": "plain"},
            work=("decode",),
            asked={"compiled": 1e-5},
        ),
        Choice(
            name="graphs",
            about="on CUDA, text encoder, velocity and decoder launched as one graph of kernels for every shape",
            ways=("plain", "captured"),
            usual={"cpu": "plain", "gpu": "plain"},
            work=("step", "decode"),
            asked={"captured": 1e-6},
        ),
        *(_ON_A_CPU if KIND == "cpu" and len(_THREADS) > 1 else ()),
        *(_ON_CUDA if KIND == "gpu" else ()),
    ),
)
way, use, using = CHOICES.way, CHOICES.use, CHOICES.using


def on_a_cpu() -> dict[str, str]:
    """Return the ways that a CPU goes where those of this machine's GPU are the usual ones."""
    usual = ((place, place.usual.get("cpu", place.plain)) for place in CHOICES.places.values())
    return {place.name: way for place, way in usual if way != CHOICES.usual[place.name]}
