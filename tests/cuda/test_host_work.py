"""What the host does for a GPU: it never waits between start and end, and touches audio once.

Everything is counted on the device "meta"; equality is tested on the CPU.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sa3_mlx.common.files.audio import clipped_share
from sa3_mlx.common.generation.clips import Clip
from sa3_mlx.common.generation.events import Sampled, Stopwatch
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import InitAudio, Item, Request
from sa3_mlx.common.model.chunks import chunk_plan
from sa3_mlx.common.model.sampling import SAMPLER_NAMES, Guidance, Sampling
from sa3_torch.choices import using
from tests.support.tiny import TINY
from tests.support.twins import Twin, relative

from .counted import CountedPipeline

RATE = 8000


def _audio(seconds: float, peak: float = 0.9) -> np.ndarray:
    made = np.random.default_rng(3).uniform(-1, 1, (int(seconds * RATE), 2))
    return (made * peak).astype(np.float32)


def _request(sampler: str, scale: float = 1.0, items: int = 1, **given: Any) -> Request:
    sampling = Sampling(sampler=sampler, steps=4, guidance=Guidance(scale=scale))
    made = tuple(Item(prompt="low kick", seconds=1.7 + k, seed=1 + k) for k in range(items))
    return Request(items=made, sampling=sampling, **given)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize(("scale", "items", "kept"), [(1.0, 1, False), (3.0, 2, False), (1.0, 2, True)])
def test_nothing_waits_between_start_and_end(
    random_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    sampler: str,
    scale: float,
    items: int,
    kept: bool,
) -> None:
    """Before, 8 steps of pingpong: 52 (tiny-s) and 50 (tiny-l), 43 with Euler and guidance; now the end alone waits."""
    pipeline = CountedPipeline.opened(random_models[model])
    given = {"init": InitAudio(audio=_audio(1.0), noise_level=0.7)} if kept else {}
    with using({"noise": "device"}):
        seen, _ = pipeline.counted(_request(sampler, scale, items, **given), monkeypatch)
    assert seen.waits == 0 and seen.copies > 0


def test_a_run_with_noise_of_the_device_has_the_same_bits(random_models: dict[str, Path]) -> None:
    pipeline = Twin("torch").pipeline(random_models["tiny-s"])
    for request in (
        _request("pingpong", items=2),
        _request("euler", init=InitAudio(audio=_audio(1.0), noise_level=0.7)),
        _request("pingpong", decode_noise=True),
    ):
        wanted = pipeline.generate(request)
        with using({"noise": "device"}):
            found = pipeline.generate(request)
        for a, b in zip(found.audio, wanted.audio, strict=True):
            np.testing.assert_array_equal(a, b)


def test_states_of_a_prompt_are_kept_beside_the_encoder(twin: Twin, random_models: dict[str, Path]) -> None:
    pipeline = twin.pipeline(random_models["tiny-s"])
    encoder, calls = pipeline.load_part("text_encoder"), []
    pipeline._parts["text_encoder"] = lambda ids, mask: (calls.append(1), encoder(ids, mask))[1]
    first, again = (pipeline.generate(_request("euler")).audio[0] for _ in range(2))
    assert len(calls) == 1
    np.testing.assert_array_equal(first, again)
    pipeline.generate(Request(items=(Item(prompt="bell", seconds=1, seed=1),)))
    assert len(calls) == 2
    for word in range(9):  # more than are kept
        pipeline.text_states(np.int32([[word]]), np.array([[True]]))
    assert len(pipeline._states) == 8
    pipeline.free("text_encoder")
    assert not pipeline._states


def test_the_table_of_embeddings_is_opened_once(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the header takes about 5 ms; another file at its path does not change what a pipeline has open."""
    t5gemma = pytest.importorskip("sa3_torch.t5gemma")
    opened: list[Path] = []
    real = t5gemma.TensorFile.open
    monkeypatch.setattr(t5gemma.TensorFile, "open", lambda path: (opened.append(path), real(path))[1])
    embedding = Twin("torch").load(random_models["tiny-s"], "text_encoder").embed_tokens
    opened.clear()
    rows = [embedding(torch.tensor([[1, 5]])) for _ in range(3)]
    assert len(opened) == 1 and torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("peak", [0.5, 1.0, 2.0])
def test_clipped_samples_are_counted_without_a_copy_where_there_are_none(peak: float) -> None:
    audio = _audio(20, peak)
    assert clipped_share(audio) == float((np.abs(audio) > 1).any(axis=1).mean())
    tracemalloc.start()
    clipped_share(audio)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (most < audio.nbytes / 10) == (peak <= 1)
    assert clipped_share(np.float32([[np.nan, 2], [np.nan, 0]])) == 0.5


def test_a_clip_of_one_piece_is_that_piece() -> None:
    config, request = TINY["tiny-s"], _request("euler")
    made = _audio(2.0)
    clip = Clip(0, request, plan(request, config), config)
    chunk = clip.add(made)
    assert np.shares_memory(clip.audio, made) and np.shares_memory(chunk.audio, made)
    assert len(clip.audio) == len(chunk.audio) == int(1.7 * RATE)
    assert not chunk.audio.flags.writeable and clip.audio.flags.writeable


def test_a_clip_that_was_stopped_ends_in_silence() -> None:
    config, request = TINY["tiny-s"], _request("euler")
    clip = Clip(0, request, plan(request, config), config)
    assert not clip.audio.any()
    clip.add(_audio(0.5))
    assert len(clip.audio) == int(1.7 * RATE) and clip.audio[3999].all() and not clip.audio[4000:].any()


class _Device:
    """Stands for the clock of a device that lags behind the host."""

    def __init__(self) -> None:
        self.launched = self.read = 0

    def mark(self) -> int:
        self.launched += 3
        return self.launched

    def between(self, start: int, stop: int) -> float:
        self.read += 1
        return float(stop - start)


def test_a_devices_clock_is_read_at_the_end_only() -> None:
    device = _Device()
    watch = Stopwatch("text", "sample", mark=device.mark, between=device.between)
    with watch("text"):
        pass
    assert list(watch.each("sample", [5, 6])) == [5, 6]
    assert device.read == 0
    assert watch.seconds == {"text": 3.0, "sample": 9.0}  # two pieces, and the end of them


def test_latents_are_fetched_where_somebody_reads_them() -> None:
    fetched: list[int] = []
    event = Sampled(fetch=lambda: (fetched.append(1), np.zeros(2, np.float32))[1])
    assert not fetched
    assert not event.latents.any() and fetched == [1]


def test_a_gpu_decodes_a_clip_as_a_whole_where_it_has_room(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched once; by the usual chunks in a device that is full."""
    pipeline = Twin("torch").pipeline(random_models["tiny-l"])
    launched: list[int] = []
    real = pipeline._decode
    monkeypatch.setattr(pipeline, "_decode", lambda z, *noises: (launched.append(len(z)), real(z, *noises))[1])
    latents = np.random.default_rng(0).standard_normal((500, 16), np.float32)
    usual = pipeline.decode(latents)
    with using({"chunks": "whole"}):
        whole = pipeline.decode(latents)
        monkeypatch.setattr(pipeline, "_room", lambda: 1e6)
        tight = pipeline.decode(latents)
    assert launched == [*_chunks(), 500, *_chunks()] and len(_chunks()) > 3
    np.testing.assert_array_equal(tight, usual)
    assert 0 < relative(whole, usual) < 5e-6  # measured 9e-7


def _chunks() -> list[int]:
    """Frames of the usual chunks of 500."""
    return [chunk.stop - chunk.start for chunk in chunk_plan(500, 128, TINY["tiny-l"].same, "decode")]
