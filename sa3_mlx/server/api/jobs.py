"""Queue, watch and cancel jobs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from sa3_mlx.server.feeds import JobEvent
from sa3_mlx.server.schemas import JobBody
from sa3_mlx.server.store.records import State
from sa3_mlx.server.studio import Studio

SSE_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def router(studio: Studio) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api/jobs", tags=["jobs"])

    @routes.post("", status_code=202)
    def submit(body: JobBody) -> dict[str, Any]:
        """Queue a job; the answer says under which id, all that was filled in, and what the model does not know."""
        job = studio.submit(body.plain())
        return {**studio.describe(job), "notes": studio.notes(job)}

    @routes.get("")
    def jobs(state: State | None = None, limit: Annotated[int, Query(ge=1, le=500)] = 100) -> list[dict[str, Any]]:
        """List jobs, newest first."""
        return [studio.describe(job) for job in studio.store.database.jobs(state, limit)]

    @routes.get("/{job_id}")
    def job(job_id: str) -> dict[str, Any]:
        """Tell how a job is, and what it made."""
        return studio.describe(studio.job(job_id))

    @routes.post("/{job_id}/cancel")
    def cancel(job_id: str) -> dict[str, Any]:
        """Cancel a job: at once while it waits, within one step while it runs."""
        return studio.describe(studio.cancel(job_id))

    @routes.post("/{job_id}/again", status_code=202)
    def again(job_id: str) -> dict[str, Any]:
        """Queue a job again, as a new one with the same order."""
        return studio.describe(studio.again(job_id))

    @routes.get("/{job_id}/events", response_class=StreamingResponse)
    async def events(
        job_id: str,
        previews: bool = False,
        last_event_id: Annotated[int | None, Header(ge=0, le=2**31)] = None,
    ) -> StreamingResponse:
        """Follow a job as server-sent events: queued, running, step, preview, audio, and how it ended."""
        if studio.engine.job(job_id) is None:
            await run_in_threadpool(studio.job, job_id)
        stream = sse(studio, job_id, last_event_id or 0, previews=previews)
        return StreamingResponse(stream, media_type="text/event-stream", headers=SSE_HEADERS)

    return routes


async def sse(studio: Studio, job_id: str, position: int, *, previews: bool) -> AsyncIterator[str]:
    """Write the events of a job as text; a comment now and then shows that the server is there."""
    async for number, event in studio.follow(job_id, position, previews=previews):
        yield ": still there\n\n" if event is None else event_text(number, event)


def event_text(number: int, event: JobEvent) -> str:
    """Return one event as text."""
    return f"id: {number}\nevent: {event.name}\ndata: {json.dumps(event.data)}\n\n"
