"""Tell what the server has and does: models, adapters, the machine, the session of a client."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from sa3_mlx.common.files import ffmpeg
from sa3_mlx.common.generation.request import ITEMS_MAX, PROMPT_MAX
from sa3_mlx.common.model.sampling import SAMPLER_NAMES, STEPS_MAX
from sa3_mlx.common.version import version
from sa3_mlx.server.schemas import Answer, SessionBody
from sa3_mlx.server.security import COOKIE, same, session_of
from sa3_mlx.server.studio import Studio

from .sounds import MEDIA

_DAYS = 30  # that a session lasts


def router(studio: Studio) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api", tags=["server"])

    @routes.get("/status")
    def status() -> dict[str, Any]:
        """Tell what the server is doing, in which formats sounds come, whether loudness is measured, and limits."""
        limits = {
            "queue": studio.settings.queue_max,
            "upload_bytes": studio.settings.upload_max,
            "items": ITEMS_MAX,
            "prompt": PROMPT_MAX,
            "steps": STEPS_MAX,
        }
        return {
            "sa3": version(),
            **studio.engine.status(),
            "samplers": list(SAMPLER_NAMES),
            "formats": [name for name in MEDIA if name != "m4a" or ffmpeg.available()],
            "loudness": find_spec("pyloudnorm") is not None,
            "limits": limits,
        }

    @routes.get("/models")
    def models() -> list[dict[str, Any]]:
        """Describe the installed models; ``words`` are all that a small one knows, ``prompts`` suggestions."""
        return studio.models()

    @routes.get("/adapters")
    def adapters() -> list[str]:
        """List the adapters that jobs can name."""
        return studio.adapters()

    @routes.get("/doctor")
    def doctor() -> dict[str, Any]:
        """Check the machine; takes some seconds."""
        return studio.doctor()

    @routes.post("/session")
    def session(body: SessionBody) -> JSONResponse:
        """Exchange the token for a cookie."""
        token = studio.settings.token
        if token is not None and not same(body.token, token):
            return JSONResponse(
                {"error": "this is not the token of the server; it is printed where sa3 serve runs"}, 401
            )
        response = JSONResponse(Answer().model_dump())
        value = session_of(token or "")
        response.set_cookie(COOKIE, value, max_age=_DAYS * 86400, httponly=True, samesite="strict")
        return response

    return routes
