"""Clients of other interfaces: the openai package, and plug-ins that submit and poll."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sa3_mlx.common.files.wav import sample_bytes
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.server.engine.runs import audio_data
from sa3_mlx.server.feeds import JobEvent
from sa3_mlx.server.open.daw import Daw, DawBody
from sa3_mlx.server.open.openai import _chunks
from sa3_mlx.server.studio import Studio
from tests.support.command import tone, write_tone
from tests.support.server import Live, Reply, body, done, parse_events


def wave(data: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)


def speak(server: Live, **body: Any) -> Reply:
    return server.post("/v1/audio/generations", {"prompt": "soft rain", "seconds": 0.8, "seed": 5, **body})


def test_audio_comes_in_the_reply_with_its_seed(server: Live) -> None:
    first = speak(server)
    assert first.status == 200 and first.headers["x-seed"] == "5" and first.headers["content-type"] == "audio/wav"
    audio, rate = wave(first.data)
    assert (len(audio), rate) == (6400, 8000)
    other = server.post("/v1/audio/music-generations", {"prompt": "soft rain", "duration": 0.8, "seed": 5})
    assert other.data == first.data
    assert speak(server, response_format="flac").data[:4] == b"fLaC"
    assert speak(server, response_format="mp3").headers["content-type"] == "audio/mpeg"
    pcm = speak(server, response_format="pcm")
    samples = np.frombuffer(pcm.data, "<i2").reshape(-1, int(pcm.headers["x-channels"])) / np.float32(32768)
    assert np.array_equal(samples, audio)
    assert int(speak(server, seed=None).headers["x-seed"]) >= 0


def test_several_sounds_come_as_json(server: Live) -> None:
    reply = speak(server, n=2)
    entries = reply.json["data"]
    assert [entry["seed"] for entry in entries] == [5, 6]
    assert all(len(wave(base64.b64decode(entry["b64_json"]))[0]) == 6400 for entry in entries)


@pytest.mark.parametrize("form", ["wav", "pcm"])
def test_audio_is_streamed_while_it_is_decoded(server: Live, form: str) -> None:
    whole = speak(server, seconds=1.5, stream=True, response_format=form)
    assert whole.headers["transfer-encoding"] == "chunked" and whole.headers["x-sample-rate"] == "8000"
    again = wave(whole.data)[0] if form == "wav" else np.frombuffer(whole.data, "<i2").reshape(-1, 2) / 32768
    assert len(again) == 12000
    events = speak(server, seconds=1.5, stream=True, stream_format="sse").data.decode()
    data = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line]
    assert data[-1]["type"] == "audio.done" and data[-1]["seed"] == 5 and len(data) >= 2
    pcm = b"".join(base64.b64decode(entry["audio"]) for entry in data[:-1])
    assert np.array_equal(np.frombuffer(pcm, "<i2").reshape(-1, 2) / np.float32(32768), again.astype(np.float32))


@pytest.mark.parametrize("heard", [0, 1, 2, 3])
def test_who_is_behind_when_the_job_ends_gets_the_rest(
    heard: int, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are dropped when a job is over; what a listener had not read comes from the stored sound."""
    (record,) = done(studio, studio.submit(body(1.5, 5)))
    sound = studio.sound(record.sounds[0])
    audio, cuts = studio.store.audio(sound), (0, 4096, 8192, 12000)
    chunks = [audio_data(audio[first:last], 0, first, 8000) for first, last in itertools.pairwise(cuts)]

    async def follow(*_arguments: Any, previews: bool) -> AsyncIterator[tuple[int, JobEvent]]:
        assert not previews
        for number, chunk in enumerate(chunks[:heard]):
            yield number, JobEvent(name="audio", data=chunk)
        yield heard, JobEvent(name="done", data={"sounds": [{"id": sound.id}]})

    async def read() -> bytes:
        return b"".join([piece async for piece in _chunks(studio, record, headed=False)])

    monkeypatch.setattr(studio, "follow", follow)
    assert asyncio.run(read()) == sample_bytes(audio, "pcm16")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"seconds": 99}, "makes above 0"),
        ({"model": "gpt"}, "is not installed"),
        ({"response_format": "aac"}, "response_format"),
        ({"stream": True, "response_format": "mp3"}, "streams are wav or pcm"),
        ({"stream": True, "n": 2}, "stream sends one"),
        ({"duration": 2.0}, "give one of them"),
        ({"voice": "alloy"}, "voice"),
        ({"n": 0}, "body.n"),
    ],
)
def test_refusals_have_openai_s_shape(server: Live, body: dict[str, Any], words: str) -> None:
    reply = speak(server, **body)
    assert words in reply.error
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}


def test_the_openai_client_gets_audio(server: Live) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused", max_retries=0)
    assert client.models.list().data[0].id == "little"
    from openai._legacy_response import HttpxBinaryResponseContent

    body = {"prompt": "bell", "seconds": 0.5, "seed": 2}
    reply = client.post("/audio/generations", body=body, cast_to=HttpxBinaryResponseContent)
    assert len(wave(reply.content)[0]) == 4000
    with pytest.raises(openai.UnprocessableEntityError, match="makes above 0"):
        client.post("/audio/generations", body={**body, "seconds": 99}, cast_to=HttpxBinaryResponseContent)


class PlugIn:
    """Submit and poll as gary4juce 4 does: the fields of its requests, and those of answers that it reads."""

    def __init__(self, server: Live) -> None:
        self.server = server

    def common(self, prompt: str) -> dict[str, Any]:
        return {
            "prompt": f"{prompt}, 120 bpm",
            "negative_prompt": "low quality",
            "steps": 8,
            "cfg_scale": 1.0,
            "shift": "logsnr",
            "seed": 7,
            "loras": [],
        }

    def submit(self, path: str, **body: Any) -> str:
        reply = self.server.post(path, body)
        assert reply.status == 200 and reply.json["success"] is True, reply
        assert reply.json["seed"] == body["seed"]
        return str(reply.json["session_id"])

    def result(self, session: str) -> dict[str, Any]:
        seen = []
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            answer = self.server.get(f"/poll_status/{session}").json
            seen.append(answer["status"])
            if answer["generation_in_progress"]:
                assert 0 <= answer["progress"] <= 100 and "status" in answer["queue_status"]
                time.sleep(0.01)
                continue
            assert answer["success"] and answer["status"] == "completed" and answer["progress"] == 100, answer
            assert set(seen) <= {"queued", "generating", "encoding", "completed"}
            return answer
        raise AssertionError(seen)

    def audio(self, session: str) -> np.ndarray:
        return wave(base64.b64decode(self.result(session)["audio_data"]))[0]


def test_a_plug_in_generates_loops_transforms_and_continues(server: Live, tmp_path: Path) -> None:
    plug_in = PlugIn(server)
    assert server.get("/health").json["status"] == "ok"
    assert server.get("/loras").json["loras"] == []
    pool = server.get("/prompts?lora=kev").json
    assert pool["missing_loras"] == ["kev"] and isinstance(pool["prompts"]["dice"]["generic"], list)
    made = plug_in.audio(plug_in.submit("/generate", **plug_in.common("rain"), duration=1.0))
    assert len(made) == 8000
    fast = plug_in.common("drone") | {"prompt": "drone, 480 bpm"}
    loop = plug_in.audio(plug_in.submit("/generate/loop", **fast, bars=4))
    assert len(loop) == round(4 * 240 / 480 * 8000)
    data = write_tone(tmp_path / "x.wav", 1.0).read_bytes()
    given = {"audio_data": base64.b64encode(data).decode()}
    varied = plug_in.audio(plug_in.submit("/transform", **plug_in.common("bell"), **given, strength=0.4))
    assert len(varied) == 8000 and not np.array_equal(varied, tone(1.0))
    more = {"continuation_seconds": 0.5, "continuation_mode": "inpaint"}
    longer = plug_in.audio(plug_in.submit("/continue", **plug_in.common("bell"), **given, **more))
    assert len(longer) == 12000 and np.array_equal(longer[:8000], tone(1.0))


def test_a_plug_in_takes_a_sound_once(server: Live) -> None:
    plug_in = PlugIn(server)
    session = plug_in.submit("/generate", **plug_in.common("rain"), duration=0.4)
    meta = plug_in.result(session)["meta"]
    assert meta["seed"] == 7 and "decoded_peak_db" in meta["loudness"]
    assert server.get(f"/poll_status/{session}?consume=1").json["status"] == "completed"
    gone = server.get(f"/poll_status/{session}?consume=1")
    assert gone.status == 404 and gone.json["success"] is False and "was taken" in gone.error
    assert server.get(f"/api/sounds/{meta['sound']}").status == 200  # the history has it
    assert server.post("/unload").json["status"] == "unloaded"


def test_uploads_of_a_plug_in_are_a_pool_and_no_path_of_it_is_opened(server: Live, tmp_path: Path) -> None:
    path = write_tone(tmp_path / "secret.wav", 0.5)
    mark = b"----sa3"
    form = b"--" + mark + b'\r\ncontent-disposition: form-data; name="file"; filename="../../drums.wav"\r\n\r\n'
    form += path.read_bytes() + b"\r\n--" + mark + b"--\r\n"
    reply = server.post("/init-audio/upload", form, content_type=f"multipart/form-data; boundary={mark.decode()}")
    found = reply.json
    assert found["success"] and found["name"] == "drums.wav" and found["path"].startswith("init-audio/")
    assert found["path"] in [file["path"] for file in server.get("/init-audio").json["files"]]
    plug_in = PlugIn(server)
    usual = {**plug_in.common("bell"), "init_path": found["path"]}
    assert len(plug_in.audio(plug_in.submit("/generate", **usual, init_noise_level=0.5))) == 4000
    kept = plug_in.audio(plug_in.submit("/generate", **usual, inpaint_start=0.25, inpaint_end=0.9))
    assert len(kept) == 7200 and np.array_equal(kept[:2000], tone(0.5)[:2000])
    for bad in (str(path), "init-audio/../../secret.wav", ""):
        refused = server.post("/generate", {**usual, "init_path": bad})
        assert refused.status == 422 and refused.json["success"] is False and "no path of a client" in refused.error
    assert (
        "file is missing"
        in server.post("/init-audio/upload", b"", content_type="multipart/form-data; boundary=x").error
    )


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/generate", {"duration": 99}, "makes above 0"),
        ("/generate", {"dist_shift": "Flux"}, "logsnr only"),
        ("/generate", {"latent_rescale": 2.0}, "latent_rescale is 2.0"),
        ("/generate", {"frames": 3}, "unknown field"),
        ("/generate", {"inpaint_start": 1.0}, "need init_path"),
        ("/generate", {"loras": [{"name": "none"}]}, "is not there"),
        ("/generate/loop", {"prompt": "rain"}, "a tempo is missing"),
        ("/generate/loop", {"prompt": "rain", "bpm": 1e-308}, "allowed are 1 to 1000"),
        ("/generate/loop", {"prompt": "rain", "bpm": -1}, "allowed are 1 to 1000"),
        ("/generate/loop", {"prompt": "120 bpm", "bars": 5}, "bars is 5"),
        ("/generate/loop", {"prompt": "60 bpm", "bars": 32}, "too long"),
        ("/transform", {}, "audio_data is missing"),
        ("/transform", {"audio_data": "!!"}, "is not base64"),
        ("/transform", {"audio_data": "aGVsbG8="}, "cannot be read as audio"),
        ("/continue", {"continuation_seconds": 1, "continuation_mode": "latent_prefix"}, "inpaint only"),
        ("/continue", {"audio_data": "aGVsbG8="}, "continuation_seconds is missing"),
    ],
)
def test_plug_ins_are_told_what_is_wrong(server: Live, path: str, body: dict[str, Any], words: str) -> None:
    reply = server.post(path, body)
    assert reply.status == 422 and reply.json["success"] is False and words in reply.error


def test_guidance_of_the_model_counts_where_none_is_given(studio: Studio) -> None:
    guided = Sampling(sampler="euler", steps=2, guidance=Guidance(scale=7.0))
    studio.default = replace(studio.default, config=replace(studio.default.config, sampling=guided))
    asked = DawBody(prompt="bell", duration=0.3, seed=3, negative_prompt="flute", apg_scale=0.0)
    for scale, wanted in ((None, Guidance(scale=7.0, apg=0.0)), (4.0, Guidance(scale=4.0, apg=0.0)), (1.0, Guidance())):
        job, answer = Daw(studio).submit(asked.model_copy(update={"cfg_scale": scale}), None, {}, {"duration"})
        request = Request.from_dict(job.order["request"])
        assert request.sampling is not None and request.sampling.guidance == wanted
        assert request.items[0].negative_prompt == ("flute" if scale != 1 else None)
        assert answer.get("ignored", []) == ([] if scale != 1 else ["apg_scale", "negative_prompt"])


def test_what_has_no_effect_is_named(server: Live) -> None:
    body = {"prompt": "bell", "duration": 0.3, "keep_models": True, "peak_normalize_db": 2.0, "decode_chunk_size": 128}
    reply = server.post("/generate", json.dumps(body).encode(), content_type="application/x-www-form-urlencoded")
    assert reply.json["ignored"] == ["decode_chunk_size", "keep_models", "peak_normalize_db"]
    body = {"prompt": "bell", "bpm": 480, "bars": 4, "duration": 1.0, "strength": 0.3}
    assert server.post("/generate/loop", body).json["ignored"] == ["duration", "strength"]


def test_server_sent_events_are_read_as_they_are_written() -> None:
    assert parse_events('id: 1\nevent: step\ndata: {"step": 1}\n\n: still there\n\n') == [("step", {"step": 1})]
