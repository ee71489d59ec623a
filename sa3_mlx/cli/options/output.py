"""Say which part of a sound is made, where it goes, and in which form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import click

from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.request import DEFAULT_CROSSFADE_MS
from sa3_mlx.common.schema import quoted

FORMATS: tuple[Subtype, ...] = get_args(Subtype)


def parse_region(text: str) -> tuple[float, float | None]:
    """Read "START:END" in seconds; an empty START is 0, an empty END None, the end of the clip. Raises ValueError."""
    start, colon, end = text.partition(":")
    try:
        region = float(start or "0"), float(end) if end.strip() else None
    except ValueError:
        colon = ""
    if not colon:
        raise ValueError(f"{quoted(text)}: expected START:END in seconds, such as 1.5:3 or 2:")
    return region


Force = Annotated[bool, click.Option(["--force"], is_flag=True, help="Replace existing files.")]
Quiet = Annotated[bool, click.Option(["--quiet", "-q"], is_flag=True, help="No progress; print files and seeds alone.")]


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Hold what most commands that write something take."""

    force: Force
    quiet: Quiet


@dataclass(frozen=True, kw_only=True)
class PasteOptions:
    """Say how kept samples and made ones meet."""

    crossfade_ms: Annotated[
        float | None,
        click.Option(
            ["--crossfade-ms"], type=float, help=f"Inside the made region. Default: {DEFAULT_CROSSFADE_MS:g}."
        ),
    ]
    no_paste: Annotated[
        bool,
        click.Option(["--no-paste"], is_flag=True, help="The model's audio as it is; kept parts are then not exact."),
    ]

    def crossfade(self) -> float | None:
        """Return milliseconds, None without paste-back. Raises click.UsageError where both options are given."""
        if not self.no_paste:
            return DEFAULT_CROSSFADE_MS if self.crossfade_ms is None else self.crossfade_ms
        if self.crossfade_ms is not None:
            raise click.UsageError("--no-paste leaves no seam: --crossfade-ms has no effect beside it")
        return None


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Say where a sound goes, and in which form."""

    out: Annotated[
        Path | None,
        click.Option(
            ["--out", "-o"],
            type=click.Path(path_type=Path, allow_dash=True),
            help=".wav, .flac, .mp3, .ogg, or - for WAV on a pipe. Default: from prompt and seed.",
        ),
    ]
    format: Annotated[
        Subtype | None,
        click.Option(
            ["--format"],
            type=click.Choice(FORMATS),
            help="Sample format. Default: that of the extension, or what keeps the input.",
        ),
    ]
    peak: Annotated[
        float | None,
        click.Option(["--peak"], type=float, metavar="DB", help="Scale louder audio down to this peak, such as -1."),
    ]
    spectrogram: Annotated[
        Path | None,
        click.Option(["--spectrogram"], type=click.Path(path_type=Path), metavar="PNG", help="Draw one too."),
    ]
    play: Annotated[
        bool, click.Option(["--play"], is_flag=True, help="Play the result, from its first decoded part on.")
    ]
    force: Force
    quiet: Quiet
