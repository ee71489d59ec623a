"""Prompts over time and regions of their own: what changes nothing changes no bit, kept samples are the source's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, Patch, Request, TimedPrompt
from sa3_mlx.common.model.sampling import SAMPLER_NAMES, Guidance, Sampling
from tests.support.twins import Twin, relative

SECONDS = 0.5
GUIDED = Sampling(sampler="euler", steps=3, guidance=Guidance(scale=3))
CLOSE = 1e-5  # measured 3e-7 .. 2e-6


@pytest.fixture(scope="module", params=["tiny-s", "tiny-l"])
def pipelines(random_models: dict[str, Path], request: pytest.FixtureRequest) -> dict[str, Any]:
    return {name: Twin(name).pipeline(random_models[request.param]) for name in ("mlx", "torch")}


@pytest.fixture
def small(twin: Twin, pipelines: dict[str, Any]) -> Any:
    return pipelines[twin.name]


def later(*changes: tuple[float, str]) -> tuple[TimedPrompt, ...]:
    return tuple(TimedPrompt(start=start, prompt=prompt) for start, prompt in changes)


def item(prompt: str, *changes: tuple[float, str], seed: int = 1, negative: str | None = None) -> Item:
    return Item(prompt=prompt, seconds=SECONDS, seed=seed, negative_prompt=negative, prompts_over_time=later(*changes))


def asked(*items: Item, **changes: Any) -> Request:
    return replace(Request(items=items, sampling=GUIDED, head_room_seconds=0.2), **changes)


def sound(pipeline: Any, seed: int = 3) -> np.ndarray:
    channels = pipeline.config.audio_channels
    return (
        np.random.default_rng(seed)
        .uniform(-0.3, 0.3, (round(SECONDS * pipeline.config.sample_rate), channels))
        .astype(np.float32)
    )


def source(pipeline: Any, *regions: Any, feather: float = 0.0) -> Inpaint:
    return Inpaint(audio=sound(pipeline), regions=regions, feather_seconds=feather)


def region(start: float, end: float, **own: Any) -> Patch:
    return Patch(start=start, end=end, **own)


@pytest.mark.parametrize("negative", [None, "rain"])
def test_one_prompt_over_all_time_changes_no_bit(small: Any, negative: str | None) -> None:
    plain = small.generate(asked(item("low kick", negative=negative)))
    timed = small.generate(asked(item("low kick", (0.2, "(low:1) kick"), (0.3, "low kick"), negative=negative)))
    np.testing.assert_array_equal(timed.audio[0], plain.audio[0])


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_a_region_with_what_all_have_changes_no_bit(small: Any, sampler: str) -> None:
    sampling = Sampling(sampler=sampler, steps=2, guidance=Guidance(scale=2))
    plain, own = (
        small.generate(asked(item("low kick"), sampling=sampling, inpaint=source(small, one)))
        for one in ((0.1, 0.3), region(0.1, 0.3, prompt="low kick", noise_level=1.0, seed=1))
    )
    np.testing.assert_array_equal(own.audio[0], plain.audio[0])


@pytest.mark.parametrize("negative", [None, "rain"])
@pytest.mark.parametrize("fade", [0.0, 0.2])
def test_a_prompt_is_heard_in_its_time(small: Any, negative: str | None, fade: float) -> None:
    """In one evaluation of one block the first frames would be those of the first prompt; over blocks they differ a
    little, and more the nearer the change is."""
    first, second, both = (
        small.generate(asked(each, prompt_fade_seconds=fade)).latents[0]
        for each in (
            item("low kick", negative=negative),
            item("high bell rain", negative=negative),
            item("low kick", (SECONDS / 2, "high bell rain"), negative=negative),
        )
    )
    third = len(both) // 3
    assert relative(both[:third], first[:third]) < relative(both[:third], second[:third])
    assert relative(both[-third:], second[-third:]) < relative(both[-third:], first[-third:])
    assert relative(both, first) > 1e-3 and relative(both, second) > 1e-3


@pytest.mark.parametrize("crossfade", [0.0, 20.0])
def test_kept_samples_are_the_source_bit_for_bit(small: Any, crossfade: float) -> None:
    """Several regions in their own ways, audio-to-audio and a continuation, in one call."""
    rate = small.config.sample_rate
    given = sound(small)[: round(0.4 * rate)]
    regions = (
        region(0.05, 0.1, prompt="bell", seed=9),
        (0.15, 0.2),
        region(0.25, 0.35, prompt="rain", noise_level=0.3),
        (0.4, SECONDS),
    )
    made = small.generate(
        asked(
            item("low kick", (0.3, "high bell")),
            init=InitAudio(audio=given, noise_level=0.8),
            inpaint=Inpaint(audio=given, regions=regions, feather_seconds=0.02),
            crossfade_ms=crossfade,
        )
    ).audio[0]
    starts = np.round(np.array([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.4]) * rate).astype(int)
    for kept, end in zip(starts[::2], starts[1::2], strict=True):
        np.testing.assert_array_equal(made[kept + 1 : end - 1], given[kept + 1 : end - 1])
    for first, end in zip(starts[1:-1:2], starts[2::2], strict=True):
        assert np.abs(made[first:end] - given[first:end]).max() > 1e-3
    assert np.abs(made[starts[-1] :]).max() > 1e-3


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_a_region_leaves_its_source_the_further_the_higher_its_level(small: Any, sampler: str) -> None:
    sampling = Sampling(sampler=sampler, steps=4, guidance=Guidance(scale=2))
    first, last = 2, 5
    far = []
    for level in (0.001, 0.4, 0.8, 1.0):
        edges = [frame * small.config.same.samples_per_latent / small.config.sample_rate for frame in (first, last)]
        asking = asked(item("low kick"), sampling=sampling, inpaint=source(small, region(*edges, noise_level=level)))
        made, encoded = (
            small.generate(asking).latents[0],
            small.encode_sources(asking, plan(asking, small.config))[1][0],
        )
        far.append(relative(made[first:last], encoded[first:last]))
        if level < 1:  # kept frames stay too
            assert relative(made[: first - 1], encoded[: first - 1]) < CLOSE
    assert far[0] < 0.1 and far == sorted(far) and far[-1] > 0.3


def test_a_seed_of_a_region_is_its_own(small: Any) -> None:
    def made(seed: int, own: int | None) -> np.ndarray:
        asking = asked(item("low kick", seed=seed), inpaint=source(small, region(0.1, 0.3, seed=own)))
        return small.generate(asking).audio[0]

    plain = made(1, None)
    np.testing.assert_array_equal(made(1, 1), plain)
    assert np.abs(made(1, 2) - plain).max() > 1e-3
    noise = small._seeded(
        asking := asked(item("low kick"), inpaint=source(small, region(0.1, 0.3, seed=2))), plan(asking, small.config)
    )
    from sa3_mlx.common.generation.noise import INITIAL
    from sa3_mlx.common.generation.noise import noise as drawn

    found, channels = noise(0, INITIAL, 60, 4, 0), 4
    ratio, rate = small.config.same.samples_per_latent, small.config.sample_rate
    inside = [0.1 * rate <= frame * ratio < 0.3 * rate for frame in range(60)]
    wanted = np.where(np.array(inside)[:, None], drawn(2, INITIAL, 60, channels), drawn(1, INITIAL, 60, channels))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(noise(0, INITIAL, 40, 4, 7), wanted[7:47])


def test_items_of_a_mixed_batch_are_those_of_single_runs(small: Any) -> None:
    items = (
        item("low kick", seed=0),
        item("low kick", (0.2, "high bell rain"), (0.35, "bell"), seed=1, negative="rain"),
        item("low kick | high bell rain : 0.4", (0.3, "(low:2) kick"), seed=2),
        item("bell", seed=3, negative="low kick"),
    )
    sources = (
        source(small, (0.1, 0.3)),
        source(small, region(0.1, 0.3, prompt="kick", noise_level=0.5, seed=8)),
        source(small, (0.1, 0.3), feather=0.05),
        source(small, (0.1, 0.2), region(0.3, 0.5, prompt="rain")),
    )
    for given in (None, sources):
        batch = small.generate(asked(*items, inpaint=given)).latents
        for number, one in enumerate(items):
            single = small.generate(asked(one, inpaint=None if given is None else given[number])).latents[0]
            assert relative(batch[number], single) < CLOSE


def test_both_twins_agree(pipelines: dict[str, Any]) -> None:
    mlx = pipelines["mlx"]
    asking = asked(
        item("low kick", (0.2, "high bell | rain : 0.3"), negative="(kick:2)"),
        inpaint=source(mlx, region(0.1, 0.2, prompt="bell", noise_level=0.6, seed=4), (0.3, 0.5), feather=0.03),
    )
    found = [pipelines[name].generate(asking).latents[0] for name in ("mlx", "torch")]
    assert relative(*found) < 1e-4


def test_both_twins_agree_where_blocks_are_read_in_every_step(pipelines: dict[str, Any]) -> None:
    asking = asked(item("low kick", (0.2, "high bell rain")))
    wanted = pipelines["mlx"].generate(asking).latents[0]
    *_, last = pipelines["mlx"].stream(asking, residency="step")
    np.testing.assert_array_equal(last.generation.latents[0], wanted)


@pytest.mark.parametrize("soft", [False, True])
def test_frames_that_mean_nothing_may_be_cut(pipelines: dict[str, Any], soft: bool) -> None:
    """As on a GPU, where one clip has no mask."""
    torch, one = pipelines["torch"], item("low kick", (0.2, "high bell rain"))
    asking = asked(one, inpaint=source(torch, region(0.1, 0.2, noise_level=0.5)) if soft else None)
    planned = plan(asking, torch.config)
    assert planned.frames > planned.lengths.valid[0]
    found = []
    for way in ("masked", "cut"):
        with torch.choices.using({"padding": way}):
            found.append(torch.generate(asking).latents[0])
    assert relative(*found) < CLOSE


def test_a_request_survives_as_json(small: Any) -> None:
    asking = asked(
        item("low kick", (0.2, "bell")),
        inpaint=source(small, (0.1, 0.2), region(0.3, 0.5, prompt="rain", noise_level=0.4, seed=7), feather=0.05),
        prompt_fade_seconds=0.1,
    )
    again = Request.from_json(asking.to_json(), audio=asking.inpaint.audio)  # type: ignore[union-attr]
    np.testing.assert_array_equal(small.generate(again).audio[0], small.generate(asking).audio[0])
    assert again.made(0) == ((0.1, 0.2), (0.3, 0.5))
