"""Prompts become ids as in the official code: no BOS, no EOS, padded and cut at the right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from sa3_mlx.common.text.tokenizer import Tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tokenizer whose file asks for BOS, EOS, left padding and truncation, all of which must be ignored."""
    backend = Backend(WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "deep": 4, "kick": 5}, "<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
    backend.enable_padding(direction="left", pad_id=1, length=9)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_no_bos_no_eos_and_right_padding_with_zero(path: Path):
    ids, mask = Tokenizer(path, 5).encode(["deep kick", "", "kick kick kick deep kick deep", "tuba"])
    np.testing.assert_array_equal(ids, [[4, 5, 0, 0, 0], [0, 0, 0, 0, 0], [5, 5, 5, 4, 5], [3, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask.sum(axis=1), [2, 0, 5, 1])
    assert ids.dtype == np.int32 and mask.dtype == np.bool_


def test_count_sees_what_truncation_drops(path: Path):
    tokenizer = Tokenizer(path, 5)
    assert tokenizer.count("kick kick kick deep kick deep") == 6
    assert tokenizer.count("") == 0
    assert tokenizer.vocab_size == 6


def test_ids_and_masks_match_the_official_code(golden: Path):
    tokenizer = Tokenizer(golden / "tiny_t5gemma" / "tokenizer.json", 12)
    for name in ("tiny-s", "tiny-l"):
        prompts = json.loads((golden / name / "manifest.json").read_text())["cases"]["text:t5gemma"]["prompts"]
        tensors = load_file(golden / name / "text.safetensors")
        ids, mask = tokenizer.encode(prompts)
        np.testing.assert_array_equal(ids, tensors["t5gemma.input_ids"])
        np.testing.assert_array_equal(mask, tensors["t5gemma.attention_mask"].astype(bool))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no tokenizer there"):
        Tokenizer(tmp_path / "tokenizer.json", 5)


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}', "\x00\xff"])
def test_a_broken_file_is_one_clear_line(tmp_path: Path, text: str):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="not a tokenizer") as caught:
        Tokenizer(tmp_path / "tokenizer.json", 5)
    assert "\n" not in str(caught.value)


def test_a_prompt_must_be_text_and_the_length_positive(path: Path):
    with pytest.raises(ValueError, match="prompt is int: expected text"):
        Tokenizer(path, 5).encode([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="max_length is 0"):
        Tokenizer(path, 0)


def test_a_closed_vocabulary_names_the_words_it_does_not_have(tmp_path: Path) -> None:
    from tokenizers import Regex
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE, WordLevel
    from tokenizers.normalizers import Replace
    from tokenizers.pre_tokenizers import WhitespaceSplit

    library = Library(WordLevel({"<pad>": 0, "<unk>": 1, "piano": 2, "note": 3}, unk_token="<unk>"))
    library.pre_tokenizer = WhitespaceSplit()
    library.save(str(tmp_path / "words.json"))
    tokenizer = Tokenizer(tmp_path / "words.json", 4)
    assert tokenizer.closed_vocabulary() == ("piano", "note")
    assert tokenizer.unknown("loud piano rain loud") == ("loud", "rain"), "each once"
    library.normalizer = Replace(Regex("[^a-z ]"), " ")
    library.save(str(tmp_path / "latin.json"))
    latin = Tokenizer(tmp_path / "latin.json", 4)
    assert latin.unknown("piano ピアノ, rain!") == ("rain", "ピアノ"), "characters without a token, punctuation aside"
    Library(BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>")).save(str(tmp_path / "pieces.json"))
    pieces = Tokenizer(tmp_path / "pieces.json", 4)
    assert pieces.closed_vocabulary() == () and pieces.unknown("ab") == ()


def test_files_that_are_meant_to_fail_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And what the library prints of its panics is not seen."""
    from tokenizers import Regex
    from tokenizers import Tokenizer as Library
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Replace, Sequence
    from tokenizers.pre_tokenizers import Split

    def refused(library: Library, text: str) -> str:
        library.save(str(tmp_path / "x.json"))
        with pytest.raises(ValueError, match=r"x\.json") as caught:
            Tokenizer(tmp_path / "x.json", 4).encode([text])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        return str(caught.value)

    assert "UNK" in refused(Library(WordLevel({"a": 0}, unk_token="<unk>")), "b\n" * 1000)
    endless = Library(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    endless.pre_tokenizer = Split(Regex("(a+)+$"), "isolated")
    assert "retry-limit" in refused(endless, "a" * 40 + "!")
    growing = Library(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    growing.normalizer = Sequence([Replace("a", "a" * 100)] * 9)
    assert "times as long" in refused(growing, "a")
    assert capfd.readouterr().err == ""
