"""Know the licences of released models, and which ones the user has accepted on this machine.

What a licence allows is said there alone; here stand its name, its page, and whether we read it as allowing to pass on
what was made from the model, with conditions that a model card can meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.objects import read_object

from .installed import home

_FORMAT = "sa3-licences/1"


@dataclass(frozen=True, kw_only=True)
class Licence:
    """Name a licence."""

    id: str
    name: str
    page: str
    conditions: str | None  # of passing on what was made from the model; None: not known to allow it


STABILITY = Licence(
    id="stability-ai-community",
    name="Stability AI Community License",
    page="https://stability.ai/community-license-agreement",
    conditions='a copy of the agreement goes with the model, and "Powered by Stability AI" is displayed',
)
GEMMA = Licence(
    id="gemma",
    name="Gemma Terms of Use (the text encoder T5Gemma)",
    page="https://ai.google.dev/gemma/terms",
    conditions="a copy of the terms and the notice that Gemma is provided under them go with the model",
)
RELEASED = (STABILITY, GEMMA)
_OPEN = {
    "mit": "the notice stays",
    "apache-2.0": "licence and notices stay",
    "cc0-1.0": "none",
    "cc-by-4.0": "the author is named",
    "cc-by-sa-4.0": "the author is named, and the licence stays",
}


def known(identity: str) -> Licence | None:
    """Return a licence of the released models by its id."""
    return next((licence for licence in RELEASED if licence.id == identity), None)


def named(name: str | None, page: str) -> Licence:
    """Return a licence by its name in a model card; one that nobody named is known to allow nothing."""
    if (found := known(name or "")) is not None:
        return found
    return Licence(id=f"{page} {name}", name=name or "no licence named", page=page, conditions=_OPEN.get(name or ""))


def accepted() -> dict[str, str]:
    """Return the day on which each licence was accepted on this machine, by its id."""
    try:
        data = read_object(_file())
    except (OSError, ValueError):  # there is none, or it is damaged: the user is asked again
        return {}
    found = data.get("accepted")
    return {str(key): str(day) for key, day in found.items()} if isinstance(found, dict) else {}


def accept(licences: Sequence[Licence]) -> None:
    """Remember that the user accepted these. Raises OSError where the disk refuses."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    days = accepted() | {licence.id: date.today().isoformat() for licence in licences}
    write_json(path, {"format": _FORMAT, "accepted": days})


def _file() -> Path:
    return home() / "licences.json"
