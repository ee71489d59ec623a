"""Grade what a run made, and choose the best of several: by a latent CLAP where the model has one, else by checks.

Every check gives 0 to 1, the score is their product. They find what is broken or not as asked, not what is beautiful.
A latent CLAP says how near a sound is to its prompt; what fails a check stands behind all that does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.events import Generation
from sa3_mlx.common.schema import Config, is_finite, quoted, require

from .seam import MEASURES, joint
from .tempo import has_librosa, key, named_bpm, named_key, tempo, tempo_share

_SILENT_DB = -60.0
_WINDOW_SECONDS = 0.05
_CLIPPED_MOST = 0.01  # share of samples at which the check reads 0
_ROUGH = 0.2  # of the check of a joint: with nine tenths of the inside smoother, a loop has failed it


@dataclass(frozen=True, kw_only=True)
class Grade(Config):
    """Hold the checks of one clip: by name 0 to 1; what was heard stands beside it, and what a latent CLAP says."""

    total: float  # their product
    checks: dict[str, float]
    heard: dict[str, str] = field(default_factory=dict)  # of tempo, key and joint
    clap: float | None = None  # cosine of clip and prompt, by which it was chosen; None: it was chosen by the checks

    def __post_init__(self) -> None:
        numbers = all(is_finite(value) for value in self.checks.values())
        texts = all(isinstance(text, str) for text in (*self.checks, *self.heard, *self.heard.values()))
        require(numbers and texts, f"checks are {quoted(self.checks)}: expected names and numbers")
        require(self.clap is None or is_finite(self.clap), f"clap is {quoted(self.clap)}: expected a number")

    @property
    def passed(self) -> bool:
        """Tell whether no check failed."""
        return self.total > 0 and self.checks.get("joint", 1.0) >= _ROUGH

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """Return what the tags hold: nothing of a latent CLAP where none was asked."""
        stored = super().to_dict(defaults=defaults)
        return stored if self.clap is not None else {name: value for name, value in stored.items() if name != "clap"}


def grade(generation: Generation, item: int) -> Grade:
    """Grade clip ``item``: not silent, not clipped, sounding to its end; joint and tempo of a loop; tempo and key that
    its prompt names. Without librosa tempo is left out."""
    request, audio, rate = generation.request, generation.audio[item], generation.sample_rate
    prompt, loop = request.items[item].prompt, request.loop
    sounding = _sounding(audio, rate)
    checks = {
        "sound": float(sounding.any()),
        "clipping": 1 - min(1.0, generation.clipped_share[item] / _CLIPPED_MOST),
    }
    if loop is None:
        checks["length"] = (int(np.flatnonzero(sounding)[-1]) + 1) / len(sounding) if sounding.any() else 0.0
    heard: dict[str, str] = {}
    if loop is not None and len(audio) >= rate / 5:
        found = joint(audio, rate)
        checks["joint"] = min(1.0, 2 * found.score)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(MEASURES, found.shares, strict=True))
        heard["joint"] = f"{found.score:.0%} of the inside is rougher ({shares})"
    bpm = loop.bpm if loop is not None and loop.bpm is not None else named_bpm(prompt)
    if bpm is not None and has_librosa():
        beats = tempo(audio, rate, loop=loop is not None)
        checks["tempo"] = 0.0 if beats is None else tempo_share(beats, bpm)
        heard["tempo"] = f"{'no beat' if beats is None else f'{beats:.1f} bpm'}, asked {bpm:g}"
    wanted = named_key(prompt)
    if wanted is not None:
        tone = key(audio, rate)
        checks["key"] = float(tone == wanted)
        heard["key"] = f"{tone}, asked {wanted}"
    checks = {name: round(value, 4) for name, value in checks.items()}
    return Grade(total=round(float(np.prod(list(checks.values()))), 6), checks=checks, heard=heard)


def best(scores: Sequence[Grade]) -> int:
    """Return the place of the best grade, of equal ones the first; all have a cosine of a latent CLAP or none has."""
    return max(range(len(scores)), key=lambda place: (_rank(scores[place]), -place))


def _rank(one: Grade) -> tuple[float, ...]:
    by_checks = one.total, sum(one.checks.values())  # where a check is 0 for all, the others decide
    if one.clap is None:
        return by_checks
    return (1.0, one.clap) if one.passed else (0.0, *by_checks)


def _sounding(audio: Audio, sample_rate: int) -> np.ndarray:
    """Mark windows of 50 ms that are louder than -60 dB."""
    window = max(1, round(_WINDOW_SECONDS * sample_rate))
    power = np.square(audio.astype(np.float64)).mean(axis=1)
    starts = np.arange(0, len(power), window)
    means = np.add.reduceat(power, starts) / np.diff([*starts, len(power)])
    return np.asarray(10 * np.log10(means + 1e-12) > _SILENT_DB)
