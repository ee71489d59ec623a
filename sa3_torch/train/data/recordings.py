"""A folder of recordings: its audio files, their captions, what each file holds. numpy only [T11d].

``clip.wav``, ``.flac``, ``.ogg`` or ``.mp3``, at any depth, may have a sidecar of the same name: ``clip.json`` or,
where there is none, ``clip.txt`` with one caption a line, the lines being alternatives. Nothing there is executed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.common.files.atomic import is_partial, write_text
from sa3_mlx.common.files.audio_file import open_audio_file
from sa3_mlx.common.files.objects import parse_object
from sa3_mlx.common.schema import is_finite, quoted, reason

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
TOLERATED = 0.01  # the share of files that may be unreadable, and that may lack a caption where one is needed
SILENT = 1e-4  # peak of a recording that holds nothing
CLIPPED = 0.999  # a sample at full scale; three in a row are clipping
CLIPPED_RUN = 3
ATTRIBUTION = "ATTRIBUTION.tsv"
TEXT_FIELDS = ("description", "title", "genre", "style", "mood", "instruments", "instrument", "tags")


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Captions and facts beside a recording; ``seconds_start`` and ``seconds_total`` place an excerpt in its piece."""

    captions: tuple[str, ...] = ()
    seconds_start: float = 0.0
    seconds_total: float | None = None  # full duration of the piece; None: the file is the whole piece
    licence: str = ""
    fields: dict[str, Any] = field(default_factory=dict)  # bpm, key, and every other key of the file


def find_audio(folder: Path) -> list[Path]:
    """Find the audio files below ``folder``, sorted, without ``._NAME``, in which a Mac keeps what is said of NAME.

    Raises FileNotFoundError without the folder, ValueError without files.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    named = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[:2] != "._")
    files = sorted(path for path in named if path.is_file())
    if not files:
        raise ValueError(f"no audio files ({', '.join(SUFFIXES)}) in {folder}")
    return files


def read_sidecar(path: Path) -> Sidecar:
    """Read the sidecar of an audio file, an empty one where there is none. Raises ValueError for a damaged one."""
    described, text = _beside(path, ".json"), _beside(path, ".txt")
    try:
        if described.is_file():
            return parse_sidecar(parse_object(described.read_bytes(), described.name))
        if text.is_file():
            return Sidecar(captions=_lines(text.read_text(encoding="utf-8-sig").splitlines()))  # Windows marks them
    except ValueError as error:
        raise ValueError(f"sidecar is not valid: {reason(error)}") from error
    return Sidecar()


def _beside(path: Path, suffix: str) -> Path:
    """Return the neighbour with a suffix, in capitals where only that is there."""
    usual, capitals = path.with_suffix(suffix), path.with_suffix(suffix.upper())
    return capitals if capitals.is_file() and not usual.is_file() else usual


def parse_sidecar(data: object) -> Sidecar:
    """Parse a JSON sidecar. Without ``prompt`` the caption is made of the text fields, bpm and key.

    Raises ValueError naming the key that is not valid.
    """
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got {type(data).__name__}")
    fields = dict(data)
    prompt = fields.pop("prompt", None)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if prompts is not None and not (isinstance(prompts, list) and all(isinstance(text, str) for text in prompts)):
        raise ValueError(f"prompt is {quoted(prompt)}: expected a text or a list of texts")
    start, total = _number(fields, "seconds_start"), _number(fields, "seconds_total")
    if start:
        fields["seconds_start"] = start  # goes with the latents
    for name in ("bpm", "key"):
        value = fields.get(name)
        if value is not None and not isinstance(value, str) and not is_finite(value):
            raise ValueError(f"{name} is {quoted(value)}: expected a number or a text")
    licence = fields.pop("licence", fields.pop("license", ""))
    if not isinstance(licence, str):
        raise ValueError(f"licence is {quoted(licence)}: expected a text")
    return Sidecar(
        captions=_lines(prompts or [", ".join(caption_parts(fields))]),
        seconds_start=start or 0.0,
        seconds_total=total,
        licence=licence,
        fields=fields,
    )


def _number(fields: dict[str, Any], name: str) -> float | None:
    value = fields.pop(name, None)
    if value is None:
        return None
    if not is_finite(value) or value < 0:
        raise ValueError(f"{name} is {quoted(value)}: expected a number of seconds, at least 0")
    return float(value)


def _lines(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for line in texts if (text := " ".join(line.split())))


def caption_parts(fields: dict[str, Any]) -> list[str]:
    """Return what a caption without ``prompt`` is made of: the text fields, bpm and key."""
    parts: list[str] = []
    for name in TEXT_FIELDS:
        value = fields.get(name)
        parts += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]
    for name, unit in (("bpm", " BPM"), ("key", "")):
        value = fields.get(name)
        if isinstance(value, str) or is_finite(value):
            parts.append(f"{value if isinstance(value, str) else format(value, 'g')}{unit}")
    return [text for part in parts if (text := " ".join(part.split()))]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Content of one audio file, at its own rate. Levels are in dB of full scale, -inf for digital silence."""

    sample_rate: int
    channels: int
    samples: int
    peak: float
    rms_db: float
    clipped_samples: int  # samples in runs of at least three at full scale
    equal_channels: bool  # two channels, the same: mono in a stereo file
    digest: str  # "sha256:..." of the file

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate

    @property
    def silent(self) -> bool:
        return self.peak < SILENT


def inspect(path: Path) -> Facts:
    """Read a file through once, block by block. Raises ValueError or OSError when it cannot be read to its end."""
    digest = hash_file(path)
    samples, peak, energy, clipped = 0, 0.0, 0.0, 0
    with open_audio_file(path) as file:
        rate, channels = file.samplerate, file.channels
        equal = channels == 2
        for block in file.blocks():
            samples += len(block)
            peak = max(peak, float(np.abs(block).max()))
            energy += float(np.square(block, dtype=np.float64).sum())
            clipped += clipped_samples(block)
            equal = equal and np.array_equal(block[:, 0], block[:, 1])
    mean = energy / (samples * channels)
    return Facts(
        sample_rate=rate,
        channels=channels,
        samples=samples,
        peak=peak,
        rms_db=10 * math.log10(mean) if mean > 0 else -math.inf,
        clipped_samples=clipped,
        equal_channels=equal,
        digest=digest,
    )


def clipped_samples(audio: np.ndarray) -> int:
    """Count samples of (L, channels) that lie in runs of at least three at full scale in one channel."""
    high = np.pad(np.abs(audio) >= CLIPPED, ((CLIPPED_RUN - 1, CLIPPED_RUN - 1), (0, 0)))
    full = np.lib.stride_tricks.sliding_window_view(high, CLIPPED_RUN, axis=0).all(-1)  # starts of runs
    spread = np.lib.stride_tricks.sliding_window_view(full, CLIPPED_RUN, axis=0).any(-1)
    return int(spread.sum())


def hash_file(path: Path) -> str:
    """Return "sha256:..." of a file."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def refuse_failures(paths: Sequence[str], files: int, what: str, tolerated: float = TOLERATED) -> None:
    """Raise ValueError with the list when more than a share ``tolerated``, 0..1, of ``files`` files are ``what``."""
    if len(paths) > tolerated * files:
        listing = "; ".join(paths[:20]) + ("; ..." if len(paths) > 20 else "")
        raise ValueError(f"{len(paths)} of {files} files are {what}, more than {100 * tolerated:g} %: {listing}")


def check_apart(folder: Path, out: Path) -> None:
    """Raise ValueError where ``out`` is the folder that is read, or holds it."""
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"{out}: the recordings lie in it; choose another folder to write to")


def check_empty(out: Path) -> None:
    """Raise ValueError unless ``out`` is new, or an empty folder."""
    if out.exists() and (not out.is_dir() or any(not is_partial(path.name) for path in out.iterdir())):
        holds = any(out.glob("*.tar")) or any(out.glob("shard-*")) or (out / "index.json").exists()
        raise ValueError(f"{out} {'holds shards already' if holds else 'is not empty'}; choose an empty folder")


@dataclass(frozen=True, kw_only=True)
class Credit:
    """One line of an attribution list."""

    id: str
    licence: str
    source: str  # hash of the file
    fields: dict[str, Any]


def write_attribution(path: Path, credits: Sequence[Credit]) -> None:
    """Write a table with tabs: name, licence ("unknown" where the sidecar names none), author or source, hash."""
    rows = ["file\tlicence\tby\tsource"]
    for credit in credits:
        by = [str(credit.fields[name]) for name in ("author", "artist", "attribution", "url") if name in credit.fields]
        cells = (credit.id, credit.licence or "unknown", ", ".join(by), credit.source)
        rows.append("\t".join(" ".join(cell.split()) for cell in cells))
    write_text(path, "\n".join(rows) + "\n")
