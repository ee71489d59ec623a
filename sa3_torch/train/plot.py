"""A picture of a run: its training terms, smoothed, and its validation measures, from ``log.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTHING = 20  # logged rows in the running mean
_NOT_TERMS = {"step", "seconds", "lr", "grad_norm", "skipped", "alarm", "steps_per_second", "items_per_second"}


def plot_run(folder: Path, title: str) -> Path:
    """Draw ``folder/log.jsonl`` to ``folder/loss.png``, which is replaced; returns its path."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("validation/") or ("/" not in name and name not in _NOT_TERMS):
                series.setdefault(name, []).append((row["step"], value))
    terms = {name: points for name, points in series.items() if not name.startswith("validation/")}
    measures = {name: points for name, points in series.items() if name.startswith("validation/")}
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
    panels[0].set(title="training (weighted terms)", xlabel="step", yscale="log")
    panels[0].legend()
    for panel, (name, points) in zip(panels[1:], measures.items(), strict=False):
        steps, values = (np.array(column) for column in zip(*points, strict=True))
        panel.plot(steps, values, marker="o", markersize=3)
        panel.set(title=name, xlabel="step")
    for panel in panels[count:]:
        panel.set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    path = folder / "loss.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path
