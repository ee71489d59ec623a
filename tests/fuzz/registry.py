"""All targets by name; those that need PyTorch are left out without it."""

from __future__ import annotations

from importlib.util import find_spec

from .target import Target


def targets() -> dict[str, Target]:
    """Return the targets, in the order in which they are fuzzed."""
    from . import files, foreign, words

    found = [*files.TARGETS, *foreign.TARGETS, *words.TARGETS]
    if find_spec("torch") is not None and find_spec("webdataset") is not None:
        from . import training

        found += training.TARGETS
    return {target.name: target for target in found}
