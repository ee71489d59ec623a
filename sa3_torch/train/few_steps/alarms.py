"""Alarms about the balance of two networks: a mean over the latest rows of the log leaves its healthy range."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

ROWS = 20  # over which a value is averaged before it is judged


@dataclass(frozen=True)
class HealthyRange:
    """Hold the range of a value of the log, and what leaving it at either end means."""

    low: float
    high: float
    below: str
    above: str


_WINS = "the discriminator wins; lower its learning rate"
_LOSES = "the discriminator hardly tells real from fake; raise its learning rate or its steps"
ADVERSARIAL = {  # [T7.4]
    "measured/gap": HealthyRange(0.3, 2.0, _LOSES, _WINS),
    "discriminator/raw": HealthyRange(0.4, 0.65, _WINS, _LOSES),
    "contrastive/raw": HealthyRange(0.0, 0.5, "", "the discriminator hardly reads prompts; raise weights.contrastive"),
}


@dataclass
class BalanceAlarms:
    """Say once for each value that it is out of its range; ``table``: name in the log -> range."""

    table: dict[str, HealthyRange]
    _seen: dict[str, deque[float]] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def alarms(self, values: dict[str, float]) -> list[str]:
        """Return sentences about what has become unhealthy with this row."""
        found = []
        for name, healthy in self.table.items():
            if name not in values or name in self._said:
                continue
            seen = self._seen.setdefault(name, deque(maxlen=ROWS))
            seen.append(values[name])
            mean = sum(seen) / len(seen)
            if len(seen) == ROWS and not healthy.low <= mean <= healthy.high:
                meaning = healthy.below if mean < healthy.low else healthy.above
                found.append(
                    f"{name} is {mean:.3g} over the last {ROWS} rows, healthy is {healthy.low:g} to {healthy.high:g}: "
                    f"{meaning}"
                )
                self._said.add(name)
        return found
