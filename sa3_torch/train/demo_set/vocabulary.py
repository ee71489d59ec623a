"""Define the closed vocabulary of the demo model: a word-level ``tokenizer.json`` for the tokenizers library.

Ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then WORDS in order. The normalizer lowers case, writes flats as sharps, joins
spellings ("hi-hat", "hi hat", "bass drum", "handclap"), drops punctuation and articles. A pitch such as "a4" or "a#4"
and a root such as "a#" are one token each; "a" stays where it can be a root ("organ chord a minor").
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from sa3_mlx.common.files.atomic import new_file

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
PAD, EOS, BOS, UNK = range(4)
_ROOTS = ("c", "c#", "d", "d#", "e", "f", "f#", "g", "g#", "a", "a#", "b")
_SOUNDS = (
    "piano",
    "organ",
    "guitar",
    "violin",
    "trumpet",
    "flute",
    "marimba",
    "vibraphone",
    "note",
    "chord",
    "major",
    "minor",
    "white",
    "pink",
    "brown",
    "noise",
    "kick",
    "snare",
    "clap",
    "closed",
    "hihat",
    "crash",
    "cymbal",
    "tom",
    "drum",
    "hand",
)
WORDS: tuple[str, ...] = (*_SOUNDS, *_ROOTS, *(f"{root}{octave}" for octave in (3, 4) for root in _ROOTS))

FLATS = {"db": "c#", "eb": "d#", "gb": "f#", "ab": "g#", "bb": "a#"}
_SPELLINGS = {
    "hi[ -]?hats?": "hihat",
    "hat": "hihat",
    "bass drum": "kick drum",
    "handclap": "hand clap",
    "cymbals": "cymbal",
    "maj": "major",
    "min": "minor",
    "tone": "note",
    "tom[ -]tom": "tom",
    "vibes": "vibraphone",
    "grand piano": "piano",
    "church organ": "organ",
    "acoustic guitar": "guitar",
}


def whole_word(pattern: str) -> Regex:
    """Match the pattern as whole words: between spaces or at an end of the text."""
    return Regex(rf"(?<!\S)(?:{pattern})(?!\S)")


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer; it adds no special tokens and neither pads nor truncates."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    if len(vocabulary) != len(SPECIAL) + len(WORDS) or len(vocabulary) > 128:
        raise ValueError(f"the vocabulary must hold at most 128 different words, got {len(SPECIAL) + len(WORDS)}")
    steps: list[normalizers.Normalizer] = [
        normalizers.Lowercase(),
        normalizers.Replace("\u266d", "b"),
        normalizers.Replace("\u266f", "#"),
        normalizers.Replace(Regex(r"[^a-z0-9#<> -]+"), " "),
    ]
    steps += [normalizers.Replace(Regex(rf"(?<!\S){flat}(?=\d?(?!\S))"), sharp) for flat, sharp in FLATS.items()]
    steps += [normalizers.Replace(whole_word(spelling), word) for spelling, word in _SPELLINGS.items()]
    steps.append(normalizers.Replace(whole_word("an|the|of|with|sound"), ""))
    # "a" before a word for a sound is an article, except before major and minor, where it is the root A.
    nouns = "|".join(word for word in _SOUNDS if word not in ("major", "minor", "chord"))
    steps.append(normalizers.Replace(Regex(rf"(?<!\S)a +(?=(?:{nouns})(?!\S))"), ""))
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=SPECIAL[UNK]))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def save_tokenizer(path: Path) -> None:
    """Write ``tokenizer.json`` as a whole."""
    with new_file(path) as partial:
        build_tokenizer().save(str(partial))
