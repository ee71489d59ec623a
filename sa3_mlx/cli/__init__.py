"""Hold the ``sa3`` command. Its help imports only ``app``; a command's module is imported when it runs."""

from __future__ import annotations


def main() -> None:
    """Run the command line of this process and exit with its code."""
    from .app import cli
    from .group import run_process

    run_process(cli, "sa3")
