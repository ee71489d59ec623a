"""A picture of a run: its training terms, smoothed, and its validation measures, from ``log.jsonl``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTHING = 20  # logged rows in the running mean
_NOT_TERMS = {
    "step", "seconds", "lr", "grad_norm", "skipped", "alarm", "revision", "steps_per_second", "items_per_second",
}  # fmt: skip
_LEVEL = re.compile(r"_(t\d[\d.]*)$")  # "flow_t0.5": such measures share a panel
_MOST_NAMES = 64  # beside a matrix


def plot_run(folder: Path, title: str) -> Path:
    """Draw ``folder/log.jsonl`` to ``folder/loss.png``, which is replaced; returns its path."""
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
    count = 1 + len(measures)
    columns = min(3, count)
    figure, axes = plt.subplots(
        -(-count // columns), columns, figsize=(5 * columns, 3 * -(-count // columns)), squeeze=False
    )
    panels = list(axes.flat)
    for name, points in terms.items():
        steps, values = (np.array(column) for column in zip(*points, strict=True))
        width = min(SMOOTHING, len(values))
        panels[0].plot(steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid"), label=name)
    positive = all(value > 0 for points in terms.values() for _, value in points)
    panels[0].set(title="training (weighted terms)", xlabel="step", yscale="log" if positive else "linear")
    panels[0].legend()
    for panel, title_of in zip(panels[1:], sorted(measures), strict=False):
        for name in sorted(measures[title_of]):
            steps, values = (np.array(column) for column in zip(*series[name], strict=True))
            panel.plot(steps, values, marker="o", markersize=3, label=name.removeprefix(title_of).lstrip("_"))
        if len(measures[title_of]) > 1:
            panel.legend()
        panel.set(title=title_of, xlabel="step")
    for panel in panels[count:]:
        panel.set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    path = folder / "loss.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def plot_matrix(path: Path, values: NDArray[np.floating], names: Sequence[str], *, title: str) -> None:
    """Draw a matrix whose rows, and columns, have these names, to ``path`` (.png)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(8, 7))
    figure.colorbar(axes.imshow(values, cmap="magma"))
    if len(names) <= _MOST_NAMES:
        axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set(xticks=[], title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
