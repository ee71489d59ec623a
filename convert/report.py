"""Report what a conversion did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Report:
    """Describe the result of ``convert`` or ``export_official``; ``str(report)`` is the text for people."""

    name: str
    source: str
    folder: Path
    parts: tuple[str, ...]
    tensors: int
    parameters: int
    dtypes: dict[str, int]  # type -> number of parameters
    bytes: int  # size of the weight files
    hash: str  # "sha256:..." of model.safetensors
    dropped: tuple[str, ...]  # tensors of the source that were left out on purpose
    seconds: float

    def __str__(self) -> str:
        dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in sorted(self.dtypes.items()))
        lines = [
            f"{self.name}: {self.source} -> {self.folder}",
            f"  parts       {', '.join(self.parts)}",
            f"  tensors     {self.tensors:,}",
            f"  parameters  {self.parameters:,} ({dtypes})",
            f"  size        {self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s",
            f"  hash        {self.hash}",
            f"  dropped     {_dropped(self.dropped)}",
        ]
        return "\n".join(lines)


def _dropped(names: tuple[str, ...]) -> str:
    """Show names that differ only in layer numbers once, with their count."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = ".".join("*" if component.isdigit() else component for component in name.split("."))
        counts[pattern] = counts.get(pattern, 0) + 1
    shown = [pattern if count == 1 else f"{pattern} ({count})" for pattern, count in counts.items()]
    return f"{len(names)}: {', '.join(shown)}" if names else "none"
