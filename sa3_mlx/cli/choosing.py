"""Make several candidates of a sound one after the other, and go on with the best one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.common.generation.events import AudioChunk, Event, Finished, Generation
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.measures.choice import Grade, best, grade
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.terminal import labelled, report, say

_LABEL = 6  # columns, as in the report of a file
Cosine = Callable[[Generation], float]  # of a clip and its prompt


def groups(requests: Sequence[Request], count: int | None) -> Iterator[Sequence[Request]]:
    """Yield the candidates of every file: ``count`` requests, or one."""
    size = count or 1
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def by_clap(candidates: Sequence[Request], config: ModelConfig) -> bool:
    """Tell whether the model's latent CLAP ranks these: there are several, it has one, and the prompt says anything."""
    return len(candidates) > 1 and config.clap is not None and bool(candidates[0].items[0].prompt.strip())


def choose(
    candidates: Sequence[Request],
    stream: Callable[[Request], Iterable[Event]],
    progress: Progress,
    cosine: Cosine | None,
) -> tuple[Request, list[Event], Grade]:
    """Make every candidate, one clip each -> the request of the best one, what came of it, and its score.

    ``cosine`` ranks them, where there is one; else the checks do. Only the best one so far stays in memory.
    """
    scores: list[Grade] = []
    kept: tuple[Request, Generation] | None = None
    for number, request in enumerate(candidates, start=1):
        *_, last = stream(request)
        assert isinstance(last, Finished)
        found = grade(last.generation, 0)
        scores.append(found if cosine is None else replace(found, clap=round(cosine(last.generation), 6)))
        if best(scores) == len(scores) - 1:
            kept = request, last.generation
        if len(candidates) > 1:
            progress.line(f"try {number}: seed {request.items[0].seed}, {_text(scores[-1])}")
    assert kept is not None
    request, generation = kept
    events: list[Event] = [AudioChunk(item=0, start=0, audio=generation.audio[0]), Finished(generation=generation)]
    return request, events, scores[best(scores)]


def report_grade(found: Grade, candidates: int, *, to_pipe: bool) -> None:
    """Print what the checks and a latent CLAP say of a file, which of them chose it, and what was heard."""
    write = say if to_pipe else report
    if candidates > 1:
        judge = "the checks" if found.clap is None else "the model's latent CLAP, among those that passed the checks"
        write(labelled("best", f"of {candidates} by {judge}", _LABEL))
    write(labelled("score", _text(found).removeprefix("score "), _LABEL))
    for name, text in found.heard.items():
        write(labelled(name, text, _LABEL))


def _text(found: Grade) -> str:
    checks = ", ".join(f"{name} {value:.2f}" for name, value in found.checks.items())
    clap = "" if found.clap is None else f", CLAP {found.clap:.3f}"
    return f"score {found.total:.3f} ({checks}){clap}"
