"""Change requests in tests."""

from __future__ import annotations

from dataclasses import replace

from sa3_mlx.common.generation.request import Request


def sampled(request: Request, **changes: object) -> Request:
    """Return a request with changes of its sampling: sampler, steps, guidance."""
    assert request.sampling is not None
    return replace(request, sampling=replace(request.sampling, **changes))  # type: ignore[arg-type]
