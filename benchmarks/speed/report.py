"""Write the table of docs/performance.md, measured, published, modelled: ``python -m benchmarks report``.

Measured rows come from ``results/*.json``, published ones with their source from ``published.json``, modelled ones
from ``roofline``. A cell without a number of one of these kinds stays empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.options import RESULTS, parse_lengths
from sa3_mlx.common.chips import Chip
from sa3_mlx.common.files.atomic import write_text
from sa3_mlx.common.model.presets import PRESETS

from .latency import FORMAT, key
from .roofline import floor
from .worker import USUAL

PUBLISHED_FILE = RESULTS.with_name("published.json")
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
MODELLED = ("M4", "M4 Pro", "H100", "H200")
TOKENS = 24
STEPS = 8  # of the heading


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """Hold a row of the table."""

    machine: str
    run: str
    cells: Mapping[float, float]  # length of the clip -> time, both in seconds
    kind: str  # "measured here", "published by ...", "modelled"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the entries of all files, the newest of each measurement, with their machine's description.

    Raises ValueError for a file that is not a result.
    """
    newest: dict[tuple[object, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("latency-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"{path}: not a result of 'python -m benchmarks latency'")
        for entry in data["entries"]:
            same = (entry["machine"], *key(entry))
            if same not in newest or newest[same]["date"] <= entry["date"]:
                newest[same] = entry | {"description": data["machine"]}
    return list(newest.values())


def measured_rows(entries: Sequence[dict[str, Any]], model: str) -> list[ReportRow]:
    """Make a row each for cold and for warm runs of everything that was measured alike on a machine without other
    work."""
    groups: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    for entry in entries:
        if entry["model"] != model or entry["busy"]:
            continue
        name = (_machine(entry["description"]), _run(entry))
        cells = groups.setdefault(name, {"warm": {}, "cold": {}})
        cells["warm"][entry["seconds"]] = entry["warm"]["total"]["p50"]
        if "cold" in entry:
            cells["cold"][entry["seconds"]] = entry["cold"]["wall"]["p50"]
    return [
        ReportRow(machine=machine, run=f"{run}, {state}", cells=cells, kind="measured here")
        for (machine, run), states in sorted(groups.items())
        for state, cells in states.items()
        if cells
    ]


def _run(entry: Mapping[str, Any]) -> str:
    """Say what was run, with whatever differs from the heading."""
    parts = ["sa3", _backend(entry), entry["dtype"]]
    parts += [f"recipe {entry['recipe']}"] if entry["recipe"] else []
    parts += ["random weights"] if entry["weights"] == "random" else []
    parts += [f"{entry['steps']} steps"] if entry["steps"] != STEPS else []
    parts += [f"tuned ({entry['ways']})"] if entry.get("ways", USUAL) != USUAL else []
    parts += [f"guidance {entry['guidance']:g}"] if entry["guidance"] != 1 else []
    return ", ".join(parts)


def _machine(description: Mapping[str, Any]) -> str:
    if description["gpu"]:
        cores = f", {description['gpu_cores']} GPU cores" if description["gpu_cores"] else ""
        return f"{description['gpu']}{cores}"
    return f"{description['chip']}, {description['cpu_cores']} cores"


def _backend(entry: Mapping[str, Any]) -> str:
    name = {"mlx": "MLX", "torch": "PyTorch"}[entry["backend"]] + (" compiled" if entry["compiled"] else "")
    return f"{name} on the {entry['device'].upper()}" if entry["device"] in ("cpu", "gpu", "mps") else name


def published_rows(model: str) -> list[ReportRow]:
    """Make a row of everything that others published."""
    figures = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))["figures"]
    return [
        ReportRow(
            machine=figure["chip"],
            run=f"{figure['run']}" + (f" ({figure['note']})" if figure["note"] else ""),
            cells={float(length): seconds for length, seconds in figure["seconds"].items()},
            kind=f"published by [{figure['source']}]({figure['url']})",
        )
        for figure in figures
        if figure["model"] == model
    ]


def modelled_rows(model: str, lengths: Sequence[float]) -> list[ReportRow]:
    """Make a row of floors for every chip, as far as the model can make clips of these lengths."""
    config, rows = PRESETS[model], []
    steps = config.usual_sampling.steps
    for chip in Chip.load_all():
        if chip.name in MODELLED:
            cells = {
                length: floor(config, length, chip, tokens=TOKENS, steps=steps, tf32=True)
                for length in lengths
                if length <= config.max_seconds
            }
            cores = f", {chip.gpu_cores} GPU cores" if chip.gpu_cores else ""
            maker = "NVIDIA" if chip.name.startswith("H") else "Apple"
            rows.append(
                ReportRow(
                    machine=f"{maker} {chip.name}{cores}",
                    run="floor of arithmetic and bandwidth",
                    cells=cells,
                    kind="modelled",
                )
            )
    return rows


def markdown(folder: Path, lengths: Sequence[float]) -> str:
    """Make a table per model from the results in ``folder``."""
    entries, parts = read_results(folder), [HEAD]
    for model in ("small-music", "medium"):
        rows = measured_rows(entries, model) + published_rows(model) + modelled_rows(model, lengths)
        parts.append(f"**{model}**, seconds for a clip of this length:\n\n{_table(rows, lengths)}")
    demo = measured_rows(entries, "demo")
    if demo:
        parts.append(f"**demo**, the model inside the package:\n\n{_table(demo, _lengths(demo))}")
    return "\n\n".join(parts) + "\n"


HEAD = (
    f"{STEPS} steps, no guidance, where a row says nothing else. "
    "*Measured here* means by `python -m benchmarks latency` on the machine of the row; "
    "*published by* is what its authors say, not measured again; *modelled* is the least time that the chip's nominal "
    "peaks of arithmetic and bandwidth allow (16-bit DiT, fp32 autoencoder, as TF32 where the chip has it), which real "
    "programs exceed. A chip without a measured row has not been measured. "
    "[How to measure yours](#7-measuring-a-mac)."
)


def _lengths(rows: Sequence[ReportRow]) -> list[float]:
    return sorted({length for row in rows for length in row.cells})


def _table(rows: Sequence[ReportRow], lengths: Sequence[float]) -> str:
    shown = [row for row in rows if any(length in row.cells for length in lengths)]
    lines = ["| machine | run | " + " | ".join(f"{length:g} s" for length in lengths) + " | |"]
    lines.append("|---|---|" + "---:|" * len(lengths) + "---|")
    for row in shown:
        cells = [_number(row.cells[length]) if length in row.cells else "" for length in lengths]
        lines.append(f"| {row.machine} | {row.run} | {' | '.join(cells)} | {row.kind} |")
    return "\n".join(lines)


def _number(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 0.1 else f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def put_into(text: str, table: str) -> str:
    """Return ``text`` with the table between its two marks. Raises ValueError for a text without them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file needs one line {BEGIN!r} and one {END!r} after it")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{table}{text[text.index(END) :]}"


@click.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=RESULTS,
    help="Default: benchmarks/results.",
)
@click.option("--seconds", "lengths", default="5,30,120,380", show_default=True, callback=parse_lengths, metavar="N,N")
@click.option(
    "--into",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Put it between the marks of this file, docs/performance.md, instead of printing it.",
)
def report(results: Path, lengths: tuple[float, ...], into: Path | None) -> None:
    """Print as Markdown what was measured here, published by others (with sources) and modelled, told apart."""
    table = markdown(results, lengths)
    if into is None:
        click.echo(table, nl=False)
        return
    try:
        text = put_into(into.read_text(encoding="utf-8"), table)
    except ValueError as error:
        raise click.UsageError(f"{into}: {error}") from error
    write_text(into, text)
    click.echo(f"{into} has the table of {results}")
