"""Read the one-shots and loops of Debian's package sonic-pi-samples, and word them by their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sa3_torch.train.data.clip_cache import SAMPLE_RATE
from sa3_torch.train.data.recordings import hash_file
from sa3_torch.train.demo_set.sounds import SAMPLES_LICENCE

DEFAULT_SAMPLES = Path("/usr/share/sonic-pi/samples")
LICENCE = SAMPLES_LICENCE
HELD_OUT = 0.08  # of the files for validation, and as many for the test
# What the first part of a name stands for; the rest of the name goes before it.
_KINDS = {
    "ambi": "ambient sound",
    "bass": "synth bass note",
    "bd": "kick",
    "drum": "",
    "elec": "electronic sound",
    "glitch": "glitch",
    "guit": "electric guitar",
    "loop": "loop",
    "mehackit": "electronic sound",
    "misc": "sound",
    "perc": "percussion",
    "sn": "snare",
    "tabla": "tabla",
    "vinyl": "vinyl",
}
_WORDS = {
    "bass hard": "kick loud",
    "bass soft": "kick soft",
    "cymbal closed": "closed hat",
    "cymbal open": "open hat",
    "cymbal pedal": "closed hat",
    "tom hi": "high tom",
    "tom lo": "low tom",
    "tom mid": "tom",
    "splash": "crash",
    "snare hard": "snare loud",
    "hi snare": "snare",
    "lo snare": "snare",
    "mid snare": "snare",
    "808": "electronic",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One file: its name, what it is called, its side ("train", "validation", "test") and the hash of the file."""

    path: Path
    what: str
    side: str
    digest: str

    def read(self) -> NDArray[np.float64]:
        """Read it as (samples, 2)."""
        import soundfile

        audio = soundfile.read(self.path, dtype="float64", always_2d=True)[0]
        return np.repeat(audio, 2, axis=1) if audio.shape[1] == 1 else audio


def find_samples(folder: Path) -> list[Path]:
    """Return the files. Raises FileNotFoundError without any."""
    files = sorted(folder.glob("*.flac"))
    if not files:
        raise FileNotFoundError(
            f"{folder}: no .flac files; on Debian or Ubuntu: sudo apt install sonic-pi-samples; or --samples FOLDER"
        )
    return files


def samples(folder: Path) -> Iterator[Sample]:
    """Yield the files at 44.1 kHz; the hash of a file decides its side."""
    import soundfile

    for path in find_samples(folder):
        if soundfile.info(path).samplerate == SAMPLE_RATE:
            digest = hash_file(path)
            place = int(digest.removeprefix("sha256:")[:8], 16) / 2**32
            side = "validation" if place < HELD_OUT else "test" if place < 2 * HELD_OUT else "train"
            yield Sample(path=path, what=describe(path.stem), side=side, digest=digest)


def describe(name: str) -> str:
    """Word a file name: "bd_haus" is "haus kick", "loop_amen_full" "amen full loop"."""
    kind, _, rest = name.partition("_")
    words = rest.replace("_", " ").rstrip("0123456789")
    for found, said in _WORDS.items():
        words = words.replace(found, said)
    noun = _KINDS.get(kind, kind)
    return " ".join(f"{words} {noun}".split())
