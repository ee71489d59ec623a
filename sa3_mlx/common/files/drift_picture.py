"""Draw how a long piece drifts as a PNG: level, spectral centroid and latents, minute by minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sa3_mlx.common.measures.drift import DriftRow

from .atomic import new_file
from .lettering import quiet_drawing, write_title


def save_drift(path: Path, pieces: Mapping[str, Sequence[DriftRow]], *, title: str = "") -> None:
    """Draw the rows of pieces, by name, into one picture. Raises OSError (one line) where the disk refuses."""
    with new_file(path) as partial, partial.open("wb") as file, quiet_drawing():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        places = figure.subplots(4, 1, sharex=True)
        for name, rows in pieces.items():
            minutes = [row.start / 60 for row in rows]
            for place, values in zip(places, _values(rows), strict=True):
                place.plot(minutes, values, label=name, linewidth=1.2)
        labels = ("level (dB)", "centroid (Hz)", "spread of latents", "moved (latents)")
        for place, label in zip(places, labels, strict=True):
            place.set_ylabel(label)
            place.grid(visible=True, alpha=0.3)
        if any(pieces):
            places[0].legend(loc="upper right")
        places[-1].set_xlabel("minute")
        write_title(places[0], title)
        figure.savefig(file, format="png", metadata={"Software": "sa3"})


def _values(rows: Sequence[DriftRow]) -> list[list[float]]:
    return [
        [row.level_db for row in rows],
        [row.centroid_hz for row in rows],
        [row.spread for row in rows],
        [row.moved for row in rows],
    ]
