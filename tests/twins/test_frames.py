"""A context for each range of frames: the plain form is one cross-attention for each prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.twins import Twin, relative

CLOSE = 5e-6  # measured 2e-7 .. 9e-7
FRAMES, MEMORY, SLOTS, CONTEXT, LATENT, WIDTH = 9, 8, 5, 48, 16, 128


@pytest.fixture(params=["tiny-s", "tiny-l"])
def dit(twin: Twin, random_models: dict[str, Path], request: pytest.FixtureRequest) -> Any:
    """Plain and differential attention."""
    return twin.load(random_models[request.param], "dit")


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def _cond(twin: Twin, *contexts: np.ndarray, shares: np.ndarray | None = None) -> Any:
    batch = len(contexts[0])
    return twin.module("dit").Conditioning(
        context=twin.array(np.concatenate(contexts, axis=1)),
        repeats=twin.array(np.tile(np.float32([1, 1, 3, 0, 1]), (batch, len(contexts)))),
        shares=None if shares is None else twin.array(shares),
        seconds=twin.array(_normal(batch, CONTEXT, seed=2)),
        local=twin.array(np.zeros((batch, 1, 1 + LATENT), np.float32)),
        valid=None,
    )


def _velocity(twin: Twin, dit: Any, cond: Any) -> np.ndarray:
    batch = len(cond.seconds)
    t = np.linspace(0.3, 0.9, batch, dtype=np.float32)
    return twin.numpy(dit(twin.array(_normal(batch, FRAMES, LATENT)), twin.times(t), dit.prepare(cond)))


def _shares(*rows: tuple[float, float]) -> np.ndarray:
    return np.broadcast_to(np.float32(rows)[:, None], (len(rows), MEMORY + FRAMES, 2)).copy()


def test_a_prompt_that_no_frame_is_told_changes_nothing(twin: Twin, dit: Any) -> None:
    first, second = (_normal(2, SLOTS, CONTEXT, seed=seed) for seed in (3, 4))
    wanted = _velocity(twin, dit, _cond(twin, np.stack([first[0], second[1]])))
    found = _velocity(twin, dit, _cond(twin, first, second, shares=_shares((1, 0), (0, 1))))
    assert relative(found, wanted) < CLOSE


@pytest.mark.parametrize("share", [0.5, 0.9, 1e-4])
def test_one_prompt_in_two_parts_is_one_prompt(twin: Twin, dit: Any, share: float) -> None:
    context = _normal(2, SLOTS, CONTEXT, seed=3)
    wanted = _velocity(twin, dit, _cond(twin, context))
    found = _velocity(twin, dit, _cond(twin, context, context, shares=_shares((share, 1 - share), (1 - share, share))))
    assert relative(found, wanted) < CLOSE


@pytest.mark.parametrize("last", [False, True])
def test_ranges_of_frames_are_cross_attentions_of_their_own(twin: Twin, dit: Any, last: bool) -> None:
    first, second = (_normal(1, SLOTS, CONTEXT, seed=seed) for seed in (3, 4))
    shares = _shares((1, 0))
    shares[:, MEMORY + 4 :] = (0, 1)
    whole, *alone = (
        dit.prepare(cond).contexts[1]
        for cond in (_cond(twin, first, second, shares=shares), _cond(twin, first), _cond(twin, second))
    )
    tokens = FRAMES if last else MEMORY + FRAMES
    x = twin.array(_normal(1, tokens, WIDTH, seed=5))
    attention = dit.layers[1].cross_attn
    found, *parts = (
        twin.numpy(attention(x, context.keys, context.values, context.bias_of(tokens))) for context in (whole, *alone)
    )
    change = tokens - FRAMES + 4
    assert relative(found[:, :change], parts[0][:, :change]) < CLOSE
    assert relative(found[:, change:], parts[1][:, change:]) < CLOSE


def test_both_halves_of_guidance_in_one_batch(twin: Twin, dit: Any) -> None:
    """The negative prompt is one for all frames."""
    first, second, away = (_normal(1, SLOTS, CONTEXT, seed=seed) for seed in (3, 4, 5))
    cond = _cond(twin, first, second, shares=_shares((0.3, 0.7)))
    null = _cond(twin, away, np.zeros_like(away))
    null = replace(null, repeats=twin.array(np.float32([[1, 1, 3, 0, 1, 0, 0, 0, 0, 0]])))
    module = twin.module("dit")
    x, t = _normal(1, FRAMES, LATENT), np.float32([0.4])
    both = dit(
        twin.array(np.concatenate([x, x])),
        twin.times(np.repeat(t, 2)),
        module.join(dit.prepare(cond), dit.prepare(null)),
    )
    for row, given in enumerate((cond, _cond(twin, away))):
        assert (
            relative(twin.numpy(both)[row], twin.numpy(dit(twin.array(x), twin.times(t), dit.prepare(given)))[0])
            < CLOSE
        )
