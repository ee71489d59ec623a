"""Turn errors into answers: one line that says what was given, what is allowed and what to do, never a path."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from sa3_mlx.common.schema import ConfigError, quoted
from sa3_mlx.common.terminal import excerpt, one_line

from .engine.engine import plain
from .engine.queue import QueueFull
from .store.pool import Full
from .store.store import Store
from .studio import Missing

log = logging.getLogger("sa3.server")
_LONGEST = 600  # characters of a message
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_DAW = ("/generate", "/transform", "/continue", "/poll_status", "/init-audio", "/loras", "/prompts", "/unload")
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (Missing, 404),
    (QueueFull, 429),
    (Full, 507),
    (ConfigError, 422),
    (ValueError, 422),
    (ImportError, 501),
    (FileNotFoundError, 404),
    (OSError, 500),
)


def answer(path: str, status: int, text: str) -> JSONResponse:
    """Return an error in the shape that clients of a path expect."""
    text = excerpt(one_line(text), _LONGEST)
    body: dict[str, Any] = {"error": text}
    if path.startswith("/v1/"):
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        body = {"error": {"message": text, "type": kind, "param": None, "code": None}}
    elif path.startswith(_DAW):
        body = {"success": False, "error": text}
    headers = {"retry-after": "5"} if status == 429 else {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body, status, headers)


def install(app: FastAPI, store: Store) -> None:
    """Let an app answer all errors so."""

    def known(request: Request, error: Exception) -> JSONResponse:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        if status == 500:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
            return answer(request.url.path, status, f"the disk or the system refused: {getattr(error, 'strerror', '')}")
        return answer(request.url.path, status, plain(str(error).strip('"'), store))

    def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(request.url.path, 422, _first(error))

    def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        text = str(error.detail)
        if error.status_code == 404 and text == "Not Found":
            text = "there is nothing at this address; /docs lists what there is"
        return answer(request.url.path, error.status_code, text)

    def left(request: Request, _: Exception) -> JSONResponse:
        return answer(request.url.path, 400, "the body ended before its length; send it again")  # if anybody is there

    def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(request.url.path, 500, "a defect of sa3; the server's log says more")

    for kind, _ in _STATUS:
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, unexpected)


def _first(error: RequestValidationError) -> str:
    """Return the first of the problems: where, what is wrong, what was given."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    given = "" if problem["type"] in ("missing", "json_invalid") else f", got {quoted(problem.get('input'))}"
    return f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}{given}"
