"""Fixtures of the tests of commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import refused_line, work_in_copy


@pytest.fixture
def own_home(shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the home that the test may damage; the work goes on in an empty folder."""
    return work_in_copy(shared_home, tmp_path, monkeypatch)


@pytest.fixture
def refused(own_home: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused -> its one line."""
    return lambda *args: refused_line(capfd, own_home, *args)
