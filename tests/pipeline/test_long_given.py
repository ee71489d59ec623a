"""Long pieces around given audio: what is there stays bit for bit, and what is made goes on from it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.events import AudioChunk, PieceFinished, WindowMade
from sa3_mlx.common.generation.long.between import between
from sa3_mlx.common.generation.long.store import FolderStore
from sa3_mlx.common.generation.long.windows import by_windows, layout
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Inpaint, Item, LongForm, Request, TimedPrompt, extend
from sa3_mlx.common.model.lengths import samples_to_seconds
from sa3_mlx.common.model.sampling import Sampling
from tests.support.command import tone
from tests.support.tiny import TINY
from tests.support.twins import Twin

RATIO, RATE = 512, 8000  # samples of a frame, and of a second, of the tiny models
FRAME = RATIO / RATE
LONG = LongForm(window_seconds=48 * FRAME, overlap_seconds=12 * FRAME)
SAMPLES = 100 * RATIO + 77  # of the source: no whole number of frames
SOURCE = tone(SAMPLES / RATE + 0.01, rate=RATE)[:SAMPLES]
TOTAL = 250 * RATIO + 5
PLACES = {"after": (SAMPLES, TOTAL), "before": (0, 131 * RATIO + 9), "between": (60 * RATIO + 1, 190 * RATIO + 300)}


def request(place: str = "after", *, total: int = TOTAL, long: LongForm = LONG) -> Request:
    """A piece whose source lies before, after or on both sides of what is made."""
    start, stop = PLACES[place]
    stop = total if place == "after" else stop
    audio = SOURCE if place == "after" else np.resize(SOURCE, (total, 2))
    return Request(
        items=(Item(prompt="kick rain", seconds=total / RATE, seed=7),),
        sampling=Sampling(sampler="pingpong", steps=2),
        inpaint=Inpaint(audio=audio, regions=((start / RATE, stop / RATE),)),
        long=long,
        head_room_seconds=4 * FRAME,
    )


def seconds(samples: int) -> float:
    return samples_to_seconds(samples, RATE)


def heard(pipeline: Any, wanted: Request, **options: Any) -> tuple[np.ndarray, PieceFinished]:
    """The whole audio of a stream, whose pieces must follow each other, and its last event."""
    audio = list[np.ndarray]()
    for event in pipeline.stream(wanted, **options):
        if isinstance(event, AudioChunk):
            assert event.start == sum(map(len, audio))
            audio.append(event.audio)
    assert isinstance(event, PieceFinished)
    return np.concatenate(audio), event


def test_windows_tile_what_is_made() -> None:
    """Whatever is given on both sides: each window hears an overlap of what is there, the last one what follows."""
    config, made_by = TINY["tiny-s"], replace(request(), inpaint=None)
    for frames in range(49, 260, 3):
        for before in (0, 1, 11, 12, 40):
            for after in (0, 1, 12, 18):
                if before + after >= frames:
                    continue
                item = replace(made_by.items[0], seconds=frames * FRAME)
                found = layout(replace(made_by, items=(item,)), config, before=before, after=after)
                there = before
                for window in found.windows:
                    assert window.start + window.kept == there and window.made > 0 and window.frames <= 48
                    assert window.kept >= min(12, there)
                    there += window.made
                assert window.after == after and window.stop == there + after
                assert found.frames == (frames if after else frames + 4) == window.stop


@pytest.mark.parametrize("name", ["tiny-s", "tiny-l"])
def test_any_lengths_windows_and_overlaps_fit(name: str) -> None:
    """Also where next to nothing is made, or given, or shared: every window makes something, and all is covered."""
    draw, config, tried = random.Random(1), TINY[name], 0
    for _ in range(600):
        window, place = draw.choice([16, 17, 31, 48, 64]), draw.choice(["after", "before", "between"])
        long = LongForm(window_seconds=window * FRAME, overlap_seconds=draw.randint(1, (window - 1) * 3 // 4) * FRAME)
        first = 0 if place == "before" else draw.choice([draw.randint(1, 1500), draw.randint(1, 150 * RATIO)])
        made = draw.choice([draw.randint(RATIO, 5 * RATIO), draw.randint(RATIO, 300 * RATIO)])
        rest = 0 if place == "after" else draw.choice([draw.randint(1, 1000), draw.randint(1, 150 * RATIO)])
        total = first + made + rest
        audio = np.zeros((first if place == "after" else total, 2), np.float32)
        wanted = replace(
            request(),
            items=(Item(prompt="kick", seconds=seconds(total), seed=7),),
            inpaint=Inpaint(audio=audio, regions=((seconds(first), seconds(first + made)),)),
            long=long,
        )
        try:
            validate(wanted, config)
        except ValueError as error:
            assert "fit into one window" in str(error) or "too short" in str(error) or "overlap is" in str(error)
            continue
        tried += 1
        found = between(wanted, config)
        parts = found.layout(config)
        there = found.before
        for one in parts.windows:
            assert one.start + one.kept == there and one.made > 0 and plan(one.request, config).frames == one.frames
            there += one.made
        assert 0 <= found.start <= first and first + made <= found.stop <= total
        assert parts.windows[-1].after == found.after and there + found.after == parts.frames >= parts.audible
    assert tried > 300


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model", ["tiny-s", "tiny-l"])
def test_given_samples_stay_and_the_rest_is_made(
    twin: Twin, random_models: dict[str, Path], model: str, place: str
) -> None:
    wanted, (start, stop) = request(place), PLACES[place]
    audio, end = heard(twin.pipeline(random_models[model]), wanted)
    kept = wanted.inpaint.audio  # type: ignore[union-attr]
    assert audio.shape == (TOTAL, 2) and end.request == wanted
    assert np.array_equal(audio[:start], kept[:start])
    assert place == "after" or np.array_equal(audio[stop:], kept[stop:])
    assert np.abs(audio[start:stop]).max() > 1e-3
    assert [seam.sample for seam in end.seams] == [sample for sample in (start, stop) if 0 < sample < TOTAL]
    steps = [float(np.abs(audio[seam.sample] - audio[seam.sample - 1]).max()) for seam in end.seams]
    assert max(steps) <= 1.5 * np.abs(np.diff(SOURCE, axis=0)).max()


def test_the_model_is_told_what_is_given(twin: Twin, random_models: dict[str, Path]) -> None:
    """Latents as those of the whole file, in their places; nothing else is encoded (measured: 1.7e-6)."""
    pipeline, wanted = twin.pipeline(random_models["tiny-s"]), request("between")
    found, told = between(wanted, pipeline.config), list[np.ndarray]()
    usual = pipeline.local_input

    def spy(plan: Any, inpaint: np.ndarray) -> Any:
        told.append(np.where(plan.keep_frames[0][:, None] == 1, inpaint[0], np.nan))
        return usual(plan, inpaint)

    pipeline.local_input = spy
    heard(pipeline, wanted)
    whole = pipeline.encode(wanted.inpaint.audio)  # type: ignore[union-attr]
    first = found.start // RATIO
    assert (found.before, found.after) == (61 - first, 12) and first % pipeline.config.same.frame_multiple == 0
    assert np.abs(told[0][: found.before] - whole[first:61]).max() < 1e-5
    assert np.isnan(told[0][found.before :]).all()
    assert np.abs(told[-1][-12:] - whole[191:203]).max() < 1e-5
    assert all(np.isnan(window).any() for window in told)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("anchor", [0.0, 0.7])
def test_it_goes_on_after_a_stop_with_the_same_bits(
    twin: Twin, random_models: dict[str, Path], tmp_path: Path, place: str, anchor: float
) -> None:
    pipeline, wanted = twin.pipeline(random_models["tiny-s"]), request(place, long=replace(LONG, anchor=anchor))
    whole = heard(pipeline, wanted)[0]
    with FolderStore.open(tmp_path / "a.windows", {}, anew=False) as store:
        events = pipeline.stream(wanted, store=store)
        next(event for event in events if isinstance(event, WindowMade) and event.index == 1)
        events.close()
        again = [event.resumed for event in pipeline.stream(wanted, store=store) if isinstance(event, WindowMade)]
        assert again[:2] == [True, True] and not any(again[2:]) and len(again) > 3
        assert np.array_equal(heard(pipeline, wanted, store=store)[0], whole)
    assert np.array_equal(pipeline.generate(wanted).audio[0], whole)
    assert np.array_equal(heard(pipeline, wanted, residency="phase")[0], whole) and not pipeline.loaded


def test_a_longer_one_begins_with_the_shorter_one(twin: Twin, random_models: dict[str, Path]) -> None:
    pipeline = twin.pipeline(random_models["tiny-s"])
    short, long = (heard(pipeline, request(total=RATIO * frames))[0] for frames in (230, 300))
    same = SAMPLES + (48 + 36 - 12 - 4) * RATIO  # until the second window ends, but for what the decoder looks ahead
    assert np.abs(short[:same] - long[:same]).max() < 1e-5 and np.abs(short - long[: len(short)]).max() > 1e-3


def test_other_seeds_and_prompts_of_their_time(twin: Twin, random_models: dict[str, Path]) -> None:
    """A prompt counts in the time of the whole, and changes nothing in windows that end before it."""
    pipeline, wanted = twin.pipeline(random_models["tiny-s"]), request()
    item = replace(wanted.items[0], prompts_over_time=(TimedPrompt(start=160 * FRAME, prompt="bell"),))
    plain, timed, other = (
        heard(pipeline, replace(wanted, items=(one,)))[0] for one in (wanted.items[0], item, replace(item, seed=8))
    )
    changed = np.flatnonzero((plain != timed).any(axis=1))
    assert 130 * RATIO < changed[0] < 160 * RATIO  # windows end in frames 137 and 173
    assert not np.array_equal(timed[SAMPLES:], other[SAMPLES:])


def test_twins_agree(random_models: dict[str, Path]) -> None:
    """Of what is made (measured: 122 dB)."""
    pytest.importorskip("mlx.core")
    pytest.importorskip("torch")
    ours, theirs = (
        heard(Twin(name).pipeline(random_models["tiny-l"]), request("between"))[0] for name in ("mlx", "torch")
    )
    assert 10 * np.log10((ours**2).sum() / ((ours - theirs) ** 2).sum()) > 110


def test_without_paste_back_the_piece_is_the_model_s(twin: Twin, random_models: dict[str, Path]) -> None:
    pipeline, wanted = twin.pipeline(random_models["tiny-s"]), replace(request(), crossfade_ms=None)
    audio, end = heard(pipeline, wanted)
    start = between(wanted, pipeline.config).start
    assert np.array_equal(audio[:start], SOURCE[:start]) and not np.array_equal(audio[start:SAMPLES], SOURCE[start:])
    assert end.seams == ()


def test_which_form_a_request_has() -> None:
    """Regions that one run can make are not made in windows, but for one that goes on to the end."""
    config, audio = TINY["tiny-s"], np.zeros((100 * RATE, 2), np.float32)
    whole = replace(request(), items=(replace(request().items[0], seconds=100.0),), long=LongForm())

    def windows(*regions: tuple[float, float], long: LongForm | None = whole.long) -> bool:
        return by_windows(replace(whole, inpaint=Inpaint(audio=audio, regions=regions), long=long), config)

    assert not windows((10.0, 20.0)) and not windows((0.0, 48.0)) and not windows((1.0, 2.0), (3.0, 4.0))
    assert windows((10.0, 100.0)) and windows((99.0, 100.0)) and windows((0.0, 49.5)) and windows((20.0, 80.0))
    assert windows((10.0, 20.0), long=LONG) and not windows((10.0, 100.0), long=None)
    assert by_windows(replace(whole, inpaint=None), config)


def test_a_short_continuation_is_one_window_that_hears_more(random_models: dict[str, Path]) -> None:
    pipeline = Twin("mlx").pipeline(random_models["tiny-s"])
    wanted = request(total=SAMPLES + 5 * RATIO)
    found = between(wanted, pipeline.config)
    (window,) = found.layout(pipeline.config).windows
    assert window.kept == found.before > 36 and window.frames == 48
    audio = heard(pipeline, wanted)[0]
    assert len(audio) == SAMPLES + 5 * RATIO and np.array_equal(audio[:SAMPLES], SOURCE)


def test_extend_asks_for_it(random_models: dict[str, Path]) -> None:
    """As a program does: ``extend`` says what is kept, ``LongForm`` that it may be long."""
    pipeline = Twin("mlx").pipeline(random_models["tiny-s"])
    kept = extend(SOURCE, 70.0, pipeline.config)
    made = pipeline.generate(replace(request(), items=(replace(request().items[0], seconds=70.0),), inpaint=kept))
    assert made.audio[0].shape == (70 * RATE, 2) and np.array_equal(made.audio[0][:SAMPLES], SOURCE)
    assert len(made.seams[0]) == 1 and np.isfinite(made.seams[0][0].level_difference_db)
