"""A loop has exactly the samples of its bars, and a difference to whole frames is taken out where it is least heard."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.loop import Loop, Ring, close, loop_seconds
from sa3_mlx.common.generation.plan import plan, told_seconds
from sa3_mlx.common.generation.request import InitAudio, Item, Request
from sa3_mlx.common.memory.activations import coded_frames
from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.model.presets import PRESETS
from tests.support.tiny import TINY

DEMO, MEDIUM = PRESETS["first"], PRESETS["medium"]


def asked(seconds: float, **loop: object) -> Request:
    return Request(items=(Item(prompt="rain", seconds=seconds, seed=1),), loop=Loop(**loop))  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
def test_seconds_of_bars_are_exact_in_samples(rate: int) -> None:
    for bpm in (60, 61.7, 87, 120, 128, 133.33, 174, 200):
        for bars in (1, 2, 3, 4, 8, 16):
            for per_bar in (3, 4, 7):
                wanted = round(bars * per_bar * 60 / bpm * rate)
                assert seconds_to_samples(loop_seconds(bpm, bars * per_bar, rate), rate) == wanted


@pytest.mark.parametrize("way", ["seam", "turn", "cut"])
def test_a_plan_has_the_samples_no_head_room_and_a_longer_duration(way: str) -> None:
    for config in (DEMO, MEDIUM):
        request = asked(loop_seconds(125, 8, 44_100), bpm=125.0, beats=8, way=way)
        planned = plan(request, config)
        assert planned.lengths.output_samples == (169_344,)
        assert told_seconds(request, config)[0] > 3.84 and planned.padding_mask.all()
        assert abs(planned.frames - 169_344 / config.same.samples_per_latent) <= 2


def test_a_turning_loop_has_an_even_number_of_frames_near_to_its_length() -> None:
    for config in (DEMO, MEDIUM, TINY["tiny-s"], TINY["tiny-l"]):
        ratio, rate = config.same.samples_per_latent, config.sample_rate
        for frames in np.linspace(9, 60, 40):
            ring = Ring.of(frames * ratio / rate, config)
            multiple = np.lcm(2 if ratio == 4096 else 1, config.same.frame_multiple)
            assert ring.frames % multiple == 0
            assert abs(ring.frames * ratio - ring.samples) <= ratio * max(2, multiple) / 2 + ratio
            kept = [
                frame for chunk in ring.chunks(256, config.same) for frame in range(chunk.keep_start, chunk.keep_stop)
            ]
            assert kept == list(range(ring.halo, ring.halo + ring.frames))
            assert (ring.heard[ring.halo : -ring.halo] == np.arange(ring.frames)).all()
            assert coded_frames(asked(frames * ratio / rate, way="turn"), config, "decode") == len(ring.heard)


@pytest.mark.parametrize("extra", [-700, -1, 1, 33, 900])
def test_closing_takes_out_the_difference_at_one_place(extra: int) -> None:
    """A sound with a pause: there the difference goes, every other sample stays as it is."""
    rng, samples = np.random.default_rng(1), 16_000
    audio = rng.normal(0, 0.1, (samples + extra, 2)).astype(np.float32)
    audio[9000:13_000] = 0
    closed = close(audio, samples, 8000)
    assert closed.shape == (samples, 2) and closed.dtype == np.float32
    np.testing.assert_array_equal(closed[:9000], audio[:9000])
    np.testing.assert_array_equal(closed[13_000 - extra :], audio[13_000:])
    assert not closed[9000 : 13_000 - extra].any()


def test_closing_goes_round_where_the_pause_is_at_the_ends() -> None:
    rng = np.random.default_rng(2)
    audio = rng.normal(0, 0.1, (16_200, 1)).astype(np.float32)
    audio[:1000] = audio[-1000:] = 0
    closed = close(audio, 16_000, 8000)
    sound = np.flatnonzero(closed[:, 0])
    assert sound[-1] - sound[0] == 16_200 - 2000 - 1
    np.testing.assert_array_equal(closed[sound[0] : sound[-1] + 1], audio[1000:-1000])


def test_closing_a_tone_leaves_no_step() -> None:
    """A tone that goes round in M samples: what is cut out is whole periods or is faded over."""
    time = np.arange(8100)
    audio = np.sin(2 * np.pi * 405 * time / 8100)[:, None].astype(np.float32)
    closed = close(audio, 8000, 8000)
    around = np.concatenate([closed, closed[:2]])[:, 0]
    assert np.abs(np.diff(around)).max() < 1.3 * np.abs(np.diff(audio[:, 0])).max()
    np.testing.assert_array_equal(close(audio, 8100, 8000), audio)


@pytest.mark.parametrize(
    ("changes", "loop", "message"),
    [
        ({"head_room_seconds": 0.0}, {}, "a loop is made from nothing and has no end: leave out head room"),
        ({"init": InitAudio(audio=np.zeros((9, 2), np.float32), noise_level=0.5)}, {}, "leave out init audio"),
        ({"decode_noise": True}, {"way": "turn"}, "decode_noise does not go round"),
        ({}, {"bpm": 19.0, "beats": 4}, "bpm is 19: allowed are 20 to 400"),
        ({}, {"bpm": float("nan"), "beats": 4}, "bpm"),
        ({}, {"bpm": 120.0}, "bpm is 120.0, beats is None: give both"),
        ({}, {"bpm": 120.0, "beats": 0}, "beats is 0: allowed are the integers 1 to 4096"),
        ({}, {"way": "knot"}, "loop way is 'knot': allowed are seam, turn, cut"),
        ({"items": (Item(prompt="", seconds=0.05, seed=1),)}, {}, "is too short to join: at least 0.093 s"),
        (
            {"items": (Item(prompt="", seconds=0.05, seed=1),)},
            {"way": "turn"},
            "first turns loops of about 0.19 to 4.46 s",
        ),
        ({"items": (Item(prompt="", seconds=4.7, seed=1),)}, {}, "first makes above 0 to 4.45 s"),
        (
            {"items": tuple(Item(prompt="", seconds=s, seed=1) for s in (1.0, 2.0))},
            {},
            "loops of one batch have one length",
        ),
        ({"items": (Item(prompt="", seconds=1.0, seed=1, spread=0.5),)}, {}, "but no seed is given towards which"),
        (
            {"items": (Item(prompt="", seconds=1.0, seed=1, toward=2, spread=1.5),)},
            {},
            "spread is 1.5: allowed are 0 to 1",
        ),
        ({"items": (Item(prompt="", seconds=1.0, seed=1, toward=-2, spread=0.5),)}, {}, "toward: seed is -2"),
    ],
)
def test_requests_for_loops_that_cannot_be_done(
    changes: dict[str, object], loop: dict[str, object], message: str
) -> None:
    request = asked(2.0, **loop)
    with pytest.raises(ValueError) as error:
        validate(replace(request, **changes), DEMO)  # type: ignore[arg-type]
    assert message in str(error.value) and "\n" not in str(error.value)
