"""Serve the addresses that DAW plug-ins know."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from sa3_mlx.common.generation.loop import BPM_MAX, BPM_MIN, loop_seconds
from sa3_mlx.common.schema import require
from sa3_mlx.server.studio import Studio

from .daw import BARS, BEATS_PER_BAR, BODY, BPM, Daw, entry, read_body


def router(studio: Studio) -> APIRouter:
    """Return the routes."""
    routes, daw = APIRouter(tags=["daw"]), Daw(studio)

    @routes.get("/health")
    def health() -> dict[str, Any]:
        """Tell that the server is there."""
        loaded = studio.default.tag in studio.engine.status()["loaded"]
        return {"success": True, "status": "ok", "model": studio.default.tag, "encoding": "wav", "loaded": loaded}

    @routes.get("/loras")
    def loras() -> dict[str, Any]:
        """List the adapters."""
        return {"success": True, "loras": daw.loras(), "model_loaded": bool(studio.engine.status()["loaded"])}

    @routes.get("/prompts")
    def prompts(lora: Annotated[str, Query(max_length=500)] = "") -> dict[str, Any]:
        """Suggest prompts that the model knows; adapters bring none of their own."""
        missing = [name for name in lora.split(",") if name.strip()]
        found = studio.model_facts(studio.default)["prompts"]
        return {"success": True, "missing_loras": missing, "prompts": {"version": 1, "dice": {"generic": found}}}

    @routes.post("/generate", openapi_extra=BODY)
    async def generate(request: Request) -> dict[str, Any]:
        """Make a sound, or vary, inpaint or continue one of the pool."""
        body = await read_body(request)

        def submit() -> dict[str, Any]:
            source = None if body.init_path is None else daw.find(body.init_path)
            changes: dict[str, Any] = {}
            reads = {"init_path"} if source is not None else {"duration"}
            if body.inpaint_start is not None or body.inpaint_end is not None:
                reads |= {"inpaint_start", "inpaint_end"}
                require(source is not None, "inpaint_start and inpaint_end need init_path, the sound that is kept")
                end = body.inpaint_end if body.inpaint_end is not None else source.seconds if source else 0.0
                changes["inpaint"] = {"regions": [[body.inpaint_start or 0.0, end]]}
                changes["seconds"] = max(end, source.seconds if source else 0.0)
            elif source is not None:
                reads.add("init_noise_level")
                changes["init"] = {"noise_level": 0.5 if body.init_noise_level is None else body.init_noise_level}
                changes["seconds"] = None
            job, answer = daw.submit(body, source, changes, reads)
            daw.remember(job, None, body.limiter_ceiling_db)
            return answer

        return await run_in_threadpool(submit)

    @routes.post("/generate/loop", openapi_extra=BODY)
    async def loop(request: Request) -> dict[str, Any]:
        """Make so many bars at a tempo, to the sample, whose end leads into their beginning."""
        body = await read_body(request)

        def submit() -> dict[str, Any]:
            found = BPM.search(body.prompt)
            bpm = body.bpm or (float(found[1]) if found else 0.0)
            require(bpm != 0, "a tempo is missing: give bpm, or write it into the prompt, such as 120 bpm")
            require(1 <= bpm <= 1000, f"bpm is {bpm:g}: allowed are 1 to 1000")
            require(body.bars in BARS, f"bars is {body.bars}: allowed are {', '.join(map(str, BARS))}")
            config, beats = studio.default.config, BEATS_PER_BAR * body.bars
            seconds = loop_seconds(bpm, beats, config.sample_rate)
            require(seconds <= config.max_seconds, f"{body.bars} bars at {bpm:g} bpm are {seconds:.2f} s: too long")
            ring = {"bpm": bpm, "beats": beats} if BPM_MIN <= bpm <= BPM_MAX else {}
            changes = {"seconds": seconds, "loop": ring, "head_room_seconds": None}
            job, answer = daw.submit(body, None, changes, {"bpm", "bars"})
            daw.remember(job, None, body.limiter_ceiling_db)
            more = {
                "bpm": bpm,
                "bars": body.bars,
                "seconds_per_bar": 60 * BEATS_PER_BAR / bpm,
                "loop_duration": seconds,
            }
            samples = round(seconds * config.sample_rate)
            return {**answer, **more, "gen_duration": seconds, "target_samples": samples}

        return await run_in_threadpool(submit)

    @routes.post("/transform", openapi_extra=BODY)
    async def transform(request: Request) -> dict[str, Any]:
        """Vary a sound that comes in base64."""
        body = await read_body(request)

        def submit() -> dict[str, Any]:
            source = daw.decode(body.audio_data)
            noise_level = 0.5 if body.strength is None else body.strength
            changes = {"init": {"noise_level": noise_level}, "seconds": None}
            job, answer = daw.submit(body, source, changes, {"audio_data", "strength"})
            daw.remember(job, None, body.limiter_ceiling_db)
            return answer

        return await run_in_threadpool(submit)

    @routes.post("/continue", openapi_extra=BODY)
    async def go_on(request: Request) -> dict[str, Any]:
        """Continue a sound that comes in base64 by so many seconds."""
        body = await read_body(request)

        def submit() -> dict[str, Any]:
            mode = body.continuation_mode
            require(mode == "inpaint", f"continuation_mode is {mode!r}: sa3 has inpaint only")
            more = body.continuation_seconds
            require(more is not None and more > 0, "continuation_seconds is missing: say by how much it goes on")
            source = daw.decode(body.audio_data)
            end = source.seconds + (more or 0.0)
            changes = {"inpaint": {"regions": [[source.seconds, end]]}, "seconds": end}
            reads = {"audio_data", "continuation_seconds", "continuation_mode"}
            job, answer = daw.submit(body, source, changes, reads)
            daw.remember(job, None, body.limiter_ceiling_db)
            return answer

        return await run_in_threadpool(submit)

    @routes.get("/poll_status/{job_id}")
    def poll(job_id: str, consume: bool = False) -> dict[str, Any]:
        """Tell how far a job is; a finished one comes with its sound in base64, with ``consume`` once only."""
        return daw.poll(job_id, consume=consume)

    @routes.get("/init-audio")
    def pool() -> dict[str, Any]:
        """List the uploads that requests can start from."""
        return {"success": True, "files": daw.pool(), "max_upload_bytes": studio.settings.upload_max}

    @routes.post("/init-audio/upload")
    async def upload(request: Request) -> dict[str, Any]:
        """Take a sound as a form with one file."""
        async with request.form(max_files=1, max_fields=4) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise ValueError("file is missing: send a form with one file")
            sound = await run_in_threadpool(daw.keep, file.file, file.filename or "upload")
        return {"success": True, **entry(studio, sound)}

    @routes.post("/unload")
    def unload() -> dict[str, Any]:
        """Free all models as soon as nothing runs."""
        studio.engine.unload()
        return {"success": True, "status": "unloaded"}

    return routes
