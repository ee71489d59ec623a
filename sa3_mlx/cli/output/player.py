"""Playing with what the system has: a file to its end, or a WAV while it is made."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Player:
    command: tuple[str, ...]
    suffixes: tuple[str, ...]  # of files it plays
    stream: tuple[str, ...] = ()  # arguments that make it read a WAV from standard input; none: it cannot


_PLAYERS: tuple[Player, ...] = (
    Player(command=("afplay",), suffixes=(".wav", ".flac")),
    Player(command=("pw-play",), suffixes=(".wav", ".flac")),
    Player(command=("paplay",), suffixes=(".wav", ".flac")),
    Player(command=("aplay", "-q"), suffixes=(".wav",), stream=("-",)),
    Player(
        command=("ffplay", "-nodisp", "-autoexit", "-loglevel", "error"),
        suffixes=(".wav", ".flac"),
        stream=("-i", "-"),
    ),
)
NAMES = tuple(player.command[0] for player in _PLAYERS)


def players() -> list[str]:
    """Those that are installed."""
    return [name for name in NAMES if shutil.which(name)]


def find_player(suffix: str) -> list[str]:
    """Command that plays such files. Raises FileNotFoundError when none is installed."""
    for player in _PLAYERS:
        if suffix in player.suffixes and shutil.which(player.command[0]):
            return list(player.command)
    raise FileNotFoundError(f"--play: no player for {suffix} files found; install one of {', '.join(NAMES)}")


def find_stream_player() -> list[str] | None:
    """Command that plays a WAV from its standard input; None when none is installed, as on a Mac without ffplay."""
    for player in _PLAYERS:
        if player.stream and shutil.which(player.command[0]):
            return [*player.command, *player.stream]
    return None


def play(path: Path) -> None:
    """Play to the end. Raises OSError when the player fails."""
    command = find_player(path.suffix.lower())
    result = subprocess.run([*command, str(path)], check=False, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(f"{path} was written, but {command[0]} could not play it: {reason}")
