"""Long pieces: windows that continue each other, decoded as one, the same after a stop, in flat memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.generation.events import AudioChunk, Latents, PieceFinished, Stepped, Stopwatch, WindowMade
from sa3_mlx.common.generation.long.around import around
from sa3_mlx.common.generation.long.run import Anchor, Tail
from sa3_mlx.common.generation.long.store import FolderStore
from sa3_mlx.common.generation.long.windows import layout
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, LongForm, Patch, Request, TimedPrompt
from sa3_mlx.common.measures.drift import DriftMeter
from sa3_mlx.common.memory.prediction import predict
from sa3_mlx.common.model.precision import Precision
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.tiny import TINY
from tests.support.twins import Twin

FRAME = 512 / 8000  # seconds of the tiny models
LONG = LongForm(window_seconds=48 * FRAME, overlap_seconds=12 * FRAME)


def request(frames: float = 150.0, long: LongForm = LONG, *, seed: int = 7) -> Request:
    item = Item(prompt="kick rain", seconds=frames * FRAME, seed=seed)
    return Request(
        items=(item,), sampling=Sampling(sampler="pingpong", steps=2), long=long, head_room_seconds=4 * FRAME
    )


def parts(pipeline: Any, wanted: Request, **options: Any) -> tuple[Latents, np.ndarray]:
    """The joined latents and audio of a stream, whose pieces must follow each other."""
    latents, audio = [], []
    for event in pipeline.stream(wanted, **options):
        if isinstance(event, WindowMade):
            latents.append(event.latents)
        elif isinstance(event, AudioChunk):
            assert event.start == sum(map(len, audio))
            audio.append(event.audio)
    assert isinstance(event, PieceFinished)
    return np.concatenate(latents), np.concatenate(audio)


def test_windows_tile_the_piece() -> None:
    for frames in (61, 83, 84, 85, 150, 151.5, 1000):
        found = layout(request(frames), TINY["tiny-s"])
        made = 0
        for window in found.windows:
            assert window.start + window.kept == made and window.frames == 48
            assert window.kept >= 12 or not window.index
            made = window.stop
        assert made == found.frames == found.audible + 4 and found.audible == -(-frames // 1)
        assert all(window.kept == 12 for window in found.windows[1:-1])


def test_a_longer_piece_begins_with_the_shorter_one(twin: Twin, random_models: dict[str, Path]) -> None:
    pipeline = twin.pipeline(random_models["tiny-s"])
    short, long = (parts(pipeline, request(frames))[0] for frames in (150, 200))
    assert np.array_equal(short[:120], long[:120]) and not np.array_equal(short[:150], long[:150])


def test_a_middle_window_is_told_that_the_clip_goes_on() -> None:
    """And the last one that it ends: it alone has head room."""
    *middle, last = layout(request(500), TINY["tiny-s"]).windows
    assert {window.declared.items[0].seconds for window in middle} == {TINY["tiny-s"].max_seconds}
    assert {window.request.head_room_seconds for window in middle} == {0.0}
    assert last.declared == last.request and last.request.head_room_seconds == pytest.approx(4 * FRAME)


@pytest.mark.parametrize("model", ["tiny-s", "tiny-l"])
def test_decoding_as_it_grows_is_decoding_the_whole(twin: Twin, random_models: dict[str, Path], model: str) -> None:
    """Bit for bit with the same chunks; with others to 5e-6 (measured: 1.0e-6)."""
    pipeline = twin.pipeline(random_models[model])
    wanted = replace(request(), chunk_frames=40)
    latents, audio = parts(pipeline, wanted)
    assert audio.shape == (150 * 512, 2) and len(latents) == 154
    halo = 2 if model == "tiny-s" else 4
    whole = np.concatenate(list(pipeline.decode_stream(latents[: 150 + halo], chunk_frames=40)))
    assert np.array_equal(audio, whole[: len(audio)])
    assert np.abs(audio - pipeline.decode(latents)[: len(audio)]).max() <= 5e-6 * np.abs(audio).max()


def test_every_window_is_the_clip_that_its_request_says(twin: Twin, random_models: dict[str, Path]) -> None:
    """The first one is a plain clip, and each of the others is told the end of what is there."""
    pipeline = twin.pipeline(random_models["tiny-s"])
    latents, _ = parts(pipeline, request())
    first = layout(request(), TINY["tiny-s"]).windows[0]
    plain = pipeline.generate(replace(first.request, items=(replace(first.request.items[0], seconds=48 * FRAME),)))
    assert plain.latents[0].shape == (48, 16)
    assert np.abs(plain.latents[0] - latents[:48]).max() > 1e-4  # which was told another duration
    told: list[np.ndarray] = []
    usual = pipeline.local_input

    def spy(plan: Any, inpaint: Latents | None) -> Any:
        told.append(np.zeros(0) if inpaint is None else inpaint[0][plan.keep_frames[0] == 1])
        return usual(plan, inpaint)

    pipeline.local_input = spy
    again, _ = parts(pipeline, request())
    assert np.array_equal(again, latents)
    assert not len(told[0]) and np.array_equal(told[1], latents[36:48]) and np.array_equal(told[2], latents[72:84])
    assert np.array_equal(told[3], latents[106:120])  # the last one keeps what it has to


def test_twins_agree(random_models: dict[str, Path]) -> None:
    """After two steps in each of four windows (measured: 125 dB)."""
    pytest.importorskip("mlx.core")
    pytest.importorskip("torch")
    ours, theirs = (parts(Twin(name).pipeline(random_models["tiny-l"]), request())[1] for name in ("mlx", "torch"))
    assert 10 * np.log10((ours**2).sum() / ((ours - theirs) ** 2).sum()) > 110


class _Stopped(Exception):
    pass


def until(events: Iterator[Any], window: int) -> None:
    """Stop in the middle of the steps of a window, as a process that is killed."""
    made = 0
    for event in events:
        made += isinstance(event, WindowMade)
        if made == window and isinstance(event, Stepped):
            raise _Stopped


@pytest.mark.parametrize("anchor", [0.0, 0.7])
def test_it_goes_on_after_a_stop_with_the_same_bits(
    twin: Twin, random_models: dict[str, Path], tmp_path: Path, anchor: float
) -> None:
    wanted = request(long=replace(LONG, anchor=anchor))
    pipeline, folder = twin.pipeline(random_models["tiny-s"]), tmp_path / "a.wav.windows"
    latents, audio = parts(pipeline, wanted)
    with pytest.raises(_Stopped), FolderStore.open(folder, {"request": wanted.to_dict()}, anew=False) as store:
        until(pipeline.stream(wanted, store=store), 2)
    assert sorted(path.name for path in folder.iterdir()) == ["000000.npy", "000001.npy", "piece.json"]
    with FolderStore.open(folder, {"request": wanted.to_dict()}, anew=False) as store:
        resumed = [event.resumed for event in pipeline.stream(wanted, store=store) if isinstance(event, WindowMade)]
        again = parts(pipeline, wanted, store=store)
    assert resumed == [True, True, False, False]
    assert np.array_equal(again[0], latents) and np.array_equal(again[1], audio)


def test_generate_joins_what_streams(twin: Twin, random_models: dict[str, Path]) -> None:
    pipeline = twin.pipeline(random_models["tiny-s"])
    made, (latents, audio) = pipeline.generate(request()), parts(pipeline, request())
    assert np.array_equal(made.audio[0], audio) and np.array_equal(made.latents[0], latents)
    assert made.seeds == (7,) and set(made.timings) == {"text", "encode", "sample", "decode"}


@pytest.mark.parametrize("residency", ["phase", "step"])
def test_freeing_parts_changes_no_bit(twin: Twin, random_models: dict[str, Path], residency: str) -> None:
    pipeline = twin.pipeline(random_models["tiny-s"])
    assert np.array_equal(parts(pipeline, request())[1], parts(pipeline, request(), residency=residency)[1])
    assert not pipeline.loaded


def test_decoder_noise_guidance_and_negative_prompts(twin: Twin, random_models: dict[str, Path]) -> None:
    pipeline = twin.pipeline(random_models["tiny-s"])
    plain = replace(request(), chunk_frames=40)
    item = replace(plain.items[0], negative_prompt="bell")
    sampling = Sampling(sampler="euler", steps=2, guidance=Guidance(scale=3.0))
    guided, noisy = replace(plain, items=(item,), sampling=sampling), replace(plain, decode_noise=True)
    found = [parts(pipeline, wanted)[1] for wanted in (plain, guided, noisy, noisy)]
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    assert np.array_equal(found[2], found[3])


def test_the_anchor_leads_statistics_back() -> None:
    rng = np.random.default_rng(0)
    first, before = rng.normal(0, 1, (500, 4)), rng.normal(3, 2, (500, 4))
    first, before = first.astype(np.float32), before.astype(np.float32)
    held = Anchor.of(first, 1.0).hold(before, before)
    assert np.allclose(held.mean(0), first.mean(0), atol=1e-5) and np.allclose(held.std(0), first.std(0), atol=1e-5)
    half = Anchor.of(first, 0.5).hold(before, before)
    assert np.allclose(half, (held + before) / 2, atol=1e-5) and held.dtype == half.dtype == np.float32
    assert np.isfinite(Anchor.of(first, 1.0).hold(before[:9], np.ones((500, 4), np.float32))).all()


def test_memory_does_not_grow_with_the_length(random_models: dict[str, Path]) -> None:
    """Neither what is held of the latents, nor what is predicted of the whole."""
    from sa3_mlx.common.generation.long import run

    held: list[int] = []

    class Spy(Tail):
        def forget(self, until: int) -> None:
            super().forget(until)
            held.append(len(self._latents))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Tail", Spy)
        pipeline = Twin("mlx").pipeline(random_models["tiny-s"])
        parts(pipeline, replace(request(1500), chunk_frames=40))
    assert len(held) > 40 and max(held) <= 48 + 40
    config, types = TINY["tiny-s"], Precision(dtype="float32", text_dtype="float32")
    short, long = (predict(request(frames), config, types).peak for frames in (1500, 150_000))
    window = predict(replace(request(48), long=None, head_room_seconds=0.0), config, types)
    assert window.peak <= long <= 1.1 * short  # chunks are about equally long, and never longer than the usual ones


def test_windows_of_the_released_models() -> None:
    """Half of their longest clip, so that no window has to end; those of small ones are as long as its clips."""
    item = Item(prompt="", seconds=1800.0, seed=0)
    wanted = Request(items=(item,), long=LongForm())
    for name, frames, count in (("medium", 2048, 13), ("first", 192, 539)):
        found = layout(wanted, PRESETS[name])
        assert (found.windows[0].frames, len(found.windows)) == (frames, count)


TONE = np.zeros((8000, 2), np.float32)
REFUSED = {
    "two clips": (replace(request(), items=request().items * 2), "is made by itself"),
    "init audio": (replace(request(), init=InitAudio(audio=TONE, noise_level=0.5)), "not made from init audio"),
    "several regions": (
        replace(request(), inpaint=Inpaint(audio=np.tile(TONE, (10, 1)), regions=((0.0, 1.0), (2.0, 3.0)))),
        "window, overlap and anchor are for one region",
    ),
    "a region with a seed": (
        replace(request(), inpaint=Inpaint(audio=TONE, regions=(Patch(start=1.0, end=150 * FRAME, seed=3),))),
        "has no prompt, seed, noise level or feather of its own",
    ),
    "a feather": (
        replace(request(), inpaint=Inpaint(audio=TONE, regions=((1.0, 150 * FRAME),), feather_seconds=0.2)),
        "has no prompt, seed, noise level or feather of its own",
    ),
    "no audio for what is kept": (
        replace(request(), inpaint=Inpaint(audio=TONE, regions=((0.0, 1.0),))),
        "the audio ends at 1.000 s",
    ),
    "given and made in one window": (
        replace(request(40), inpaint=Inpaint(audio=TONE, regions=((1.0, 40 * FRAME),))),
        "2.56 s fit into one window of 3.07 s",
    ),
    "more than a day": (request(1e7), "at most 86400"),
    "not finite": (request(float("inf")), "finite"),
    "no length": (request(0), "seconds is 0"),
    "fits into one window": (request(44), "fit into one window of 3.07 s"),
    "window too short": (request(long=LongForm(window_seconds=0.5)), "windows of 1.02 to 65.53 s"),
    "window too long": (request(long=LongForm(window_seconds=66.0)), "windows of 1.02 to 65.53 s"),
    "window nan": (request(long=LongForm(window_seconds=float("nan"))), "window is nan"),
    "window negative": (request(long=LongForm(window_seconds=-1.0)), "window is -1"),
    "overlap none": (request(long=replace(LONG, overlap_seconds=0.0)), "overlap is 0"),
    "overlap too short": (request(long=replace(LONG, overlap_seconds=0.01)), "allowed are 0.064 to 2.30 s"),
    "overlap too long": (request(long=replace(LONG, overlap_seconds=2.5)), "allowed are 0.064 to 2.30 s"),
    "overlap infinite": (request(long=replace(LONG, overlap_seconds=float("inf"))), "overlap is inf"),
    "anchor above 1": (request(long=replace(LONG, anchor=1.1)), "anchor is 1.1: allowed are 0 to 1"),
    "anchor negative": (request(long=replace(LONG, anchor=-0.1)), "allowed are 0 to 1"),
    "anchor nan": (request(long=replace(LONG, anchor=float("nan"))), "allowed are 0 to 1"),
    "long is a text": (replace(request(), long="yes"), "long is 'yes'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(random_models: dict[str, Path], case: str) -> None:
    wanted, message = REFUSED[case]
    with pytest.raises(ValueError, match=r".") as caught:
        Twin("mlx").pipeline(random_models["tiny-s"]).stream(wanted)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_another_piece_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a.windows"
    with FolderStore.open(folder, {"request": {"seed": 1}, "model": "x"}, anew=False) as store:
        store.write(0, np.zeros((3, 2), np.float32))
        with (
            pytest.raises(OSError, match="another process works"),
            FolderStore.open(folder, {"request": {"seed": 1}, "model": "x"}, anew=False),
        ):
            pass
    other = {"request": {"seed": 2}, "model": "x"}
    with (
        pytest.raises(ValueError, match=r"another piece \(it differs in request.seed\)"),
        FolderStore.open(folder, other, anew=False),
    ):
        pass
    with FolderStore.open(folder, other, anew=True) as store:
        assert store.count() == 0 and store.read(0) is None
    for strange in ("{", '{"format": "other"}'):
        (folder / "piece.json").write_text(strange)
        with pytest.raises(ValueError, match=r"piece.json"), FolderStore.open(folder, other, anew=True):
            pass


def test_a_damaged_window_is_named(twin: Twin, random_models: dict[str, Path], tmp_path: Path) -> None:
    pipeline, folder = twin.pipeline(random_models["tiny-s"]), tmp_path / "a.windows"
    with FolderStore.open(folder, {"request": {}}, anew=False) as store:
        parts(pipeline, request(), store=store)
        (folder / "000001.npy").write_bytes(b"\x93NUMPY")
        with pytest.raises(ValueError, match=r"000001.npy: is damaged; remove it"):
            parts(pipeline, request(), store=store)
        store.write(1, np.zeros((5, 16), np.float32))
        with pytest.raises(ValueError, match=r"window 1: what was kept"):
            parts(pipeline, request(), store=store)


def test_audio_longer_than_a_clip_is_kept_around_what_is_made(twin: Twin, random_models: dict[str, Path]) -> None:
    """The run is that of a window, and everything outside of the regions is the source, bit for bit."""
    rng = np.random.default_rng(3)
    pipeline, config = twin.pipeline(random_models["tiny-s"]), TINY["tiny-s"]
    audio = rng.normal(0, 0.1, (100 * 8000, 2)).astype(np.float32)
    regions = ((50.0, 51.0), Patch(start=52.5, end=53.0, seed=9))
    item = replace(request().items[0], seconds=100.0, prompts_over_time=(TimedPrompt(start=52.0, prompt="bell"),))
    wanted = replace(request(), items=(item,), inpaint=Inpaint(audio=audio, regions=regions), long=LongForm())
    events = list(pipeline.stream(wanted))
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    made = events[-1].generation
    assert np.array_equal(np.concatenate([chunk.audio for chunk in chunks]), made.audio[0])
    assert [chunk.start for chunk in chunks[1:]] == list(np.cumsum([len(chunk.audio) for chunk in chunks])[:-1])
    changed = np.flatnonzero((made.audio[0] != audio).any(axis=1))
    assert changed[0] >= 50 * 8000 and changed[-1] < 53 * 8000
    assert not ((changed >= 51 * 8000) & (changed < 52.5 * 8000)).any() and len(changed) > 11_000
    assert [seam.sample for seam in made.seams[0]] == [int(time * 8000) for time in (50, 51, 52.5, 53)]
    assert made.request == wanted
    found = around(wanted, config)
    part = pipeline.generate(found.request).audio[0]
    assert np.array_equal(made.audio[0][found.start : found.start + len(part)], part)
    assert found.request.items[0].prompts_over_time[0].start == pytest.approx(52.0 - found.start / 8000)


def test_windows_have_the_prompts_of_their_time() -> None:
    later = (TimedPrompt(start=70 * FRAME, prompt="bell"), TimedPrompt(start=1000 * FRAME, prompt="drone"))
    item = replace(request(2000).items[0], prompts_over_time=later)
    windows = layout(replace(request(2000), items=(item,)), TINY["tiny-s"]).windows
    texts = [
        (one.request.items[0].prompt, [p.prompt for p in one.request.items[0].prompts_over_time]) for one in windows
    ]
    assert texts[0] == ("kick rain", []) and texts[1] == ("kick rain", ["bell"])
    assert texts[2] == ("bell", []) and texts[-1] == ("drone", [])
    assert windows[1].request.items[0].prompts_over_time[0].start == pytest.approx((70 - 36) * FRAME)


def test_a_prompt_over_time_changes_nothing_before_it(twin: Twin, random_models: dict[str, Path]) -> None:
    """Windows that end before it are those of the plain piece, bit for bit."""
    pipeline = twin.pipeline(random_models["tiny-s"])
    item = replace(request().items[0], prompts_over_time=(TimedPrompt(start=90 * FRAME, prompt="bell"),))
    plain, timed = parts(pipeline, request())[0], parts(pipeline, replace(request(), items=(item,)))[0]
    assert np.array_equal(plain[:84], timed[:84]) and not np.array_equal(plain[84:], timed[84:])


def test_what_is_measured_on_the_way_does_not_grow() -> None:
    """Times of single steps are added up after every window, and of a minute's sound four numbers are held."""
    ticks = iter(range(1000))
    watch = Stopwatch("sample", "decode", mark=lambda: next(ticks))
    for _ in range(50):
        for stage in ("sample", "decode", "sample"):
            with watch(stage):
                pass
        watch.settle()
        assert not any(watch._spans.values())
    assert watch.seconds == {"sample": 100.0, "decode": 50.0}
    meter = DriftMeter(8000, 512)
    for _ in range(100):
        meter.add_audio(np.random.default_rng(0).normal(0, 0.1, (60 * 800, 2)))
    assert sum(block.nbytes for block in meter._blocks.values()) == len(meter.rows()) * 4 * 8 == 10 * 32
