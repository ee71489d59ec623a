"""Clip cache: one memory-mappable array of concatenated audio plus an index. numpy only.

A cache folder holds ``audio.npy``, float16 of shape (total samples, channels) with channels 1 or 2, and
``index.json``: {"format", "sample_rate", "about", "clips": [CachedClip, ...]}. ``offset`` and ``samples`` of a clip are
rows of the array. float16 keeps 11 bits of mantissa at any level: its noise lies 66 dB below the signal.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.arrays import map_array
from sa3_mlx.common.files.atomic import is_partial, new_folder, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.schema import listed, quoted

from .entries import parse_entries
from .recordings import ATTRIBUTION, Credit, write_attribution

FORMAT = "sa3-clips/1"
SAMPLE_RATE = 44_100
_FILES = ("audio.npy", "index.json", ATTRIBUTION)
Audio = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class CachedClip:
    """One sound. ``captions`` are alternatives that say the same; the first is canonical; empty: no caption."""

    id: str
    captions: tuple[str, ...]
    seconds: float  # full duration: of an excerpt, that of the piece
    offset: int  # first row in the audio array
    samples: int
    kind: str  # note | drum | noise | chord | sample | user
    label: str  # class: note, chord, kick, snare, clap, hihat, crash, tom, white, pink, brown, sample, user
    instrument: str | None
    midi: int | None  # pitch of a note, root of a chord
    split: str  # train | validation
    licence: str = ""  # "": unknown
    source: str = ""  # "sha256:..." of the file that it was read from; "": made here
    fields: dict[str, Any] = field(default_factory=dict)  # what else a sidecar said

    @property
    def caption(self) -> str:
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A clip before it has a place in a cache; ``audio`` is (samples,) or (samples, channels), or blocks of it."""

    id: str
    captions: tuple[str, ...]
    kind: str
    label: str
    instrument: str | None
    midi: int | None
    split: str
    audio: Audio | Iterable[Audio]
    seconds: float | None = None  # None: that of the audio
    licence: str = ""
    source: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


def write_clips(
    folder: Path, drafts: Iterable[Draft], *, channels: int, about: dict[str, Any], overwrite: bool = False
) -> ClipSet:
    """Write a cache folder as a whole and open it. ``about`` says how it was made.

    Raises ValueError as ``check_place``, and for drafts that a cache cannot hold; what was there then stays as it was.
    """
    check_place(folder, overwrite=overwrite)
    with new_folder(folder) as partial:
        clips = _write_drafts(partial / "audio.npy", drafts, channels)
        if not clips:
            raise ValueError(f"no clips for {folder}")
        entries = [dataclasses.asdict(clip) for clip in clips]
        write_json(
            partial / "index.json", {"format": FORMAT, "sample_rate": SAMPLE_RATE, "about": about, "clips": entries}
        )
        credits = [Credit(id=clip.id, licence=clip.licence, source=clip.source, fields=clip.fields) for clip in clips]
        write_attribution(partial / ATTRIBUTION, credits)
    return ClipSet(folder)


def check_place(folder: Path, *, overwrite: bool) -> None:
    """Raise ValueError unless ``folder`` may become a cache: it is new or empty, or is one, with ``overwrite``."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; give a folder")
    names = (path.name for path in folder.iterdir() if not is_partial(path.name))  # left by processes that ended
    others = sorted(name for name in names if name not in (*_FILES, ".DS_Store"))
    if others:
        raise ValueError(f"{folder}: holds {others[0]}, which is no part of a cache; choose an empty folder")
    if (folder / "index.json").is_file():
        read_index(folder, FORMAT)  # that of something else is not replaced
    if not overwrite and any((folder / name).exists() for name in _FILES):
        raise ValueError(f"{folder}: holds a cache already; choose an empty folder or replace it with --force")


def _write_drafts(path: Path, drafts: Iterable[Draft], channels: int) -> list[CachedClip]:
    """Write the array of a cache; return where each draft lies in it."""
    clips: list[CachedClip] = []
    offset = 0
    with path.open("wb") as file:
        _write_header(file, 0, channels)
        start = file.tell()
        for draft in drafts:
            samples = _write_audio(file, draft, channels)
            fields = {f.name: getattr(draft, f.name) for f in dataclasses.fields(draft) if f.name != "audio"}
            fields["seconds"] = round(samples / SAMPLE_RATE, 6) if draft.seconds is None else draft.seconds
            clips.append(CachedClip(**fields, offset=offset, samples=samples))
            offset += samples
        file.seek(0)
        _write_header(file, offset, channels)
        if file.tell() != start:
            raise RuntimeError(
                "this numpy writes array headers whose size depends on the shape; 1.25 or later does not"
            )
    return clips


def _write_audio(file: BinaryIO, draft: Draft, channels: int) -> int:
    """Append the audio of a draft -> its samples."""
    samples = 0
    for block in (draft.audio,) if isinstance(draft.audio, np.ndarray) else draft.audio:
        audio = block.reshape(len(block), -1)
        if audio.shape[1] != channels:
            raise ValueError(f"clip {draft.id}: {audio.shape[1]} channel(s), the cache has {channels}")
        if not np.isfinite(audio).all():
            raise ValueError(f"clip {draft.id}: audio is not finite")
        file.write(audio.astype("<f2").tobytes())
        samples += len(audio)
    return samples


def _write_header(file: BinaryIO, rows: int, channels: int) -> None:
    header = {"descr": "<f2", "fortran_order": False, "shape": (rows, channels)}
    np.lib.format.write_array_header_1_0(file, header)


def read_index(folder: Path, *expected: str) -> dict[str, Any]:
    """Read ``index.json`` of a cache of a format ``expected``. Raises FileNotFoundError; ValueError for another."""
    path, names = folder / "index.json", " or ".join(expected)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no index.json, so it is not a complete {names} cache; make it again")
    index = read_object(path)
    found = index.get("format")
    if found not in expected:
        raise ValueError(f"{path}: expected format {names}, got {listed([found])}")
    return index


def _map_array(path: Path) -> NDArray[np.float16]:
    """Map the array of a cache, (total samples, channels). Raises FileNotFoundError, or ValueError for another."""
    array = map_array(path, "damaged or truncated; make the cache again")
    if array.ndim != 2 or array.dtype != np.float16 or not 1 <= array.shape[1] <= 2:
        raise ValueError(f"{path}: expected float16 (samples, 1 or 2 channels); make the cache again")
    return array


class ClipSet:
    """An opened cache: ``clips`` (list of CachedClip), ``audio`` (total, channels) float16 memory map, ``about``."""

    def __init__(self, folder: Path) -> None:
        index = read_index(folder, FORMAT)
        self.folder = folder
        self.about: dict[str, Any] = index.get("about") or {}
        self.clips = parse_entries(CachedClip, index.get("clips"), f"{folder / 'index.json'}: clips")
        if index.get("sample_rate") != SAMPLE_RATE or not self.clips:
            raise ValueError(
                f"{folder}: expected clips at {SAMPLE_RATE} Hz, got {len(self.clips)} at "
                f"{quoted(index.get('sample_rate'))} Hz"
            )
        for clip in self.clips:
            if not clip.samples:
                raise ValueError(f"{folder}: clip {quoted(clip.id)} has no samples; make the cache again")
        self.audio = _map_array(folder / "audio.npy")
        self.channels: int = self.audio.shape[1]
        needed = max(clip.offset + clip.samples for clip in self.clips)
        if needed > len(self.audio):
            raise ValueError(f"{folder}: audio.npy has {len(self.audio)} samples, its index needs {needed}")

    def digest(self) -> str:
        """Return "sha256:..." of the index and of the audio: of all where it is short, else of 4,096 parts of it.

        The parts are 512 samples long and lie at equal distances, so that hours of sound need not be read.
        """
        found = hashlib.sha256((self.folder / "index.json").read_bytes())
        for start in sorted({*range(0, len(self.audio), max(512, len(self.audio) // 4096)), len(self.audio) - 512}):
            found.update(self.audio[max(0, start) : start + 512].tobytes())
        return f"sha256:{found.hexdigest()}"

    def read(self, clip: CachedClip, start: int = 0, stop: int | None = None) -> Audio:
        """Read samples [start, stop) of a clip, (samples, channels) float32."""
        stop = clip.samples if stop is None else min(stop, clip.samples)
        return np.asarray(self.audio[clip.offset + start : clip.offset + stop], dtype=np.float32)

    def select(self, split: str) -> list[CachedClip]:
        """Return the clips of one split, "train" or "validation"."""
        if split not in ("train", "validation"):
            raise ValueError(f"split must be train or validation, got {split!r}")
        return [clip for clip in self.clips if clip.split == split]


def trim(audio: Audio, *, maximum_seconds: float, minimum_seconds: float) -> Audio:
    """Cut a mono clip at its onset and at its end: what lies below -60 dBFS at the end goes, a 10 ms fade closes it.

    The onset is the first sample above -45 dB of the peak, less 2 ms with a fade in. Shorter than the minimum:
    padded with zeros.
    """
    peak = float(np.abs(audio).max())
    if peak == 0:
        raise ValueError("cannot trim silence")
    lead = int(0.002 * SAMPLE_RATE)
    start = max(0, int(np.argmax(np.abs(audio) > peak * 10 ** (-45 / 20))) - lead)
    audio = audio[start : start + int(maximum_seconds * SAMPLE_RATE)].copy()
    loud = np.flatnonzero(np.abs(audio) > 1e-3)
    fade = int(0.010 * SAMPLE_RATE)
    audio = audio[: (int(loud[-1]) + 1 if len(loud) else len(audio)) + fade]
    ramp = np.linspace(1, 0, min(fade, len(audio)), dtype=np.float32)
    audio[len(audio) - len(ramp) :] *= ramp
    audio[:lead] *= np.linspace(0, 1, min(lead, len(audio)), dtype=np.float32)
    return np.pad(audio, (0, max(0, int(minimum_seconds * SAMPLE_RATE) - len(audio))))
