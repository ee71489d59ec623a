"""List the places of the MLX twin that have several ways to the same result: ``way("compiled_step")``.

A place is one line here and an ``if way(...) == ...`` where it computes. ``sa3 tune`` checks and times every way of
every place and needs no other word; ``common/tuning/choice.py`` says what the fields mean.
"""

from __future__ import annotations

from sa3_mlx.common.tuning.choice import Choice, Choices
from sa3_mlx.common.tuning.chunk import CHUNKS, CHUNKS_TOLERANCE, FACTORS
from sa3_mlx.runtime import on_gpu

CHOICES = Choices(
    "mlx",
    "gpu" if on_gpu() else "cpu",
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
    ),
)
way, use, using = CHOICES.way, CHOICES.use, CHOICES.using
