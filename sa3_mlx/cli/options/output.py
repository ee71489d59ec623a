"""Say which part of a sound is made, where it goes, and in which form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import click

from sa3_mlx.common.delivery.settings import Delivery
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.request import DEFAULT_CROSSFADE_MS

FORMATS: tuple[Subtype, ...] = get_args(Subtype)


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
class DeliveryOptions:
    """Say how a sound is finished: every command that writes one takes these."""

    format: Annotated[
        Subtype | None,
        click.Option(
            ["--format"],
            type=click.Choice(FORMATS),
            help="Sample format, such as pcm24. Default: that of the extension, or what keeps the input.",
        ),
    ] = None
    rate: Annotated[
        int | None,
        click.Option(["--rate"], type=int, metavar="HZ", help="Resample to this rate, such as 48000."),
    ] = None
    trim_silence: Annotated[
        bool,
        click.Option(["--trim-silence"], is_flag=True, help="Cut what is below -60 dB at both ends: --trim-silence."),
    ] = False
    fade_in: Annotated[
        float,
        click.Option(["--fade-in"], type=float, default=0.0, metavar="S", help="Fade the beginning in, such as 0.05."),
    ] = 0.0
    fade_out: Annotated[
        float,
        click.Option(["--fade-out"], type=float, default=0.0, metavar="S", help="Fade the end out, such as 1.5."),
    ] = 0.0
    loudness: Annotated[
        float | None,
        click.Option(
            ["--loudness"], type=float, metavar="LUFS", help="Integrated loudness (BS.1770), such as -14: up or down."
        ),
    ] = None
    true_peak: Annotated[
        float | None,
        click.Option(
            ["--true-peak"], type=float, metavar="DB", help="Ceiling between samples too, such as -1: scales down."
        ),
    ] = None
    peak: Annotated[
        float | None,
        click.Option(["--peak"], type=float, metavar="DB", help="Scale louder audio down to this peak, such as -1."),
    ] = None
    limit: Annotated[
        bool,
        click.Option(
            ["--limit"],
            is_flag=True,
            help="Limit peaks, do not scale: --loudness -14 --true-peak -1 --limit.",
        ),
    ] = False
    safe: Annotated[
        bool, click.Option(["--safe"], is_flag=True, help="Limit only where the file would clip: --safe.")
    ] = False

    def delivery(self, sample_rate: int, subtype: Subtype) -> Delivery:
        """Return what happens to a sound of a model with this rate in a file of this kind. Raises ConfigError."""
        delivery = Delivery(
            trim_silence=self.trim_silence,
            rate=self.rate,
            fade_in=self.fade_in,
            fade_out=self.fade_out,
            loudness_lufs=self.loudness,
            true_peak_db=self.true_peak,
            peak_db=self.peak,
            limit=self.limit,
            safe=self.safe,
        )
        return delivery.for_file(subtype, sample_rate)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(DeliveryOptions):
    """Say where a sound goes, and in which form."""

    out: Annotated[
        Path | None,
        click.Option(
            ["--out", "-o"],
            type=click.Path(path_type=Path, allow_dash=True),
            help=".wav, .flac, .mp3, .ogg, .opus, .m4a, or - for WAV on a pipe. Default: from prompt and seed.",
        ),
    ] = None
    spectrogram: Annotated[
        Path | None,
        click.Option(["--spectrogram"], type=click.Path(path_type=Path), metavar="PNG", help="Draw one too."),
    ] = None
    play: Annotated[
        bool, click.Option(["--play"], is_flag=True, help="Play the result, from its first decoded part on.")
    ] = False
    force: Force = False
    quiet: Quiet = False
