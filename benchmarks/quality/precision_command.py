"""``python -m benchmarks precision``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from benchmarks.speed.latency import RESULTS
from benchmarks.speed.machine import describe
from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.quant.calibration import usual_prompts
from sa3_mlx.common.quant.recipes import RECIPES
from sa3_mlx.quantize import QuantizeOptions, quantize_model

from .precision import Bench, Row, SoundsPlan, table, to_json
from .quality import GUIDANCE, SAMPLER, STEPS, chosen_sampling

FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ROWS = (
    "fp32,fp16,bf16,8bit,6bit,5bit,4bit,3bit,6bit-gptq,5bit-gptq,4bit-gptq,3bit-gptq,mixed-5,mixed-4.5,mixed-4.5-gptq"
)


@click.command()
@click.argument("model")
@click.option("--rows", default=ROWS, show_default=True, help="Precisions and recipes of `sa3 quantize`.")
@click.option(
    "--also",
    "also",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of a quantized version, such as one from `sa3 train quantize`; repeatable.",
)
@STEPS
@SAMPLER
@GUIDANCE
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True, help="Sounds per prompt.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=None,
    help="Folder made by `sa3 data render`, for distances to real sounds.",
)
@click.option("--data-seed", type=int, default=0, show_default=True, help="Seed of `sa3 data render`.")
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Default: benchmarks/results."
)
def precision(
    model: str,
    rows: str,
    also: tuple[Path, ...],
    steps: int | None,
    sampler: str | None,
    guidance: float | None,
    seeds: int,
    data: Path | None,
    data_seed: int,
    results: Path,
) -> None:
    """What every precision of MODEL costs in quality and saves in bytes: one table."""
    found_model = find_model(model, generates=True)
    folder, config = found_model.folder, found_model.config
    names = rows.split(",")
    if unknown := [name for name in names if name not in (*FLOATS, *RECIPES)]:
        raise click.UsageError(f"no row {unknown[0]!r}; rows: {', '.join((*FLOATS, *RECIPES))}")
    from sa3_torch.pipeline import Pipeline

    sampling = chosen_sampling(Pipeline.load(folder), steps, sampler, guidance)
    plan = SoundsPlan(sampling=sampling, seeds=seeds, data_seed=data_seed)
    bench = Bench(folder, plan, data)
    day = datetime.now(UTC).date().isoformat()
    about: dict[str, Any] = {
        "format": "sa3-precision/1",
        "date": day,
        "machine": describe("torch").to_dict(),
        "model": config.name,
        "weights": fingerprint(folder, config),
        "prompts": len(bench.prompts),
        "setting": asdict(plan),
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"precision-{config.name}-{day}.json"
    found: list[Row] = []
    for row in _rows(bench, folder, names, also):  # stored after every row: a long table can be stopped
        found.append(row)
        click.echo(table([row]), err=True)
        path.write_text(json.dumps(about | {"rows": to_json(found)}, indent=1) + "\n", encoding="utf-8")
    click.echo(table(found))
    click.echo(f"stored in {path}", err=True)
    click.echo(json.dumps(about | {"rows": to_json(found)}))


def _rows(bench: Bench, folder: Path, names: list[str], also: tuple[Path, ...]) -> Iterator[Row]:
    yield bench.floor()
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            place = folder if name in FLOATS else _quantized(folder, Path(work) / name, name)
            yield bench.row(name, place, FLOATS.get(name, "float32"))
    for place in also:
        yield bench.row(_recipe_of(place), place, "float32")


def _quantized(folder: Path, out: Path, name: str) -> Path:
    from sa3_mlx.common.model.config import ModelConfig

    prompts = usual_prompts(open_tokenizer(folder, ModelConfig.load(folder)))
    options = QuantizeOptions(source=folder, out=out, name=name, recipe=RECIPES[name], prompts=prompts, force=False)
    report = quantize_model(options, lambda *_: None)
    click.echo(str(report), err=True)
    return out


def _recipe_of(folder: Path) -> str:
    report = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
    return str(report["recipe"])
