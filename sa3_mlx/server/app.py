"""Put the server together: interfaces, page and guard, around one studio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from sa3_mlx.common.version import version

from . import errors, page
from .api import jobs, machine, sounds
from .open import daw_routes, openai
from .schemas import ErrorBody
from .security import Guard
from .studio import Studio

_ERRORS = {status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 421, 422, 429, 507)}


def make_server(studio: Studio) -> uvicorn.Server:
    """Return the server as uvicorn runs it, which listens where it is told: ``run(sockets=[...])``."""
    config = uvicorn.Config(
        make_app(studio), ws="none", log_level="warning", server_header=False, timeout_graceful_shutdown=3
    )
    return uvicorn.Server(config)


def make_app(studio: Studio) -> ASGIApp:
    """Return the server as an ASGI app, which opens the studio when it starts and closes it at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        studio.engine.loop = asyncio.get_running_loop()
        with studio:
            yield

    app = FastAPI(
        title="sa3",
        version=version(),
        summary="Make, vary, inpaint and extend sounds",
        docs_url=None,  # that page loads its parts from another host
        redoc_url=None,
        lifespan=lifespan,
        responses=_ERRORS,  # type: ignore[arg-type]  # keys are status codes
    )
    for module in (jobs, sounds, machine, openai, daw_routes):
        app.include_router(module.router(studio))
    app.include_router(page.router())
    errors.install(app, studio.store)
    return Guard(app, studio.settings)
