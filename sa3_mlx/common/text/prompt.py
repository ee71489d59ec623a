"""Read what a prompt says beside its words: weights, and blends of two texts.

"(soft:0.5) piano" gives a phrase a weight; groups may be nested, and their weights multiply. "piano | violin : 0.3"
goes three tenths of the way from the first text to the second. Anything else is text as it stands: parentheses without
a weight, a bar without a share. A backslash before ( ) | or itself makes text of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sa3_mlx.common.schema import quoted

WEIGHT_MAX = 10.0
_NUMBER = r"[+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
_WEIGHT = re.compile(rf":\s*({_NUMBER})\s*$")
_SHARE = re.compile(rf"\s:\s*({_NUMBER})\s*$")
_TAIL = 64  # characters in which the weight of a group stands
_SPECIAL = "()|\\"


@dataclass(frozen=True)
class WeightedText:
    """Hold a text and the weights of its phrases: (start, stop, weight) in characters; the rest has weight 1."""

    text: str
    spans: tuple[tuple[int, int, float], ...] = ()

    def weight(self, start: int, stop: int) -> float:
        """Return the weight of the token that these characters make: that of its first one that is no space."""
        place = next((place for place in range(start, stop) if not self.text[place].isspace()), start)
        return next((weight for first, last, weight in self.spans if first <= place < last), 1.0)


@dataclass(frozen=True)
class Prompt:
    """Hold one text, or two and how far to go from the first to the second."""

    first: WeightedText
    second: WeightedText | None = None
    share: float = 0.0  # above 0 and below 1 where there is a second one

    @property
    def texts(self) -> tuple[WeightedText, ...]:
        """Return the one text, or both."""
        return (self.first,) if self.second is None else (self.first, self.second)


def parse_prompt(text: str) -> Prompt:
    """Read a prompt. Raises ValueError, one line that says at which character, for a weight or share that cannot be."""
    bars = [match.start() for match in re.finditer(r"\\.|\|", text, re.DOTALL) if match[0] == "|"]
    share = _SHARE.search(text)
    if len(bars) != 1 or share is None or share.start() < bars[0]:
        return Prompt(_weighted(text, 0))
    (bar,) = bars
    value, parts = float(share[1]), (text[:bar].rstrip(), text[bar + 1 : share.start()].strip())
    if not 0 <= value <= 1:
        raise ValueError(
            f"the blend at character {share.start(1) + 1} is {share[1]}: allowed are 0 to 1; write \\| for a bar"
        )
    if not all(part.strip() for part in parts):
        raise ValueError(f"the blend at character {bar + 1} has no text on one side: write 'piano | violin : 0.3'")
    second_start = bar + 1 + len(text[bar + 1 :]) - len(text[bar + 1 :].lstrip())
    first, second = _weighted(parts[0], 0), _weighted(parts[1], second_start)
    if value in (0, 1):
        return Prompt(second if value else first)
    return Prompt(first, second, value)


def _weighted(text: str, offset: int) -> WeightedText:
    """Take the weights out of a text, which begins at character ``offset`` of the prompt."""
    letters, weights = list[str](), list[float]()  # of the text without them
    opened = list[tuple[int, int]]()  # in ``letters`` and in ``text``
    place = 0
    while place < len(text):
        letter, following = text[place], text[place + 1 : place + 2]
        if letter == "\\" and following and following in _SPECIAL:
            letters.append(following)
            weights.append(1.0)
            place += 2
            continue
        if letter == ")" and (found := _WEIGHT.search("".join(letters[-_TAIL:]))):
            if not opened:
                raise ValueError(f"the weight before character {offset + place + 1} has no '(': write \\) for text")
            start, source = opened.pop()
            stop = len(letters) - (len(found.string) - found.start())
            weight = _checked(found[1], "".join(letters[start + 1 : stop]), offset + source + 1)
            letters[start:] = letters[start + 1 : stop]
            weights[start:] = [weight * inner for inner in weights[start + 1 : stop]]
            if (most := max(map(abs, weights[start:]), default=0.0)) > WEIGHT_MAX:
                raise ValueError(
                    f"the weights inside of the '(' at character {offset + source + 1} multiply to {most:g}: allowed "
                    f"are -{WEIGHT_MAX:g} to {WEIGHT_MAX:g}"
                )
            place += 1
            continue
        if letter == "(":
            opened.append((len(letters), place))
        elif letter == ")" and opened:
            opened.pop()
        letters.append(letter)
        weights.append(1.0)
        place += 1
    if opened and _WEIGHT.search("".join(letters[-_TAIL:])):
        raise ValueError(f"the '(' at character {offset + opened[-1][1] + 1} is not closed: write \\( for text")
    return WeightedText("".join(letters), _spans(weights))


def _checked(number: str, phrase: str, place: int) -> float:
    weight = float(number)
    if not phrase.strip():
        raise ValueError(f"the weight at character {place} has no words: write '(piano:{number})'")
    if abs(weight) > WEIGHT_MAX:
        raise ValueError(
            f"the weight of {quoted(phrase)} at character {place} is {number}: allowed are -{WEIGHT_MAX:g} to "
            f"{WEIGHT_MAX:g}"
        )
    return weight


def _spans(weights: list[float]) -> tuple[tuple[int, int, float], ...]:
    """Join letters of one weight."""
    spans: list[tuple[int, int, float]] = []
    for place, weight in enumerate(weights):
        if spans and spans[-1][1] == place and spans[-1][2] == weight:
            spans[-1] = (spans[-1][0], place + 1, weight)
        elif weight != 1:
            spans.append((place, place + 1, weight))
    return tuple(spans)
