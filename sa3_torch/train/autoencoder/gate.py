"""Check before diffusion training that pre-encoded latents decode as well as on-line ones [T3].

The check finds latents of another scale or autoencoder, wrong lengths and shifted rows: "the model makes noise" is
nearly always one of these [T1.8].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sa3_mlx.common.measures.spectra import log_mel_l1
from sa3_mlx.common.model.config import ModelConfig
from sa3_torch.same import SAME
from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.data.encode.sources import Source
from sa3_torch.train.data.latents import LatentItem, LatentSet

TOLERANCE = 0.01  # of the on-line log-mel distance
SECONDS = 20  # of every item, from its start


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """Hold the log-mel distances of one item to its source: decoded from the stored latents, and from ones
    encoded now."""

    id: str
    stored: float
    online: float
    expected_frames: int
    frames: int


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """Hold the distances of all items, and say whether they are as they should be."""

    rows: tuple[GateRow, ...]

    @property
    def stored(self) -> float:
        """Return the mean distance from the stored latents."""
        return float(np.mean([row.stored for row in self.rows]))

    @property
    def online(self) -> float:
        """Return the mean distance from latents encoded now."""
        return float(np.mean([row.online for row in self.rows]))

    @property
    def good(self) -> bool:
        """Return whether all lengths follow the ceil rule, and the mean distances differ by less than 1 %."""
        lengths = all(row.frames == row.expected_frames for row in self.rows)
        return lengths and abs(self.stored - self.online) < TOLERANCE * max(self.online, 1e-6)

    def summary(self) -> dict[str, Any]:
        """Return the verdict and what it rests on, as JSON values."""
        return {
            "good": self.good,
            "log_mel_stored": self.stored,
            "log_mel_online": self.online,
            "items": len(self.rows),
            "wrong_lengths": sum(row.frames != row.expected_frames for row in self.rows),
        }

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**self.summary(), "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines = [f"{'stored':>8} {'online':>8}  frames  item"]
        for row in self.rows:
            wrong = "" if row.frames == row.expected_frames else f" (expected {row.expected_frames})"
            lines.append(f"{row.stored:8.4f} {row.online:8.4f}  {row.frames:6}  {row.id}{wrong}")
        verdict = "the latents decode as they should" if self.good else "the latents do NOT belong to these recordings"
        lines.append(f"{self.stored:8.4f} {self.online:8.4f}  mean log-mel distance: {verdict}")
        return "\n".join(lines)


@torch.no_grad()
def check_latents(
    folder: Path,
    source: Source,
    autoencoder: Path,
    *,
    items: int,
    progress: Callable[[list[LatentItem]], Iterable[LatentItem]] = iter,
) -> GateReport:
    """Decode ``items`` items, evenly spread, from the stored latents and from latents made now; compare both with the
    source; note the outcome beside the latents, where training looks for it. ``progress`` goes through the items, with
    a bar for example.

    Raises ValueError when the autoencoder is another one or no item is found in the source.
    """
    same, digest = load_autoencoder(autoencoder)
    sample_rate = ModelConfig.load(autoencoder).sample_rate
    latents = LatentSet(folder, autoencoder=digest)
    numbers = {name: number for number, name in enumerate(source.names)}
    known = [item for item in latents.items if item.id in numbers]
    if not known:
        raise ValueError(f"{folder}: none of its items is among the recordings; give those that were encoded")
    spread = np.linspace(0, len(known) - 1, min(items, len(known))).round().astype(int)
    chosen = progress([known[i] for i in spread])
    rows = [_row(same, latents, item, source, numbers[item.id], sample_rate) for item in chosen]
    report = GateReport(rows=tuple(rows))
    latents.record_gate(report.summary())
    return report


def _row(same: SAME, latents: LatentSet, item: LatentItem, source: Source, number: int, sample_rate: int) -> GateRow:
    size, kept, samples = same.config.samples_per_latent, [], 0
    for block in source.recording(number).blocks():
        if samples < SECONDS * sample_rate:
            kept.append(block)
        samples += len(block)
    audio = np.concatenate(kept)[: SECONDS * sample_rate]
    frames = -(-len(audio) // size)
    stored = same.decode(latents.read(item, 0, frames)[None])[0].numpy()
    online = same.decode(same.encode(torch.from_numpy(audio)[None]))[0].numpy()

    def distance(output: np.ndarray) -> float:
        output = output[: len(audio)]
        return log_mel_l1(audio, np.pad(output, ((0, len(audio) - len(output)), (0, 0))))

    return GateRow(
        id=item.id,
        stored=distance(stored),
        online=distance(online),
        expected_frames=-(-samples // size),
        frames=item.frames,
    )
