"""Draw the noise of ``common/generation/noise.py`` on any device: the same Philox 4x64 in int64 operations [A15.8].

The words are those of numpy, bit for bit; normals are float64 until the last rounding, as there. Nothing waits for the
device. On a CPU numpy is faster, so a pipeline there draws with it.

Shapes: the leading shape is that of ``seeds`` and ``index``, broadcast; T frames, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sa3_mlx.common.generation.events import SeededNoise
from sa3_mlx.common.generation.noise import INITIAL, NoiseStream, step

from .cuda.transfer import upload

_LOW = 0xFFFFFFFF
_TOP = 2**64
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_TOGETHER = 8  # draws of a run: the start and seven steps, all that the usual eight steps need
_PART = 256  # frames of decoder noise at a time: SAME-L's take 50 MB in each of about ten tensors


def _signed(value: int) -> int:
    """Return the int64 with the bits of a number below 2**64."""
    return value - _TOP if value >= _TOP // 2 else value


def _high(x: Tensor) -> Tensor:
    """Return the upper 32 bits as a number of 0 .. 2**32 - 1: torch shifts the sign in."""
    return (x >> 32) & _LOW


def words(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """Return Philox 4x64-10 of counters and keys: 4 and 2 int64 tensors that broadcast -> (..., 4) int64.

    The counter is the published one; numpy's generator gives the block of a counter that is one higher than its own.
    """
    shape = torch.broadcast_shapes(*(each.shape for each in (*counter, *key)))
    even, odd = _pair(counter[0], counter[2], shape), _pair(counter[1], counter[3], shape)
    keys = _pair(key[0], key[1], shape)
    whole, low, high, weyl = (each.view(2, *(1,) * len(shape)) for each in _constants(even.device))
    for k in range(_ROUNDS):
        keys = keys + weyl if k else keys
        upper = _product_high(even, low, high)  # of words 0 and 2
        even, odd = upper.flip(0) ^ odd ^ keys, (even * whole).flip(0)
    even, odd = even.expand(2, *shape), odd.expand(2, *shape)
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1)


def _pair(first: Tensor, second: Tensor, shape: Sequence[int]) -> Tensor:
    """Return both as one (2, ...), whose shape still broadcasts to (2, *shape): words that are alike stay one."""
    both = torch.stack(torch.broadcast_tensors(first, second))
    return both.view(2, *(1,) * (len(shape) + 1 - both.dim()), *both.shape[1:])


def _constants(device: torch.device) -> Tensor:
    """Return multipliers, their lower and upper halves, and what is added to the keys: (4, 2)."""
    rows = [*([_signed(m), m & _LOW, m >> 32] for m in _MULTIPLIERS)]
    return upload(np.array([*zip(*rows, strict=True), tuple(map(_signed, _WEYL))]), device)


def _product_high(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the upper 64 bits of the unsigned product of x and high * 2**32 + low; no sum of parts overflows."""
    a, b = x & _LOW, _high(x)
    middle = b * low + _high(a * low)
    return b * high + _high(middle) + _high((middle & _LOW) + a * high)


def normals(drawn: Tensor) -> Tensor:
    """Return standard normals (..., n) float32 of words (..., n), n even: Box-Muller of each pair in float64."""
    uniform = ((drawn >> 11) & (2**53 - 1)).double() * 2.0**-53  # in [0, 1)
    first, second = uniform[..., 0::2], uniform[..., 1::2]
    radius, angle = torch.sqrt(-2.0 * torch.log1p(-first)), 2.0 * math.pi * second
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(-2).float()


def noise(seeds: Tensor, index: Tensor, stream: Tensor, frames: int, channels: int, *, start: int = 0) -> Tensor:
    """Draw the normals of ``NoiseStream(stream, index)`` for seeds, all int64 -> (..., frames, channels) float32.

    Seeds (B,) with indices (steps, 1) make what a whole run adds, (steps, B, frames, channels), in one go.
    """
    blocks = -(-channels // 4)
    block = torch.arange(1 + start * blocks, 1 + (start + frames) * blocks, device=seeds.device)
    seeds, index, stream = seeds[..., None], index[..., None], stream[..., None]
    zero = torch.zeros_like(block[:1])
    drawn = words((block, zero, index, stream), (seeds, zero))
    return normals(drawn.reshape(*drawn.shape[:-2], frames, blocks * 4))[..., :channels]


@dataclass(frozen=True, kw_only=True)
class DeviceNoise(SeededNoise):
    """Draw noise from seeds on a device: that of the start and of the first steps in one go, then more at a time.

    ``frames``, ``channels``: of the latents of the run. ``steps`` of it add noise. A single item's is a tensor too.
    """

    device: torch.device
    frames: int
    channels: int
    steps: int
    _drawn: dict[int, Tensor] = field(default_factory=dict, init=False)

    def batch(self, purpose: NoiseStream) -> Tensor:
        """Return the normals (B, frames, channels) of the start or of a step."""
        group, row = divmod(0 if purpose == INITIAL else 1 + purpose.index, _TOGETHER)
        if group not in self._drawn:
            self._drawn.clear()
            self._drawn[group] = self._draw(group * _TOGETHER)
        return self._drawn[group][row]

    def _draw(self, first: int) -> Tensor:
        purposes = [INITIAL, *map(step, range(self.steps))][first : first + _TOGETHER]
        index, stream = upload(np.array([(each.index, each.stream) for each in purposes]), self.device).unbind(1)
        return noise(self._seeds, index[:, None], stream[:, None], self.frames, self.channels)

    @property
    def _seeds(self) -> Tensor:
        return upload(np.array(self.seeds, np.int64), self.device)

    def __call__(self, item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> Tensor:
        """Return the normals (frames, channels) of one item."""
        index, stream = upload(np.array([purpose.index, purpose.stream]), self.device).unbind(0)
        parts = (
            noise(self._seeds[item], index, stream, min(_PART, frames - done), channels, start=start + done)
            for done in range(0, frames, _PART)
        )
        return torch.cat([*parts])
