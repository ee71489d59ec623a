"""Say how a sound is finished before it goes to a file; tags keep it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from sa3_mlx.common.files.audio_file import RATES
from sa3_mlx.common.files.encoders import usual_rate
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.schema import Config, is_finite, quoted, require

_LEVELS = {  # dB, lowest and highest
    "peak_db": ("peak", "dB", -60.0, 0.0),
    "true_peak_db": ("true peak", "dB", -60.0, 0.0),
    "loudness_lufs": ("loudness", "LUFS", -60.0, 0.0),
}
_FADE_MAX = 3600.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Delivery(Config):
    """Say what happens to a finished sound, in this order, whatever the order of the fields.

    Silent ends are cut, the rate is changed, the ends are faded; then the level is set: gain to the loudness, and peaks
    above the ceiling are limited, or the whole is scaled down. Without any of it a sound stays as it is.
    """

    trim_silence: bool = False  # cut what is below -60 dB at both ends
    rate: int | None = None  # Hz; None keeps it
    fade_in: float = 0.0  # seconds
    fade_out: float = 0.0
    loudness_lufs: float | None = None  # integrated, BS.1770
    true_peak_db: float | None = None  # ceiling between samples too
    peak_db: float | None = None  # ceiling of the samples
    limit: bool = False  # hold peaks below the ceiling, .977 where none is given; other samples keep their gain
    safe: bool = False  # limit where a file that clips would clip

    def __post_init__(self) -> None:
        self.take_plain()
        for name, (label, unit, low, high) in _LEVELS.items():
            value = getattr(self, name)
            allowed = value is None or (is_finite(value) and low <= value <= high)
            shown = f"{value:g}" if isinstance(value, int | float) else quoted(value)
            require(allowed, f"{label} is {shown} {unit}: allowed are {low:g} to {high:g}")
        for name in ("fade_in", "fade_out"):
            value = getattr(self, name)
            allowed = is_finite(value) and 0 <= value <= _FADE_MAX
            require(allowed, f"{name.replace('_', ' ')} is {quoted(value)} s: allowed are 0 to {_FADE_MAX:g}")
        rate = self.rate
        require(
            rate is None or RATES[0] <= rate <= RATES[1], f"rate is {rate} Hz: allowed are {RATES[0]} to {RATES[1]}"
        )
        both = self.peak_db is not None and self.true_peak_db is not None
        require(not both, "--peak and --true-peak: give one ceiling; a true peak holds the samples below it too")
        idle = next((word for word, on in self._ceilings() if on and self.safe), None)
        require(idle is None, f"--safe has no effect beside {idle}, below which nothing clips")

    def for_file(self, subtype: Subtype, sample_rate: int) -> Self:
        """Return it with the rate of a file of this kind for sound of ``sample_rate`` Hz, where none is asked for."""
        usual = usual_rate(subtype, sample_rate)
        return self if self.rate is not None or usual == sample_rate else replace(self, rate=usual)

    def _ceilings(self) -> tuple[tuple[str, bool], ...]:
        peaks = ("--true-peak", self.true_peak_db is not None), ("--peak", self.peak_db is not None)
        return ("--limit", self.limit), *peaks

    @property
    def whole(self) -> tuple[str, ...]:
        """Name the options that need the whole sound before its first sample can leave."""
        options = {
            "--trim-silence": self.trim_silence,
            "--loudness": self.loudness_lufs is not None,
            "--true-peak": self.true_peak_db is not None,
            "--peak": self.peak_db is not None,
            "--limit": self.limit,
            "--safe": self.safe,
        }
        return tuple(option for option, on in options.items() if on)

    @property
    def changing(self) -> tuple[str, ...]:
        """Name the options that may change samples which were kept from an input."""
        options = {
            "--rate": self.rate is not None,
            "--fade-in": self.fade_in > 0,
            "--fade-out": self.fade_out > 0,
        }
        return (*(option for option, on in options.items() if on), *self.whole)

    def check(self, seconds: float, subtype: Subtype, *, kept: bool) -> None:
        """Raise ValueError for what cannot be done to a sound of so many seconds in a file of this kind.

        ``kept``: parts of it are those of an input, which promises to leave them as they are.
        """
        if self.trim_silence and kept:
            raise ValueError("--trim-silence cuts kept samples off: not possible where an input is kept")
        if self.safe and subtype == "float":
            raise ValueError("--safe has no effect in a float file, which does not clip; leave it out")
        if self.fade_in + self.fade_out > seconds:
            fades = f"fades of {self.fade_in:g} s and {self.fade_out:g} s"
            raise ValueError(f"{fades} do not fit into {seconds:g} s; ask for shorter ones")
        if self.loudness_lufs is not None:
            from .loudness import BLOCK_SECONDS, library

            library()
            if seconds < BLOCK_SECONDS:
                raise ValueError(
                    f"--loudness: a sound of {seconds:g} s has none, it takes at least {BLOCK_SECONDS:g} s"
                )
