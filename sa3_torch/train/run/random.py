"""Random numbers of training and evaluation: what each is for, and the generators.

All are counter-based: a number follows from a seed, a purpose and a place (a step, an item), so it is the same in any
order of use and after any resume. Those of the items of a batch (``item_uniforms``, ``item_noise``) are
made for the rows that are asked for, on the device where they are used: the same for any number of processes and
micro-batches.

Shapes: n items, K numbers of an item.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the tools for data run without PyTorch
    import torch

    Word = int | torch.Tensor


class Purpose(IntEnum):
    """Say what random numbers are for. No two uses share a number, and no number changes: results would."""

    # sounds of the demo set
    HOLD_OUT = 0
    NOTE = 1
    CHORD = 2
    DRUM = 3
    SYNTH = 4
    COLOURED_NOISE = 5
    GAIN = 6
    MUSIC_NOTES = 7
    MUSIC_PLAN = 8
    MUSIC_ORDER = 9
    MUSIC_SYNTH = 10
    MUSIC_FINISH = 11
    # evaluation
    BOOTSTRAP = 61
    HALVES = 62
    OTHER_TEXTS = 63
    FLOW_NOISE = 64
    OTHER_CAPTIONS = 65
    CLIP_ORDER = 66
    REAL_CLIPS = 67
    JUDGE_DAMAGE = 68
    JUDGE_TRAINING = 69
    # data
    CROPS = 101
    LATENT_BATCH = 102
    ENCODER_SHIFT = 103
    AUGMENTATION = 104
    SHARD_ORDER = 105
    SHARD_WINDOW = 106
    SHARD_CROPS = 107
    # stages
    DEMO_CHIRP = 108
    FLOW_DRAWS = 111
    MASK_DRAWS = 112
    TRAINING_NOISE = 113
    HELD_OUT_NOISE = 114
    CODER_NOISE = 115
    CLAP_TIMES = 121
    CLAP_NOISE = 122
    CLAP_CAPTIONS = 123
    ADAPTER_START = 171
    ALIGNMENT = 201
    CRITIC = 202
    SEMANTICS_HELD_OUT = 203
    ALIGNMENT_TIMES = 204
    CRITIC_NOISE = 205
    TEACHER_STATES = 301
    PROBE_CONTROL = 302
    PROBE_PAN = 303
    GENERATOR_INPUT = 311
    SHARED_NOISE = 312
    REAL_PENALTY = 313
    FAKE_PENALTY = 314
    CLAP_INPUT = 315
    OWN_SAMPLES = 316
    NOISE_LEVELS = 317
    TEACHER_LEVELS = 318
    OTHER_PROMPTS = 319
    # benchmarks
    BELL = 401


def generator(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of (seed, key...), whose first number is a ``Purpose``."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key])))


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of one step, independent of all others."""
    import torch

    return torch.Generator().manual_seed((seed << 40) ^ (step * 2_654_435_761 + 97))


def purpose_generator(seed: int, purpose: Purpose, step: int) -> torch.Generator:
    """Return the generator of one step for one purpose."""
    import torch

    return torch.Generator().manual_seed(int(generator(seed, purpose, step).integers(2**63)))


def item_uniforms(
    rows: slice, count: int, seed: int, purpose: Purpose, step: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Draw uniform numbers (n, count) float64 in [0, 1), multiples of 2^-32, for the items ``rows`` of a batch."""
    import torch

    parts = _worked_on(rows, count, device)
    return torch.cat([_item_words(part, count, seed, purpose, step, device).double() for part in parts]) / 2**32


def item_noise(
    rows: slice, shape: tuple[int, ...], seed: int, purpose: Purpose, step: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Draw standard normals (n, *shape) float32 for the items ``rows`` of a batch, by Box and Muller.

    The same on all devices, but for the last bits of logarithm and cosine.
    """
    import torch

    size, made = math.prod(shape), []
    for part in _worked_on(rows, size, device):
        first, second = _item_words(part, size + size % 2, seed, purpose, step, device).unflatten(1, (-1, 2)).unbind(2)
        radius = (first + 1).float().div_(2**32).log_().mul_(-2).sqrt_()  # of a uniform number in (0, 1]
        angle = second.float().mul_(2 * math.pi / 2**32)
        made.append(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)[:, :size])
    return torch.cat(made).unflatten(1, shape)


def _worked_on(rows: slice, count: int, device: torch.device | str) -> list[slice]:
    """Cut rows of ``count`` numbers into parts that fit the caches of a CPU, or keep a GPU busy."""
    import torch

    each = max(1, (1 << (18 if torch.device(device).type == "cpu" else 24)) // max(count, 1))
    return [slice(at, min(at + each, rows.stop)) for at in range(rows.start, max(rows.stop, rows.start + 1), each)]


_FACTORS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Return the four words of Philox 4x32-10 (Salmon et al. 2011) for counters and a key of words of 32 bits.

    Words are numbers or int64 tensors that broadcast: both halves of a product of two survive the overflow of 64 bits.
    """
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0, k1 = ((word + turn * step) & _LOW for word, step in zip(key, _STEPS, strict=True))
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1 = ((second >> 32) & _LOW) ^ c1 ^ k0, second & _LOW
        c2, c3 = ((first >> 32) & _LOW) ^ c3 ^ k1, first & _LOW
    return c0, c1, c2, c3


def _item_words(
    rows: slice, count: int, seed: int, purpose: Purpose, step: int, device: torch.device | str
) -> torch.Tensor:
    """Return ``count`` words of 32 bits of every item: (n, count) int64; word i is word i % 4 of counter i // 4."""
    import torch

    block = torch.arange(-(-count // 4), device=device)[None]
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    words = philox((block, row, step & _LOW, (step >> 32 << 16) ^ int(purpose)), (seed & _LOW, seed >> 32))
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, words)), dim=2).flatten(1)[:, :count]
