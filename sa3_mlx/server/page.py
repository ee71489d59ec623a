"""Serve the page: the files of web/, which are listed once, so that no name of a client is opened."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from starlette.responses import FileResponse

_WEB = Path(__file__).parent / "web"
_MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {path.relative_to(_WEB).as_posix(): path for path in sorted(_WEB.rglob("*")) if path.suffix in _MEDIA}


def router() -> APIRouter:
    """Return the routes."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def index() -> FileResponse:
        return _file("index.html")

    @routes.get("/docs")
    def docs() -> FileResponse:
        return _file("docs.html")

    @routes.get("/web/{name:path}")
    def part(name: str) -> FileResponse:
        return _file(name)

    return routes


def _file(name: str) -> FileResponse:
    path = _FILES.get(name)
    if path is None:
        raise HTTPException(404, "the page has no such file")
    return FileResponse(path, media_type=_MEDIA[path.suffix], headers={"cache-control": "no-cache"})
