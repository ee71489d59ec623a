"""Say how a piece is made that is longer than a run of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click

from sa3_mlx.common.generation.request import LongForm
from sa3_mlx.common.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LongOptions:
    """Say how windows follow each other; with any of these, and beyond the longest clip, a piece is made in windows."""

    window: Annotated[
        float | None,
        click.Option(
            ["--window"],
            type=float,
            metavar="SECONDS",
            help="Of a long piece: length of a run of the model. Default: half of its longest clip, of a small model "
            "the whole.",
        ),
    ]
    overlap: Annotated[
        float | None,
        click.Option(
            ["--overlap"],
            type=float,
            metavar="SECONDS",
            help="Of a long piece: what a window hears of the one before. Default: a quarter of it.",
        ),
    ]
    anchor: Annotated[
        float,
        click.Option(
            ["--anchor"],
            type=float,
            default=0.0,
            metavar="SHARE",
            help="Of a long piece: 0..1, lead what windows hear back to statistics of the first one. Default: 0, off.",
        ),
    ]
    drift: Annotated[
        Path | None,
        click.Option(
            ["--drift"],
            type=click.Path(path_type=Path),
            metavar="PNG",
            help="Of a long piece: draw its level, brightness and latents minute by minute.",
        ),
    ]

    def form(self, seconds: float, config: ModelConfig) -> LongForm | None:
        """Return how a piece of ``seconds`` is made, None for one run of the model."""
        asked = self.window is not None or self.overlap is not None or self.anchor != 0 or self.drift is not None
        if not asked and not seconds > config.max_seconds:
            return None
        return LongForm(window_seconds=self.window, overlap_seconds=self.overlap, anchor=self.anchor)
