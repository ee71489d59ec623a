"""``benchmarks gpu``: everything in short on the CPU, and what is kept of a run that is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from benchmarks.__main__ import main
from benchmarks.gpu import whole
from benchmarks.gpu.command import PLAN
from benchmarks.gpu.journal import Journal, Row, Workbench
from sa3_mlx.cli.train.stages import SECTIONS as TRAININGS

TRAINED = [name for section in TRAININGS.values() for name in section]


def test_the_dry_run_goes_through_everything(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["gpu", "--dry-run", "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert found["format"] == "sa3-gpu/1" and found["short"] and list(found["sections"]) == list(PLAN)
    for name, section in found["sections"].items():
        errors = [row["error"] for row in section["rows"] if isinstance(row.get("error"), str)]
        assert section["rows"] and not section["cut"] and (not errors or name == "fp8"), (name, errors)
    sections = {name: section["rows"] for name, section in found["sections"].items()}
    assert {row["case"] for row in sections["correctness"]} > {"plain", "guided", "negative", "inpaint", "init"}
    assert all(row["latents"] < 1e-4 and row["repeats"] for row in sections["correctness"])
    assert {row["model"] for row in sections["latency"]} == {"small-music", "medium"}
    assert all(row["error"] < 1e-5 for row in sections["eager"] + sections["compiled"])
    assert {row["numbers"] for row in sections["same"]} >= {"float32", "products", "float16", "float16, graph"}
    assert [row["step"] for row in sections["training"]] == [
        *("masked, checkpointed", "apart, checkpointed", "checkpointed", "all kept"),
        *("AdamW, foreach", "AdamW, fused"),
    ]
    trained = {row["stage"].split()[0] for row in sections["stages"] if row.get("steps_per_second", 0) > 0}
    planned = {row["stage"].split()[0] for row in sections["stages"] if row.get("planned_bytes", 0) > 0}
    assert trained == planned == set(TRAINED)
    assert not any(row.get("not_finite") for row in sections["stages"])
    assert str(tmp_path) not in file.read_text()


def _bench(folder: Path) -> Workbench:
    return Workbench(device=torch.device("cpu"), short=True, folder=folder, golden=None, official=None, repeats=1)


def test_what_is_known_is_in_the_file_at_once_and_an_error_ends_its_section_only(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    record = Journal(file, {"date": "today"})

    def breaks(_bench: Workbench) -> Iterator[Row]:
        yield {"a": 1}
        assert json.loads(file.read_text())["sections"]["breaks"]["rows"] == [{"a": 1}]
        raise RuntimeError("out of memory\nat length")

    def endless(_bench: Workbench) -> Iterator[Row]:
        while True:
            yield {"b": 2}

    record.run("breaks", breaks, _bench(tmp_path), 5)
    record.run("endless", endless, _bench(tmp_path), 0.0)
    found = json.loads(file.read_text())["sections"]
    assert (
        found["breaks"]["rows"] == [{"a": 1}, {"error": "RuntimeError: out of memory"}] and not found["breaks"]["cut"]
    )
    assert found["endless"]["rows"] == [{"b": 2}] and found["endless"]["cut"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an NVIDIA GPU")
def test_without_a_gpu_only_the_dry_run_makes_sense() -> None:
    result = CliRunner().invoke(main, ["gpu"])
    assert result.exit_code == 2 and "finds no CUDA device" in result.output
    result = CliRunner().invoke(main, ["gpu", "--dry-run", "--only", "speed"])
    assert result.exit_code == 2 and "no section is called 'speed'" in result.output


def test_outputs_of_the_official_code_are_compared_where_they_are(golden: Path, tmp_path: Path) -> None:
    """With a limit of 1 or less, as ``sa3 verify`` has it."""
    if not (golden / "tiny-s" / "manifest.json").is_file():
        pytest.skip("no folder of reference outputs beside the checkout")
    rows = [*whole.goldens(_bench(tmp_path), golden / "tiny-s")]
    assert {row["area"] for row in rows} == {"dit", "guidance", "same", "samplers"}
    assert all(0 < row["error"] < 1e-3 for row in rows)
