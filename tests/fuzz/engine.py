"""Fuzz one target: hypothesis draws damaged inputs, those that reach new lines are damaged further."""

from __future__ import annotations

import ast
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from .mutate import MUTATIONS
from .target import ROOT, Case, Finding, Form, Lines, Target, check, remove

ROUND = 50  # examples between two looks at the clock; the corpus grows between rounds
OTHER_FORMS: tuple[Form, ...] = ("missing", "folder", "pipe", "loop")


@dataclass
class Result:
    """What fuzzing a target gave."""

    target: str
    examples: int = 0
    seconds: float = 0.0
    corpus: int = 0  # inputs that reached new lines, the valid ones included
    lines: int = 0  # of the target's files, that were executed
    of_lines: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, other: Result) -> None:
        """Add what another run of the same target gave; its corpus began from nothing."""
        self.examples += other.examples
        self.seconds += other.seconds
        self.corpus, self.lines = max(self.corpus, other.corpus), max(self.lines, other.lines)
        self.of_lines = other.of_lines
        for finding in other.findings.values():
            self.note(finding.signature, finding.case, finding.detail, finding.count)

    def note(self, signature: str, case: Case, detail: str, count: int = 1) -> None:
        """Count a finding and keep its shortest input."""
        known = self.findings.setdefault(signature, Finding(signature, case, detail, count=0))
        known.count += count
        if len(case.data) < len(known.case.data):
            known.case, known.detail = case, detail


class Fuzzer:
    """Fuzz a target in an empty folder; equal seeds draw equal inputs. ``watch`` is told every case first."""

    def __init__(self, target: Target, folder: Path, *, watch: Callable[[Case], None] | None = None) -> None:
        self.target, self.folder, self._watch = target, folder, watch
        self._kinds = target.make(folder)
        self._whole = {name: (folder / name).read_bytes() for name in self._kinds}
        self._corpus = {name: [data] for name, data in self._whole.items()}
        self._covered = frozenset(str(ROOT / name) for name in target.covers)
        self._lines = Lines(self._covered)
        self.result = Result(target.name)

    def run(self, *, seed: int, seconds: float = math.inf, examples: float = math.inf) -> Result:
        """Read what is valid, then damaged inputs until the time or the examples are spent."""
        result, start, number = self.result, time.monotonic(), 0
        for name, data in self._whole.items():
            self.read(Case(name, data))
        while time.monotonic() - start < seconds and result.examples < examples:
            self._round(seed * 1_000_003 + number, int(min(ROUND, examples - result.examples)))
            number += 1
        statements = {(name, line) for name in self._covered for line in _statements(Path(name))}
        result.seconds = time.monotonic() - start
        result.corpus = sum(map(len, self._corpus.values()))
        result.lines, result.of_lines = len(self._lines.seen & statements), len(statements)
        return result

    def read(self, case: Case) -> None:
        """Read a case, note what must not happen, and put the valid file back."""
        if self._watch is not None:
            self._watch(case)
        try:
            problem = check(self.target, self.folder, case, self._lines)
        finally:
            remove(self.folder / case.file)
            (self.folder / case.file).write_bytes(self._whole[case.file])
        if problem is not None:
            self.result.note(problem[0], case, problem[1])

    def _round(self, seed: int, size: int) -> None:
        fresh: list[Case] = []

        @seeded(seed)
        @settings(
            max_examples=size,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def example(data: Any) -> None:
            case, known = self._draw(data.draw), len(self._lines.seen)
            self.read(case)
            self.result.examples += 1
            if len(self._lines.seen) > known and case.form == "bytes":
                fresh.append(case)

        example()
        for case in fresh:
            self._corpus[case.file].append(case.data)

    def _draw(self, draw: Any) -> Case:
        name = draw(st.sampled_from(sorted(self._kinds)))
        if self.target.forms and draw(st.integers(0, 39)) == 0:
            return Case(name, b"", draw(st.sampled_from(OTHER_FORMS)))
        return Case(name, MUTATIONS[self._kinds[name]](draw, draw(st.sampled_from(self._corpus[name]))))


def _statements(path: Path) -> set[int]:
    """Return the lines of a file on which a statement inside of a function begins."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    inside = [
        inner for node in functions for inner in ast.walk(node) if isinstance(inner, ast.stmt) and inner is not node
    ]
    texts = [node for node in inside if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return {node.lineno for node in inside} - {node.lineno for node in texts}
