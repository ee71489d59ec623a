"""The ``sa3`` command. Only ``app`` is imported to show the help; a command's module is imported when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    from .app import run

    sys.exit(run(sys.argv[1:]))
