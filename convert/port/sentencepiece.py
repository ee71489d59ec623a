"""Turn a SentencePiece model into a tokenizer.json that gives the same ids, and back.

Only what Gemma's tokenizer is: byte-pair encoding with byte fallback, no normalization but the visible space, no
prefix. Text is cut into characters, those of user-defined pieces stay together; then, again and again, the neighbours
whose joint text is the piece of the best score are joined, the leftmost first.

**Why it is exact.** SentencePiece joins any two neighbours whose joint text is a piece; the tokenizers library joins
listed pairs, in the order of the list. While nothing reaches over the ends of a stretch of text, what happens inside
does not depend on what lies around it. So wherever a piece comes to be, the same joins in the same order have made it,
and its last join is always the same pair: the one that shows when the piece is encoded by itself. These pairs, one a
piece, ordered by score, are the list. It takes different scores for different pieces; others are refused.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from sa3_mlx.common.schema import listed, quoted
from sa3_mlx.common.terminal import excerpt

SPACE = "\u2581"
_PIECES_MAX = 2**20
_LENGTH_MAX = 1000  # characters of a piece
_BPE = 2  # model_type
_NEVER = -math.inf
_BYTES = {f"<0x{number:02X}>": number for number in range(256)}
Score = Callable[[str, str], float]  # of the join of two neighbours; _NEVER: they are not joined


class Kind(IntEnum):
    """Name the types of pieces as the protocol buffer numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class WordPiece:
    """Hold one entry of the vocabulary; its place is its id."""

    text: str
    score: float
    kind: Kind


def tokenizer_json(model: bytes, where: str) -> str:
    """Return the text of a tokenizer.json with the ids of a serialized SentencePiece model.

    Text that spells a control piece, such as "<bos>", is text here as there. Raises ValueError, which begins with
    ``where``, for a damaged model and for one of another kind than Gemma's.
    """
    try:
        pieces = _read_model(model)
        _check_pieces(pieces)
        merges = _merges_of(pieces)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    unknown = next(piece.text for piece in pieces if piece.kind is Kind.UNKNOWN)
    added = [
        {
            "id": number,
            "content": piece.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
            "special": False,
        }
        for number, piece in enumerate(pieces)
        if piece.kind is Kind.USER_DEFINED and " " not in piece.text  # a space is never there when they are looked for
    ]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: number for number, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    return json.dumps(data, ensure_ascii=False)


def sentencepiece_model(data: Mapping[str, Any], where: str) -> bytes:
    """Return a serialized SentencePiece model with the ids of a parsed tokenizer.json.

    A piece that no listed join makes becomes a control piece; text that spells one, such as "<bos>", stays text, where
    the tokenizers library would take special tokens for what they mean. Raises ValueError, which begins with ``where``,
    for a tokenizer that is not of Gemma's kind.
    """
    try:
        return _write_model(_pieces_of(data))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a tokenizer of the tokenizers library ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _last_join(text: str, score: Score) -> tuple[str, str] | None:
    """Encode a piece by itself; return the two parts that become it at last, None where it never comes to be."""
    parts = list(text)
    scores = [score(left, right) for left, right in itertools.pairwise(parts)]
    while len(parts) > 2:
        best = max(scores)
        if best == _NEVER:
            return None
        place = scores.index(best)  # the leftmost
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        del scores[place]
        if place < len(scores):
            scores[place] = score(parts[place], parts[place + 1])
        if place:
            scores[place - 1] = score(parts[place - 1], parts[place])
    return (parts[0], parts[1]) if len(parts) == 2 and scores[0] != _NEVER else None


# --- SentencePiece to ours --------------------------------------------------------------------------------------------


def _check_pieces(pieces: list[WordPiece]) -> None:
    texts = {piece.text for piece in pieces}
    if len(texts) != len(pieces) or "" in texts:
        raise ValueError("the SentencePiece model has an empty piece, or one twice")
    kinds = [piece.kind for piece in pieces]
    if kinds.count(Kind.UNKNOWN) != 1:
        raise ValueError(f"the SentencePiece model has {kinds.count(Kind.UNKNOWN)} unknown pieces, must have one")
    if Kind.UNUSED in kinds:
        raise ValueError(f"piece {quoted(pieces[kinds.index(Kind.UNUSED)].text)} is marked unused: not supported")
    if any(piece.kind in (Kind.CONTROL, Kind.UNKNOWN) and len(piece.text) == 1 for piece in pieces):
        raise ValueError("the SentencePiece model has a control piece of one character: not supported")
    if {piece.text for piece in pieces if piece.kind is Kind.BYTE} != set(_BYTES):
        raise ValueError("the SentencePiece model must have the 256 byte pieces <0x00> to <0xFF>, and no others")


def _merges_of(pieces: list[WordPiece]) -> list[tuple[str, str]]:
    scores = {piece.text: piece.score for piece in pieces if piece.kind in (Kind.NORMAL, Kind.USER_DEFINED)}

    def score(left: str, right: str) -> float:
        return scores.get(left + right, _NEVER)

    joins: list[tuple[float, tuple[str, str]]] = []
    for piece in pieces:
        if piece.kind is Kind.NORMAL and len(piece.text) > 1 and (pair := _last_join(piece.text, score)):
            if pair[0] not in scores or pair[1] not in scores:
                raise ValueError(f"piece {quoted(piece.text)} is made of characters that are no pieces: not supported")
            joins.append((piece.score, pair))
    joins.sort(key=lambda join: -join[0])
    for (first, pair), (second, other) in itertools.pairwise(joins):
        if first == second:
            raise ValueError(f"pieces {listed([''.join(pair), ''.join(other)])} have the same score: not supported")
    return [pair for _, pair in joins]


# --- ours to SentencePiece --------------------------------------------------------------------------------------------


def _pieces_of(data: Mapping[str, Any]) -> list[WordPiece]:
    model = data["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        kind = (
            f"a {excerpt(str(model.get('type')), 80)} model"
            if model.get("type") != "BPE"
            else "one without byte fallback"
        )
        raise ValueError(f"its tokenizer is {kind}; a SentencePiece file can only hold a BPE with byte fallback")
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if data.get("normalizer") != normalizer or not _is_idle(data.get("pre_tokenizer")):
        raise ValueError("its tokenizer changes or splits text other than Gemma's does: SentencePiece cannot")
    vocabulary: dict[str, int] = dict(model["vocab"])
    added = {entry["content"]: bool(entry["special"]) for entry in data.get("added_tokens", ())}
    vocabulary |= {entry["content"]: entry["id"] for entry in data.get("added_tokens", ())}
    texts = sorted(vocabulary, key=lambda text: vocabulary[text])
    if [vocabulary[text] for text in texts] != list(range(len(texts))):
        raise ValueError("the ids of its tokenizer have gaps or appear twice")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    ranks: dict[tuple[str, ...], float] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault(pair, -float(rank))
    made = {"".join(pair) for pair in pairs}
    joins = {text: join for text in made if (join := _last_join(text, _listed(ranks))) is not None}
    scores = {text: ranks[pair] for text, pair in joins.items()}
    places = {text: -float(place) for place, text in enumerate(sorted(scores, key=lambda text: -scores[text]))}
    pieces = [_piece(text, places.get(text), added.get(text), model["unk_token"]) for text in texts]
    _check_pieces(pieces)
    return pieces


def _is_idle(step: Mapping[str, Any] | None) -> bool:
    """Tell whether a pre-tokenizer does nothing: it splits at spaces, of which the normalizer leaves none."""
    return step is None or (step.get("type") == "Split" and step.get("pattern") == {"String": " "})


def _listed(ranks: Mapping[tuple[str, ...], float]) -> Score:
    return lambda left, right: ranks.get((left, right), _NEVER)


def _piece(text: str, score: float | None, special: bool | None, unknown: str) -> WordPiece:
    """Return a piece; one that no join makes is a control piece, which no text gives."""
    if text == unknown:
        return WordPiece(text, 0.0, Kind.UNKNOWN)
    if text in _BYTES:
        return WordPiece(text, 0.0, Kind.BYTE)
    if special is False:
        return WordPiece(text, 0.0, Kind.USER_DEFINED)
    if special or (score is None and len(text) > 1):
        return WordPiece(text, 0.0, Kind.CONTROL)
    return WordPiece(text, score or 0.0, Kind.NORMAL)


# --- the protocol buffer ----------------------------------------------------------------------------------------------

# Numbers of fields: ModelProto {1 pieces, 2 trainer_spec, 3 normalizer_spec}, SentencePiece {1 piece, 2 score, 3 type},
# TrainerSpec {3 model_type, 4 vocab_size, 24 treat_whitespace_as_suffix, 35 byte_fallback, 40 unk_id},
# NormalizerSpec {1 name, 2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces,
# 6 normalization_rule_tsv}


def _read_model(data: bytes) -> list[WordPiece]:
    pieces: list[WordPiece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(memoryview(data)):
        if number in (1, 2, 3) and not isinstance(value, memoryview):
            raise ValueError("damaged SentencePiece model")
        if number == 1:
            pieces.append(_read_piece(value))
            if len(pieces) > _PIECES_MAX:
                raise ValueError(f"the SentencePiece model has more than {_PIECES_MAX} pieces")
        elif number == 2:
            trainer |= dict(_fields(value))
        elif number == 3:
            normalizer |= dict(_fields(value))
    if trainer.get(3, 1) != _BPE or trainer.get(24, 0):
        raise ValueError("the SentencePiece model is no byte-pair encoding with spaces in front: not supported")
    if not trainer.get(35, 0):
        raise ValueError("the SentencePiece model has no byte fallback: not supported")
    if normalizer.get(2) or normalizer.get(3, 1) or normalizer.get(4, 1) or not normalizer.get(5, 1):
        raise ValueError("the SentencePiece model changes text (normalization, prefix, spaces): not supported")
    return pieces


def _read_piece(data: memoryview) -> WordPiece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if not isinstance(text, memoryview | bytes) or not isinstance(score, memoryview | bytes) or len(score) != 4:
        raise ValueError("damaged SentencePiece model")
    if kind not in list(Kind):
        raise ValueError(f"the SentencePiece model has a piece of type {quoted(kind)}")
    if len(text) > 4 * _LENGTH_MAX:
        raise ValueError(f"the SentencePiece model has a piece of {len(text)} bytes")
    (value,) = struct.unpack("<f", score)
    if not math.isfinite(value):
        raise ValueError("the SentencePiece model has a score that is no number")
    return WordPiece(bytes(text).decode("utf-8"), value, Kind(kind))  # UnicodeDecodeError is a ValueError


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and value of every field: integers, and memoryviews of whatever has a length."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        wire = key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("damaged SentencePiece model")
        if place + size > len(data):
            raise ValueError("truncated SentencePiece model")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("truncated SentencePiece model")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("damaged SentencePiece model")


def _write_model(pieces: list[WordPiece]) -> bytes:
    unknown = next(number for number, piece in enumerate(pieces) if piece.kind is Kind.UNKNOWN)
    parts = [_block(1, _text(1, piece.text) + _score(piece.score) + _number(3, piece.kind)) for piece in pieces]
    trainer = _number(3, _BPE) + _number(4, len(pieces)) + _number(35, 1) + _number(40, unknown)
    normalizer = _text(1, "identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)
    return b"".join([*parts, _block(2, trainer), _block(3, normalizer)])


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _encoded(field << 3) + _encoded(value)


def _block(field: int, data: bytes) -> bytes:
    return _encoded(field << 3 | 2) + _encoded(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _block(field, text.encode("utf-8"))


def _score(value: float) -> bytes:
    return _encoded(2 << 3 | 5) + struct.pack("<f", value)
