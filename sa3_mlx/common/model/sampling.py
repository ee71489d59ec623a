"""Say how a diffusion model is sampled: sampler, steps and guidance, in the only type for it.

Requests, models, demos of a training, teachers, evaluation and benchmarks hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sa3_mlx.common.schema import Config, ConfigError, is_finite, quoted

SAMPLER_NAMES = ("euler", "pingpong", "dpmpp", "rk4")
STEPS_MAX = 1000


@dataclass(frozen=True, kw_only=True)
class Guidance(Config):
    """Set classifier-free guidance [B18-B21]; the defaults are the official ones: no guidance, at scale 1."""

    scale: float = 1.0  # 0 to 100; 1 is off
    apg: float = 1.0  # 0 plain guidance, 1 only the part orthogonal to the conditional prediction
    rescale: float = 0.0  # 0 to 1, how far the level of the guided prediction is brought back
    interval: tuple[float, float] = (0.0, 1.0)  # times t in which guidance is on
    norm_threshold: float = 0.0  # 0 off

    def __post_init__(self) -> None:
        self.take_plain()

    @classmethod
    def from_dict(cls, data: object, *, where: str = "guidance") -> Self:
        """Read a table, of which fields may be missing, or a number, which is the scale."""
        if isinstance(data, int | float) and not isinstance(data, bool):
            data = {"scale": data}
        return super().from_dict(data, where=where)

    def check(self) -> None:
        """Raise ConfigError for a value that guidance cannot have, and for settings that have no effect."""
        _check_range(self.scale, "guidance scale", 0, 100)
        _check_range(self.apg, "guidance apg", 0, 1)
        _check_range(self.rescale, "guidance rescale", 0, 1)
        _check_range(self.norm_threshold, "guidance norm threshold", 0, 1e9)
        if len(self.interval) != 2:
            raise ConfigError(f"guidance interval is {quoted(self.interval)}: expected (start, end)")
        start, end = self.interval
        for bound in self.interval:
            _check_finite(bound, "guidance interval")
        if not 0 <= start <= end <= 1:
            raise ConfigError(f"guidance interval is {start:g}..{end:g}: expected 0 <= start <= end <= 1")
        if self.scale == 1 and self != Guidance():
            raise ConfigError(
                "guidance apg, rescale, interval and norm threshold have no effect at guidance scale 1; use a scale "
                "such as 4, or leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """Take ``steps`` of ``sampler``, with ``guidance``."""

    sampler: str  # one of SAMPLER_NAMES
    steps: int  # 1 to STEPS_MAX
    guidance: Guidance = Guidance()  # a number stands for its scale

    def __post_init__(self) -> None:
        self.take_plain()
        object.__setattr__(self, "guidance", Guidance.from_dict(self.guidance))

    @classmethod
    def from_dict(cls, data: object, *, where: str = "sampling") -> Self:
        """Read a table, checked; without guidance it is the official one that does nothing."""
        found = super().from_dict(data, where=where)
        try:
            found.check()
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        return found

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "SAMPLER:STEPS:GUIDANCE" such as euler:50:3, or with the share of the orthogonal part, as dpmpp:15:3:0,
        which is plain guidance. Raises ConfigError for anything else."""
        try:
            sampler, steps, scale, *more = text.split(":")
            (apg,) = more or [str(Guidance.apg)]
            guidance = Guidance(scale=float(scale), apg=float(apg))
            found = cls(sampler=sampler, steps=int(steps), guidance=guidance)
        except ValueError as error:
            raise ConfigError(
                f"{quoted(text)}: expected SAMPLER:STEPS:GUIDANCE[:APG] such as euler:50:3 or dpmpp:15:3:0"
            ) from error
        if sampler not in SAMPLER_NAMES:
            raise ConfigError(f"{quoted(text)}: sampler is {quoted(sampler)}: allowed are {', '.join(SAMPLER_NAMES)}")
        return found

    def __str__(self) -> str:
        text = f"{self.sampler}:{self.steps}:{self.guidance.scale:g}"
        return text if self.guidance.apg == Guidance.apg else f"{text}:{self.guidance.apg:g}"

    def check(self) -> None:
        """Raise ConfigError for an unknown sampler, a number of steps out of range and impossible guidance."""
        if type(self.steps) is not int or not 1 <= self.steps <= STEPS_MAX:
            raise ConfigError(f"steps is {quoted(self.steps)}: allowed are the integers 1 to {STEPS_MAX}")
        if self.sampler not in SAMPLER_NAMES:
            raise ConfigError(f"sampler is {quoted(self.sampler)}: allowed are {', '.join(SAMPLER_NAMES)}")
        self.guidance.check()


def _check_finite(value: float, name: str) -> None:
    if not is_finite(value):
        raise ConfigError(f"{name} is {quoted(value)}: expected a finite number")


def _check_range(value: float, name: str, low: float, high: float) -> None:
    _check_finite(value, name)
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value:g}: allowed are {low:g} to {high:g}")
