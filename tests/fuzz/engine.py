"""Fuzz one target: hypothesis draws damaged inputs, those that reach new lines are damaged further."""

from __future__ import annotations

import ast
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from sa3_mlx.common.files.atomic import write_json

from .mutate import MUTATIONS
from .target import ROOT, Case, Finding, Form, Lines, Target, check, remove

ROUND = 50  # examples between two looks at the clock; the corpus grows between rounds
OTHER_FORMS: tuple[Form, ...] = ("missing", "folder", "pipe", "loop")


@dataclass
class Result:
    """What fuzzing a target gave, in all runs that share a file of it."""

    target: str
    rounds: int = 0  # begun
    examples: int = 0
    seconds: float = 0.0
    processor: float = 0.0  # seconds of it, which a busy machine gives fewer of; with those of child processes
    corpus: int = 0  # inputs that reached new lines, the valid ones included
    lines: int = 0  # of the target's files, that were executed
    of_lines: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)

    def note(self, signature: str, case: Case, detail: str) -> None:
        """Count a finding and keep its shortest input."""
        known = self.findings.setdefault(signature, Finding(signature, case, detail, count=0))
        known.count += 1
        if len(case.data) < len(known.case.data):
            known.case, known.detail = case, detail

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"findings": [finding.to_dict() for finding in self.findings.values()]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        found = [Finding.from_dict(finding) for finding in data["findings"]]
        return cls(**data | {"findings": {finding.signature: finding for finding in found}})


@dataclass
class State:
    """Hold how far fuzzing a target is: its result, and the inputs to damage further, by the file that they are for."""

    result: Result
    corpus: dict[str, list[bytes]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, target: str) -> State:
        """Read what ``save`` left; without a file nothing was done yet."""
        if not path.is_file():
            return cls(Result(target))
        data = json.loads(path.read_text())
        corpus = {name: [text.encode("latin-1") for text in texts] for name, texts in data["corpus"].items()}
        return cls(Result.from_dict(data["result"]), corpus)

    def save(self, path: Path) -> None:
        corpus = {name: [data.decode("latin-1") for data in inputs] for name, inputs in self.corpus.items()}
        write_json(path, {"result": self.result.to_dict(), "corpus": corpus})


class Fuzzer:
    """Fuzz a target in an empty folder, on from a ``state`` where there is one; equal seeds draw equal inputs.

    ``watch`` is told every case first, ``keep`` the state after every round.
    """

    def __init__(
        self,
        target: Target,
        folder: Path,
        state: State | None = None,
        *,
        watch: Callable[[Case], None] | None = None,
        keep: Callable[[State], None] | None = None,
    ) -> None:
        self.target, self.folder, self._watch, self._keep = target, folder, watch, keep
        self._kinds = target.make(folder)
        self._whole = {name: (folder / name).read_bytes() for name in self._kinds}
        self.state = state or State(Result(target.name))
        self.result = self.state.result
        known = self.state.corpus
        self.state.corpus = {
            name: list(dict.fromkeys([data, *known.get(name, [])])) for name, data in self._whole.items()
        }
        self._covered = frozenset(str(ROOT / name) for name in target.covers)
        self._statements = {(name, line) for name in self._covered for line in _statements(Path(name))}
        self._lines = Lines(self._covered)

    def run(self, *, seed: int, seconds: float = math.inf, examples: float = math.inf) -> Result:
        """Read what reached new lines before, then damaged inputs until the time or the examples are spent."""
        result, start, before = self.result, time.monotonic(), (self.result.seconds, self.result.examples)
        spent = self.result.processor - _processor_seconds()
        for name, inputs in self.state.corpus.items():
            for data in inputs:
                self.read(Case(name, data))
        while result.seconds - before[0] < seconds and result.examples - before[1] < examples:
            left = before[1] + examples - result.examples
            result.rounds += 1
            self._round(seed * 1_000_003 + result.rounds - 1, int(min(ROUND, left)))
            result.seconds = before[0] + time.monotonic() - start
            result.processor = spent + _processor_seconds()
            result.corpus = sum(map(len, self.state.corpus.values()))
            result.lines, result.of_lines = len(self._lines.seen & self._statements), len(self._statements)
            if self._keep is not None:
                self._keep(self.state)
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
            self.state.corpus[case.file].append(case.data)

    def _draw(self, draw: Any) -> Case:
        name = draw(st.sampled_from(sorted(self._kinds)))
        if self.target.forms and draw(st.integers(0, 39)) == 0:
            return Case(name, b"", draw(st.sampled_from(OTHER_FORMS)))
        return Case(name, MUTATIONS[self._kinds[name]](draw, draw(st.sampled_from(self.state.corpus[name]))))


def _processor_seconds() -> float:
    """Return what this process and its finished children took of processors."""
    return sum(os.times()[:4])


def _statements(path: Path) -> set[int]:
    """Return the lines of a file on which a statement inside of a function begins."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    inside = [
        inner for node in functions for inner in ast.walk(node) if isinstance(inner, ast.stmt) and inner is not node
    ]
    texts = [node for node in inside if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return {node.lineno for node in inside} - {node.lineno for node in texts}
