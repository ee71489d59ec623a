"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the reference outputs of the official code; skips where it is not beside the repository."""
    if not GOLDEN.is_dir():
        pytest.skip("no golden folder beside the repository")
    return GOLDEN
