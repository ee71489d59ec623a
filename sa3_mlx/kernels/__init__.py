"""Own Metal kernels for what MLX computes in many small steps, each with its plain form beside it.

No Metal device has run them yet: tests translate them to C++ and compare them with the plain form on a CPU. A choice
turns each of them on (``sa3_mlx/choices.py``), and its first use compares it with the plain form on the machine itself.
"""

from .heads import head_norm_rope
from .window import near_attention

__all__ = ["head_norm_rope", "near_attention"]
