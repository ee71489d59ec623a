"""A SentencePiece model of Gemma's kind becomes a tokenizer.json with the same ids, and back."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import tokenizers
from sa3_convert.port.sentencepiece import (
    SPACE,
    Kind,
    WordPiece,
    _read_model,
    _write_model,
    sentencepiece_model,
    tokenizer_json,
)

from tests.support.foreign.port_files import tokenizer_data

ROOT = Path(__file__).resolve().parents[3]
STRINGS = 10_000
FOREIGN = "Größe straße naïve café Ωμέγα こんにちは 世界 音楽 مرحبا שלום привет мир 🎵🎶 drum’s “quote” — …"
ODD = [chr(code) for code in range(0x250)] + list("▁▁▁   \n\n\t\r\0こ世é́🎵\u200d\u200b\ufeff\u2028\uffff\U0010ffff")


def corpus() -> list[str]:
    """Lines of this repository's documents, and other scripts."""
    lines = [line for path in sorted((ROOT / "docs").glob("*.md")) for line in path.read_text("utf-8").splitlines()]
    return [line for line in lines if line.strip()][:3000] + [FOREIGN] * 20


@pytest.fixture(scope="module")
def trained() -> bytes:
    """A model with the settings of Gemma's, as far as they show in the ids, trained by the library itself."""
    library = pytest.importorskip("sentencepiece")
    symbols = ["\n" * n for n in range(1, 6)] + [SPACE * n for n in range(2, 9)] + ["\t", "<b>", "</b>", "<unused0>"]
    out = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=out,
        model_type="bpe",
        vocab_size=2500,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        split_by_whitespace=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=symbols,
        character_coverage=0.9995,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def odd_strings(pieces: list[str], count: int) -> list[str]:
    """Random characters, pieces in a row, repetitions, few letters again and again, real lines with extra spaces."""
    draw, lines = random.Random(3), corpus()

    def one() -> str:
        match draw.randrange(5):
            case 0:
                return "".join(draw.choices(ODD, k=draw.randint(0, 60)))
            case 1:
                return "".join(draw.choices(pieces, k=draw.randint(0, 20)))
            case 2:
                return (draw.choice(pieces)[:3] + draw.choice(["a", " ", "b", "\n"])) * draw.randint(1, 20)
            case 3:
                return "".join(draw.choices("abt \n▁<>", k=draw.randint(0, 80)))
            case _:
                line = draw.choice(lines)
                return line[draw.randrange(len(line)) :].replace(" ", draw.choice([" ", "  ", "   "]))

    return [one() for _ in range(count)]


def differing(library, tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[str]:
    return [text for text in texts if library.encode(text) != tokenizer.encode(text, add_special_tokens=False).ids]


def test_ids_are_those_of_the_library(trained):
    """10,000 odd strings among which control pieces and bytes are written out, in both directions."""
    library = pytest.importorskip("sentencepiece")
    text = tokenizer_json(trained, "model")
    texts = odd_strings([piece.text for piece in _read_model(trained)], STRINGS)
    theirs, ours = library.SentencePieceProcessor(model_proto=trained), tokenizers.Tokenizer.from_str(text)
    assert differing(theirs, ours, texts) == []
    again = library.SentencePieceProcessor(model_proto=sentencepiece_model(json.loads(text), "tokenizer"))
    assert [text for text in texts if theirs.encode(text) != again.encode(text)] == []
    kinds = {id for text in texts for id in theirs.encode(text)}
    assert len(kinds) > 1500  # of 2500: the strings reach most of the vocabulary


def test_a_tokenizer_with_every_split_of_every_piece_goes_back(trained):
    """As the transformers library writes them: all pairs of pieces that make a piece, the best piece first."""
    library = pytest.importorskip("sentencepiece")
    data = json.loads(tokenizer_json(trained, "model"))
    vocabulary = data["model"]["vocab"]
    order = {"".join(pair): rank for rank, pair in enumerate(data["model"]["merges"])}
    pairs = [
        (order[piece], [piece[:cut], piece[cut:]])
        for piece in order
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    data["model"]["merges"] = [pair for _, pair in sorted(pairs, key=lambda pair: pair[0])]
    assert len(pairs) > len(order)
    data["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    theirs = library.SentencePieceProcessor(model_proto=sentencepiece_model(data, "tokenizer"))
    ours = tokenizers.Tokenizer.from_str(json.dumps(data))
    assert differing(theirs, ours, odd_strings([*order], 2000)) == []


def test_a_model_and_its_tokenizer_go_back_and_forth_unchanged():
    """Needs no library: pieces, kinds and scores are the same after both ways."""
    model = sentencepiece_model(tokenizer_data(), "made")
    pieces = _read_model(model)
    assert {piece.kind for piece in pieces} == set(Kind) - {Kind.UNUSED}
    text = tokenizer_json(model, "made")
    assert sentencepiece_model(json.loads(text), "again") == model
    ours = tokenizers.Tokenizer.from_str(text)
    assert ours.encode("beat  <bos>\n\n\n").tokens[:4] == ["beat", SPACE, SPACE, "<0x3C>"]


def changed(change) -> bytes:
    pieces = _read_model(sentencepiece_model(tokenizer_data(), "made"))
    return _write_model(change(pieces))


def _fields(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


MODEL = sentencepiece_model(tokenizer_data(), "made")
IDENTITY = b"\x0a\x08identity"
REFUSED = {
    "garbage": (b"\xff" * 30, "damaged"),
    "truncated": (MODEL[:-30], "truncated|no byte-pair"),
    "nothing": (b"", "no byte-pair encoding"),
    "prefix": (_fields(MODEL, IDENTITY + b"\x18\x00", IDENTITY + b"\x18\x01"), "changes text"),
    "equal_scores": (
        changed(lambda pieces: [WordPiece(p.text, -1.0 if p.kind is Kind.NORMAL else 0, p.kind) for p in pieces]),
        "the same score",
    ),
    "unused": (changed(lambda p: [*p, WordPiece("zz", 0, Kind.UNUSED)]), "unused"),
    "twice": (changed(lambda p: [*p, p[-1]]), "one twice"),
    "two_unknown": (changed(lambda p: [*p, WordPiece("<none>", 0, Kind.UNKNOWN)]), "2 unknown pieces"),
    "no_bytes": (changed(lambda p: [x for x in p if x.text != "<0x00>"]), "256 byte pieces"),
    "no_number": (changed(lambda p: [*p, WordPiece("zz", float("nan"), Kind.NORMAL)]), "no number"),
    "characters_that_are_no_pieces": (changed(lambda p: [*p, WordPiece("zy", -99.0, Kind.NORMAL)]), "are no pieces"),
    "one_character_control": (changed(lambda p: [*p, WordPiece("z", 0, Kind.CONTROL)]), "of one character"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused_in_one_line(kind):
    data, words = REFUSED[kind]
    with pytest.raises(ValueError, match=f"(?i)file: .*({words})") as error:
        tokenizer_json(data, "file")
    assert len(str(error.value).splitlines()) == 1


def _edited(**values: object) -> dict:
    data = tokenizer_data()
    data["model"] = {**data["model"], **values}  # type: ignore[dict-item]
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_edited(type="WordLevel"), "a WordLevel model"),
        (_edited(byte_fallback=False), "without byte fallback"),
        ({**tokenizer_data(), "normalizer": None}, "changes or splits"),
        ({**tokenizer_data(), "pre_tokenizer": {"type": "Whitespace"}}, "changes or splits"),
        (_edited(vocab={"a": 1}), "gaps"),
        ({}, "not a tokenizer"),
        (_edited(type="a" * 5000), "can only hold a BPE"),
    ],
)
def test_tokenizers_that_sentencepiece_cannot_express_are_refused(data, words):
    with pytest.raises(ValueError, match=f"file: .*({words})") as error:
        sentencepiece_model(data, "file")
    assert len(str(error.value)) < 400
