"""Checks of a folder of recordings before anything is trained on it: a table, a picture, JSON. numpy and matplotlib."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_mlx.common.files.atomic import new_file
from sa3_mlx.common.files.lettering import quiet_drawing, write_title

from .clip_cache import SAMPLE_RATE
from .recordings import Facts, find_audio, inspect, read_sidecar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIPPED_SHARE = 1e-4  # of the samples
_FORMATS = 8  # that the picture shows
# name -> what it means; these make a folder wrong ...
PROBLEMS = {
    "unreadable": "cannot be read to its end",
    "bad sidecar": "its .json or .txt is not valid",
    "no caption": "no .json or .txt with a caption",
    "duplicate": "the same bytes as another file",
    "clipping": f"more than {CLIPPED_SHARE:.2%} of the samples in runs at full scale",
    "silent": "peak below -80 dBFS",
    "too short": "shorter than --min-seconds",
    "low rate": f"sample rate below {SAMPLE_RATE} Hz: no content above its half",
}
# ... and these are said, no more.
NOTES = {
    "other rate": f"sample rate above {SAMPLE_RATE} Hz: will be resampled",
    "mono": "one channel: becomes two equal ones",
    "equal channels": "two channels, both the same",
    "many channels": "more than two channels: the first two are taken",
}


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """One file: what it holds (None: unreadable), the names of its problems and notes, and what is to be added."""

    path: str
    facts: Facts | None
    found: tuple[str, ...]
    detail: str

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(name for name in self.found if name in PROBLEMS)


@dataclass(frozen=True, kw_only=True)
class LintReport:
    folder: str
    files: tuple[FileReport, ...]

    @property
    def counts(self) -> Counter[str]:
        return Counter(name for file in self.files for name in file.found)

    @property
    def good(self) -> bool:
        return not any(file.problems for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold: levels of digital silence are null."""
        facts = [file.facts for file in self.files if file.facts]
        rows = []
        for file in self.files:
            about = asdict(file.facts) if file.facts else {}
            if about and not math.isfinite(about["rms_db"]):
                about["rms_db"] = None
            rows.append({"path": file.path, "found": list(file.found), "detail": file.detail, **about})
        return {
            "folder": self.folder,
            "good": self.good,
            "files": len(self.files),
            "counts": dict(self.counts),
            "seconds": round(sum(f.seconds for f in facts), 6),
            "rows": rows,
        }

    def __str__(self) -> str:
        facts = [file.facts for file in self.files if file.facts]
        seconds = sum(f.seconds for f in facts)
        lines = [f"{self.folder}: {len(self.files)} files, {seconds / 60:.1f} min"]
        for name, meaning in {**PROBLEMS, **NOTES}.items():
            if self.counts[name]:
                lines.append(f"{self.counts[name]:6} {name:14} {meaning}")
        wrong = [file for file in self.files if file.problems]
        lines += [
            f"  {file.path}: {', '.join(file.problems)}{f' ({file.detail})' if file.detail else ''}" for file in wrong
        ]
        lines.append("nothing is wrong" if not wrong else f"{len(wrong)} of {len(self.files)} files need a look")
        return "\n".join(lines)


def lint_folder(
    folder: Path,
    *,
    minimum_seconds: float,
    captions_required: bool = True,
    progress: Callable[[list[Path]], Iterable[Path]] = iter,
) -> LintReport:
    """Read every audio file below ``folder`` once. ``progress`` goes through the files, with a bar for example.

    ``captions_required`` False: only the autoencoder is trained; a missing caption is nothing to report.
    Raises FileNotFoundError without the folder, ValueError without audio files.
    """
    first: dict[str, str] = {}
    reports = []
    for path in progress(find_audio(folder)):
        name = path.relative_to(folder).as_posix()
        facts, found, details = _facts(path, minimum_seconds)
        if facts is not None and (twin := first.setdefault(facts.digest, name)) != name:
            found.append("duplicate")
            details.append(f"as {twin}")
        try:
            if not read_sidecar(path).captions and captions_required:
                found.append("no caption")
        except (ValueError, OSError) as error:
            found.append("bad sidecar")
            details.append(str(error))
        reports.append(FileReport(path=name, facts=facts, found=tuple(found), detail="; ".join(details)))
    return LintReport(folder=folder.name, files=tuple(reports))


def _facts(path: Path, minimum_seconds: float) -> tuple[Facts | None, list[str], list[str]]:
    try:
        facts = inspect(path)
    except (ValueError, OSError) as error:
        return None, ["unreadable"], [str(error).removeprefix(f"{path}: ")]
    clipped = facts.clipped_samples / (facts.samples * facts.channels)
    tests = {
        "clipping": clipped > CLIPPED_SHARE,
        "silent": facts.silent,
        "too short": facts.seconds < minimum_seconds,
        "low rate": facts.sample_rate < SAMPLE_RATE,
        "other rate": facts.sample_rate > SAMPLE_RATE,
        "mono": facts.channels == 1,
        "equal channels": facts.equal_channels,
        "many channels": facts.channels > 2,
    }
    details = {
        "clipping": f"{clipped:.2%} clipped",
        "too short": f"{facts.seconds:.3f} s",
        "low rate": f"{facts.sample_rate} Hz",
    }
    found = [name for name, holds in tests.items() if holds]
    return facts, found, [details[name] for name in found if name in details]


def draw_report(report: LintReport, path: Path) -> None:
    """Draw levels, durations, formats and what was found, as a PNG."""
    with quiet_drawing(), new_file(path) as partial:
        figure_of(report).savefig(partial, dpi=110, format="png")


def figure_of(report: LintReport) -> Figure:
    """Return that picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    facts = [file.facts for file in report.files if file.facts]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (levels, durations), (formats, findings) = figure.subplots(2, 2)
    write_title(figure, f"{report.folder}: {len(report.files)} files, {sum(f.seconds for f in facts) / 60:.1f} min")
    bins = np.arange(-96, 1, 3)
    peaks = [20 * math.log10(min(max(f.peak, 1.6e-5), 1.0)) for f in facts]
    levels.hist([max(f.rms_db, -95.9) for f in facts], bins=bins, label="RMS", color="tab:blue")
    levels.hist(peaks, bins=bins, label="peak", histtype="step", color="tab:orange", linewidth=2)
    levels.set(title="level", xlabel="dB of full scale", ylabel="files")
    levels.legend()
    seconds = [f.seconds for f in facts] or [1.0]
    low, high = min(seconds) / 1.1, max(seconds) * 1.1
    if facts:
        durations.hist(seconds, bins=np.geomspace(low, high, 30).tolist(), color="tab:blue")
    durations.set(title="duration", xlabel="seconds", ylabel="files", xscale="log", xlim=(low, high))
    durations.set_xticks(*_duration_ticks(low, high))
    durations.minorticks_off()
    for panel in (levels.yaxis, durations.yaxis, formats.xaxis, findings.xaxis):
        panel.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    shapes = Counter(f"{f.sample_rate} Hz, {f.channels} ch" for f in facts)
    shown = dict(shapes.most_common(_FORMATS))
    if others := len(shapes) - len(shown):
        shown[f"{others} others"] = len(facts) - sum(shown.values())
    _bars(formats, shown, "formats", set())
    _bars(findings, {name: report.counts[name] for name in {**PROBLEMS, **NOTES}}, "found", set(PROBLEMS))
    return figure


def _duration_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return places and words of a few ticks on a logarithmic axis of seconds, far from each other."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= 3:
            break
    else:
        ticks = np.geomspace(low, high, 4).tolist()
    return ticks, [f"{tick:.3g}" for tick in ticks]


def _bars(axes: Any, counts: dict[str, int], title: str, red: set[str]) -> None:
    names = list(counts)[::-1]
    bars = axes.barh(names, [counts[name] for name in names])
    for bar, name in zip(bars, names, strict=True):
        bar.set_color("tab:red" if name in red else "tab:blue")
    axes.bar_label(bars, padding=3)
    axes.set(title=title, xlabel="files", xlim=(0, 1.12 * max(counts.values(), default=0) or 1))
