"""Trainings of ``benchmarks gpu``: what fits one GPU of the eight that presets are for, and what is tried next."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from benchmarks.gpu import stages
from benchmarks.gpu.journal import Row, Workbench
from benchmarks.gpu.stages import OneGpu
from benchmarks.speed.full_scale import FULL_SCALE

CASES = {case.name: case for case in FULL_SCALE}


def bench(folder: Path, *, short: bool = False) -> Workbench:
    return Workbench(device=torch.device("cpu"), short=short, folder=folder, golden=None, official=None, repeats=1)


@pytest.mark.parametrize(
    ("name", "micro_batch", "micro_batches", "batch"),
    [
        ("pretrain medium", 16, 2, 32),  # 256 of 8 processes in 2
        ("posttrain medium", 2, 2, 4),  # in 16, of which 2 are taken
        ("autoencoder same-l", 8, 1, 8),
        ("lora released", 1, 1, 1),
        ("quantize medium", 4, 2, 8),
    ],
)
def test_one_gpu_takes_the_micro_batch_of_the_preset(
    name: str, micro_batch: int, micro_batches: int, batch: int, tmp_path: Path
) -> None:
    run = OneGpu.of(CASES[name], bench(tmp_path), 1)
    assert run is not None and (run.micro_batch, run.micro_batches) == (micro_batch, micro_batches)
    assert f"train.batch={batch}" in run.changes and run.of_preset[0] == micro_batch


def test_what_does_not_fit_is_tried_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps_of(run: OneGpu, _bench: Workbench) -> Row:
        if run.micro_batch > 4:
            raise torch.OutOfMemoryError
        return {"seconds": 1.0}

    monkeypatch.setattr(stages, "steps_of", steps_of)
    rows = [row for _, row in stages._measured(bench(tmp_path), CASES["pretrain medium"])]
    assert [(row["micro_batch"], row.get("out_of_memory"), row.get("seconds")) for row in rows] == [
        (16, True, None),
        (8, True, None),
        (4, None, 1.0),
    ]
    assert all(row["micro_batch_of_preset"] == 16 for row in rows)


def test_no_item_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps_of(_run: OneGpu, _bench: Workbench) -> Row:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stages, "steps_of", steps_of)
    rows = [row for _, row in stages._measured(bench(tmp_path), CASES["posttrain medium"])]
    assert [row["micro_batch"] for row in rows] == [2, 1] and all(row["out_of_memory"] for row in rows)


def test_what_breaks_in_a_stage_or_its_plan_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps_of(run: OneGpu, _bench: Workbench) -> Row:
        if run.case.stage == "pretrain":
            raise RuntimeError("no kernel\nfor this")
        return {"seconds": 2.0, "peak_bytes": 3}

    def planned(run: OneGpu) -> Row:
        if run.case.stage == "clap":
            raise ValueError("no plan")
        return {"planned_bytes": 2, "tflop": 4.0, "planned_seconds": 1.0}

    for name, value in {"steps_of": steps_of, "planned": planned, "by_part": lambda *_: iter(())}.items():
        monkeypatch.setattr(stages, name, value)
    rows = [*stages.stages(bench(tmp_path, short=True))]
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["stage"].split()[0], []).append(row)
    assert [row.get("error") for row in found["pretrain"]] == ["RuntimeError: no kernel"]
    assert found["clap"][1]["error"] == "ValueError: no plan"
    assert found["lora"][1] == {
        "stage": "lora demo",
        "micro_batch": 2,
        "planned_bytes": 2,
        "tflop": 4.0,
        "planned_seconds": 1.0,
        "peak_to_plan": 1.5,
        "tflops": 2.0,
        "seconds_to_plan": 2.0,
    }
