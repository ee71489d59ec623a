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


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without their counts, which are most of a dry run: test_plan.py counts the steps of all stages."""
    from sa3_torch.train.run.planning import plan
    from sa3_torch.train.run.planning.count import StepCount

    monkeypatch.setattr(plan, "count_step", lambda *_: StepCount(flops=1, peak_bytes=1, gradient_bytes=0))
    monkeypatch.setattr(plan, "count_forward", lambda *_: 1)
