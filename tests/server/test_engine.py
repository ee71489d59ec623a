"""The engine: what jobs make, in which order, together, and what happens when they are cancelled or break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.adapters.format import write_adapter
from sa3_mlx.common.generation.events import Event
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Request
from sa3_mlx.pipeline import Pipeline
from sa3_mlx.server import feeds
from sa3_mlx.server.engine.queue import QueueFull
from sa3_mlx.server.settings import Settings
from sa3_mlx.server.studio import Missing, Studio
from tests.support.adapters import adapter_config, random_adapter
from tests.support.command import Run, ok, read, write_tone
from tests.support.server import Gate, body, done, wait

Stream = Callable[..., Iterator[Event]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that pipelines carry out, in their order."""
    seen: list[Request] = []
    original = BasePipeline.stream

    def stream(self: BasePipeline[Any], request: Request, **more: Any) -> Iterator[Event]:
        seen.append(request)
        return original(self, request, **more)

    monkeypatch.setattr(BasePipeline, "stream", stream)
    return seen


def test_a_job_gives_the_bytes_of_the_command_s_file(run: Run, studio: Studio) -> None:
    job = studio.submit(body(0.7, seed=5, exact=True, model="little"))
    (sound,) = done(studio, job)[0].sounds
    for name in ("x.wav", "x.flac", "x.mp3"):
        words = ("generate", "soft rain", "--seconds", "0.7", "--seed", "5", "--backend", "mlx", "--out", name)
        ok(run(*words, "-q"))
        made = studio.store.export(studio.sound(sound), Path(name).suffix, None)
        assert made.read_bytes() == Path(name).read_bytes(), name


def test_a_loop_has_the_samples_of_the_request_and_steps_of_both_runs(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = body(0.8, seed=5)
    asked["request"] |= {"loop": {"bpm": 300.0, "beats": 4}, "sampling": "euler:3:1"}
    gate = Gate(studio, monkeypatch)
    job = studio.submit(asked)
    found = studio.engine.job(job.id)
    assert found is not None
    gate.open()
    done(studio, job)
    sound = studio.sound(studio.job(job.id).sounds[0])
    assert sound.samples == round(0.8 * 8000)
    steps = [event.data for event in found.feed.events if event is not None and event.name == "step"]
    assert [(data["step"], data["steps"]) for data in steps] == [(step, 6) for step in range(1, 7)]
    made = Pipeline.load(studio.default.folder).generate(Request.from_dict(job.order["request"])).audio[0]
    assert np.array_equal(read(studio.store.path(sound)), made)


def test_edits_give_the_bytes_of_the_commands(run: Run, studio: Studio) -> None:
    source = write_tone(Path("take.wav"), 1.0)
    with studio.store.upload() as taken:
        taken.write(source.read_bytes())
        upload = studio.store.add_upload(taken, "take.wav")
    item = {"prompt": "bell", "seed": 3}
    edits: dict[str, tuple[dict[str, Any], list[str]]] = {
        "vary": ({"items": [item], "init": {"noise_level": 0.5}}, ["--noise-level", "0.5"]),
        "inpaint": (
            {"items": [item], "inpaint": {"regions": [[0.2, 0.4], [0.6, 0.8]]}},
            ["--region", "0.2:0.4", "--region", "0.6:0.8"],
        ),
        "extend": ({"items": [{**item, "seconds": 1.5}]}, ["--seconds", "1.5"]),
    }
    for kind, (request, options) in edits.items():
        job = studio.submit({"kind": kind, "request": request, "source": upload.id, "exact": True})
        (sound,) = done(studio, job)[0].sounds
        ok(run(kind, "take.wav", "bell", "--seed", "3", *options, "--backend", "mlx", "--out", f"{kind}.wav", "-q"))
        made = studio.store.export(studio.sound(sound), ".wav", "pcm16")
        assert made.read_bytes() == Path(f"{kind}.wav").read_bytes(), kind
        assert studio.sound(sound).parent == upload.id
    whole = studio.store.audio(studio.sound(sound))  # the extension keeps its source as it is
    assert np.array_equal(whole[:8000], read("take.wav"))


def test_waiting_jobs_run_as_one_batch_and_rerun_bit_for_bit(
    run: Run, studio: Studio, runs: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(studio, monkeypatch)
    jobs = [studio.submit(body(0.5, seed=seed, prompt=word)) for seed, word in enumerate(("bell", "kick", "low hat"))]
    jobs.append(studio.submit(body(0.9, seed=7)))  # of another length
    alone = [studio.submit(body(0.5, seed=seed, prompt="bell", exact=True)) for seed in (0, 0)]
    gate.open()
    records = done(studio, *jobs, *alone)
    assert [len(request.items) for request in runs] == [1, 3, 1, 1, 1]
    sounds = [studio.store.audio(studio.sound(record.sounds[0])) for record in records]
    assert np.array_equal(sounds[4], sounds[5])
    assert np.abs(sounds[0] - sounds[4]).max() < 1e-5  # measured 3e-7: the rounding of another batch
    exported = studio.store.export(studio.sound(records[1].sounds[0]), ".wav", "pcm16")
    Path("second.wav").write_bytes(exported.read_bytes())
    assert "byte for byte" in ok(run("rerun", "second.wav")).out


def test_a_strength_stands_for_the_noise_level_of_the_command(studio: Studio) -> None:
    (first,) = done(studio, studio.submit(body()))
    source = first.sounds[0]
    wish = {"source": source, "strength": 0.3, "request": {"schedule": "monotone"}}
    with pytest.raises(ValueError, match="little has no dial"):
        studio.submit(wish)
    (varied,) = done(studio, studio.submit({**wish, "model": "demo"}))
    level = studio.model("demo").config.noise_level(0.3, "monotone")
    assert varied.order["request"]["init"] == {"noise_level": level}
    for bad in ({"request": {"init": {"noise_level": 0.5}}, "source": source}, {"kind": "generate"}):
        with pytest.raises(ValueError, match="strength"):
            studio.submit({**bad, "strength": 0.3})


def test_variations_are_one_batch_with_seeds_that_go_on(studio: Studio, runs: list[Request]) -> None:
    (record,) = done(studio, studio.submit(body(seed=4, variations=3)))
    assert [studio.sound(sound).seed for sound in record.sounds] == [4, 5, 6]
    assert [len(request.items) for request in runs] == [3]


def test_higher_priorities_run_first_then_the_older(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(studio, monkeypatch)
    jobs = [studio.submit(body(priority=priority, exact=True)) for priority in (0, 5, 0, 5, -3)]
    places = [studio.describe(studio.job(job.id))["progress"]["place"] for job in jobs]
    gate.open()
    records = done(studio, *jobs)
    order = sorted(range(5), key=lambda number: records[number].finished or 0)
    assert order == [1, 3, 0, 2, 4] and places == [3, 1, 4, 2, 5]


def test_cancel_takes_effect_within_one_step(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(studio, monkeypatch)
    waiting = studio.submit(body())
    assert studio.cancel(waiting.id).state == "cancelled"
    gate.open()
    long = body(0.5)
    long["request"]["sampling"] = {"steps": 1000}
    job = studio.submit(long)
    running = studio.engine.job(job.id)
    assert running is not None
    deadline = time.monotonic() + 30
    while running.step < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    before = running.step
    studio.engine.cancel(job.id)
    at_cancel = running.step
    (record,) = wait(studio, job)
    assert record.state == "cancelled" and before >= 3
    assert running.step <= at_cancel + 1 and running.step < 1000
    assert done(studio, studio.submit(body())) and studio.job(gate.job.id).state == "done"


def test_a_cancelled_job_leaves_the_others_of_its_batch(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(studio, monkeypatch)
    jobs = [studio.submit(body(seed=seed)) for seed in range(3)]
    taken = studio.engine._queue.take(8, 0)
    taken[1].cancelled.set()
    gate.open()
    wait(studio, gate.job)
    studio.engine._run(taken)
    assert [studio.job(job.id).state for job in jobs] == ["done", "cancelled", "done"]


def test_one_job_that_breaks_takes_no_other_with_it(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BasePipeline.stream

    def stream(self: BasePipeline[Any], request: Request, **more: Any) -> Iterator[Event]:
        if any(item.prompt == "hard" for item in request.items):
            raise KeyError("/elsewhere/secret broke")
        return original(self, request, **more)

    monkeypatch.setattr(BasePipeline, "stream", stream)
    gate = Gate(studio, monkeypatch)
    jobs = [studio.submit(body(seed=seed, prompt=word)) for seed, word in enumerate(("bell", "hard", "kick"))]
    gate.open()
    records = wait(studio, *jobs)
    assert [record.state for record in records] == ["done", "failed", "done"]
    assert "defect" in (records[1].error or "")


@pytest.mark.parametrize("words", ["[metal::malloc] Attempting to allocate 99 bytes", "CUDA out of memory"])
def test_out_of_memory_fails_the_job_and_says_what_would_fit(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[Event]:
        raise RuntimeError(words)

    with monkeypatch.context() as broken:
        broken.setattr(BasePipeline, "stream", stream)
        (record,) = wait(studio, studio.submit(body(3.0)))
    assert record.state == "failed" and (record.error or "").startswith("out of memory: this needs about")
    assert "would need" in (record.error or "")
    done(studio, studio.submit(body()))


def test_numbers_that_overflow_fail_the_job(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Pipeline._decode
    monkeypatch.setattr(Pipeline, "_decode", lambda *arguments: original(*arguments) * np.float32("nan"))
    (record,) = wait(studio, studio.submit(body()))
    assert record.state == "failed" and "overflowed" in (record.error or "")


def test_idle_models_are_freed(wanted: Settings) -> None:
    with Studio(replace(wanted, keep_alive=0)) as studio:
        done(studio, studio.submit(body()))
        deadline = time.monotonic() + 30
        while studio.engine.status()["loaded"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with Studio(wanted) as studio:
        done(studio, studio.submit(body()))
        assert studio.engine.status()["loaded"] == ["little"]
        studio.engine.unload()
        deadline = time.monotonic() + 30
        while studio.engine.status()["loaded"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_max_memory_holds_for_all_models_together(wanted: Settings) -> None:
    with Studio(wanted) as studio:
        done(studio, studio.submit(body()), studio.submit(body(model="demo")))
        assert studio.engine.status()["loaded"] == ["little", "demo"]
        peak = max(entry.peak for entry in studio.engine._models._loaded.values())
    with Studio(replace(wanted, max_memory=int(peak * 1.101))) as studio:
        done(studio, studio.submit(body()), studio.submit(body(model="demo")))
        assert studio.engine.status()["loaded"] == ["demo"]  # which leaves no room for the other
    with Studio(replace(wanted, max_memory=1_000_000)) as studio:
        (record,) = wait(studio, studio.submit(body(model="demo")))
        assert record.state == "failed" and "memory: " in (record.error or "")


def test_adapters_are_changed_without_a_new_model(
    studio: Studio, shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = studio.settings.adapters
    folder.mkdir()
    write_adapter(
        folder / "bell.safetensors", random_adapter(shared_home / "models" / "little", adapter_config("lora"))
    )
    loads: list[object] = []
    original = BasePipeline._checked

    def checked(*arguments: Any, **more: Any) -> Any:
        loads.append(arguments)
        return original(*arguments, **more)

    monkeypatch.setattr(BasePipeline, "_checked", staticmethod(checked))
    wishes: list[list[dict[str, Any]]] = [
        [],
        [{"name": "bell.safetensors", "strength": 2.0}],
        [],
        [{"name": "bell.safetensors"}],
    ]
    records = [done(studio, studio.submit(body(adapters=adapters)))[0] for adapters in wishes]
    assert len(loads) == 1 and studio.adapters() == ["bell.safetensors"]
    plain, loud, again, usual = (studio.store.audio(studio.sound(record.sounds[0])) for record in records)
    assert np.array_equal(plain, again)
    assert np.abs(plain - loud).max() > np.abs(plain - usual).max() > 1e-4
    with pytest.raises(ValueError, match=r"bell\.safetensors"):
        studio.submit(body(adapters=[{"name": "../bell.safetensors"}]))


def test_the_queue_has_a_limit(wanted: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with Studio(replace(wanted, queue_max=2)) as studio:
        gate = Gate(studio, monkeypatch)
        jobs = [studio.submit(body()), studio.submit(body())]
        with pytest.raises(QueueFull, match="2 jobs wait"):
            studio.submit(body())
        assert len(studio.store.database.jobs()) == 3
        gate.open()
        done(studio, *jobs)


def test_a_remaining_time_is_learned_and_kept(wanted: Settings) -> None:
    with Studio(wanted) as studio:
        first, second = (studio.submit(body(seed=seed)) for seed in (1, 2))
        done(studio, first, second)
        rates = studio.store.database.rates()
        assert set(rates) == {"little sampled", "little coded"} and all(rate > 0 for rate in rates.values())
    with Studio(wanted) as studio:
        job = studio.submit(body())
        found = studio.engine.job(job.id)
        assert found is None or found.cost


def test_a_slow_listener_holds_nobody_up_and_keeps_no_audio(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(studio, monkeypatch)

    async def listen() -> list[str]:
        studio.engine.loop = asyncio.get_running_loop()
        job = await asyncio.to_thread(studio.submit, body(exact=True))
        found = studio.engine.job(job.id)
        assert found is not None
        stream = studio.follow(job.id, 0, previews=True)
        first = await anext(stream)
        gate.open()
        while (await asyncio.to_thread(studio.job, job.id)).state != "done":  # nobody reads meanwhile
            await asyncio.sleep(0.01)
        while not found.feed.closed:
            await asyncio.sleep(0.01)
        assert all(event is None or event.name != "audio" for event in found.feed.events)
        rest = [event.name async for _, event in stream if event is not None]
        assert found.feed.watched == 0
        return [first[1].name if first[1] else "", *rest]

    names = asyncio.run(listen())
    assert names[:2] == ["queued", "running"] and names[-1] == "done" and names.count("step") == 8


def test_latents_go_out_and_come_back(studio: Studio) -> None:
    (made,) = done(studio, studio.submit(body(0.8)))
    (encoded,) = done(studio, studio.submit({"kind": "encode", "source": made.sounds[0]}))
    latents = studio.sound(encoded.sounds[0])
    (decoded,) = done(studio, studio.submit({"kind": "decode", "source": latents.id}))
    sound = studio.sound(decoded.sounds[0])
    assert (latents.subtype, latents.parent, sound.parent) == ("latents", made.sounds[0], latents.id)
    assert sound.samples == studio.sound(made.sounds[0]).samples
    for kind, source in (("decode", sound.id), ("encode", latents.id), ("vary", latents.id)):
        with pytest.raises(ValueError, match=r"takes|holds latents"):
            studio.submit({"kind": kind, "source": source})


def test_a_model_given_by_its_path_is_called_by_its_last_part(wanted: Settings, shared_home: Path) -> None:
    path = shared_home / "models" / "little"
    with Studio(replace(wanted, model=replace(wanted.model, name=str(path)))) as studio:
        assert studio.models()[0]["name"] == "little" and studio.models()[0]["default"]
        record = done(studio, studio.submit(body()))[0]
        assert str(shared_home) not in repr(studio.describe(record)) + repr(studio.models())
        assert studio.engine.status()["loaded"] == ["little"]


def test_a_feed_holds_so_much_audio_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_HELD_MAX", 100)
    feed = feeds.Feed(None)
    for number in range(10):
        feed.append("step", {"step": number})
        feed.append("audio", {"pcm16": "x" * 40, "start": number})
    kept = [event.data["start"] for event in feed.events if event is not None and event.name == "audio"]
    assert kept == [8, 9] and sum(event is not None for event in feed.events) == 12


def test_models_are_names_and_never_paths(studio: Studio, shared_home: Path) -> None:
    for name in (str(shared_home / "models" / "little"), "../little", "only-autoencoder/../little", "nothing"):
        with pytest.raises(Missing, match="is not installed"):
            studio.submit(body(model=name))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (body(99), "little makes above 0 to"),
        (body(seed=-1), "seed is -1"),
        (body(seed=2**63), "seed"),
        (body(kind="vary"), "give its id as source"),
        (body(source="nothing"), "no such sound"),
        (body(kind="generate", source="x"), "leave source out"),
        (body(kind="dance"), "kind is 'dance'"),
        (body(priority=11), "priority is 11"),
        ({"request": {"items": [{"prompt": "x" * 10_001}]}}, "10,001 characters"),
        ({"request": {"items": []}, "variations": 300}, "variations is 300"),
        ({"request": {"items": [{}], "sampling": {"steps": 0}}}, "steps is 0"),
        ({"request": {"items": [{}], "sampling": {"speed": 3}}}, "unknown field"),
        ({"request": {"items": [{}], "sampling": "euler:x:3"}}, "expected SAMPLER"),
        ({"request": {"items": [{}], "colour": 3}}, "unknown field"),
        ({"request": {"items": [{"seconds": 4000}], "long": {}}}, "a server makes up to 3600 s"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_is_queued(studio: Studio, data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        studio.submit(data)
    assert studio.store.database.jobs() == []


def test_both_backends_make_sounds(wanted: Settings) -> None:
    pytest.importorskip("torch")
    sounds = []
    for backend in ("mlx", "torch"):
        own = replace(wanted, folder=wanted.folder / backend, model=replace(wanted.model, backend=backend))
        with Studio(own) as studio:
            (record,) = done(studio, studio.submit(body()))
            sounds.append(studio.store.audio(studio.sound(record.sounds[0])))
    assert np.abs(sounds[0] - sounds[1]).max() < 1e-4  # measured 2e-6
