"""Tell the version of the installed package, and of its source."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from subprocess import DEVNULL, PIPE, run

SOURCE = Path(__file__).resolve().parents[2]


def version() -> str:
    """Return "0.1.0" or the like; "0+source" when the package runs from a source folder without being installed."""
    try:
        return installed_version("sa3")
    except PackageNotFoundError:
        return "0+source"


def revision() -> str:
    """Return the git revision of the source, "-dirty" with changes that are not in it; ``version()`` without git."""
    if not (SOURCE / ".git").exists():
        return version()
    command = ["git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        found = run(command, stdout=PIPE, stderr=DEVNULL, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        return version()
    return found or version()
