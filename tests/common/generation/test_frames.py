"""What every latent frame is told: shares of prompts, noise levels, seeds; requests that cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.events import host_noise
from sa3_mlx.common.generation.frames import Held, PatchFrames, Track, text_shares
from sa3_mlx.common.generation.noise import INITIAL, noise, step
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.regions import to_regions
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, Patch, Request, TimedPrompt
from sa3_mlx.common.model.presets import PRESETS
from tests.support.tiny import TINY

CONFIG = TINY["tiny-s"]  # 8,000 Hz, a frame is 512 samples or 0.064 s
FRAME = 0.064
AUDIO = np.zeros((8000, 2), np.float32)


def item(*changes: tuple[float, str], seconds: float = 1.0) -> Item:
    timed = tuple(TimedPrompt(start=start, prompt=prompt) for start, prompt in changes)
    return Item(prompt="a", seconds=seconds, seed=1, prompts_over_time=timed)


def inpaint(*regions: Any, feather: float = 0.0, audio: np.ndarray = AUDIO) -> Inpaint:
    return Inpaint(audio=audio, regions=regions, feather_seconds=feather)


def levels(given: Inpaint, frames: int = 20) -> np.ndarray:
    return PatchFrames(8000, 8000, 512).levels(given, to_regions(given.spans, 8000), frames)


def test_texts_share_a_clip_by_time_and_by_blend() -> None:
    blended = Item(
        prompt="(a:2) b | c : 0.25", seconds=4.0, seed=1, prompts_over_time=(TimedPrompt(start=3.0, prompt="a b"),)
    )
    plain = Item(prompt="c", seconds=2.0, seed=1)
    first, second = text_shares(Request(items=(blended, plain), prompt_fade_seconds=0), (40, 20), 0.1)
    assert first == {"a b": pytest.approx(0.75 * 0.75 + 0.25), "c": pytest.approx(0.75 * 0.25)}
    assert second == {"c": 1.0}


def test_a_track_has_every_prompt_once_and_joins_equal_neighbours() -> None:
    found = Track.of(item((0.2, "(a:1)"), (0.4, "b"), (0.6, "a"), (0.8, "a | b : 1")), None)
    assert [prompt.first.text for prompt in found.prompts] == ["a", "b"]
    assert found.starts == (0.0, 0.4, 0.6, 0.8) and found.chosen == (0, 1, 0, 1)
    own = inpaint(Patch(start=0.1, end=0.3, prompt="c"), (0.5, 0.7), Patch(start=0.9, end=1.0, prompt="a"))
    found = Track.of(item((0.2, "b")), own)
    assert [prompt.first.text for prompt in found.prompts] == ["a", "c", "b"]
    assert found.starts == (0.0, 0.1, 0.3, 0.9) and found.chosen == (0, 1, 2, 0)


@pytest.mark.parametrize("fade", [0.0, 0.1, 5.0])
def test_shares_sum_to_one_and_each_prompt_is_alone_in_its_middle(fade: float) -> None:
    track = Track.of(item((0.3, "b"), (0.4, "c"), (0.9, "b")), None)
    shares = track.shares(1.0, np.linspace(0, 1.2, 241), fade)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-12)
    assert (shares >= 0).all()
    for middle, row in ((0.0, 0), (0.35, 1), (0.65, 2), (1.0, 1), (1.2, 1)):
        assert shares[round(middle / 0.005), row] == pytest.approx(1)
    if fade == 0:
        assert set(np.unique(shares)) == {0, 1} and shares[59, 0] == shares[60, 1] == 1


def test_memory_tokens_get_the_mean_of_real_frames() -> None:
    asked = Request(items=(item((0.5, "b")), item(seconds=0.5)), prompt_fade_seconds=0.0)
    planned = plan(asked, CONFIG)
    assert planned.shares is not None
    memory = CONFIG.require_diffusion().dit.memory_tokens
    frames, valid = planned.shares[0, memory:, 0], planned.lengths.valid[0]
    np.testing.assert_allclose(planned.shares[0, :memory, 0], frames[:valid].mean(), rtol=1e-6)
    assert (planned.shares[1] == [1, 0]).all()
    assert plan(Request(items=(item(), item((0.5, "a")))), CONFIG).shares is None


def test_levels_are_those_of_regions_with_a_fade_where_they_meet_what_stays() -> None:
    assert (levels(inpaint((0.1, 0.3))) == 1).all() and (levels(inpaint(Patch(start=0.1, end=0.3, seed=3))) == 1).all()
    soft = levels(inpaint(Patch(start=0.128, end=0.32, noise_level=0.4), (0.64, 1.0)))
    np.testing.assert_allclose(soft, [0, 0, *[0.4] * 3, *[0] * 5, *[1] * 10])
    faded = levels(inpaint((0.128, 0.64), feather=4 * FRAME))
    np.testing.assert_allclose(faded[:10], [0, 0, 0.125, 0.375, 0.625, 0.875, 0.875, 0.625, 0.375, 0.125], atol=1e-6)
    assert (faded[10:16] == 0).all() and (faded[16:] == 1).all()  # the source ends in frame 15
    ends = levels(inpaint((0.0, 0.256), (0.768, 1.0), feather=2 * FRAME))
    np.testing.assert_allclose(ends[:4], [1, 1, 0.75, 0.25], atol=1e-6)
    np.testing.assert_allclose(ends[12:], [0.25, 0.75, *[1] * 6], atol=1e-6)
    shorter = levels(inpaint((0.128, 1.0), feather=2 * FRAME, audio=AUDIO[:2048]))
    np.testing.assert_allclose(shorter, [0, 0, 0.25, 0.75, *[1] * 16], atol=1e-6)


def test_a_step_is_held_as_far_as_its_level_says() -> None:
    sigmas = np.float32([[1, 0.75, 0.5, 0]])
    held = Held(
        source=np.ones((1, 4, 2), np.float32), levels=np.float32([[0, 0.5, 0.7, 1]]), sigmas=sigmas, array=np.asarray
    )
    np.testing.assert_allclose(held.shares(np.float32([1])), [[1, 1, 1, 0]])
    np.testing.assert_allclose(held.shares(np.float32([0.75])), [[1, 1, 0.2, 0]], atol=1e-6)
    np.testing.assert_allclose(held.shares(np.float32([0.6])), [[1, 1, 0.2, 0]], atol=1e-6)
    np.testing.assert_allclose(held.shares(np.float32([0.5])), [[1, 0, 0, 0]])
    x, v = np.full((1, 4, 2), 3, np.float32), np.full((1, 4, 2), 9, np.float32)
    np.testing.assert_allclose(held(x, np.float32([0.5]), v)[0, :, 0], [4, 9, 9, 9])
    np.testing.assert_allclose(held(x, np.float32([1e-5]), v)[0, :, 0], [4, 9, 9, 9])


def test_noise_of_a_region_is_that_of_its_seed_for_every_purpose() -> None:
    given = inpaint(Patch(start=0.1, end=0.3, seed=5), Patch(start=0.64, end=1.0, seed=6))
    asked = Request(items=item(), inpaint=given)
    source = host_noise(asked, plan(asked, CONFIG))
    for purpose in (INITIAL, step(2)):
        found = source(0, purpose, 30, 4, 0)
        own = {seed: noise(seed, purpose, 30, 4) for seed in (1, 5, 6)}
        np.testing.assert_array_equal(found[:2], own[1][:2])
        np.testing.assert_array_equal(found[2:5], own[5][2:5])
        np.testing.assert_array_equal(found[5:10], own[1][5:10])
        np.testing.assert_array_equal(found[10:], own[6][10:])
        np.testing.assert_array_equal(source(0, purpose, 9, 4, 3), found[3:12])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": replace(item(), prompts_over_time=("b",))}, "a prompt over time is 'b': expected TimedPrompt"),
        ({"items": replace(item(), prompts_over_time=None)}, "prompts_over_time is None: expected TimedPrompt"),
        ({"items": item((0.5, "b"), (0.4, "c"))}, "the prompt at 0.4 s: comes -0.1 s after the one before it"),
        ({"items": item((0.5, None))}, "the prompt at 0.5 s is NoneType: expected text"),  # type: ignore[arg-type]
        ({"prompt_fade_seconds": None}, "prompt fade is None: expected a finite number"),
        ({"inpaint": inpaint(Patch(start=0.1, end=0.3, noise_level=None))}, "noise level is None: expected a finite"),  # type: ignore[arg-type]
        ({"inpaint": inpaint(Patch(start=0.1, end=0.3, seed=-1))}, "region 0.1:0.3: seed is -1: allowed are the"),
        ({"inpaint": inpaint(Patch(start=0.1, end=0.3, prompt=3))}, "region 0.1:0.3: prompt is int: expected text"),  # type: ignore[arg-type]
        ({"inpaint": inpaint(Patch(start=0.1, end="b"))}, "region (0.1, 'b'): expected (start, end) in seconds"),  # type: ignore[arg-type]
        ({"inpaint": inpaint("0.1:0.3")}, "region '0.1:0.3': expected (start, end) in seconds"),
        ({"inpaint": inpaint((0.1, 0.3), feather=None)}, "inpaint feather is None: expected a finite number"),  # type: ignore[arg-type]
        (
            {
                "init": InitAudio(audio=AUDIO, noise_level=0.3),
                "inpaint": inpaint(Patch(start=0.1, end=0.3, noise_level=0.5)),
            },
            "region 0.1:0.3: noise level 0.5 is above 0.3, at which all starts; raise that one",
        ),
    ],
)
def test_requests_that_cannot_be_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        validate(replace(Request(items=item()), **changes), CONFIG)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["small-music", "medium"])
def test_plans_of_the_released_sizes(name: str) -> None:
    config = PRESETS[name]
    audio = np.zeros((30 * config.sample_rate, 2), np.float32)
    asked = Request(
        items=Item(prompt="a", seconds=30, seed=1, prompts_over_time=(TimedPrompt(start=20, prompt="b"),)),
        inpaint=Inpaint(
            audio=audio, regions=((1, 2), Patch(start=5, end=9, noise_level=0.5, seed=3)), feather_seconds=0.5
        ),
    )
    planned = plan(asked, config)
    assert planned.shares is not None and planned.levels is not None
    assert planned.shares.shape == (1, planned.frames + 64, 2) and planned.levels.shape == (1, planned.frames)
