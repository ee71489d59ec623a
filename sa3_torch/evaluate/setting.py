"""How sounds are sampled, as one writes it: SAMPLER:STEPS:GUIDANCE[:APG]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sa3_mlx.common.generation.request import SAMPLER_NAMES, Guidance, Item, Request, defaults
from sa3_mlx.common.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How sounds are sampled; ``guidance`` and ``apg`` are ``scale`` and ``apg`` of ``Guidance``."""

    sampler: str
    steps: int
    guidance: float
    apg: float = Guidance.apg

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From "SAMPLER:STEPS:GUIDANCE" such as euler:50:3, or with the share of the orthogonal part, as dpmpp:15:3:0,
        which is plain guidance."""
        try:
            sampler, steps, guidance, *more = text.split(":")
            (apg,) = more or [str(Guidance.apg)]
            found = cls(sampler=sampler, steps=int(steps), guidance=float(guidance), apg=float(apg))
        except ValueError as error:
            raise ValueError(
                f"setting is {text!r}: expected SAMPLER:STEPS:GUIDANCE[:APG] such as euler:50:3 or dpmpp:15:3:0"
            ) from error
        if sampler not in SAMPLER_NAMES:
            raise ValueError(f"setting {text!r}: sampler is {sampler!r}: allowed are {', '.join(SAMPLER_NAMES)}")
        return found

    @classmethod
    def usual(cls, config: ModelConfig) -> Setting:
        """The model's own."""
        own = defaults(config)
        return cls(sampler=own.sampler, steps=own.steps, guidance=own.guidance_scale)

    def __str__(self) -> str:
        text = f"{self.sampler}:{self.steps}:{self.guidance:g}"
        return text if self.apg == Guidance.apg else f"{text}:{self.apg:g}"

    def request(self, items: Sequence[Item]) -> Request:
        guidance = Guidance(scale=self.guidance, apg=self.apg)
        return Request(items=tuple(items), steps=self.steps, sampler=self.sampler, guidance=guidance)
