"""How sounds are sampled, as one writes it: SAMPLER:STEPS:GUIDANCE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sa3_mlx.spec.config import ModelConfig
from sa3_mlx.spec.request import SAMPLER_NAMES, Guidance, Item, Request, defaults


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How sounds are sampled."""

    sampler: str
    steps: int
    guidance: float

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From "SAMPLER:STEPS:GUIDANCE" such as euler:50:3."""
        parts = text.split(":")
        try:
            sampler, steps, guidance = parts
            found = cls(sampler=sampler, steps=int(steps), guidance=float(guidance))
        except ValueError as error:
            raise ValueError(f"setting is {text!r}: expected SAMPLER:STEPS:GUIDANCE such as euler:50:3") from error
        if sampler not in SAMPLER_NAMES:
            raise ValueError(f"setting {text!r}: sampler is {sampler!r}: allowed are {', '.join(SAMPLER_NAMES)}")
        return found

    @classmethod
    def usual(cls, config: ModelConfig) -> Setting:
        """The model's own."""
        own = defaults(config)
        return cls(sampler=own.sampler, steps=own.steps, guidance=own.guidance_scale)

    def __str__(self) -> str:
        return f"{self.sampler}:{self.steps}:{self.guidance:g}"

    def request(self, items: Sequence[Item]) -> Request:
        return Request(
            items=tuple(items), steps=self.steps, sampler=self.sampler, guidance=Guidance(scale=self.guidance)
        )
