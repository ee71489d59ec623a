"""List the places of the MLX twin that have several ways to the same result: ``way("compiled_step")``.

A place is one line here and an ``if way(...) == ...`` where it computes. ``sa3 tune`` checks and times every way of
every place and needs no other word; ``common/tuning/choice.py`` says what the fields mean.
"""

from __future__ import annotations

from sa3_mlx.common.tuning.choice import Choice, Choices
from sa3_mlx.runtime import mx

CHOICES = Choices(
    "mlx",
    "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu",
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
            name="chunks",
            about="chunks of SAME-L of 192 frames, or up to 512 where an Apple GPU has room for them",
            ways=("usual", "long"),
            usual={"cpu": "usual", "gpu": "long"},
            work=("decode", "encode"),
            tolerance=1e-5,
        ),
    ),
)
way, use, using = CHOICES.way, CHOICES.use, CHOICES.using
