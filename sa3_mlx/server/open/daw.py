"""Answer DAW plug-ins that speak the jobs interface of other Stable Audio 3 servers: submit, then poll.

Fields that sa3 settles by itself (how long models stay, chunks, normalising before the limit) are taken and named in
the answer; what would change the sound and is not there is refused.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sa3_mlx.common.files.audio import apply_peak, peak_db
from sa3_mlx.common.files.wav import sample_bytes, wav_header
from sa3_mlx.common.schema import quoted, require
from sa3_mlx.server.engine.results import sound_name
from sa3_mlx.server.store.records import JobRecord, SoundRecord
from sa3_mlx.server.studio import Missing, Studio

BARS = (4, 8, 16, 32)
_USUAL_BARS, _CEILING_DB = 8, -0.3
BEATS_PER_BAR = 4
BPM = re.compile(r"(\d{2,3}(?:\.\d+)?)\s*bpm", re.IGNORECASE)
_STATES = {"queued": "queued", "running": "generating", "done": "completed"}  # all others: failed
_SAMPLED = 90  # percent of the progress, when all steps are done
_REMEMBERED = 1000  # jobs
_SETTLED = (
    "keep_models",
    "peak_normalize_db",
    "limiter_knee",
    "dist_shift_params",
    "latent_adapt_min",
    "latent_adapt_max",
    "encode_chunk_size",
    "encode_overlap",
    "decode_chunk_size",
    "decode_overlap",
)
_GUIDANCE = {"apg_scale": "apg", "cfg_rescale": "rescale", "cfg_norm_threshold": "norm_threshold"}
_INTERVAL = ("cfg_interval_min", "cfg_interval_max")
_OF_ROUTES = {  # fields that not every route reads
    "duration",
    "init_path",
    "init_noise_level",
    "inpaint_start",
    "inpaint_end",
    "bpm",
    "bars",
    "audio_data",
    "strength",
    "continuation_seconds",
    "continuation_mode",
}
_FIXED = {"latent_rescale": 1.0, "latent_shift": 0.0, "latent_target_std": None}  # only these values are there


class LoraBody(BaseModel):
    """Put an adapter on."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: str
    strength: float = 1.0
    interval_min: float = 0.0
    interval_max: float = 1.0


class DawBody(BaseModel):
    """Ask for a sound, as plug-ins do."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str | None = None
    duration: float | None = Field(None, description="Seconds.")
    steps: int | None = None
    seed: int = Field(-1, description="-1: a random one.")
    loras: list[LoraBody] = []
    cfg_scale: float | None = None
    cfg_rescale: float | None = None
    cfg_interval_min: float | None = None
    cfg_interval_max: float | None = None
    apg_scale: float | None = None
    cfg_norm_threshold: float | None = None
    duration_padding_sec: float | None = Field(None, description="Made beyond the end, then cut.")
    dist_shift: str | None = None
    shift: str | None = None
    init_path: str | None = Field(None, description="A path that /init-audio gave; no other is opened.")
    init_noise_level: float | None = None
    inpaint_start: float | None = None
    inpaint_end: float | None = None
    limiter_ceiling_db: float | str | bool | None = _CEILING_DB
    bpm: float | None = None
    bars: int = _USUAL_BARS
    audio_data: str | None = Field(None, description="A sound in base64, to transform or continue.")
    strength: float | None = None
    continuation_seconds: float | None = None
    continuation_mode: str = "inpaint"


_SCHEMA = DawBody.model_json_schema()
_SCHEMA["properties"]["loras"]["items"] = _SCHEMA.pop("$defs")[LoraBody.__name__]
BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": _SCHEMA}}}}


async def read_body(request: Request) -> DawBody:
    """Read the JSON of a request, whatever its content type says. Raises RequestValidationError."""
    data = await request.body()
    try:
        return DawBody.model_validate(json.loads(data))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    except (ValueError, RecursionError) as error:
        raise RequestValidationError([{"type": "json_invalid", "loc": ("body",), "msg": "Not JSON"}]) from error


class Daw:
    """Turn requests of plug-ins into jobs and jobs into what they poll for."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._wishes: OrderedDict[str, tuple[int | None, float | None]] = OrderedDict()  # job: samples, ceiling in dB

    def submit(
        self, body: DawBody, source: SoundRecord | None, changes: dict[str, Any], reads: set[str]
    ) -> tuple[JobRecord, dict[str, Any]]:
        """Queue a job; ``changes`` of its request, names of the fields that the route ``reads`` -> the job, and the
        answer to the plug-in, which names what was ignored."""
        unknown = sorted(set(body.model_extra or {}) - set(_SETTLED) - set(_FIXED))
        require(not unknown, f"unknown field(s) {', '.join(unknown)}")
        for name, value in _FIXED.items():
            given = (body.model_extra or {}).get(name, value)
            require(given == value, f"{name} is {quoted(given)}: sa3 has {value} only")
        for shift in (body.dist_shift, body.shift):
            require(shift is None or shift.lower() == "logsnr", f"shift is {quoted(shift)}: sa3 has logsnr only")
        seconds = changes.get("seconds", body.duration)
        item: dict[str, Any] = {"prompt": body.prompt, "seconds": seconds, "seed": None if body.seed < 0 else body.seed}
        if body.negative_prompt and self._scale(body) != 1:  # without guidance it has no effect
            item["negative_prompt"] = body.negative_prompt
        request = {
            "items": [item],
            "sampling": self._sampling(body),
            "head_room_seconds": body.duration_padding_sec,
            **{name: value for name, value in changes.items() if name != "seconds"},
        }
        job = self._studio.submit(
            {
                "request": {name: value for name, value in request.items() if value is not None},
                "source": None if source is None else source.id,
                "kind": _kind(request, source, self._studio),
                "adapters": [self._adapter(lora) for lora in body.loras],
            }
        )
        seed = job.order["request"]["items"][0]["seed"]
        ignored = self._ignored(body, reads)
        answer = {"success": True, "session_id": job.id, "seed": seed} | ({"ignored": ignored} if ignored else {})
        return job, answer

    def _ignored(self, body: DawBody, reads: set[str]) -> list[str]:
        """Name what a plug-in gave and what has no effect."""
        given = {name for name in body.model_fields_set if getattr(body, name, None) is not None}
        found = given & (_OF_ROUTES - reads) | set(body.model_extra or {}) & set(_SETTLED)
        if self._scale(body) == 1:
            found |= given & {"negative_prompt", *_GUIDANCE, *_INTERVAL}
        return sorted(found)

    def remember(self, job: JobRecord, samples: int | None, ceiling: float | str | bool | None) -> None:
        """Keep what a poll must know of a job: its exact length and how loud it may be."""
        limit = float(ceiling) if isinstance(ceiling, int | float) and ceiling is not True and ceiling <= 0 else None
        self._wishes[job.id] = (samples, None if ceiling is False else limit)
        while len(self._wishes) > _REMEMBERED:
            self._wishes.popitem(last=False)

    def poll(self, job_id: str, *, consume: bool) -> dict[str, Any]:
        """Tell how far a job is; a finished one comes with its sound."""
        job = self._studio.job(job_id)
        if job_id not in self._wishes and job.state == "done":
            raise Missing(f"there is no job {quoted(job_id)}: it was taken, or is too old; its sound is in the history")
        live = self._studio.engine.job(job_id)
        step, steps = (live.step, live.steps) if live is not None else (0, 0)
        status = _STATES.get(job.state, "failed")
        if status == "generating" and steps and step == steps:
            status = "encoding"
        going = status in ("queued", "generating", "encoding")
        answer: dict[str, Any] = {
            "success": status != "failed",
            "generation_in_progress": going,
            "transform_in_progress": False,
            "progress": 100 if status == "completed" else round(_SAMPLED * step / steps) if steps else 0,
            "step": step,
            "total_steps": steps,
            "status": status,
            "queue_status": self._queued(job, status) if going else {},
        }
        if status == "failed":
            answer["error"] = job.error or f"the job was {job.state}"
        if status == "completed":
            samples, ceiling = self._wishes[job_id]
            answer |= self._result(self._studio.sound(job.sounds[0]), samples, ceiling)
            if consume:
                del self._wishes[job_id]
        return answer

    def _queued(self, job: JobRecord, status: str) -> dict[str, Any]:
        live = self._studio.engine.job(job.id)
        if status != "queued" or live is None:
            return {"status": "ready"}
        progress = self._studio.engine.progress(live)
        place, remaining = progress.get("place", 0), progress.get("remaining")
        found: dict[str, Any] = {"status": "queued", "position": place + 1, "message": f"{place} before it"}
        return found if remaining is None else {**found, "estimated_seconds": round(remaining)}

    def _result(self, sound: SoundRecord, samples: int | None, ceiling: float | None) -> dict[str, Any]:
        audio = self._studio.store.audio(sound)[:samples]
        limited = audio if ceiling is None else apply_peak(audio, max(-60.0, ceiling))
        header = wav_header(len(limited), sound.channels, sound.sample_rate, "pcm16", "")
        levels = {"decoded_peak_db": peak_db(audio), "final_peak_db": peak_db(limited)}
        loudness = {name: round(value, 2) for name, value in levels.items() if np.isfinite(value)}
        data = base64.b64encode(header + sample_bytes(limited, "pcm16")).decode("ascii")
        return {"audio_data": data, "meta": {"seed": sound.seed, "loudness": loudness, "sound": sound.id}}

    def _sampling(self, body: DawBody) -> dict[str, Any]:
        """Return the sampling that was asked for; at scale 1 the rest of the guidance has no effect and is left out."""
        found: dict[str, Any] = {} if body.steps is None else {"steps": body.steps}
        guidance: dict[str, Any] = {} if body.cfg_scale is None else {"scale": body.cfg_scale}
        if self._scale(body) != 1:
            given = {name: getattr(body, field) for field, name in _GUIDANCE.items()}
            guidance |= {name: value for name, value in given.items() if value is not None}
            if body.cfg_interval_min is not None or body.cfg_interval_max is not None:
                high = 1.0 if body.cfg_interval_max is None else body.cfg_interval_max
                guidance["interval"] = [body.cfg_interval_min or 0.0, high]
        return {**found, "guidance": guidance} if guidance else found

    def _scale(self, body: DawBody) -> float:
        """Return the guidance scale that was asked for, or that of the model."""
        return self._studio.default.config.usual_sampling.guidance.scale if body.cfg_scale is None else body.cfg_scale

    def _adapter(self, lora: LoraBody) -> dict[str, Any]:
        names = {Path(name).stem: name for name in self._studio.adapters()}
        interval = [lora.interval_min, lora.interval_max]
        return {"name": names.get(lora.name, lora.name), "strength": lora.strength, "interval": interval}

    def loras(self) -> list[dict[str, Any]]:
        """List the adapters, by the names that requests use."""
        names = enumerate(self._studio.adapters())
        return [{"index": number, "name": Path(name).stem, "path": name} for number, name in names]

    def pool(self) -> list[dict[str, Any]]:
        """List the sounds that requests can start from."""
        uploads = self._studio.store.database.sounds(kind="upload", limit=500)
        return [entry(self._studio, sound) for sound in uploads]

    def find(self, path: str) -> SoundRecord:
        """Return the sound of a path that ``pool`` gave. Raises ValueError for any other."""
        try:
            return self._studio.sound(Path(path).stem)
        except Missing as error:
            raise ValueError(
                f"init_path is {quoted(path)}: no path of a client is opened; send the sound to /init-audio/upload and "
                "give the path of the answer"
            ) from error

    def decode(self, text: str | None) -> SoundRecord:
        """Keep a sound that came in base64. Raises ValueError for what is none."""
        require(bool(text), "audio_data is missing: send a sound in base64")
        try:
            data = base64.b64decode(text or "", validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("audio_data is not base64") from error
        return self.keep(io.BytesIO(data), "from the plug-in")

    def keep(self, file: Any, name: str) -> SoundRecord:
        """Keep an uploaded file."""
        with self._studio.store.upload() as taken:
            while block := file.read(1 << 20):
                taken.write(block)
            return self._studio.store.add_upload(taken, sound_name(Path(name).stem))


def _kind(request: dict[str, Any], source: SoundRecord | None, studio: Studio) -> str | None:
    """Return "extend" for a region that is all beyond the end of the source, else leave it to the request."""
    if source is None or request.get("inpaint") is None:
        return None
    ((start, end),) = request["inpaint"]["regions"]
    if start >= source.seconds - 1 / studio.default.config.sample_rate and end > source.seconds:
        del request["inpaint"]
        return "extend"
    return "inpaint"


def entry(studio: Studio, sound: SoundRecord) -> dict[str, Any]:
    """Describe a sound of the pool."""
    size = studio.store.path(sound).stat().st_size
    return {"name": f"{sound.name}.wav", "path": f"init-audio/{sound.id}.wav", "bytes": size}
