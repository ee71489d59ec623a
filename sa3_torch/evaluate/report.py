"""Report an evaluation: a table for people, report.json for machines, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.common.files.atomic import new_file, write_json, write_text
from sa3_mlx.common.version import version
from sa3_torch.evaluate.measures.flow import FlowLosses
from sa3_torch.evaluate.measures.frechet import ENOUGH

from .comparison import ComparisonRow
from .real import Real
from .run import EvaluateOptions

FORMAT = "sa3-evaluation/2"
# measure -> (title, factor, digits); shares are shown in percent; FD: to real clips, or to these after the autoencoder
COLUMNS = {
    "frechet_judge": ("FD judge", 1, 2),
    "frechet_judge_rebuilt": ("FD rebuilt", 1, 2),
    "frechet_clap": ("FD clap", 1, 4),
    "frechet_clap_rebuilt": ("FD clap rebuilt", 1, 4),
    "all": ("all right %", 100, 1),
    "class": ("class %", 100, 1),
    "notes_pitch": ("pitch %", 100, 1),
    "notes_instrument": ("instrument %", 100, 1),
    "chords_name": ("chord %", 100, 1),
    "clap_own": ("clap cosine", 1, 3),
    "clap_first": ("clap first %", 100, 1),
    "diversity": ("diversity", 1, 2),
    "copies": ("near copies %", 100, 1),
    "kept_error": ("kept error", 1, 4),
    "seam": ("seam", 1, 2),
    "silent": ("silent %", 100, 1),
    "not_finite": ("NaN %", 100, 1),
    "clipped": ("clipped %", 100, 1),
    "sample_seconds_per_clip": ("s per clip", 1, 3),
}


def report(
    rows: Sequence[ComparisonRow],
    real: Real,
    options: EvaluateOptions,
    seeds: int,
    flow: Mapping[str, FlowLosses],
    one_step: Mapping[str, Sequence[float]],
    teacher: str | None,
) -> dict[str, Any]:
    """Return all results as JSON values."""
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).date().isoformat(),
        "version": version(),
        "options": asdict(options),
        "seeds": seeds,
        "enough_clips": options.clips >= ENOUGH,
        "real": real.about,
        "rows": [row.to_dict(rows[0]) for row in rows],
        "flow": {
            name: asdict(found) | {"wiener_ratio": found.wiener_ratio, "zero_ratio": found.zero_ratio}
            for name, found in flow.items()
        },
        "one_step": {"teacher": teacher, "errors": {name: list(values) for name, values in one_step.items()}},
    }


def table(data: dict[str, Any]) -> str:
    """Lay out the rows of a report, then real clips, flow losses and one-step errors.

    Shares of right sounds have their 95 % interval by prompts and a star where the difference to the first row is
    clear; other measures have the spread over seeds.
    """
    rows = data["rows"]
    names = [name for name in COLUMNS if any(row["mean"].get(name) is not None for row in rows)]
    real = [_real_line(data["real"], names, kind) for kind in ("real", "autoencoder")]
    lines = [
        ["", *(COLUMNS[name][0] for name in names)],
        *([f"{row['model']} {row['setting']}", *(_cell(row, name) for name in names)] for row in rows),
        *real,
    ]
    text = _aligned(lines)
    if classes := _class_lines(rows):
        text += "\n\n" + _aligned(classes)
    if data["flow"]:
        text += "\n\n" + _aligned(_flow_lines(data["flow"]))
    if data["one_step"]["errors"]:
        found = [[name, _spread(values)] for name, values in data["one_step"]["errors"].items()]
        text += "\n\n" + _aligned([["one step", f"error against {data['one_step']['teacher']}"], *found])
    return text + "".join(f"\nnote: {note}" for note in notes(data))


def notes(data: dict[str, Any]) -> list[str]:
    """Return what to keep in mind when one reads the numbers."""
    found = []
    if not (data["enough_clips"] and data["real"]["enough"]):
        found.append(
            f"FD of {data['options']['clips']} generated and {data['real']['clips']} real clips: below {ENOUGH} it "
            "lies too high and is only for comparisons at the same number"
        )
    if data["options"]["prompts"] == "training":
        found.append("prompts and real clips are of the training data: to choose by, not to report")
    if any(row.get("interval") for row in data["rows"]):
        found.append("[]: 95 % interval by drawing prompts again; *: other than the first row; ±: spread over seeds")
    if (clips := data["real"].get("floor_clips")) is not None and clips < data["options"]["clips"]:
        found.append(f"the floor of FD is of {clips} real clips and as many others: of more it would lie lower")
    if data["seeds"] < 3:
        found.append(f"{data['seeds']} seed(s): the spread needs at least 3")
    if any(not np.isfinite(value) for row in data["rows"] for value in row["mean"].values() if value is not None):
        found.append("some measures are not finite")
    return found


def clear(difference: dict[str, float] | None) -> bool:
    """Return whether there is a difference whose interval leaves zero out."""
    return difference is not None and (difference["low"] > 0 or difference["high"] < 0)


def _cell(row: dict[str, Any], name: str) -> str:
    _, factor, digits = COLUMNS[name]
    mean, spread = row["mean"].get(name), row["spread"].get(name)
    if mean is None:
        return "-"
    if found := row.get("interval", {}).get(name):  # reports of before have none
        value, low, high = (f"{factor * found[key]:.{digits}f}" for key in ("value", "low", "high"))
        return f"{value} [{low}, {high}]{'*' if clear(row['to_first'].get(name)) else ''}"
    text = f"{factor * mean:.{digits}f}"
    return text if spread is None else f"{text} ±{factor * spread:.{digits}f}"


def _real_line(real: dict[str, Any], names: list[str], kind: str) -> list[str]:
    """Return floors of the distances and what the judge says of real clips, as they are or through the autoencoder."""
    judged = real[f"judge_{kind}"] or {}
    values = {name: judged.get(name) for name in names}
    for name in names:
        if name.startswith("frechet_"):
            values[name] = real[name]["real_halves" if kind == "real" else "autoencoder"]
    if kind == "real" and real["latent_clap"]:
        values |= {"clap_own": real["latent_clap"]["own"], "clap_first": real["latent_clap"]["first"]}
    floor = f"of {real['floor_clips']} and others" if "floor_clips" in real else "of two halves"
    title = f"real clips (FD: {floor})" if kind == "real" else "real clips, autoencoder"
    return [title, *("-" if (v := values[n]) is None else f"{COLUMNS[n][1] * v:.{COLUMNS[n][2]}f}" for n in names)]


CLASS_COLUMNS = {"shift": "shift of its mean", "tail": "tail, dB", "attack": "attack above 5 kHz, dB"}  # of ClassShift


def class_means(row: dict[str, Any], name: str) -> dict[str, float]:
    """Return a field of ``ClassShift`` by class, the mean over the seeds of a row that have the class."""
    seeds = [details.get("by_class", {}) for details in row["details"]]
    return {
        label: float(np.mean([found[label][name] for found in seeds if label in found])) for label in _classes([row])
    }


def _classes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the classes that a row has sounds of, by name; none in a report that was made without them."""
    return sorted({label for row in rows for details in row["details"] for label in details.get("by_class", {})})


def _class_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return lines on how the sounds of every class lie to the rebuilt clips of that class."""
    labels = _classes(rows)
    if not labels:
        return []
    lines = [["classes beside rebuilt clips", *labels]]
    for name, title in CLASS_COLUMNS.items():
        for row in rows:
            means, sign = class_means(row, name), "" if name == "shift" else "+"
            cells = (f"{means[label]:{sign}.1f}" if label in means else "-" for label in labels)
            lines.append([f"{title}: {row['model']} {row['setting']}", *cells])
    return lines


def _flow_lines(flow: dict[str, dict[str, Any]]) -> list[list[str]]:
    lines: list[list[str]] = []
    for name, found in flow.items():
        if not lines:
            lines.append(["flow-matching loss", *(f"t={t:g}" for t in found["times"]), "shuffled", "dropped"])
        for key in ("zero", "wiener_frame", "wiener_clip"):
            lines.append([f"{name}: {key.replace('_', ' ')}", *(f"{v:.3f}" for v in found[key]), "", ""])
        ratios = [found["shuffled_ratio"], found["dropped_ratio"]]
        shown = ["-" if ratio is None else f"x {ratio:.3f}" for ratio in ratios]
        lines.append([f"{name}: loss", *(f"{v:.3f}" for v in found["loss"]), *shown])
    return lines


def _spread(values: Sequence[float]) -> str:
    text = f"{np.mean(values):.3f}"
    return text if len(values) < 2 else f"{text} ±{np.std(values, ddof=1):.3f}"


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def save_report(folder: Path, data: dict[str, Any]) -> None:
    """Write ``report.json``, ``report.txt`` (the table) and ``report.png`` into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", data)
    write_text(folder / "report.txt", table(data) + "\n")
    with new_file(folder / "report.png") as partial:
        draw(partial, data)


def draw(path: Path, data: dict[str, Any]) -> None:
    """Draw bars with intervals, or the spread over seeds, for the main measures, and the loss over time beside its
    baselines."""
    from matplotlib.figure import Figure

    rows, labels = data["rows"], [f"{row['model']}\n{row['setting']}" for row in data["rows"]]
    shown = ("frechet_judge", "frechet_judge_rebuilt", "frechet_clap", "all", "clap_own", "diversity", "copies", "seam")
    names = [name for name in shown if any(row["mean"].get(name) is not None for row in rows)]
    classes = _classes(rows)
    count = len(names) + bool(classes) + bool(data["flow"])
    columns = min(3, count)
    height = -(-count // columns)
    figure = Figure(figsize=(max(4.5, 1.2 * len(rows)) * columns, 3.4 * height))
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        title, factor, _ = COLUMNS[name]
        means = [factor * (row["mean"].get(name) or 0.0) for row in rows]
        spreads = factor * np.transpose([_reach(row, name) for row in rows])
        panel.bar(labels, means, width=0.6, yerr=spreads, capsize=4, color=[f"C{i}" for i in range(len(rows))])
        for (value, text), style in zip(_references(name, data["real"]), ("--", ":"), strict=False):
            panel.axhline(factor * value, color="0.2", linestyle=style, label=text)
        panel.set_title(title)
        panel.tick_params(axis="x", labelsize=7)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    if classes:
        _draw_classes(panels[len(names)], rows, classes)
    if data["flow"]:
        _draw_flow(panels[count - 1], data["flow"])
    for panel in panels[count:]:
        panel.set_visible(False)
    figure.suptitle(f"{data['options']['clips']} clips, {data['seeds']} seeds, {data['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=100, format="png")


def _reach(row: dict[str, Any], name: str) -> tuple[float, float]:
    """Return how far below and above a bar its interval reaches; without one, the spread over seeds."""
    if found := row.get("interval", {}).get(name):
        return max(row["mean"][name] - found["low"], 0.0), max(found["high"] - row["mean"][name], 0.0)
    spread = row["spread"].get(name) or 0.0
    return spread, spread


def _draw_classes(panel: Any, rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> None:
    """Draw a bar for every class and row: the shift of the class's mean."""
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        means = class_means(row, "shift")
        places = np.arange(len(classes)) + (i - (len(rows) - 1) / 2) * width
        panel.bar(
            places,
            [means.get(label, 0.0) for label in classes],
            width=width,
            color=f"C{i}",
            label=f"{row['model']} {row['setting']}",
        )
    panel.set_xticks(range(len(classes)), classes, fontsize=7, rotation=30)
    panel.set_title("class means: squared distance to rebuilt clips")
    panel.legend(fontsize=7)


def _references(name: str, real: dict[str, Any]) -> list[tuple[float, str]]:
    if name.startswith("frechet_"):
        found = [(real[name]["real_halves"], "real: two halves"), (real[name]["autoencoder"], "autoencoder")]
        return [(value, text) for value, text in found if value is not None]
    if name == "all" and real["judge_real"]:
        return [(real["judge_real"]["all"], "real"), (real["judge_autoencoder"]["all"], "autoencoder")]
    if name == "clap_own":
        return [(real["latent_clap"]["own"], "real")]
    return {"diversity": [(1.0, "real")], "copies": [(0.05, "chance")], "seam": [(1.0, "real")]}.get(name, [])


def _draw_flow(panel: Any, flow: dict[str, dict[str, Any]]) -> None:
    for number, (name, found) in enumerate(flow.items()):
        panel.plot(found["times"], found["loss"], marker="o", color=f"C{number}", label=name)
        wiener = list(map(min, found["wiener_frame"], found["wiener_clip"]))
        panel.plot(found["times"], wiener, linestyle="--", color="0.3", label=None if number else "Wiener")
        panel.plot(found["times"], found["zero"], linestyle=":", color="0.3", label=None if number else "zero")
    panel.set(title="flow-matching loss", xlabel="t (1 is noise)", ylim=(0, None))
    panel.legend(fontsize=7)
