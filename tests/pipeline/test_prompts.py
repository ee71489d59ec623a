"""Weights and blends of prompts: what has no effect has none on any bit, what has one has it on its item only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.twins import Twin, relative

PLAIN = "low kick"
GUIDED = Sampling(sampler="euler", steps=2, guidance=Guidance(scale=3))


@pytest.fixture(scope="module")
def pipelines(random_models: dict[str, Path]) -> dict[str, Any]:
    return {name: Twin(name).pipeline(random_models["tiny-s"]) for name in ("mlx", "torch")}


@pytest.fixture
def small(twin: Twin, pipelines: dict[str, Any]) -> Any:
    return pipelines[twin.name]


def request(*prompts: str, negative: str | None = None, **changes: Any) -> Request:
    items = tuple(
        Item(prompt=prompt, seconds=0.5, seed=number, negative_prompt=negative) for number, prompt in enumerate(prompts)
    )
    return replace(Request(items=items, sampling=GUIDED, head_room_seconds=0.2), **changes)


def context(pipeline: Any, asked: Request) -> tuple[np.ndarray, np.ndarray]:
    """What prompts and negative prompts become."""
    cond, null = pipeline.encode_texts(asked, plan(asked, pipeline.config))
    return pipeline._numpy(cond.context), np.zeros(0) if null.context is None else pipeline._numpy(null.context)


@pytest.mark.parametrize("prompt", ["(low:1) kick", "((low kick:2):0.5)", f"{PLAIN} | bell : 0", f"bell | {PLAIN} : 1"])
def test_weight_1_and_the_ends_of_a_blend_change_no_bit(small: Any, prompt: str) -> None:
    wanted, found = (small.generate(request(text)).audio[0] for text in (PLAIN, prompt))
    np.testing.assert_array_equal(found, wanted)
    wanted, found = (small.generate(request("bell", negative=text)).audio[0] for text in (PLAIN, prompt))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("weight", [0.5, 2.0, 0.0, -1.5])
def test_a_weight_scales_its_tokens_and_no_others(small: Any, weight: float) -> None:
    (plain, away), (weighted, away_weighted) = (
        context(small, request(text, negative=text)) for text in (PLAIN, f"low (kick:{weight})")
    )
    for before, after in ((plain, weighted), (away, away_weighted)):
        np.testing.assert_allclose(after[0, 1], weight * before[0, 1], rtol=1e-6)
        np.testing.assert_array_equal(np.delete(after, 1, axis=1), np.delete(before, 1, axis=1))
    heard = [small.generate(request(text)).audio[0] for text in (PLAIN, f"low (kick:{weight})")]
    assert relative(heard[0], heard[1]) > 1e-3


@pytest.mark.parametrize("blend", ["spherical", "linear"])
def test_a_blend_lies_between_its_texts(small: Any, blend: str) -> None:
    first, second, mixed = (
        context(small, request(text, negative=text, blend=blend))
        for text in ("low kick", "high bell rain", "low kick | high bell rain : 0.25")
    )
    width = mixed[0].shape[1]
    for half in (0, 1):
        a, b = (np.pad(x[half], ((0, 0), (0, width - x[half].shape[1]), (0, 0))) for x in (first, second))
        token = mixed[half][0, 0]
        near, far = (np.linalg.norm(token - x[0, 0]) for x in (a, b))
        assert 0 < near < far
        if blend == "linear":
            np.testing.assert_allclose(token, 0.75 * a[0, 0] + 0.25 * b[0, 0], rtol=1e-5, atol=1e-6)
        else:  # a quarter of the angle, and of the way between the lengths
            unit = [x / np.linalg.norm(x) for x in (a[0, 0], token, b[0, 0])]
            angles = [np.arccos(np.clip(unit[0] @ other, -1, 1)) for other in unit[1:]]
            assert angles[0] == pytest.approx(angles[1] / 4, rel=1e-3)
            lengths = [np.linalg.norm(x) for x in (a[0, 0], token, b[0, 0])]
            assert lengths[1] == pytest.approx(0.75 * lengths[0] + 0.25 * lengths[2], rel=1e-4)


def test_items_of_a_mixed_batch_are_those_of_single_runs(small: Any) -> None:
    prompts = ("low kick", "(low:2) kick", "low kick | high bell rain : 0.4", "bell")
    batch = small.generate(request(*prompts)).latents
    for number, prompt in enumerate(prompts):
        one = request(prompt)
        one = replace(one, items=(replace(one.items[0], seed=number),))
        assert relative(batch[number], small.generate(one).latents[0]) < 1e-5


def test_both_twins_agree(pipelines: dict[str, Any]) -> None:
    for blend in ("spherical", "linear"):
        asked = request("(low:-0.7) kick | (high bell:2) rain : 0.4", negative="(kick:2)", blend=blend)
        mlx, torch = (pipelines[name].generate(asked).latents[0] for name in ("mlx", "torch"))
        assert relative(mlx, torch) < 1e-4
