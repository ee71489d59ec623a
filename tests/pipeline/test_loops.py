"""Loops join themselves in both twins; noise between two seeds is that of either at the ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.generation.events import AudioChunk, Finished, Stepped, host_noise
from sa3_mlx.common.generation.loop import Loop, Ring, loop_seconds
from sa3_mlx.common.generation.noise import INITIAL, noise
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Sampling
from tests.support.twins import Twin

RATE = 8000  # of the tiny models, with 512 samples a latent
BPM, BEATS = 160.0, 4  # 1.5 s, 23.4 latents


@pytest.fixture(scope="module")
def pipelines(random_models: dict[str, Path]) -> dict[tuple[str, str], Any]:
    return {
        (name, model): Twin(name).pipeline(random_models[model])
        for name in ("mlx", "torch")
        for model in ("tiny-s", "tiny-l")
    }


@pytest.fixture
def small(twin: Twin, pipelines: dict[tuple[str, str], Any]) -> Any:
    return pipelines[twin.name, "tiny-s"]


def request(*seeds: int, way: Any = "seam", sampler: Any = "euler", bpm: float = BPM) -> Request:
    seconds = loop_seconds(bpm, BEATS, RATE)
    items = tuple(Item(prompt="low kick", seconds=seconds, seed=seed) for seed in seeds)
    return Request(items=items, sampling=Sampling(sampler=sampler, steps=3), loop=Loop(bpm=bpm, beats=BEATS, way=way))


def test_a_seam_keeps_all_that_is_not_around_the_joint(small: Any) -> None:
    asked = request(3)
    cut, loop = (small.generate(replace(asked, loop=replace(asked.loop, way=way))).audio[0] for way in ("cut", "seam"))
    length = round(BEATS * 60 / BPM * RATE)
    assert cut.shape == loop.shape == (length, 2)
    half = round(60 / BPM * RATE) // 2 + 2
    np.testing.assert_array_equal(loop[half:-half], cut[half:-half])
    assert not np.array_equal(loop[:half], cut[:half]) and not np.array_equal(loop[-half:], cut[-half:])


def test_the_joint_of_a_seam_was_made_in_one_piece(small: Any) -> None:
    """Around the joint the audio is what the second run decoded, across the joint without a crossfade."""
    audio = small.generate(request(3)).audio[0]
    step = np.abs(audio[0] - audio[-1]).max()
    assert step <= np.abs(np.diff(audio, axis=0)).max()


@pytest.mark.parametrize("way", ["seam", "turn"])
@pytest.mark.parametrize("sampler", ["euler", "pingpong", "rk4"])
def test_loops_of_a_batch_are_those_made_by_themselves(small: Any, way: str, sampler: str) -> None:
    both = small.generate(request(3, 4, way=way, sampler=sampler)).audio
    for seed, audio in zip((3, 4), both, strict=True):
        alone = small.generate(request(seed, way=way, sampler=sampler)).audio[0]
        np.testing.assert_allclose(audio, alone, atol=2e-5)
        assert len(alone) == 12_000


@pytest.mark.parametrize("model", ["tiny-s", "tiny-l"])
@pytest.mark.parametrize("chunk_frames", [None, 24])
def test_a_turning_loop_is_decoded_as_if_it_went_on_for_ever(
    twin: Twin, pipelines: dict[tuple[str, str], Any], model: str, chunk_frames: int | None
) -> None:
    pipeline, bpm = pipelines[twin.name, model], 60 * BEATS * RATE / (512 * 24)  # 24 whole frames: nothing to cut out
    made = pipeline.generate(replace(request(3, way="turn", bpm=bpm), chunk_frames=chunk_frames))
    (latents,), (audio,) = made.latents, made.audio
    assert latents.shape[0] == 24 and len(audio) == 512 * 24
    rounds = pipeline.decode(np.concatenate([latents] * 3))[len(audio) : 2 * len(audio)]
    np.testing.assert_allclose(audio, rounds, atol=2e-5)
    assert np.abs(audio - pipeline.decode(latents)).max() > 1e-3  # the ends of a plain one know nothing of each other


def test_turning_changes_what_the_network_sees(small: Any) -> None:
    cut, turned = (small.generate(request(3, way=way)).audio[0] for way in ("cut", "turn"))
    assert np.abs(cut - turned).max() > 1e-3


@pytest.mark.parametrize("way", ["seam", "turn", "cut"])
def test_events_of_a_loop(small: Any, way: str) -> None:
    events = list(small.stream(request(3, 4, way=way)))
    steps = [event for event in events if isinstance(event, Stepped)]
    count = 6 if way == "seam" else 3
    assert [step.index for step in steps] == list(range(count)) and {step.steps for step in steps} == {count}
    finished = events[-1]
    assert isinstance(finished, Finished) and finished.generation.request == request(3, 4, way=way)
    for item, audio in enumerate(finished.generation.audio):
        pieces = [event.audio for event in events if isinstance(event, AudioChunk) and event.item == item]
        np.testing.assert_array_equal(np.concatenate(pieces), audio)


def test_a_request_for_loops_goes_through_json_and_gives_the_same_bits(small: Any) -> None:
    asked = request(3)
    again = Request.from_json(asked.to_json())
    assert again == asked
    np.testing.assert_array_equal(small.generate(again).audio[0], small.generate(asked).audio[0])


def test_a_spread_of_0_changes_no_bit_and_1_is_the_other_seed(small: Any) -> None:
    plain = replace(request(3), loop=None)
    wanted = {seed: small.generate(replace(plain, items=(replace(plain.items[0], seed=seed),))) for seed in (3, 9)}

    def varied(spread: float) -> np.ndarray:
        return small.generate(replace(plain, items=(replace(plain.items[0], toward=9, spread=spread),))).audio[0]

    np.testing.assert_array_equal(varied(0.0), wanted[3].audio[0])
    np.testing.assert_array_equal(varied(1.0), wanted[9].audio[0])
    near, far = (np.abs(varied(spread) - wanted[3].audio[0]).mean() for spread in (0.05, 0.5))
    assert 0 < near < far


def test_noise_between_two_seeds_is_noise() -> None:
    item = Item(prompt="", seconds=1.0, seed=3, toward=9, spread=0.3)
    drawn = host_noise(Request(items=(item,)))(0, INITIAL, 4000, 16, 0)
    assert drawn.dtype == np.float32
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.01
    alike = np.corrcoef(drawn.ravel(), noise(3, INITIAL, 4000, 16).ravel())[0, 1]
    assert alike == pytest.approx(np.cos(0.3 * np.pi / 2), abs=0.01)
    np.testing.assert_array_equal(host_noise(Request(items=(item,)))(0, INITIAL, 100, 16, 50), drawn[50:150])


def test_long_loops_that_do_not_turn_are_refused(small: Any) -> None:
    frames = small.config.diffusion.max_frames
    longest = Ring.of(frames * 512 / RATE, small.config)
    assert longest.frames <= frames
    with pytest.raises(ValueError, match="turns loops of about"):
        Ring.of((frames + 4) * 512 / RATE, small.config)
