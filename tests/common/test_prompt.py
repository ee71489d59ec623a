"""Weights and blends in prompts: what is read, what stays text, and where an error is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa3_mlx.common.text.prompt import Prompt, WeightedText, parse_prompt

PLAIN = (
    "",
    "piano note A4",
    "guitar (live)",
    "(note: A4)",
    "Genre: rock | BPM: 120",
    "Format: Band | Genre: Rock | Tempo : fast",
    "a | b",
    "ends with a backslash \\",
    ":-)",
    "10:30",
)


@pytest.mark.parametrize("text", PLAIN)
def test_everything_else_is_text_as_it_stands(text: str):
    assert parse_prompt(text) == Prompt(WeightedText(text))


@pytest.mark.parametrize(
    ("text", "words", "spans"),
    [
        ("(piano:1.5) note", "piano note", ((0, 5, 1.5),)),
        ("a (b (c:2) d:0.5) e", "a b c d e", ((2, 4, 0.5), (5, 7, 0.5))),  # 2 x 0.5 is 1
        ("((a:2) b:3)", "a b", ((0, 1, 6.0), (1, 3, 3.0))),
        ("(live (a:-2))", "(live a)", ((6, 7, -2.0),)),
        ("(a: .5 )", "a", ((0, 1, 0.5),)),
        (r"\(a:2\)", "(a:2)", ()),
        (r"(a\) b:2)", "a) b", ((0, 4, 2.0),)),
        (r"a \| b : 0.5", "a | b : 0.5", ()),
        ("(a:1)", "a", ()),
    ],
)
def test_weights(text: str, words: str, spans: tuple[tuple[int, int, float], ...]):
    assert parse_prompt(text) == Prompt(WeightedText(words, spans))


def test_blends():
    assert parse_prompt("piano | violin : 0.3") == Prompt(WeightedText("piano"), WeightedText("violin"), 0.3)
    assert parse_prompt("piano|(violin:2) : .25").second == WeightedText("violin", ((0, 6, 2.0),))
    assert parse_prompt("piano | violin : 0") == Prompt(WeightedText("piano"))
    assert parse_prompt("piano | violin : 1.0") == Prompt(WeightedText("violin"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(a:50)", "the weight of 'a' at character 1 is 50: allowed are -10 to 10"),
        ("a (b (c:-11) d:1)", "the weight of 'c' at character 6 is -11"),
        ("x (:2)", "the weight at character 3 has no words"),
        ("x ( : 2)", "the weight at character 3 has no words"),
        ("(drums:1.5", "the '(' at character 1 is not closed"),
        ("drums:1.5)", "the weight before character 10 has no '('"),
        ("a | b : 7", "the blend at character 9 is 7: allowed are 0 to 1"),
        ("a | b : -0.1", "the blend at character 9 is -0.1"),
        (" | b : .2", "the blend at character 2 has no text on one side"),
        ("a |  : .2", "the blend at character 3 has no text on one side"),
        ("x ((a:5) b:-3)", "the weights inside of the '(' at character 3 multiply to 15: allowed are -10 to 10"),
        ("(" * 40 + "a" + ":10)" * 40, "at character 39 multiply to 100"),
        ("aa | bb (c:99) : .2", "the weight of 'c' at character 9 is 99"),
    ],
)
def test_errors_point_at_the_place(text: str, message: str):
    with pytest.raises(ValueError) as caught:
        parse_prompt(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@given(st.text(alphabet="ab ():|.\\0129-", max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text: str):
    try:
        found = parse_prompt(text)
    except ValueError as error:
        assert "character" in str(error) and "\n" not in str(error)
        return
    for part in found.texts:
        assert all(0 <= start < stop <= len(part.text) for start, stop, _ in part.spans)
        assert all(first[1] <= second[0] for first, second in zip(part.spans, part.spans[1:], strict=False))


def test_escaping_makes_text_of_anything():
    for text in ("(a:2)", "a | b : 0.5", "((x:1) y:2)", "\\(", "a:2)"):
        escaped = "".join("\\" + letter if letter in "()|\\" else letter for letter in text)
        assert parse_prompt(escaped) == Prompt(WeightedText(text))


def test_groups_can_be_as_deep_as_a_prompt_is_long():
    assert parse_prompt("(" * 3000 + "a" + ":1)" * 3000) == Prompt(WeightedText("a"))
