"""``benchmarks best-of``: what each way keeps of made-up candidates, and the differences of the ways."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the judge needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from benchmarks.music.best_of import Candidate, chosen, table
from sa3_mlx.common.measures.choice import Grade


def candidate(*, right: bool, clap: float, total: float = 1.0, named: bool = False) -> Candidate:
    verdicts = {"all": right, **({"notes_pitch": right} if named else {})}
    return Candidate(grade=Grade(total=total, checks={"sound": total}, clap=clap), right=verdicts)


def test_every_way_keeps_its_own() -> None:
    group = [
        candidate(right=False, clap=0.1, total=0.5),
        candidate(right=False, clap=0.2),
        candidate(right=True, clap=0.3, total=0.9),
        candidate(right=True, clap=0.9, total=0.0),
    ]
    assert chosen(group, "all") == {"one": 0, "checks": 0, "clap": 1, "any": 1}


def test_shares_and_paired_differences() -> None:
    good = [candidate(right=False, clap=0.1, named=True), candidate(right=True, clap=0.2, named=True)]
    bad = [candidate(right=False, clap=0.1), candidate(right=False, clap=0.2)]
    found = table([("a", good), ("b", bad), ("a", good), ("c", good)], "all")
    assert found["groups"] == 4 and found["shares"] == {"one": 0, "checks": 0, "clap": 0.75, "any": 0.75}
    gap = found["differences"]["clap - checks"]
    assert gap["value"] == 0.75 and gap["prompts"] == 3 and gap["low"] <= 0.75 <= gap["high"]
    assert found["differences"]["any - clap"]["value"] == 0
    named = table([("a", good), ("b", bad), ("c", good)], "notes_pitch")
    assert named["groups"] == 2 and named["shares"]["clap"] == 1  # of those that say anything of it
