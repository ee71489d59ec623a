"""Print the lines at the end: what was made, how fast, what to look out for, what to try next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from sa3_mlx.common.files.audio import Audio, clipped_share, peak_db
from sa3_mlx.common.generation.regions import Seam

from .provenance import Provenance, find_input

_SILENT_DB = -80.0
_LOUD_SEAM_DB = 6.0
_LONG_PROMPT = 60  # characters


def report_file(
    path: Path,
    audio: Audio,
    limited: Audio,
    sample_rate: int,
    made: Provenance,
    elapsed: float,
    seams: Sequence[Seam],
    first_sound: float | None,
    *,
    quiet: bool,
) -> None:
    """Print the lines about one file; for one on standard output they go to stderr.

    ``audio`` is what the model made, ``limited`` what was written; ``elapsed`` seconds of work for this file,
    ``first_sound`` of them before its first samples left, None if they had to wait for the last.
    """
    err = str(path) == "-"
    if quiet:
        click.echo(f"{path} seed {made.clip.seed}", err=err)
        return
    seconds = len(audio) / sample_rate

    def line(label: str, text: str) -> None:
        _line(label, text, err=err)

    line("file", f"{path}  ({seconds:.2f} s, {sample_rate} Hz, {audio.shape[1]} channels, {made.output.format})")
    early = "" if first_sound is None else f", first sound after {first_sound:.1f} s"
    line("seed", str(made.clip.seed))
    line(
        "speed", f"{elapsed:.1f} s for {seconds:.2f} s of audio ({seconds / max(elapsed, 1e-9):.2f} x real time{early})"
    )
    for text in _level_lines(audio, limited, made):
        line("level", text)
    for seam in seams:
        line("seam", _seam_text(seam, sample_rate))


def report_next(path: Path, made: Provenance, source: Path | None) -> None:
    """Print what to try with a file that was made from ``source``."""
    _line("next", next_command(path, made, source))


def _level_lines(audio: Audio, limited: Audio, made: Provenance) -> list[str]:
    lines = []
    peak, share = peak_db(audio), clipped_share(limited)
    if peak < _SILENT_DB:
        lines.append("the result is silent; try another seed or prompt")
    limit, edited = made.output.peak_db, made.request.inpaint is not None
    if limit is not None and limited is not audio and peak > limit:
        kept = "; kept parts were scaled too" if edited else ""
        lines.append(f"peak {peak:+.1f} dB was scaled down to {limit:+.1f} dB{kept}")
    if share and made.output.format == "float":
        lines.append(f"peak {peak:+.1f} dB: {share_text(limited)} are beyond full scale, kept in the float file")
    elif share:
        advice = "a .wav with --format float" if edited and made.request.crossfade_ms is not None else "--peak -1"
        lines.append(f"{share_text(limited)} were clipped (peak {peak:+.1f} dB); {advice} avoids it")
    return lines


def share_text(audio: Audio) -> str:
    """Say how many samples are beyond full scale: a share, or the number of a few."""
    share = clipped_share(audio)
    return f"{share:.2%} of samples" if share >= 1e-4 else f"{round(share * len(audio))} samples"


def _seam_text(seam: Seam, sample_rate: int) -> str:
    where = "into" if seam.side == "in" else "out of"
    fade = seam.crossfade_samples / sample_rate * 1000
    loud = abs(seam.level_difference_db) > _LOUD_SEAM_DB
    advice = "; try another seed or a longer --crossfade-ms" if loud else ""
    return (
        f"{seam.sample / sample_rate:.3f} s, {where} the made part: level {seam.level_difference_db:+.1f} dB, "
        f"crossfade {fade:.0f} ms{advice}"
    )


def next_command(path: Path, made: Provenance, source: Path | None) -> str:
    """Return a command that makes sense after this one."""
    name = shlex.quote(str(path))
    if made.command == "generate":
        prompt = shlex.quote(made.clip.prompt) if len(made.clip.prompt) <= _LONG_PROMPT else "PROMPT"
        return f"sa3 vary {name} {prompt} --noise-level 0.6, or sa3 extend {name} {prompt} --seconds N"
    if made.command == "vary":
        return "a lower --noise-level stays closer to the input, a higher one leaves it"
    found = None if made.input is None else find_input(made.input.name, path)
    same = source is None or (found is not None and found.samefile(source))
    return f"another --seed, or sa3 rerun {name}" + ("" if same else f" --input {shlex.quote(str(source))}")


def _line(label: str, text: str, *, err: bool = False) -> None:
    click.echo(f"{label:<6} {text}", err=err)
