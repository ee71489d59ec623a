"""Fixtures of the tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server needs pip install 'sa3[server]'")
pytest.importorskip("mlx.core")

from sa3_mlx.server.settings import Settings
from sa3_mlx.server.studio import Studio
from tests.support.command import use_home
from tests.support.server import Live, live, settings


@pytest.fixture
def wanted(shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a server with the little model."""
    use_home(shared_home, monkeypatch)
    return settings(tmp_path)


@pytest.fixture
def studio(wanted: Settings) -> Iterator[Studio]:
    """A studio without a server around it."""
    with Studio(wanted) as found:
        yield found


@pytest.fixture(scope="module")
def server(shared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with the little model, for the tests of a file."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_home(shared_home, monkeypatch)
        with live(settings(tmp_path_factory.mktemp("server"))) as found:
            yield found
