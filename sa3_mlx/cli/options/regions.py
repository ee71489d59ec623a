"""Read what ``--region`` says: when, and in which way of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sa3_mlx.common.generation.request import Patch
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import quoted

_TIMES = re.compile(r"\s*([^\s:=]*)\s*:\s*((?!(?:strength|noise-level|seed|prompt)=)[^\s:=]*)\s*")
_SETTING = re.compile(r"(strength|noise-level|seed)=([^\s=]*)(?:\s+|$)|(?=(?:prompt)?=)")
_WORDS = "strength=0.4, noise-level=0.5, seed=7 and, last, =PROMPT"


@dataclass(frozen=True, kw_only=True)
class WantedRegion:
    """Hold one region as it was asked for; None where nothing was said."""

    start: float  # seconds
    end: float | None  # None: the end of the clip
    prompt: str | None = None
    strength: float | None = None  # by the dial of the model
    noise_level: float | None = None
    seed: int | None = None

    @property
    def has_level(self) -> bool:
        """Tell whether it says how far to go."""
        return self.strength is not None or self.noise_level is not None

    def patch(self, length: float, level: float | None, config: ModelConfig) -> tuple[float, float] | Patch:
        """Return the region of a clip of ``length`` seconds, a plain one where it has nothing of its own.

        ``level``: the noise level where it has none. Raises ValueError for a strength that cannot be.
        """
        end = length if self.end is None else self.end
        if self.strength is not None:
            level = config.noise_level(self.strength, "monotone")
        level = level if self.noise_level is None else self.noise_level
        if self.prompt is None and level is None and self.seed is None:
            return self.start, end
        wanted = 1.0 if level is None else level
        return Patch(start=self.start, end=end, prompt=self.prompt, noise_level=wanted, seed=self.seed)


def to_patches(
    regions: Sequence[WantedRegion], length: float, level: float | None, config: ModelConfig
) -> tuple[tuple[tuple[float, float] | Patch, ...], float | None]:
    """Return the regions, and the noise level from which the whole clip starts.

    Where one region says how far to go, ``level`` is that of the others, and the clip starts from noise.
    """
    if not any(region.has_level for region in regions):
        return tuple(region.patch(length, None, config) for region in regions), level
    return tuple(region.patch(length, level, config) for region in regions), None


def parse_region(text: str) -> WantedRegion:
    """Read "START:END", then "strength=0.4", "noise-level=0.5" or "seed=7", then "=PROMPT", all but times optional.

    An empty START is 0, an empty END the end of the clip. Raises ValueError, one line, with the place of what is wrong.
    """
    times = _TIMES.match(text)
    try:
        start, end = (float(part) if part else None for part in (times.groups() if times else ("?", "")))
    except ValueError:
        raise ValueError(f"{quoted(text)}: expected START:END in seconds, such as 1.5:3 or 2:") from None
    place, found = times.end() if times else 0, dict[str, str]()
    while place < len(text):
        setting = _SETTING.match(text, place)
        if setting is None:
            word = text[place:].split(maxsplit=1)[0]
            raise ValueError(f"{quoted(text)}: {quoted(word)} at character {place + 1}: allowed are {_WORDS}")
        if setting[1] is None:
            found["prompt"] = text[text.index("=", place) + 1 :].strip()
            if not found["prompt"]:
                raise ValueError(f"{quoted(text)}: no words after '=' at character {text.index('=', place) + 1}")
            break
        if setting[1] in found:
            raise ValueError(f"{quoted(text)}: a second {setting[1]} at character {place + 1}: give one")
        found[setting[1]] = setting[2]
        place = setting.end()
    if "strength" in found and "noise-level" in found:
        raise ValueError(f"{quoted(text)}: strength and noise-level say the same: give one of them")
    seed = found.get("seed")
    if seed is not None and not re.fullmatch(r"[0-9]{1,19}", seed):
        raise ValueError(f"{quoted(text)}: seed is {quoted(seed)}: expected a whole number such as seed=7")
    return WantedRegion(
        start=start or 0.0,
        end=end,
        prompt=found.get("prompt"),
        strength=_number(found, "strength", text),
        noise_level=_number(found, "noise-level", text),
        seed=None if seed is None else int(seed),
    )


def _number(found: dict[str, str], name: str, text: str) -> float | None:
    if name not in found:
        return None
    try:
        return float(found[name])
    except ValueError:
        raise ValueError(
            f"{quoted(text)}: {name} is {quoted(found[name])}: expected a number such as {name}=0.4"
        ) from None
