"""Playing a file with what the system has."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_PLAYERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (  # command, its options, what it plays
    ("afplay", (), (".wav", ".flac")),
    ("pw-play", (), (".wav", ".flac")),
    ("paplay", (), (".wav", ".flac")),
    ("aplay", ("-q",), (".wav",)),
    ("ffplay", ("-nodisp", "-autoexit", "-loglevel", "error"), (".wav", ".flac")),
)
NAMES = tuple(name for name, _, _ in _PLAYERS)


def players() -> list[str]:
    """Those that are installed."""
    return [name for name in NAMES if shutil.which(name)]


def find_player(suffix: str) -> list[str]:
    """Command that plays such files. Raises FileNotFoundError when none is installed."""
    for name, options, suffixes in _PLAYERS:
        if suffix in suffixes and shutil.which(name):
            return [name, *options]
    raise FileNotFoundError(f"--play: no player for {suffix} files found; install one of {', '.join(NAMES)}")


def play(path: Path) -> None:
    """Play to the end. Raises OSError when the player fails."""
    command = find_player(path.suffix.lower())
    result = subprocess.run([*command, str(path)], check=False, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(f"{path} was written, but {command[0]} could not play it: {reason}")
