"""Random numbers of training and evaluation: what each is for, and the generators.

All are counter-based: a number follows from a seed, a purpose and a place (a step, an item), so it is the same in any
order of use and after any resume.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the tools for data run without PyTorch
    import torch


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
    CLAP_TIMES = 121
    CLAP_NOISE = 122
    CLAP_CAPTIONS = 123
    ADAPTER_START = 171
    ALIGNMENT = 201
    CRITIC = 202
    SEMANTICS_HELD_OUT = 203
    TEACHER_STATES = 301
    PROBE_CONTROL = 302
    PROBE_PAN = 303
    GENERATOR_INPUT = 311
    SHARED_NOISE = 312
    REAL_PENALTY = 313
    FAKE_PENALTY = 314
    CLAP_INPUT = 315
    OWN_SAMPLES = 316
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


def item_noise(rows: slice, shape: tuple[int, ...], seed: int, purpose: Purpose, step: int) -> torch.Tensor:
    """Draw standard normals (B, *shape) for the items ``rows`` of a global batch.

    Each item has its own generator, so that no process draws those of others.
    """
    import torch

    drawn = []
    for item in range(rows.start, rows.stop):
        random = torch.Generator().manual_seed(int(generator(seed, purpose, step, item).integers(2**63)))
        drawn.append(torch.randn(shape, generator=random))
    return torch.stack(drawn)
