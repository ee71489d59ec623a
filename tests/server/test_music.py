"""Variations near a sound, and pieces that are longer than a clip."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.cli.audio.source import SourceFile
from sa3_mlx.common.files.audio import read_audio
from sa3_mlx.common.generation.events import Event
from sa3_mlx.common.generation.long.windows import layout
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Request
from sa3_mlx.server.engine import runs
from sa3_mlx.server.engine.rates import JobSize
from sa3_mlx.server.settings import Settings
from sa3_mlx.server.studio import Studio
from tests.support.command import SMALL, Run, ok
from tests.support.server import Live, body, done, wait


def piece(seconds: float = 5.0, seed: int = 7, steps: int = 2, **more: Any) -> dict[str, Any]:
    """What asks for a long piece."""
    asked = body(seconds, seed=seed)
    asked["request"] |= {"long": more, "sampling": {"steps": steps}}
    return asked


def test_variations_near_a_sound_are_the_command_s_files(run: Run, studio: Studio) -> None:
    (first,) = done(studio, studio.submit(body(0.5, seed=7, exact=True)))
    (near,) = done(studio, studio.near(first.sounds[0], 2, 0.3))
    options = ["--seed", "7", "--variations", "2", "--spread", "0.3", "--backend", "mlx", "--out", "near.wav", "-q"]
    ok(run("generate", "soft rain", "--seconds", "0.5", *options))
    found = [studio.sound(sound) for sound in near.sounds]
    for number, sound in enumerate(found, start=1):
        assert studio.store.export(sound, ".wav", "pcm16").read_bytes() == Path(f"near-{number}.wav").read_bytes()
    assert [sound.parent for sound in found] == [*first.sounds, *first.sounds]
    assert [sound.name for sound in found] == ["soft rain 7-8", "soft rain 7-9"]
    family = studio.store.database.family(first.sounds[0])
    assert {sound.id for sound in family} == {first.sounds[0], *near.sounds}
    (again,) = done(studio, studio.again(near.id))
    assert [studio.sound(sound).file for sound in again.sounds] == [sound.file for sound in found]


def test_variations_near_an_edit_start_from_its_source(studio: Studio) -> None:
    (first,) = done(studio, studio.submit(body(0.5, seed=7)))
    asked = {"kind": "inpaint", "source": first.sounds[0], "variations": 2}
    asked |= {"request": {"items": [{"seed": 3}], "inpaint": {"regions": [[0.1, 0.3]]}}}
    (edited,) = done(studio, studio.submit(asked))
    (near,) = done(studio, studio.near(edited.sounds[1], 1, 0.5))
    item = near.order["request"]["items"][0]
    assert (item["seed"], item["toward"], item["spread"]) == (4, 5, 0.5)
    source, made = (studio.store.audio(studio.sound(sound)) for sound in (first.sounds[0], near.sounds[0]))
    assert np.array_equal(source[:800], made[:800]) and not np.array_equal(source, made)
    assert studio.sound(near.sounds[0]).parent == edited.sounds[1]


def test_what_has_no_noise_of_one_seed_has_nothing_near_it(server: Live) -> None:
    made = server.make(body(0.4, seed=2))
    job = server.post(f"/api/sounds/{made['id']}/near", {"variations": 1, "spread": 0.5}).json
    near = server.events(job["id"])[-1][1]["sounds"][0]
    latents = server.make({"kind": "encode", "source": made["id"]})
    decoded = server.make({"kind": "decode", "source": latents["id"]})
    for sound, words in ((near, "is near another sound already"), (decoded, "was made of latents")):
        assert words in server.post(f"/api/sounds/{sound['id']}/near", {}).error
    assert server.post(f"/api/sounds/{made['id']}/near", {"spread": 1.5}).status == 422
    assert server.post("/api/sounds/none/near", {}).status == 404


def test_a_long_piece_is_the_command_s_file(run: Run, studio: Studio) -> None:
    (record,) = done(studio, studio.submit(piece(overlap_seconds=0.5)))
    sound = studio.sound(record.sounds[0])
    options = ["--seed", "7", "--steps", "2", "--overlap", "0.5", "--backend", "mlx", "--out", "long.wav", "-q"]
    ok(run("generate", "soft rain", "--seconds", "5", *options))
    assert studio.store.export(sound, ".wav", "pcm16").read_bytes() == Path("long.wav").read_bytes()
    whole = studio.store.audio(sound)
    assert whole.shape == (40000, 2) and sound.seconds == 5.0
    assert sound.peak_db == pytest.approx(20 * math.log10(np.abs(whole).max()))


def test_a_long_piece_tells_its_steps_and_sends_its_sound(server: Live) -> None:
    job = server.post("/api/jobs", piece()).json
    events = server.events(job["id"])
    windows = len(layout(Request.from_dict(job["order"]["request"]), SMALL).windows)
    steps = [(data["step"], data["steps"]) for name, data in events if name == "step"]
    assert windows > 1 and steps == [(step + 1, 2 * windows) for step in range(2 * windows)]
    assert [name for name, _ in events if name == "preview"] == []  # of a window, which says nothing of the whole
    last = events[-1]
    assert last[0] == "done" and last[1]["sounds"][0]["samples"] == 40000


def test_a_long_piece_is_cancelled_within_a_step_and_leaves_nothing(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left when the job says that it is over, though closing the file takes its time."""
    original = runs.AudioWriter.__exit__

    def slowly(self: runs.AudioWriter, *error: Any) -> None:
        time.sleep(0.3)
        original(self, *error)

    monkeypatch.setattr(runs.AudioWriter, "__exit__", slowly)
    job = studio.submit(piece(60, steps=8))
    running = studio.engine.job(job.id)
    assert running is not None
    deadline = time.monotonic() + 30
    while running.step < 10 and time.monotonic() < deadline:  # in its second window
        time.sleep(0.001)
    assert running.step >= 10
    studio.engine.cancel(job.id)
    at_cancel = running.step
    (record,) = wait(studio, job)
    assert record.state == "cancelled" and running.step <= at_cancel + 1 < running.steps
    assert list((studio.settings.folder / "incoming").iterdir()) == []


def test_a_long_piece_is_never_whole_in_memory(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = runs.AudioWriter.write

    def write(self: runs.AudioWriter, audio: np.ndarray) -> None:
        written.append(len(audio))
        original(self, audio)

    monkeypatch.setattr(runs.AudioWriter, "write", write)
    (record,) = done(studio, studio.submit(piece(8)))
    sound = studio.sound(record.sounds[0])
    assert sum(written) == sound.samples == 64_000 and max(written) < 20_000
    assert isinstance(studio.store.audio(sound).base, np.memmap)


def test_a_long_piece_takes_no_other_job_into_its_batch(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = BasePipeline.stream

    def stream(self: BasePipeline[Any], request: Request, **more: Any) -> Iterator[Event]:
        seen.append(len(request.items))
        return original(self, request, **more)

    monkeypatch.setattr(BasePipeline, "stream", stream)
    jobs = [studio.submit(piece(4, seed=seed)) for seed in range(2)]
    done(studio, *jobs)
    assert seen == [1, 1]


def test_the_work_of_a_long_piece_is_that_of_its_windows(studio: Studio) -> None:
    job = studio.submit(piece(steps=3))
    request = Request.from_dict(job.order["request"])
    parts = layout(request, SMALL)
    work = JobSize.of(request, SMALL)
    assert work.steps == 3 * len(parts.windows)
    assert work.sampled == 3 * sum(window.frames for window in parts.windows)
    assert done(studio, job) and studio.engine.estimate("little", work) is not None
    assert JobSize.of(replace(request, items=(replace(request.items[0], seconds=50.0),)), SMALL).sampled > work.sampled


def test_long_pieces_have_a_limit_and_are_not_edits(studio: Studio) -> None:
    (made,) = done(studio, studio.submit(body()))
    edit = {**piece(), "kind": "vary", "source": made.sounds[0]}
    for data, words in (
        (edit, "vary takes what fits into a clip of little, up to 3.20 s"),
        (piece(3601), "a server makes up to 3600 s"),
        (piece(1), "fit into one window"),
        ({**piece(), "variations": 2}, "a long piece is made by itself"),
        (body(5), "little makes above 0 to"),
    ):
        with pytest.raises(ValueError, match=words):
            studio.submit(data)


def extended(source: str, seconds: float, seed: int = 7, **more: Any) -> dict[str, Any]:
    """What asks for a piece that goes on from a sound."""
    return {**piece(seconds, seed=seed, **more), "kind": "extend", "source": source}


@pytest.mark.parametrize("held", [2.0, 12.0])
def test_a_sound_goes_on_beyond_a_clip_as_with_the_command(run: Run, studio: Studio, held: float) -> None:
    """The second source is longer than what the model hears of it, so only its end is held."""
    (first,) = done(studio, studio.submit(piece(held) if held > SMALL.max_seconds else body(held, seed=7)))
    given = studio.sound(first.sounds[0])
    Path("given.wav").write_bytes(studio.store.export(given, ".wav", "float").read_bytes())
    (record,) = done(studio, studio.submit(extended(given.id, held + 4, seed=3)))
    sound, options = studio.sound(record.sounds[0]), ["--steps", "2", "--backend", "mlx", "--out", "on.wav", "-q"]
    ok(run("extend", "given.wav", "soft rain", "--seconds", f"{held + 4:g}", "--seed", "3", *options))
    made = studio.store.audio(sound)
    assert np.array_equal(made, read_audio(Path("on.wav"), SMALL.sample_rate, 2))
    assert np.array_equal(made[: given.samples], studio.store.audio(given))
    assert (sound.parent, sound.regions) == (given.id, [[held, held + 4]])
    assert [seam["sample"] for seam in sound.seams] == [given.samples]
    assert SourceFile.read(Path("given.wav"), SMALL, end=True).skipped > 0 or held == 2
    (again,) = done(studio, studio.again(record.id))
    (near,) = done(studio, studio.near(sound.id, 1, 0.5))
    assert studio.sound(again.sounds[0]).file == sound.file
    varied = studio.store.audio(studio.sound(near.sounds[0]))
    assert np.array_equal(varied[: given.samples], made[: given.samples]) and not np.array_equal(varied, made)


def test_a_sound_that_goes_on_is_sent_from_its_beginning(server: Live) -> None:
    made = server.make(body(2.0))
    events = server.events(server.post("/api/jobs", extended(made["id"], 6)).json["id"])
    steps = [(data["step"], data["steps"]) for name, data in events if name == "step"]
    assert len(steps) > 2 and steps == [(step + 1, len(steps)) for step in range(len(steps))]
    chunks = [(data["start"], data["samples"]) for name, data in events if name == "audio"]
    ends = [start + samples for start, samples in chunks]
    assert [start for start, _ in chunks] == [0, *ends[:-1]] and ends[-1] == 48000


def test_a_sound_that_goes_on_has_limits(studio: Studio) -> None:
    (made,) = done(studio, studio.submit(piece(5)))
    (sound,) = made.sounds
    for data, words in (
        (extended(sound, 4), "extend to 4 s: soft rain 7 has 5.000 s; ask for a longer clip"),
        (extended(sound, 3601), "a server makes up to 3600 s, 'sa3 extend' a day"),
        ({**extended(sound, 9), "variations": 2}, "a long piece is made by itself"),
        ({**body(9), "kind": "extend", "source": sound}, "little makes above 0 to"),
    ):
        with pytest.raises(ValueError, match=words):
            studio.submit(data)


def test_numbers_that_overflow_fail_a_long_piece(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BasePipeline.fetch
    monkeypatch.setattr(BasePipeline, "fetch", lambda *arguments: original(*arguments) * np.float32("nan"))
    (record,) = wait(studio, studio.submit(piece()))
    assert record.state == "failed" and "overflowed" in (record.error or "")
    assert list((studio.settings.folder / "incoming").iterdir()) == []


def test_out_of_memory_of_a_long_piece_names_its_windows(wanted: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[Event]:
        raise MemoryError

    monkeypatch.setattr(BasePipeline, "stream", stream)
    with Studio(wanted) as studio:
        (record,) = wait(studio, studio.submit(piece()))
    assert record.state == "failed" and "smaller model, or shorter windows" in (record.error or "")
