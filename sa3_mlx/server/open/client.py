"""Talk to a server over HTTP, with the standard library."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PATIENCE = 60.0  # seconds for an answer; jobs are not waited for


class Client:
    """Send requests to one server; ``refused`` is raised with its line where it refuses one, or is not there."""

    def __init__(
        self, address: str, token: str | None = None, *, refused: Callable[[str], Exception] = ValueError
    ) -> None:
        """Take the address of a server. Raises ValueError for what is none."""
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"server is {address!r}: expected an address such as http://127.0.0.1:7860")
        self._address, self._token, self._refused = f"{parts.scheme}://{parts.netloc}", token, refused

    def ask(
        self,
        method: str,
        path: str,
        data: bytes | dict[str, Any] | None = None,
        query: Mapping[str, str | int] | None = None,
    ) -> bytes:
        """Return the body of an answer."""
        target = f"{self._address}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        body = json.dumps(data).encode() if isinstance(data, dict) else data
        headers = {"content-type": "application/json" if isinstance(data, dict) else "application/octet-stream"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        call = urllib.request.Request(target, body, headers, method=method)
        try:
            with urllib.request.urlopen(call, timeout=_PATIENCE) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError as error:
            raise self._refused(_line(error.read()) or f"the server refused ({error.code})") from error
        except urllib.error.URLError as error:
            raise self._refused(f"{self._address}: no server answers there; start one with 'sa3 serve'") from error

    def json(
        self,
        method: str,
        path: str,
        data: dict[str, Any] | None = None,
        query: Mapping[str, str | int] | None = None,
    ) -> Any:
        """Return an answer that is JSON."""
        return json.loads(self.ask(method, path, data, query))

    def is_there(self) -> bool:
        """Tell whether a server of sa3 answers."""
        try:
            return "sa3" in self.json("GET", "/api/status")
        except ValueError:
            return False

    def upload(self, path: Path) -> str:
        """Send a sound; return its id."""
        return str(json.loads(self.ask("POST", "/api/uploads", path.read_bytes(), {"name": path.name}))["id"])


def _line(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return ""
