"""Make several candidates of a sound one after the other, and go on with the best one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.common.generation.events import AudioChunk, Event, Finished, Generation
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.measures.choice import Grade, best, grade
from sa3_mlx.common.terminal import labelled, report, say

_LABEL = 6  # columns, as in the report of a file


def groups(requests: Sequence[Request], count: int | None) -> Iterator[Sequence[Request]]:
    """Yield the candidates of every file: ``count`` requests, or one."""
    size = count or 1
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def choose(
    candidates: Sequence[Request], stream: Callable[[Request], Iterable[Event]], progress: Progress
) -> tuple[Request, list[Event], Grade]:
    """Make every candidate, one clip each -> the request of the best one, what came of it, and its score.

    Only the best one so far stays in memory.
    """
    scores: list[Grade] = []
    kept: tuple[Request, Generation] | None = None
    for number, request in enumerate(candidates, start=1):
        *_, last = stream(request)
        assert isinstance(last, Finished)
        scores.append(grade(last.generation, 0))
        if best(scores) == len(scores) - 1:
            kept = request, last.generation
        if len(candidates) > 1:
            checks = ", ".join(f"{name} {value:.2f}" for name, value in scores[-1].checks.items())
            progress.line(f"try {number}: seed {request.items[0].seed}, score {scores[-1].total:.3f} ({checks})")
    assert kept is not None
    request, generation = kept
    events: list[Event] = [AudioChunk(item=0, start=0, audio=generation.audio[0]), Finished(generation=generation)]
    return request, events, scores[best(scores)]


def report_grade(found: Grade, candidates: int, *, to_pipe: bool) -> None:
    """Print what the checks say of a file, and what was heard."""
    write = say if to_pipe else report
    checks = ", ".join(f"{name} {value:.2f}" for name, value in found.checks.items())
    of = f", best of {candidates}" if candidates > 1 else ""
    write(labelled("score", f"{found.total:.3f}{of} ({checks})", _LABEL))
    for name, text in found.heard.items():
        write(labelled(name, text, _LABEL))
