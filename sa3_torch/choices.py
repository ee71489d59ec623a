"""List the places of the PyTorch twin that have several ways to the same result; the twin of ``sa3_mlx/choices.py``."""

from __future__ import annotations

import torch

from sa3_mlx.common.tuning.choice import Choice, Choices
from sa3_mlx.common.tuning.chunk import CHUNKS, CHUNKS_TOLERANCE, FACTORS

# Compiling takes up to minutes for every new length, which only repeated runs win back: ``--compile`` asks for it.
CHOICES = Choices(
    "torch",
    "gpu" if torch.cuda.is_available() else "cpu",
    (
        Choice(
            name=CHUNKS,
            about="the autoencoder by 192 (SAME-L) or 128 frames, or by more or fewer",
            ways=("usual", *FACTORS),
            usual={"cpu": "usual", "gpu": "usual"},
            work=("decode", "encode"),
            tolerance=CHUNKS_TOLERANCE,
        ),
        Choice(
            name="compiled_step",
            about="a velocity of the DiT compiled, on CUDA as one graph of kernels",
            ways=("plain", "compiled"),
            usual={"cpu": "plain", "gpu": "plain"},
            work=("step",),
            asked={"compiled": 1e-5},
        ),
        Choice(
            name="compiled_decoder",
            about="the decoder of SAME compiled, on CUDA as one graph of kernels",
            ways=("plain", "compiled"),
            usual={"cpu": "plain", "gpu": "plain"},
            work=("decode",),
            asked={"compiled": 1e-5},
        ),
    ),
)
way, use, using = CHOICES.way, CHOICES.use, CHOICES.using
