"""Every citation in the code leads to a place in docs/, and none leads out of the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PRODUCT = ("sa3_mlx", "sa3_torch", "convert", "benchmarks")
DOCUMENTS = {"A": "architecture", "B": "architecture", "P": "performance", "Q": "quantization", "T": "training"}

CITATION = re.compile(r"\[([ABPQT]\d[^\]\n]*)\]")  # [B12], [T4.2], [B4, B5], [B18-B21], [B41 to B44]
SECTION = re.compile(r"^(?:#+ |\*\*)(\d+[a-z]?(?:\.\d+)*)[ .]", re.MULTILINE)  # "## 4 Title", "**1.4.1 Title.** ..."
BEHAVIOUR = re.compile(r"^\*\*\[(B\d+)\]", re.MULTILINE)  # "**[B12] Title.** ..."
OUTSIDE = re.compile(r"\bspec/|\bshared/|\bspec(?:ification)?,? section|\bthe spec\b", re.IGNORECASE)


@cache
def _anchors(letter: str) -> frozenset[str]:
    text = (DOCS / f"{DOCUMENTS[letter]}.md").read_text(encoding="utf-8")
    if letter == "B":
        return frozenset(BEHAVIOUR.findall(text))
    return frozenset(letter + number for number in SECTION.findall(text))


def _lines(*folders: str) -> Iterator[tuple[str, str]]:
    """Yield "file:line" and the text of every line of code and data."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml", ".json") and path != Path(__file__):
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    yield f"{path.relative_to(ROOT)}:{number}", line


def _cited(text: str) -> list[str]:
    """What is between the brackets, one by one: "B18-B21, B41 to B44" are four."""
    return re.split(r", | to |-|–", text)


def test_every_citation_leads_to_a_place_in_the_documents() -> None:
    lost = [
        f"{place}: [{text}]"
        for place, line in _lines(*PRODUCT, "tests")
        for text in CITATION.findall(line)
        if not all(item[:1] in DOCUMENTS and item in _anchors(item[0]) for item in _cited(text))
    ]
    assert not lost, "\n".join(lost)


def test_nothing_cites_a_document_outside_of_the_repository() -> None:
    found = [f"{place}: {line.strip()}" for place, line in _lines(*PRODUCT) if OUTSIDE.search(line)]
    assert not found, "\n".join(found)


def test_tests_that_the_documents_name_are_there() -> None:
    """In tables as "`file`: `a`, `b`"; the word test_ before names, and the folders of training, are left out."""
    record, lost, named = (DOCS / "records" / "robustness.md").read_text(encoding="utf-8"), [], 0
    for name, tests in re.findall(r"`((?:\w+/)*test_\w+)`((?:(?::|,) `\w+`)*)", record):
        folder, _, file = name.rpartition("/")
        files = [
            path
            for path in (ROOT / "tests").rglob(f"{file}.py")
            if {folder or "train", folder or "evaluate"} & {*path.parts}
        ]
        text = files[0].read_text(encoding="utf-8") if len(files) == 1 else ""
        found = [test for test in re.findall(r"`(\w+)`", tests) if f"def test_{test}(" in text]
        named += len(found)
        if not text or len(found) != tests.count("`") // 2:
            lost.append(f"{name}{tests}")
    assert named > 80 and not lost, lost


@pytest.mark.parametrize("letter", DOCUMENTS)
def test_the_documents_have_anchors(letter: str) -> None:
    assert len(_anchors(letter)) > 5
