"""Print the lines at the end: what was made, how fast, what to look out for, what to try next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from sa3_mlx.cli.inputs import is_stream
from sa3_mlx.cli.options.model import ModelOptions
from sa3_mlx.common.delivery.chain import Delivered
from sa3_mlx.common.files.audio import clipped_share, peak_db
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.regions import Seam
from sa3_mlx.common.installed import name_of
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.terminal import command, labelled, report, say

from .provenance import Provenance, find_input

_SILENT_DB = -80.0
_LOUD_SEAM_DB = 6.0
_LABEL = 6  # columns


def report_file(
    path: Path,
    audio: Audio,
    sound: Delivered,
    sample_rate: int,
    made: Provenance,
    elapsed: float,
    seams: Sequence[Seam],
    first_sound: float | None,
    *,
    quiet: bool,
) -> None:
    """Print the lines about one file; for one on standard output they go to stderr.

    ``audio`` is what the model made, at ``sample_rate``, ``sound`` what was written; ``elapsed`` seconds of work for
    this file, ``first_sound`` of them before its first samples left, None if they had to wait for the last.
    """
    write = say if str(path) == "-" else report
    if quiet:
        write(f"{path} seed {made.clip.seed}")
        return
    rate, samples, channels = sound.sample_rate, *sound.audio.shape
    seconds = samples / rate

    def line(label: str, text: str) -> None:
        write(labelled(label, text, _LABEL))

    line("file", f"{path}  ({seconds:.2f} s, {rate} Hz, {channels} channels, {made.output.format})")
    early = "" if first_sound is None else f", first sound after {first_sound:.1f} s"
    line("seed", str(made.clip.seed))
    line(
        "speed", f"{elapsed:.1f} s for {seconds:.2f} s of audio ({seconds / max(elapsed, 1e-9):.2f} x real time{early})"
    )
    for text in (*_level_lines(audio, sound.audio, made), *sound.notes):
        line("level", text)
    for seam in seams:
        line("seam", seam_text(seam, sample_rate))


def report_next(path: Path, made: Provenance, source: Path | None, options: ModelOptions, longest: float) -> None:
    """Print what to try with a file that was made from ``source``, each command on a line of its own.

    ``longest`` seconds are what the model makes.
    """
    for line in next_commands(path, made, source, options, longest):
        report(labelled("next", line, _LABEL))


def _level_lines(audio: Audio, limited: Audio, made: Provenance) -> list[str]:
    lines = []
    peak, share = peak_db(audio), clipped_share(limited)
    output, edited = made.output, made.request.inpaint is not None
    beyond = share_text(share, len(limited))
    if peak < _SILENT_DB:
        lines.append("the result is silent; try another seed or prompt")
    ceiling = None if output.limit or output.loudness_lufs is not None else output.peak_db
    if ceiling is not None and limited is not audio and peak > ceiling:
        kept = "; kept parts were scaled too" if edited else ""
        lines.append(f"peak {peak:+.1f} dB was scaled down to {ceiling:+.1f} dB{kept}")
    peak = peak_db(limited)
    if share and made.output.format == "float":
        lines.append(f"peak {peak:+.1f} dB: {beyond} are beyond full scale, kept in the float file")
    elif share:
        advice = "a .wav with --format float" if edited and made.request.crossfade_ms is not None else "--peak -1"
        lines.append(f"{beyond} were clipped (peak {peak:+.1f} dB); {advice} avoids it")
    return lines


def share_text(share: float, samples: int) -> str:
    """Say how many samples are beyond full scale: a share, or the number of a few."""
    return f"{share:.2%} of samples" if share >= 1e-4 else f"{round(share * samples)} samples"


def seam_text(seam: Seam, sample_rate: int) -> str:
    where = "into" if seam.side == "in" else "out of"
    fade = seam.crossfade_samples / sample_rate * 1000
    loud = abs(seam.level_difference_db) > _LOUD_SEAM_DB
    advice = "; try another seed or a longer --crossfade-ms" if loud else ""
    return (
        f"{seam.sample / sample_rate:.3f} s, {where} the made part: level {seam.level_difference_db:+.1f} dB, "
        f"crossfade {fade:.0f} ms{advice}"
    )


def next_commands(
    path: Path, made: Provenance, source: Path | None, options: ModelOptions, longest: float
) -> list[str]:
    """Return commands that make sense after this one, with model and adapters where the user named them.

    The prompt of a new sound is that in the tags of ``path``.
    """
    name = str(path) if not str(path).startswith("-") else f"./{path}"
    model = [] if options.name is None else ["--model", options.name]
    if made.command == "generate":
        same = [*model, *(word for file in options.lora for word in ("--lora", str(file)))]
        longer = math.floor(100 * min(2 * made.clip.seconds, longest)) / 100
        commands = [command("vary", name, "--noise-level", "0.6", *same)]
        if longer > made.clip.seconds:
            commands.append(command("extend", name, "--seconds", f"{longer:g}", *same))
        return commands
    if made.command == "vary":
        return ["a lower --noise-level stays closer to the input, a higher one leaves it"]
    if source is not None and is_stream(source):
        return ["another --seed makes another one"]
    found = None if made.input is None else find_input(made.input.name, path)
    where = [] if source is None or (found and found.samefile(source)) else ["--input", str(source)]
    adapters = [word for file in options.lora for word in ("--lora", str(file.path))]
    return [f"another --seed, or {command('rerun', name, *where, *model, *adapters)}"]


def first_command(folder: Path) -> str:
    """Return a command for a new model, by its installed name, or else its folder."""
    what = "encode INPUT OUT.safetensors" if ModelConfig.load(folder).diffusion is None else "generate PROMPT"
    return f"sa3 {what} --model {shlex.quote(name_of(folder))}"
