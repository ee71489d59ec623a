"""The native interface over HTTP, as a client sees it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sa3_mlx.common.generation.request import Inpaint, Item, Request
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.server.orders import AdapterChoice
from sa3_mlx.server.schemas import model_of
from tests.support.command import tone
from tests.support.server import Gate, Live, body


def sound(data: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)


@pytest.fixture(scope="module")
def made(server: Live) -> dict[str, Any]:
    """A sound."""
    return server.make(body(1.0, seed=8))


def test_a_job_tells_what_happens_until_its_sound_is_there(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(server.studio, monkeypatch)
    job = server.post("/api/jobs", body(1.2, seed=2, stream=True)).json
    assert job["state"] == "queued" and job["order"]["request"]["sampling"]["steps"] == 8
    threading.Timer(0.3, gate.open).start()  # when somebody listens already
    events = server.events(job["id"])
    names = [name for name, _ in events]
    assert names[-1] == "done" and names.count("step") == 8 and "preview" in names
    steps = [data for name, data in events if name == "step"]
    assert [data["step"] for data in steps] == list(range(1, 9)) and steps[0]["steps"] == 8
    chunks = [data for name, data in events if name == "audio"]
    assert len(chunks) >= 2 and chunks[0]["start"] == 0
    pcm = b"".join(base64.b64decode(data["pcm16"]) for data in chunks)
    streamed = np.frombuffer(pcm, "<i2").reshape(-1, 2) / np.float32(32768)
    (record,) = events[-1][1]["sounds"]
    audio, rate = sound(server.get(f"/api/sounds/{record['id']}/audio").data)
    assert rate == 8000 and np.array_equal(streamed, audio)
    assert server.get(f"/api/jobs/{job['id']}").json["state"] == "done"
    assert [name for name, _ in server.events(job["id"])] == ["done"]  # later listeners get the end


def test_words_that_a_model_does_not_know_are_named(server: Live) -> None:
    demo = server.post("/api/jobs", body(0.3, prompt="piano flugelhorn", model="demo")).json
    unknown, instead = demo["notes"]
    assert unknown == "demo does not know 'flugelhorn'; see 'sa3 info demo'"
    assert instead.startswith('demo does well: "piano note A4", ')
    assert server.post("/api/jobs", body(0.3, prompt="soft rain")).json["notes"] == []
    assert server.events(demo["id"])[-1][0] == "done"


def test_a_listener_goes_on_where_it_was(server: Live) -> None:
    job = server.post("/api/jobs", body(2.0, seed=3)).json
    names = [name for name, _ in server.events(job["id"], last_event_id="6")]
    assert names[-1] == "done" and names.count("step") < 8
    assert server.get("/api/jobs/none/events").status == 404
    assert server.ask("GET", f"/api/jobs/{job['id']}/events", headers={"last-event-id": "x"}).status == 422


@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "ogg"])
def test_sounds_come_in_every_format_and_in_parts(server: Live, made: dict[str, Any], form: str) -> None:
    whole = server.get(f"/api/sounds/{made['id']}/audio?format={form}&download=true")
    assert whole.status == 200 and whole.headers["content-disposition"].endswith(f"soft%20rain%208.{form}")
    audio, rate = sound(whole.data)
    assert rate == 8000 and (len(audio) == 8000 or form in ("mp3", "ogg"))
    part = server.get(f"/api/sounds/{made['id']}/audio?format={form}", range="bytes=100-299")
    assert (part.status, part.data) == (206, whole.data[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(whole.data)}"
    assert server.get(f"/api/sounds/{made['id']}/audio?format={form}", range="bytes=99999999-").status == 416


def test_samples_are_what_was_asked_for(server: Live, made: dict[str, Any]) -> None:
    for samples, subtype in (("float", "FLOAT"), ("pcm24", "PCM_24"), ("pcm16", "PCM_16")):
        data = server.get(f"/api/sounds/{made['id']}/audio?samples={samples}").data
        assert soundfile.info(io.BytesIO(data)).subtype == subtype
    assert "cannot hold" in server.get(f"/api/sounds/{made['id']}/audio?format=mp3&samples=float").error


@pytest.mark.parametrize(("rate", "channels", "form"), [(8000, 2, "WAV"), (44100, 1, "FLAC"), (96000, 3, "AIFF")])
def test_uploads_of_any_rate_can_be_edited(server: Live, rate: int, channels: int, form: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, tone(0.5, rate=rate, channels=channels), rate, format=form, subtype="PCM_24")
    upload = server.post("/api/uploads?name=../../my%20take.wav", file.getvalue())
    assert upload.status == 201
    record = upload.json
    assert (record["name"], record["kind"], record["sample_rate"]) == ("my take", "upload", rate)
    back, back_rate = sound(server.get(f"/api/sounds/{record['id']}/audio?samples=pcm24").data)
    assert back_rate == rate and np.abs(back - tone(0.5, rate=rate, channels=channels)).max() < 1e-6
    edited = server.make(body(0.5, source=record["id"], kind="vary"))
    assert edited["parent"] == record["id"] and edited["sample_rate"] == 8000


def test_prompts_over_time_and_regions_of_their_own_are_json_of_a_request(server: Live, made: dict[str, Any]) -> None:
    item = {"prompt": "kick", "seed": 3, "prompts_over_time": [{"start": 0.2, "prompt": "bell"}]}
    regions = [[0.05, 0.15], {"start": 0.2, "end": 0.35, "prompt": "rain", "noise_level": 0.5, "seed": 9}]
    order = {
        "kind": "inpaint",
        "source": made["id"],
        "request": {
            "items": [item],
            "inpaint": {"regions": regions, "feather_seconds": 0.02},
            "prompt_fade_seconds": 0.1,
            "sampling": {"steps": 2},
        },
    }
    found = server.make(order)
    kept = server.get(f"/api/sounds/{found['id']}/provenance").json["request"]
    assert kept["items"][0]["prompts_over_time"] == item["prompts_over_time"]
    assert kept["inpaint"] == {"regions": regions, "feather_seconds": 0.02} and kept["prompt_fade_seconds"] == 0.1
    assert found["regions"] == [[0.05, 0.15], [0.2, 0.35]]
    order["request"]["items"] = [{"prompt": "kick", "prompts_over_time": [{"start": 9.0, "prompt": "bell"}]}]  # type: ignore[index]
    assert "the prompt at 9 s: allowed are times above 0" in server.post("/api/jobs", order).error


def test_what_is_no_sound_is_refused_and_not_kept(server: Live) -> None:
    before = len(server.get("/api/sounds?limit=500").json)
    assert "cannot be read as audio" in server.post("/api/uploads?name=x.wav", b"MZ not a sound" * 99).error
    assert "empty" in server.post("/api/uploads", b"").error
    assert len(server.get("/api/sounds?limit=500").json) == before


def test_peaks_and_levels_for_drawing(server: Live, made: dict[str, Any]) -> None:
    audio, _ = sound(server.get(f"/api/sounds/{made['id']}/audio?samples=float").data)
    peaks = server.get(f"/api/sounds/{made['id']}/peaks?columns=10&start=0.5&end=1").json
    assert peaks["high"] == [round(float(part.max()), 3) for part in np.split(audio[4000:], 10)]
    levels = server.get(f"/api/sounds/{made['id']}/spectrogram")
    assert len(levels.data) == int(levels.headers["x-bands"]) * int(levels.headers["x-columns"])
    assert max(levels.data) == 255
    picture = server.get(f"/api/sounds/{made['id']}/spectrogram.png")
    assert picture.data.startswith(b"\x89PNG") and picture.headers["content-type"] == "image/png"


def test_history_is_starred_listed_made_again_and_deleted(server: Live) -> None:
    found = server.make(body(0.4, seed=77, prompt="bell"))
    address = f"/api/sounds/{found['id']}"
    assert server.ask("PATCH", address, {"starred": True}).json["starred"]
    assert found["id"] in [entry["id"] for entry in server.get("/api/sounds?starred=true").json]
    assert server.get(f"{address}/provenance").json["request"]["items"][0]["seed"] == 77
    job = server.post(f"{address}/again").json
    again = server.events(job["id"])[-1][1]["sounds"][0]
    assert server.get(f"/api/sounds/{again['id']}/audio").data == server.get(f"{address}/audio").data
    assert server.ask("DELETE", address).json == {"ok": True}
    assert server.get(address).status == 404 and server.get(f"{address}/audio").status == 404
    assert server.ask("DELETE", address).status == 404


def test_latents_can_be_fetched(server: Live, made: dict[str, Any]) -> None:
    latents = server.make({"kind": "encode", "source": made["id"]})
    data = server.get(f"/api/sounds/{latents['id']}/latents").data
    assert b'"latents"' in data[:2000]
    assert "holds latents" in server.get(f"/api/sounds/{latents['id']}/audio").error
    assert "job of kind encode" in server.get(f"/api/sounds/{made['id']}/latents").error


def test_the_server_says_what_it_has(server: Live) -> None:
    (little, *_) = server.get("/api/models").json
    assert little["name"] == "little" and little["default"] and little["max_seconds"] == 3.2
    status = server.get("/api/status").json
    assert status["waiting"] == 0 and "pingpong" in status["samplers"]
    assert server.get("/api/adapters").json == []
    assert server.get("/openapi.json").json["info"]["title"] == "sa3"
    assert server.get("/docs").status == 200


@pytest.mark.parametrize("kind", [Request, Item, Inpaint, Sampling, Guidance, AdapterChoice])
def test_schemas_have_the_fields_of_what_reads_them(kind: type) -> None:
    fields = {field.name for field in dataclasses.fields(kind)} - {"audio"}
    model = model_of(kind)
    assert set(model.model_fields) == fields
    schema = model.model_json_schema()
    assert schema["additionalProperties"] is False


def test_a_request_that_the_schema_takes_is_what_the_package_reads() -> None:
    request = Request(items=(Item(prompt="a", seconds=1.0, seed=2),), sampling=Sampling(sampler="euler", steps=3))
    data = json.loads(request.to_json())
    assert model_of(Request).model_validate(data).model_dump() == data


def test_the_client_in_the_docs_works(server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("7860", str(server.port)), {})
    audio, rate = sound(Path("piano.wav").read_bytes())
    assert len(audio) == 2 * rate
