"""A picture of a run: its training terms, smoothed, and its validation measures, from ``log.jsonl``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.atomic import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 20  # logged rows in the running mean
_COLUMNS = 4  # of panels of measures
_COLORS, _STYLES = 10, ("-", "--", ":")
_NOT_TERMS = {
    "step",
    "seconds",
    "lr",
    "grad_norm",
    "skipped",
    "alarm",
    "revision",
    "steps_per_second",
    "items_per_second",
}
_LEVEL = re.compile(r"_(t\d[\d.]*)$")  # "flow_t0.5": such measures share a panel
_MOST_NAMES = 64  # beside a matrix


def plot_run(folder: Path, title: str) -> Path:
    """Draw ``folder/log.jsonl`` to ``folder/loss.png``, which is replaced; returns its path."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("validation/") or ("/" not in name and name not in _NOT_TERMS):
                series.setdefault(name, []).append((row["step"], value))
    terms = {name: points for name, points in series.items() if not name.startswith("validation/")}
    measures: dict[str, list[str]] = {}  # panel -> its series
    for name in series.keys() - terms.keys():
        measures.setdefault(_LEVEL.sub("", name), []).append(name)
    columns = min(_COLUMNS, max(1, len(measures)))
    below = -(-len(measures) // columns)
    figure = Figure(figsize=(max(10, 5 * columns), 4 + 3 * below))
    grid = figure.add_gridspec(1 + below, columns, height_ratios=[4, *[3] * below])
    _plot_terms(figure.add_subplot(grid[0, :]), terms)
    for place, title_of in enumerate(sorted(measures)):
        panel = figure.add_subplot(grid[1 + place // columns, place % columns])
        for name in sorted(measures[title_of]):
            steps, values = (np.array(column) for column in zip(*series[name], strict=True))
            panel.plot(steps, values, marker="o", markersize=3, label=name.removeprefix(title_of).lstrip("_"))
        if len(measures[title_of]) > 1:
            panel.legend(fontsize=8)
        panel.set(title=title_of.removeprefix("validation/"), xlabel="step")
    figure.suptitle(title)
    figure.tight_layout()
    path = folder / "loss.png"
    with new_file(path) as partial:
        figure.savefig(partial, dpi=90, format="png")
    return path


def _plot_terms(panel: Axes, terms: dict[str, list[tuple[int, float]]]) -> None:
    """Draw running means of the training terms, their names beside them."""
    for number, (name, points) in enumerate(terms.items()):
        steps, values = (np.array(column) for column in zip(*points, strict=True))
        ends = np.arange(1, len(values) + 1)
        sums, before = np.concatenate([[0.0], np.cumsum(values)]), np.maximum(ends - SMOOTHING, 0)
        smooth = (sums[ends] - sums[before]) / (ends - before)
        panel.plot(steps, smooth, _STYLES[number // _COLORS % len(_STYLES)], label=name)
    positive = all(value > 0 for points in terms.values() for _, value in points)
    panel.set(title="training (weighted terms)", xlabel="step", yscale="log" if positive else "linear")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def plot_matrix(path: Path, values: NDArray[np.floating], names: Sequence[str], *, title: str) -> None:
    """Draw a matrix whose rows, and columns, have these names, to ``path`` (.png)."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 7))
    axes = figure.subplots()
    figure.colorbar(axes.imshow(values, cmap="magma"))
    if len(names) <= _MOST_NAMES:
        axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set(xticks=[], title=title)
    figure.tight_layout()
    with new_file(path) as partial:
        figure.savefig(partial, dpi=90, format="png")
