"""The table of the README tells measured, published and modelled numbers apart, and has no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.options import RESULTS
from benchmarks.speed.latency import FORMAT
from benchmarks.speed.report import (
    BEGIN,
    END,
    MODELLED,
    PUBLISHED_FILE,
    markdown,
    measured_rows,
    modelled_rows,
    put_into,
    read_results,
)

ROOT = Path(__file__).resolve().parents[3]
LENGTHS = (5.0, 30.0, 120.0, 380.0)


def _write(folder: Path, day: str, total: float, **changes: object) -> None:
    description = {"chip": "Apple M4", "cpu_cores": "10", "gpu": "Apple M4", "gpu_cores": 10}
    entry = {
        "model": "small-music",
        "weights": "random",
        "recipe": None,
        "backend": "mlx",
        "compiled": False,
        "device": "gpu",
        "dtype": "float16",
        "text_dtype": "auto",
        "seconds": 30.0,
        "steps": 8,
        "sampler": "pingpong",
        "guidance": 1.0,
        "date": day,
        "machine": "apple-m4",
        "busy": False,
        "warm": {"total": {"p50": total}},
        "cold": {"wall": {"p50": 2 * total}},
    }
    data = {"format": FORMAT, "machine": description, "date": day, "entries": [entry | changes]}
    (folder / f"latency-apple-m4-{day}.json").write_text(json.dumps(data))


def test_the_newest_measurement_counts(tmp_path: Path):
    _write(tmp_path, "2026-01-02", 1.25)
    _write(tmp_path, "2026-01-01", 9.0)
    warm, cold = measured_rows(read_results(tmp_path), "small-music")
    assert warm.cells == {30.0: 1.25} and cold.cells == {30.0: 2.5}
    assert warm.machine == "Apple M4, 10 GPU cores" and "random weights" in warm.run and warm.kind == "measured here"
    assert "float16" in warm.run and warm.run.endswith("warm") and cold.run.endswith("cold")
    text = markdown(tmp_path, LENGTHS)
    assert "| 1.25 |" in text and "| 2.50 |" in text and "9.00" not in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 50}, "50 steps"),
        ({"guidance": 7.0}, "guidance 7"),
        ({"recipe": "8bit", "weights": "sha256:1"}, "8bit"),
    ],
)
def test_what_was_not_run_alike_has_a_row_of_its_own(tmp_path: Path, changes: dict[str, object], named: str):
    _write(tmp_path, "2026-01-01", 1.0)
    _write(tmp_path, "2026-01-02", 999.0, **changes)
    rows = measured_rows(read_results(tmp_path), "small-music")
    assert len(rows) == 4
    assert {row.cells[30.0] for row in rows if named in row.run} == {999.0, 1998.0}
    assert {row.cells[30.0] for row in rows if named not in row.run} == {1.0, 2.0}


def test_times_of_a_busy_machine_are_left_out(tmp_path: Path):
    _write(tmp_path, "2026-01-01", 1.0, busy=True)
    assert not measured_rows(read_results(tmp_path), "small-music")


def test_every_number_is_measured_published_or_modelled(tmp_path: Path):
    """Without results, every number of the table is in the file of published figures or is modelled."""
    figures = json.loads(PUBLISHED_FILE.read_text())["figures"]
    published = [seconds for figure in figures for seconds in figure["seconds"].values()]
    for line in markdown(tmp_path, LENGTHS).splitlines():
        if not line.startswith("| ") or line.startswith("| machine"):
            continue
        *cells, kind = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [float(cell) for cell in cells[2:] if cell]
        assert kind == "modelled" or kind.startswith("published by ["), line
        if kind != "modelled":
            assert all(any(abs(n - p) <= 0.05 * (n >= 10) for p in published) for n in numbers), line


def test_every_published_figure_has_a_source():
    for figure in json.loads(PUBLISHED_FILE.read_text())["figures"]:
        assert figure["source"] and figure["url"].startswith("https://") and figure["seconds"]
        assert figure["model"] in ("small-music", "medium")


def test_modelled_rows_keep_to_what_a_model_can_make():
    small, medium = modelled_rows("small-music", LENGTHS), modelled_rows("medium", LENGTHS)
    assert len(small) == len(medium) == len(MODELLED)
    assert all(380.0 not in row.cells for row in small) and all(380.0 in row.cells for row in medium)


def test_other_files_are_refused(tmp_path: Path):
    (tmp_path / "latency-x.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not a result of"):
        read_results(tmp_path)


def test_the_table_goes_between_the_marks(tmp_path: Path):
    path = tmp_path / "performance.md"
    path.write_text(f"before\n{BEGIN}\nolder table\n{END}\nafter\n")
    (tmp_path / "results").mkdir()
    args = ["report", "--results", str(tmp_path / "results"), "--into", str(path)]
    assert CliRunner().invoke(main, args).exit_code == 0
    text = path.read_text()
    assert (
        text.startswith(f"before\n{BEGIN}\n8 steps")
        and text.endswith(f"\n{END}\nafter\n")
        and "older table" not in text
    )
    with pytest.raises(ValueError, match="needs one line"):
        put_into("no marks", "table")
    path.write_text("no marks")
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and "needs one line" in result.output and path.read_text() == "no marks"


def test_the_page_has_the_table_of_the_results():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    fresh = put_into(text, markdown(RESULTS, LENGTHS))
    assert fresh == text, "run: python -m benchmarks report --into docs/performance.md"


def test_results_name_no_one():
    for path in RESULTS.glob("*.json"):
        assert not re.search(r"/(home|Users|root|tmp|work)/", path.read_text(encoding="utf-8")), path
