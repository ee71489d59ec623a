"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """Such as "0.1.0"; "0+source" when the package runs from a source folder without being installed."""
    try:
        return installed_version("sa3")
    except PackageNotFoundError:
        return "0+source"
