"""Answer clients of OpenAI's interface: audio in the reply, or while it is decoded."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from sa3_mlx.common.files.wav import Subtype, sample_bytes, wav_header
from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.schema import require
from sa3_mlx.server.api.sounds import MEDIA
from sa3_mlx.server.store.records import JobRecord, SoundRecord
from sa3_mlx.server.studio import Studio

_PCM = "audio/pcm"


class SpeakBody(BaseModel):
    """Ask for sounds."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="Name of an installed model, see /v1/models.")
    prompt: str
    seconds: float | None = Field(None, description="Length; duration says the same.")
    duration: float | None = None
    n: int = Field(1, ge=1, le=16, description="Sounds, with seeds that go on; several come as JSON.")
    seed: int | None = None
    response_format: Literal["wav", "flac", "mp3", "pcm"] = "wav"
    stream: bool = Field(False, description="Send audio while it is decoded: wav or pcm.")
    stream_format: Literal["audio", "sse"] = "audio"
    user: str | None = Field(None, description="Not looked at.")


def router(studio: Studio) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.get("/models")
    def models() -> dict[str, Any]:
        """List the installed models."""
        data = [{"id": model["name"], "object": "model", "created": 0, "owned_by": "sa3"} for model in studio.models()]
        return {"object": "list", "data": data}

    async def generate(body: SpeakBody, request: Request) -> Response:
        """Make sounds of a prompt; the header x-seed says with which seed."""
        job = await run_in_threadpool(studio.submit, _order(body))
        seed = str(job.order["request"]["items"][0]["seed"])
        headers = {"x-seed": seed, "x-job-id": job.id, "cache-control": "no-store"}
        if body.stream:
            if body.stream_format == "sse":
                return StreamingResponse(_events(studio, job), media_type="text/event-stream", headers=headers)
            rate, channels = await run_in_threadpool(_format, studio, job)
            headers |= {"x-sample-rate": str(rate), "x-channels": str(channels)}
            media = MEDIA["wav"] if body.response_format == "wav" else _PCM
            stream = _chunks(studio, job, headed=body.response_format == "wav")
            return StreamingResponse(stream, media_type=media, headers=headers)
        sounds = await _finished(studio, job, request)
        if body.n == 1:
            data, media, more = await run_in_threadpool(_file, studio, sounds[0], body.response_format)
            return Response(data, media_type=media, headers=headers | more)
        files = [await run_in_threadpool(_file, studio, sound, body.response_format) for sound in sounds]
        entries = [
            {"b64_json": base64.b64encode(data).decode(), "seed": sound.seed, "id": sound.id}
            for sound, (data, _, _) in zip(sounds, files, strict=True)
        ]
        return JSONResponse({"created": int(time.time()), "data": entries}, headers=headers)

    for path in ("/audio/generations", "/audio/music-generations"):
        routes.add_api_route(path, generate, methods=["POST"], response_class=Response)
    return routes


def _order(body: SpeakBody) -> dict[str, Any]:
    """Return what is asked for as a job. Raises ConfigError for what does not go together."""
    require(not (body.stream and body.n > 1), f"stream sends one sound, n is {body.n}: leave one of them out")
    require(
        not (body.stream and body.response_format in ("flac", "mp3")),
        f"response_format is {body.response_format}, which has no length before its end: streams are wav or pcm",
    )
    require(body.seconds is None or body.duration is None, "seconds and duration say the same: give one of them")
    seconds = body.duration if body.seconds is None else body.seconds
    item = {"prompt": body.prompt, "seconds": seconds, "seed": body.seed}
    return {"model": body.model, "request": {"items": [item]}, "variations": body.n, "stream": body.stream}


async def _finished(studio: Studio, job: JobRecord, request: Request) -> list[SoundRecord]:
    """Wait for the sounds of a job; cancel it where the client leaves. Raises HTTPException where it fails."""
    try:
        async for _, event in studio.follow(job.id, 0, previews=False):
            if event is None and await request.is_disconnected():
                raise HTTPException(499, "the client left")
        record = await run_in_threadpool(studio.job, job.id)
    finally:
        studio.engine.cancel(job.id)  # one that is over stays as it is
    if record.state != "done":
        raise HTTPException(500, record.error or f"the job was {record.state}; send the request again")
    return [await run_in_threadpool(studio.sound, sound) for sound in record.sounds]


def _file(studio: Studio, sound: SoundRecord, form: str) -> tuple[bytes, str, dict[str, str]]:
    """Return the bytes of a sound, their media type and headers that say what they are."""
    headers = {"x-sound-id": sound.id, "x-sample-rate": str(sound.sample_rate), "x-channels": str(sound.channels)}
    if form == "pcm":
        return sample_bytes(studio.store.audio(sound), "pcm16"), _PCM, headers
    return studio.store.export(sound, f".{form}", None).read_bytes(), MEDIA[form], headers


def _format(studio: Studio, job: JobRecord) -> tuple[int, int]:
    config = studio.model(job.order["model"]).config
    return config.sample_rate, config.audio_channels


async def _pieces(studio: Studio, job: JobRecord) -> AsyncIterator[dict[str, Any]]:
    """Yield chunks of audio as they are decoded; the job is cancelled where nobody reads on."""
    done = 0
    try:
        async for _, event in studio.follow(job.id, 0, previews=False):
            if event is not None and event.name == "audio" and event.data["start"] >= done:
                if event.data["start"] > done:
                    raise ConnectionAbortedError("the client reads too slowly: a part was dropped")
                done += event.data["samples"]
                yield event.data
            elif event is not None and event.name in ("failed", "cancelled", "interrupted"):
                raise ConnectionAbortedError(event.data.get("error", event.name))  # the body must not look whole
            elif event is not None and event.name == "done":
                sound = await run_in_threadpool(studio.sound, event.data["sounds"][0]["id"])
                if done < sound.samples:
                    yield await asyncio.to_thread(_rest, studio, sound, done)
    finally:
        studio.engine.cancel(job.id)


def _rest(studio: Studio, sound: SoundRecord, start: int) -> dict[str, Any]:
    """Return a sound from sample ``start`` on as one chunk: its own ones are dropped once the job is over."""
    pcm = base64.b64encode(sample_bytes(studio.store.audio(sound)[start:], "pcm16")).decode("ascii")
    return {"start": start, "samples": sound.samples - start, "pcm16": pcm}


async def _chunks(studio: Studio, job: JobRecord, *, headed: bool) -> AsyncIterator[bytes]:
    """Yield the bytes of a WAV, whose header says its length before its first sample, or of its samples only."""
    if headed:
        subtype: Subtype = "pcm16"
        rate, channels = await run_in_threadpool(_format, studio, job)
        samples = seconds_to_samples(job.order["request"]["items"][0]["seconds"], rate)
        yield wav_header(samples, channels, rate, subtype, "")
    async for chunk in _pieces(studio, job):
        yield base64.b64decode(chunk["pcm16"])


async def _events(studio: Studio, job: JobRecord) -> AsyncIterator[str]:
    """Yield audio as server-sent events: audio.delta with pcm16 in base64, then audio.done or error."""
    rate, channels = await run_in_threadpool(_format, studio, job)
    try:
        async for chunk in _pieces(studio, job):
            yield _data({"type": "audio.delta", "audio": chunk["pcm16"], "sample_rate": rate, "channels": channels})
        record = await run_in_threadpool(studio.job, job.id)
        seed = job.order["request"]["items"][0]["seed"]
        yield _data({"type": "audio.done", "seed": seed, "id": record.sounds[0]})
    except ConnectionAbortedError as error:
        yield _data({"type": "error", "error": {"message": str(error), "type": "server_error"}})


def _data(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
