"""Segmenters: a table of expected cuts, then the rules as properties, then bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.errors import ConfigError
from stepkd.steps.segment import (
    SEGMENTERS,
    RegexSegmenter,
    Segmenter,
    get_segmenter,
    segment,
    spans_from_ends,
    step_ends,
)
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text


def by_character(text: str) -> TokenizedText:
    """One token per character."""
    return TokenizedText(tuple(range(len(text))), text, tuple(range(1, len(text) + 1)))


def pieces(name: str, text: str) -> list[str]:
    completion = by_character(text)
    return [completion.span_text(*span) for span in segment(get_segmenter(name), completion)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("newline", ["a\n", "b\n", "c"]),
        ("newline", ["a \n\n \n", "  b\n"]),
        ("newline", ["\n\na\n", "b"]),
        ("newline", ["a\r\n", "b\r\n"]),
        ("newline", ["   \n "]),
        ("newline", ["one line"]),
        ("blank_line", ["a\nb\n\n", "c\n \t\n\n", "d\n"]),
        ("blank_line", ["a\r\n\r\n", "b"]),
        ("step_heading", ["Step 1: x\ny\n", "Step 2: z"]),
        ("step_heading", ["Plan\n", "## Step 1\nx\n", "**step 12.** y\n", "  Step 3: z\n"]),
        ("step_heading", ["### **Step 1:** x\n", "### **Step 2:** y"]),
        ("step_heading", ["In Step 2: we stay\nSteps 3 and Stepping 4 too\nStep x"]),
        ("sentence", ["It is 3.5.", " Then 4!", ' "So?"', " Yes."]),
        ("sentence", ["One line\n", "1. Add 3.", " Now 4.\n\n  ", "2. Stop.\n"]),
        ("sentence", ["Take e.g. Mr. Smith (cf. Dr. No) here.", " End"]),
        ("sentence", ["Wait...", " what?!", " Fine.)", " ok"]),
        ("whole", ["a\n\nStep 2: b. c"]),
        ("regex:;+ *", ["a;; ", "b; ", "c"]),
        ("regex_before:(?=[A-Z])", ["aa", "Bb", "Cc"]),
        (r"regex:\[END:\d\]", ["a[END:1]", "b[END:2]", "c"]),
    ],
)
def test_expected_cuts(name: str, expected: list[str]) -> None:
    assert pieces(name, "".join(expected)) == expected


def test_no_tokens_no_steps() -> None:
    for name in SEGMENTERS:
        assert segment(get_segmenter(name), TokenizedText((), "", ())) == []
        assert segment(get_segmenter(name), TokenizedText((), "dropped by\nthe tokenizer", ())) == []


def test_straddling_token_goes_to_the_earlier_step() -> None:
    # tokens: "a", "b\nc", "d\n", "e"
    text = TokenizedText((1, 2, 3, 4), "ab\ncd\ne", (1, 4, 6, 7))
    assert segment(get_segmenter("newline"), text) == [(0, 2), (2, 3), (3, 4)]
    assert segment(get_segmenter("regex_before:(?=[ce])"), text) == [(0, 2), (2, 3), (3, 4)]


def test_step_swallowed_by_a_straddling_token_leaves_no_blank_step() -> None:
    # tokens: "a\nb", "\n", "c": the second line's only word went to the first step, its separator follows
    assert segment(get_segmenter("newline"), TokenizedText((1, 2, 3), "a\nb\nc", (3, 4, 5))) == [(0, 2), (2, 3)]
    # tokens: "a\nb", end token: nothing but the end token is left
    assert segment(get_segmenter("newline"), TokenizedText((1, 2), "a\nb", (3, 3))) == [(0, 2)]


def test_the_end_token_belongs_to_the_last_step(tokenizers_by_name: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_name["characters"]
    ids = [*tokenizer("a\nb\n", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert segment(get_segmenter("newline"), text_from_ids(tokenizer, ids)) == [(0, 2), (2, 5)]


PIECES = [
    "a",
    "7",
    " ",
    "\n",
    "\n\n",
    "\t\r\n",
    ". ",
    "?! ",
    "\nStep 2: ",
    "日",
    "😀",
    "é",
    "etc. ",
    "\n1. ",
    ".\n",
    "#### ",
]


@settings(max_examples=120, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=16).map("".join),
    name=st.sampled_from([*SEGMENTERS, "regex: +", "regex_before:7"]),
    tokenizer=st.sampled_from(["characters", "bpe", "bpe_over_lines", "bpe_trimmed", "sentencepiece"]),
    end_token=st.booleans(),
)
def test_rules(text: str, name: str, tokenizer: str, end_token: bool, tokenizers_by_name: dict[str, Any]) -> None:
    used = tokenizers_by_name[tokenizer]
    completions = [tokenize_text(used, text)]
    ids = [*completions[0].token_ids, *([used.eos_token_id] if end_token else [])]
    completions.append(text_from_ids(used, ids))
    for completion in completions:
        spans = segment(get_segmenter(name), completion)
        assert spans_from_ends(step_ends(spans), len(completion)) == list(spans)
        steps = [completion.span_text(*span) for span in spans]
        assert "".join(steps) == completion.text
        if len(steps) > 1:
            assert all(step.strip() for step in steps), steps
        if name == "newline" and tokenizer == "characters":
            assert all(step.endswith("\n") for step in steps[:-1])
            assert all("\n" not in step.strip() for step in steps)


@pytest.mark.parametrize("name", ["newline", "blank_line", "step_heading", "sentence"])
@pytest.mark.parametrize(
    "unit", [" ", "!", "# ", "*", "\n", " \n", "etc. ", ".\"')", "\t\r", "Step 1", "1.", "a.\n"], ids=repr
)
def test_degenerate_completions_are_read_once(name: str, unit: str) -> None:
    """A model that loops makes long runs. Patterns that back off would need minutes here, these need milliseconds."""
    text = unit * (120_000 // len(unit)) + "x"
    spans = segment(get_segmenter(name), by_character(text))
    assert spans[-1][1] == len(text)


def test_own_segmenters_fit_the_protocol() -> None:
    class EveryOther:
        def ends(self, completion: TokenizedText) -> list[int]:
            return list(range(2, len(completion) + 2, 2))

    assert isinstance(EveryOther(), Segmenter)
    assert segment(EveryOther(), by_character("abcde")) == [(0, 2), (2, 4), (4, 5)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("newlines", "unknown segmenter 'newlines'. Did you mean 'newline'? Known: newline, blank_line"),
        ("zzz", "unknown segmenter 'zzz'. Known: newline"),
        ("regex:", "unknown segmenter 'regex:'."),
        ("regex:(", "segmenter pattern '(' is not a regular expression"),
        ("regex:x*", "segmenter pattern 'x*' matches the empty string and would cut everywhere"),
        ("regex_before:^", "matches the empty string"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_segmenter(name)


def test_bad_cut() -> None:
    with pytest.raises(ConfigError, match="unknown segmenter cut 'aftr': did you mean 'after'"):
        RegexSegmenter("x", cut="aftr")  # type: ignore[arg-type]


def test_closed_form() -> None:
    spans = spans_from_ends([3, 5], 9)
    assert spans == [(0, 3), (3, 5), (5, 9)]
    assert step_ends(spans) == [3, 5, 9]
    assert spans_from_ends([], 4) == [(0, 4)]
    assert spans_from_ends([1, 2], 0) == []
    assert step_ends([]) == []


@given(st.lists(st.integers(-3, 30)), st.integers(0, 25))
def test_any_ends_make_a_partition(ends: list[int], num_tokens: int) -> None:
    spans = spans_from_ends(ends, num_tokens)
    assert [i for start, end in spans for i in range(start, end)] == list(range(num_tokens))
    assert spans_from_ends(step_ends(spans), num_tokens) == spans
    assert set(step_ends(spans)) == ({end for end in ends if 0 < end < num_tokens} | {num_tokens}) - {0}
