"""Attend in sequences of different lengths that lie one after the other: a kernel of a GPU, or one by one on a CPU.

The kernel has not run on CUDA yet. Tests give PyTorch's operation a form for a CPU, so that the rest of it has run.

Shapes: N tokens of all sequences together, H heads, K head size.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

KNOWN = find_spec("torch.nn.attention.varlen") is not None  # PyTorch 2.10 or later


def ready(like: Tensor) -> bool:
    """Tell whether ``attend`` takes tensors as this one; the kernel needs 16 bits and a GPU from 2020 on."""
    if like.device.type == "cpu":
        return True
    sixteen = like.dtype in (torch.float16, torch.bfloat16)
    if like.device.type != "cuda" or not sixteen or not KNOWN:
        return False
    return torch.cuda.get_device_capability(like.device) >= (8, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_longest: int, k_longest: int) -> Tensor:
    """Return softmax(q k^T / sqrt K) v of every sequence, (N, H, K) each.

    Sequence i are the queries q_ends[i]..q_ends[i + 1] - 1 and the keys k_ends[i]..k_ends[i + 1] - 1, int32; none of
    them has more than ``q_longest`` and ``k_longest``.
    """
    run = one_by_one if q.device.type == "cpu" else at_once
    return run(q, k, v, q_ends, k_ends, q_longest, k_longest)


def at_once(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_longest: int, k_longest: int) -> Tensor:
    """Do it by one kernel."""
    from torch.nn.attention.varlen import varlen_attn  # loads the compiler, which takes as long as all of PyTorch

    out = varlen_attn(q, k, v, q_ends, k_ends, q_longest, k_longest)
    assert isinstance(out, Tensor)
    return out


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, _q_longest: int, _k_longest: int
) -> Tensor:
    """Do it in fp32, sequence by sequence."""
    parts = []
    with torch.autocast("cpu", enabled=False):
        for (start, stop), (first, last) in zip(pairwise(q_ends.tolist()), pairwise(k_ends.tolist()), strict=True):
            own, keys, values = (x.float().transpose(0, 1) for x in (q[start:stop], k[first:last], v[first:last]))
            if stop > start:
                parts.append(F.scaled_dot_product_attention(own[None], keys[None], values[None])[0].transpose(0, 1))
    return torch.cat(parts).to(q.dtype)
