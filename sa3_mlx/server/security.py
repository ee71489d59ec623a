"""Let in whom the server is for: checks of host, origin and token, limits of bodies, headers of every answer.

A page of another site can make a browser send requests here (cross-site posts), and can name this machine by a name of
its own (DNS rebinding). The first is seen by Origin and Sec-Fetch-Site, the second by Host.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import answer
from .settings import BODY_MAX, LOOPBACK, Settings

COOKIE = "sa3_session"
UPLOADS = ("/api/uploads", "/init-audio/upload", "/transform", "/continue")  # paths that take sounds
PUBLIC = ("/", "/docs", "/openapi.json", "/api/session", "/health")  # no token; so are the files of the page
_PATIENCE = 60.0  # seconds until the next bytes of a body must come
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Tell whether a server on this host is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def session_of(token: str) -> str:
    """Return what the cookie of a client holds that has shown the token."""
    return hashlib.sha256(b"sa3 session\0" + token.encode()).hexdigest()


def same(given: str, wanted: str) -> bool:
    """Compare two secrets in constant time."""
    return hmac.compare_digest(hashlib.sha256(given.encode()).digest(), hashlib.sha256(wanted.encode()).digest())


class Guard:
    """Check every request before anything else sees it."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._names = {*LOOPBACK, settings.host, *settings.names}
        if not is_loopback(settings.host):
            self._names |= {socket.gethostname(), socket.gethostname().split(".")[0] + ".local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin")
        allowed = origin in self._settings.origins

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    ours.setdefault(name, value)
                if allowed and origin is not None:
                    ours["access-control-allow-origin"] = origin
                    ours["access-control-expose-headers"] = "*"
                    ours["cross-origin-resource-policy"] = "cross-origin"
                    ours.add_vary_header("Origin")
            await send(message)

        if (problem := self._refusal(scope["method"], path, headers, trusted=allowed)) is not None:
            await answer(path, *problem)(scope, receive, secured)
        elif allowed and scope["method"] == "OPTIONS":
            await _preflight(secured)
        else:
            await self._app(scope, self._bounded(path, receive), secured)

    def _refusal(self, method: str, path: str, headers: Headers, *, trusted: bool) -> tuple[int, str] | None:
        """Return status and reason where a request is refused."""
        host = headers.get("host", "")
        if not self._knows(host):
            return 421, f"host {_short(host)} is not a name of this server; use its address, or start it with --name"
        origin = headers.get("origin")
        if origin is not None and not trusted and not _own(origin, host):
            return 403, f"pages of {_short(origin)} may not use this server; start it with --cors to let them"
        if (
            headers.get("sec-fetch-site") == "cross-site"
            and not trusted
            and headers.get("sec-fetch-mode") != "navigate"
        ):
            return 403, "pages of other sites may not use this server; start it with --cors to let them"
        if method == "OPTIONS" and trusted:
            return None  # a preflight carries no token
        if not self._allowed(path, headers):
            return 401, "a token is needed: send the header Authorization: Bearer TOKEN, or open the printed address"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            return 400, "the content-length is not a number"
        if int(length) > self._limit(path):
            return 413, f"the body is larger than {self._limit(path):,} bytes, which is the limit here"
        return None

    def _knows(self, host: str) -> bool:
        """Tell whether a Host header names this server: a name of ours, or on an open server any address."""
        name = _host_name(host)
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback if is_loopback(self._settings.host) else True

    def _allowed(self, path: str, headers: Headers) -> bool:
        token = self._settings.token
        if token is None or path in PUBLIC or path.startswith("/web/"):
            return True
        kind, _, shown = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same(shown.strip(), token):
            return True
        return same(_cookie(headers), session_of(token))

    def _limit(self, path: str) -> int:
        return self._settings.upload_max + BODY_MAX if path in UPLOADS else BODY_MAX

    def _bounded(self, path: str, receive: Receive) -> Receive:
        """Return a ``receive`` that refuses a body beyond the limit, and one that does not go on."""
        limit, size = self._limit(path), 0
        whole = False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), _PATIENCE)
            except TimeoutError as error:
                raise HTTPException(408, "the body did not go on; send it again") from error
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > limit:
                raise HTTPException(413, f"the body is larger than {limit:,} bytes, which is the limit here")
            return message

        return bounded


def _host_name(host: str) -> str:
    """Return the name of a Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _own(origin: str, host: str) -> bool:
    """Tell whether an origin is that of the page of this server."""
    parts = urlsplit(origin)
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _cookie(headers: Mapping[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _short(text: str) -> str:
    return repr(text[:80])


async def _preflight(send: Send) -> None:
    headers = {
        "access-control-allow-methods": "GET, POST, PATCH, DELETE",
        "access-control-allow-headers": "authorization, content-type, last-event-id, range",
        "access-control-max-age": "600",
    }
    start = {
        "type": "http.response.start",
        "status": 204,
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }
    await send(start)
    await send({"type": "http.response.body", "body": b""})
