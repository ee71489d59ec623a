"""Show progress bars on stderr: text, steps, decoding. They are silent when asked, and where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.terminal import one_line, say

if TYPE_CHECKING:
    from tqdm import tqdm

    from sa3_mlx.common.generation.events import Event

_BAR = "{desc:<7} {percentage:3.0f}% |{bar:30}| {n:.4g}/{total:.4g} {unit} [{elapsed}<{remaining}]"


class Progress:
    """Print lines and bars, unless ``quiet``."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def line(self, text: str) -> None:
        """Print one line for people, on stderr."""
        if not self.quiet:
            say(text)

    def bar(self, name: str, total: float, unit: str, *, delay: float = 0) -> tqdm:
        """Return a bar to ``update`` and ``close``, which appears after ``delay`` seconds."""
        from tqdm import tqdm

        disable = True if self.quiet else None  # None: tqdm looks whether stderr is a terminal
        return tqdm(
            desc=one_line(name),
            total=total,
            unit=unit,
            disable=disable,
            bar_format=_BAR,
            dynamic_ncols=True,
            delay=delay,
        )

    @contextmanager
    def tensors(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        """Yield a function that takes how many bytes of how many are written, and moves a bar."""
        bars: list[tqdm] = []

        def show(done: int, total: int, _tensor: str) -> None:
            if not bars:
                bars.append(self.bar(name, total / 1e6, "MB"))
            bars[0].update(done / 1e6 - bars[0].n)

        try:
            yield show
        finally:
            for bar in bars:
                bar.close()

    @contextmanager
    def watch(self, request: Request, sample_rate: int) -> Iterator[Callable[[Event], None]]:
        """Yield a function that takes every event of a run and moves the bars."""
        from sa3_mlx.common.generation.events import AudioChunk, Conditioned, Stepped

        current = self.bar("text", 1, "prompt")

        def next_bar(name: str, total: float, unit: str) -> None:
            nonlocal current
            current.update((current.total or 0) - current.n)
            current.close()
            current = self.bar(name, total, unit)

        def watch(event: Event) -> None:
            if isinstance(event, Conditioned):
                next_bar("steps", event.sigmas.shape[1] - 1, "steps")
            elif isinstance(event, Stepped):
                current.update(1)
                if event.index + 1 == event.steps:
                    next_bar("decode", sum(item.seconds for item in request.items), "s")
            elif isinstance(event, AudioChunk):
                current.update(len(event.audio) / sample_rate)

        try:
            yield watch
        finally:
            current.close()
