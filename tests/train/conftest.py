"""Fixtures of training tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def pictures() -> None:
    """Let trainings draw their pictures after all."""


@pytest.fixture
def no_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave out the pictures of trainings, which take longer than tiny steps, unless a test asks for ``pictures``."""
    from tests.support.stages import without_pictures

    if "pictures" in request.fixturenames:
        yield
    else:
        with without_pictures():
            yield
