"""Upload, list, draw, download, star and delete sounds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from sa3_mlx.common.delivery.settings import Delivery
from sa3_mlx.common.files.atomic import write_bytes
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.encoders import SUBTYPES
from sa3_mlx.common.files.spectrogram import RANGE_DB, save_spectrogram, spectrogram
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.server.engine.results import sound_name
from sa3_mlx.server.engine.runs import LATENTS, peaks
from sa3_mlx.server.schemas import Answer, NearBody, StarBody
from sa3_mlx.server.store.records import SoundRecord
from sa3_mlx.server.studio import Studio

Format = Literal["wav", "flac", "mp3", "ogg", "opus", "m4a"]
MEDIA = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "m4a": "audio/mp4",
}
_COLUMNS_MAX = 8000
_LEVEL_COLUMNS = 700
_CACHED = "private, max-age=3600"  # what an id stands for never changes
assert {f".{name}" for name in MEDIA} == set(SUBTYPES)


def router(studio: Studio) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api", tags=["sounds"])
    store = studio.store

    @routes.post("/uploads", status_code=201)
    async def upload(request: Request, name: Annotated[str, Query(max_length=200)] = "") -> dict[str, Any]:
        """Take a sound as the body of the request, in any format that can be decoded: wav, flac, mp3, ogg, aiff."""
        return (await take_upload(studio, request, name)).to_dict()

    @routes.get("/sounds")
    def sounds(
        text: Annotated[str | None, Query(max_length=200)] = None,
        starred: bool = False,
        kind: str | None = None,
        before: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> list[dict[str, Any]]:
        """List sounds, newest first: those with a text in their prompt, starred ones, those made before a time."""
        found = store.database.sounds(text, starred=starred, kind=kind, before=before, limit=limit)
        return [sound.to_dict() for sound in found]

    @routes.get("/sounds/{sound_id}")
    def sound(sound_id: str) -> dict[str, Any]:
        """Describe a sound."""
        return studio.sound(sound_id).to_dict()

    @routes.patch("/sounds/{sound_id}")
    def star(sound_id: str, body: StarBody) -> dict[str, Any]:
        """Star a sound, or not."""
        studio.sound(sound_id)
        store.database.star(sound_id, body.starred)
        return studio.sound(sound_id).to_dict()

    @routes.delete("/sounds/{sound_id}")
    def delete(sound_id: str) -> Answer:
        """Delete a sound and its file."""
        studio.sound(sound_id)
        store.delete(sound_id)
        return Answer()

    @routes.get("/sounds/{sound_id}/family")
    def family(sound_id: str) -> list[dict[str, Any]]:
        """List all versions of a sound, oldest first; ``parent`` makes a tree of them."""
        studio.sound(sound_id)
        return [version.to_dict() for version in store.database.family(sound_id)]

    @routes.get("/sounds/{sound_id}/provenance")
    def provenance(sound_id: str) -> dict[str, Any]:
        """Tell how a sound was made: what is in the tags of its file. Empty for an upload."""
        return studio.sound(sound_id).provenance or {}

    @routes.post("/sounds/{sound_id}/again", status_code=202)
    def again(sound_id: str) -> dict[str, Any]:
        """Queue the job that made a sound again."""
        return studio.describe(studio.again(studio.maker(studio.sound(sound_id)).id))

    @routes.post("/sounds/{sound_id}/near", status_code=202)
    def near(sound_id: str, body: NearBody) -> dict[str, Any]:
        """Queue variations near a sound: made as it was, from noise between that of its seed and that of others."""
        return studio.describe(studio.near(sound_id, body.variations, body.spread))

    @routes.get("/sounds/{sound_id}/audio", response_class=FileResponse)
    def audio(
        sound_id: str,
        format: Format = "wav",
        samples: Subtype | None = None,
        download: bool = False,
        *,
        delivery: Annotated[Delivery, Depends()],
    ) -> FileResponse:
        """Send the sound as a file, whole or, with a Range header, a part of it; finished as the commands do.

        The header ``x-notes`` says what there is to say about it, such as a loudness that could not be reached.
        """
        found = studio.sound(sound_id)
        return sound_response(studio, found, format, samples, delivery, download=download)

    @routes.get("/sounds/{sound_id}/latents", response_class=FileResponse)
    def latents(sound_id: str) -> FileResponse:
        """Send the file of latents that an encoding made."""
        found = studio.sound(sound_id)
        if found.subtype != LATENTS:
            raise ValueError(f"{found.id} is a sound; a job of kind encode makes latents of it")
        name = f"{sound_name(found.name)}.safetensors"
        return FileResponse(store.path(found), media_type="application/octet-stream", filename=name)

    @routes.get("/sounds/{sound_id}/peaks")
    def sound_peaks(
        sound_id: str,
        columns: Annotated[int, Query(ge=1, le=_COLUMNS_MAX)] = 1000,
        start: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0,
        end: Annotated[float | None, Query(ge=0, allow_inf_nan=False)] = None,
    ) -> dict[str, Any]:
        """Return the lowest and the highest sample of every column, for drawing; ``start`` and ``end`` in seconds."""
        return peaks(_part(studio.sound(sound_id), start, end), columns)

    @routes.get("/sounds/{sound_id}/spectrogram", response_class=Response)
    def levels(sound_id: str) -> Response:
        """Return levels as bytes, row by row from the lowest band up: 255 is the loudest, 0 is 90 dB below.

        The headers ``x-bands`` and ``x-columns`` say how many there are.
        """
        found = studio.sound(sound_id)
        path = store.pool.export(f"{found.id}.npy")
        with store.drawing:
            if not path.exists():
                data = spectrogram(store.audio(_audible(found)), found.sample_rate, _LEVEL_COLUMNS).levels_db
                buffer = io.BytesIO()
                np.save(buffer, (np.clip((data - data.max()) / RANGE_DB + 1, 0, 1) * 255).astype(np.uint8))
                write_bytes(path, buffer.getvalue())
        scaled = np.load(path)
        headers = {"x-bands": str(scaled.shape[0]), "x-columns": str(scaled.shape[1]), "cache-control": _CACHED}
        return Response(scaled.tobytes(), media_type="application/octet-stream", headers=headers)

    @routes.get("/sounds/{sound_id}/spectrogram.png", response_class=FileResponse)
    def picture(sound_id: str) -> FileResponse:
        """Return a picture of waveform and spectrogram, with axes."""
        found = studio.sound(sound_id)
        title = found.prompt or found.name
        path = store.pool.export(f"{found.id}.png")
        with store.drawing:
            if not path.exists():
                save_spectrogram(path, _part(found, 0, None), found.sample_rate, title=title)
        return FileResponse(path, media_type="image/png")

    def _part(found: SoundRecord, start: float, end: float | None) -> Audio:
        """Read the part of a sound between two times."""
        samples = store.audio(_audible(found))
        first = min(int(start * found.sample_rate), len(samples) - 1)
        last = len(samples) if end is None else min(len(samples), int(end * found.sample_rate))
        return samples[first : max(first + 1, last)]

    return routes


def _audible(sound: SoundRecord) -> SoundRecord:
    if sound.subtype == LATENTS:
        raise ValueError(f"{sound.id} holds latents; a job of kind decode makes a sound of them")
    return sound


def sound_response(
    studio: Studio, sound: SoundRecord, form: Format, samples: Subtype | None, delivery: Delivery, *, download: bool
) -> FileResponse:
    """Return a sound as a file in a format."""
    path: Path = studio.store.export(_audible(sound), f".{form}", samples, delivery)
    notes = studio.store.said(path)
    return FileResponse(
        path,
        media_type=MEDIA[form],
        filename=f"{sound_name(sound.name)}.{form}",
        content_disposition_type="attachment" if download else "inline",
        headers={"cache-control": _CACHED} | ({"x-notes": "; ".join(notes)} if notes else {}),
    )


async def take_upload(studio: Studio, request: Request, name: str) -> SoundRecord:
    """Take the body of a request as a sound, piece by piece to the disk. Raises ValueError for what is no sound."""
    with await run_in_threadpool(studio.store.upload) as taken:
        async for block in request.stream():
            if block:
                await run_in_threadpool(taken.write, block)
        return await run_in_threadpool(studio.store.add_upload, taken, sound_name(Path(name).stem or "upload"))
