"""Turn text into token ids, exactly as the text encoder was trained: no BOS, no EOS, right padding with 0 [B1].

Shapes: B batch, S tokens.
"""

from __future__ import annotations

import json
import string
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from sa3_mlx.common.schema import quoted, reason
from sa3_mlx.common.terminal import excerpt, hushed

PAD_ID = 0
_MAX_GROWTH = 1000
_WORDS = 5  # of those that a model does not know, in a note


def first_words(words: Sequence[str]) -> str:
    """Return the first five words for a note, and how many more there are."""
    more = f" and {len(words) - _WORDS} more" if len(words) > _WORDS else ""
    return ", ".join(repr(excerpt(word)) for word in words[:_WORDS]) + more


def collapse_padding(
    mask: NDArray[np.bool_], dtype: str = "float32", sizes: Sequence[int] = ()
) -> tuple[int, NDArray[np.float32]]:
    """Keep one padded slot for all, or two: mask (B, S), true at tokens -> slots to keep, repeats (B, slots + 1).

    Every padded slot of a prompt holds the same vector [B4], so the first stands for all of them; further ones, which
    fill up a batch, stand for none. The last column is the duration token. See ``Conditioning.repeats``.

    ln n, rounded to 16 bits, is up to 0.2 % ("float16") or 1.6 % ("bfloat16") of the weight off. So for these types n
    is split over two slots: the first has a logarithm of that type just below ln n, the second what is left.

    ``sizes``, rising: numbers of columns, of which the next is taken, filled up with slots that stand for none.
    """
    counts, size = mask.sum(axis=1), mask.shape[1]
    slots = min(int(counts.max()) + (1 if dtype == "float32" else 2), size)
    slots = min(next((columns - 1 for columns in sizes if columns > slots), slots), size)
    repeats = np.ones((len(mask), slots + 1), np.float32)
    repeats[:, :slots] = mask[:, :slots]
    for row in np.flatnonzero(counts < size):
        first = counts[row]
        repeats[row, first] = size - first
        if dtype != "float32" and first + 1 < slots:
            repeats[row, first] = np.exp(_rounded_down(np.log(size - first), dtype))
            repeats[row, first + 1] = size - first - repeats[row, first]
    return slots, repeats


def _rounded_down(number: float, dtype: str) -> float:
    """Return the largest number of a type of 16 bits that is not above a number >= 0."""
    if dtype == "bfloat16":
        return float((np.float32(number).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
    rounded = np.float16(number)
    return float(rounded if rounded <= number else np.nextafter(rounded, np.float16(0)))


class Tokenizer:
    """Read a ``tokenizer.json`` of the tokenizers library; its own padding, truncation and template are not used.

    Raises FileNotFoundError for a missing file and ValueError for one that is no tokenizer, or, when it is used, for
    one that fails at a text; the message names the file.
    """

    def __init__(self, path: str | Path, max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: at least 1 token is needed")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no tokenizer there; the checkpoint folder needs its tokenizer.json")
        with _library(f"{path}: not a tokenizer of the tokenizers library"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            grows = _grows(self._tokenizer.normalizer)
        if grows:
            raise ValueError(f"{path}: its normalizer makes a text more than {_MAX_GROWTH} times as long")
        self._path, self._known_to_leave_out = path, dict[str, bool]()
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_length = max_length

    @property
    def vocab_size(self) -> int:
        """Return the largest token id + 1."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def count(self, text: str) -> int:
        """Count tokens of ``text`` before truncation: above ``max_length`` the end of the text has no effect."""
        return len(self._tokens(text))

    def closed_vocabulary(self) -> tuple[str, ...]:
        """Return all words of a tokenizer that knows whole words only, in the order of their ids; else nothing."""
        if not isinstance(self._tokenizer.model, tokenizers.models.WordLevel):
            return ()
        ids = self._tokenizer.get_vocab(with_added_tokens=False)
        return tuple(word for word in sorted(ids, key=lambda word: ids[word]) if not word.startswith("<"))

    def unknown(self, text: str) -> tuple[str, ...]:
        """Return words of ``text`` that a closed vocabulary does not have, then runs of characters that it leaves out
        (punctuation aside), each once; empty for a tokenizer of word pieces."""
        model = self._tokenizer.model
        if not isinstance(model, tokenizers.models.WordLevel):
            return ()
        found = self._encoding(text)
        words = [
            text[start:stop].strip()
            for name, (start, stop) in zip(found.tokens, found.offsets, strict=True)
            if name == model.unk_token
        ]
        runs = groupby(text, key=lambda character: self._left_out(character))
        return tuple(dict.fromkeys([*words, *("".join(run) for left_out, run in runs if left_out)]))

    def _left_out(self, character: str) -> bool:
        if character not in self._known_to_leave_out:
            plain = character.isspace() or unicodedata.category(character).startswith("P")
            self._known_to_leave_out[character] = not plain and not self._tokens(character)
        return self._known_to_leave_out[character]

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return ids (B, S) int32 and mask (B, S) bool, true at tokens, of (B,) texts, S = ``max_length``.

        A longer text is cut at the right. An empty text gives an all-false mask.
        """
        ids = np.full((len(texts), self.max_length), PAD_ID, dtype=np.int32)
        mask = np.zeros((len(texts), self.max_length), dtype=np.bool_)
        for row, text in enumerate(texts):
            tokens = self._tokens(text)[: self.max_length]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def places(self, text: str) -> list[tuple[int, int]]:
        """Return the characters (start, stop) that each token of ``text`` makes, in the order of ``encode``."""
        return self._encoding(text).offsets[: self.max_length]

    def _tokens(self, text: str) -> list[int]:
        return self._encoding(text).ids

    def _encoding(self, text: str) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise ValueError(f"prompt is {type(text).__name__}: expected text")
        try:
            with _library(f"{self._path}: fails at {quoted(text)}"):
                return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:  # a lone surrogate: bytes that are not UTF-8
            raise ValueError("prompt is not valid text: its bytes are not UTF-8") from error


@contextmanager
def _library(words: str) -> Iterator[None]:
    """Turn errors of the library, which raises bare Exception and panics at a pattern without end, into ValueError.

    What a panic prints stays unseen.
    """
    try:
        with hushed():
            yield
    except TypeError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{words} ({reason(error)})") from error


def _grows(normalizer: tokenizers.normalizers.Normalizer | None) -> bool:
    """Tell whether what replaces parts of a text makes one more than ``_MAX_GROWTH`` times as long, step by step.

    The text that is tried is made of all patterns and of all that comes in their place.
    """
    if normalizer is None:
        return False
    state = json.loads(normalizer.__getstate__())
    steps = state.get("normalizers", [state])
    parts = [step.get("content", step.get("prepend", "")) for step in steps]
    if max(map(len, parts), default=0) > _MAX_GROWTH:
        return True
    text = string.printable + "".join(parts) + "".join(str(step.get("pattern", "")) for step in steps)
    limit = _MAX_GROWTH * len(text)
    for step in steps:
        if "pattern" in step:
            (kind, pattern), content = next(iter(step["pattern"].items())), step["content"]
            wanted = tokenizers.Regex(pattern) if kind == "Regex" else pattern
            text = tokenizers.normalizers.Replace(wanted, content).normalize_str(text)
        else:
            text = step.get("prepend", "") + text
        if len(text) > limit:
            return True
    return False
