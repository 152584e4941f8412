from __future__ import annotations

import time

import pytest

from stepkd.errors import ConfigError
from stepkd.grading.extract import check_extractors, extract_answer

DEFAULT_CASES = [
    # the hash mark
    ("#### 18", "18"),
    ("####18", "18"),
    ("####\n18", "18"),
    ("#### $1,234.00.", "$1,234.00"),
    ("#### -10", "-10"),
    ("#### −10", "−10"),
    ("#### 18 dollars", "18 dollars"),
    ("#### **18**", "18"),
    ("#### The final answer is 18.", "18"),
    ("#### Answer: 18", "18"),
    ("#### x = 5", "x = 5"),
    ("#### \\frac{1}{2}", "\\frac{1}{2}"),
    ("#### 18<|im_end|>", "18"),
    ("#### 18. She makes 20 more.", "18"),
    ("She sells 9.\n#### 18\n\nQuestion: what is 3+4?\n#### 7", "18"),  # ran on to the next question
    ("#### Step 1: add\n3+4=7\n#### Step 2\n#### 14", "14"),  # headings
    ("#### Understanding it\nWe add.\n\\boxed{4}", "4"),
    ("#### 1. Add them\nThat is 5", "5"),
    ("#### 1) Add them\nThat is 5", "5"),
    ("##### a smaller heading\n\\boxed{4}", "4"),
    ("#### Yes", "Yes"),
    # boxes
    ("\\boxed{5}", "5"),
    ("first \\boxed{3}, then \\boxed{4}.", "4"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\boxed{4}}", "4"),
    ("\\boxed{\\sqrt{\\frac{a}{b}}} and text after", "\\sqrt{\\frac{a}{b}}"),
    ("\\fbox{7}", "7"),
    ("\\boxed 5", "5"),
    ("$\\boxed 15$ apples", "15"),
    ("\\boxed{2} so \\boxed{5", None),  # cut off inside the last box
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    ("\\boxed{-3}", "-3"),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}"),
    ("\\boxed{x = 5}", "x = 5"),
    ("\\boxed{50\\%}", "50\\%"),
    ("\\boxed{}", None),
    ("\\boxedfoo{5} or six", None),  # not a box, and its number is no answer of its own
    # numbers
    ("so it is -5.", "-5"),
    ("x=-5", "x=-5"),
    ("the total = - 5", "- 5"),
    ("-$5.50", "-$5.50"),
    ("the point $-5$", "-5"),
    ("10 - 5", "10 - 5"),
    ("so 10 - 5", None),
    ("so 3y + 5", None),
    ("so it is 5x", None),
    ("10-5", "10-5"),
    ("(3)-5", "(3)-5"),
    ("It costs $1,234.50.", "$1,234.50"),
    ("\\$32,348", "\\$32,348"),
    ("1,234,567", "1,234,567"),
    ("the list 1,2345", "2345"),
    ("the roots are $3$ and $4$", "3, 4"),
    ("$3$ or $4$", "3 or 4"),
    ("Now $x = 3$, so \\[y = \\frac{1}{2}.\\]", "y = \\frac{1}{2}"),
    ("it is $\\frac{1}", None),
    ("<think>\\boxed{3}</think> #### 4", "4"),
    ("\\boxed{3}</think> so it is 4", "4"),
    ("<think> \\boxed{3} or", None),
    ("It is 3.14", "3.14"),
    ("It is 18.", "18"),
    (".5", ".5"),
    ("50%", "50%"),
    ("50 \\%", "50 \\%"),
    ("3/4 cup", "3/4"),
    ("-\\frac{3}{4}", "-\\frac{3}{4}"),
    ("1\\frac{1}{2}", "1\\frac{1}{2}"),
    ("2 1/2 hours", "2 1/2"),
    ("12 m^2", "12 m^2"),
    ("2^{10}", "2^{10}"),
    ("3 \\times 10^{5}", "3 \\times 10^{5}"),
    ("1e6", "1e6"),
    ("答案是18。", "18"),
    ("5kg.", "5"),
    ("some H2O and x_1", None),
    ("no number", None),
    ("", None),
    ("\0 18 \0", "18"),
    ("\ud800 #### 18", "18"),
]

PHRASE_CASES = [
    ("The answer is 18.", "18"),
    ("The final answer is: $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}"),
    ("**Answer:** 18", "18"),
    ("Answer: x = 5", "x = 5"),
    ("The answer to the problem is 18 dollars, since we add.", "18 dollars"),
    ("The answer is 3. No, the answer is 4.", "4"),
    ("The answer is \\boxed{5}.", "5"),
    ("the answer is\n\n18", "18"),
    ("answer: $18 per day for $2", "$18 per day for $2"),
    ("The answer is 1,234.5", "1,234.5"),
    ("The answer is -5 because of the sign", "-5"),
    ("Final Answer: (C)", "(C)"),
    ("The answer: \\(\\frac12\\)", "\\frac12"),
    ("We answered nothing.", None),
]


@pytest.mark.parametrize(("text", "expected"), DEFAULT_CASES)
def test_default_extractors(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(("text", "expected"), PHRASE_CASES)
def test_answer_phrase(text: str, expected: str | None) -> None:
    assert extract_answer(text, ("answer_phrase",)) == expected


def test_order_of_extractors_decides() -> None:
    text = "\\boxed{2}\n#### 3\n4"
    assert extract_answer(text, ("boxed", "hash")) == "2"
    assert extract_answer(text, ("hash", "boxed")) == "3"
    assert extract_answer(text, ("last_number",)) == "4"


def test_one_extractor_is_a_strict_reading() -> None:
    assert extract_answer("The answer is 18.", ("hash",)) is None
    assert extract_answer("The answer is 18.", ("boxed",)) is None


def test_a_mark_counts_the_first_time_and_everything_else_the_last() -> None:
    assert extract_answer("#### 1\n#### 2") == "1"
    assert extract_answer("\\boxed{1} \\boxed{2}") == "2"
    assert extract_answer("1 or 2", ("last_number",)) == "2"
    assert extract_answer("Answer: 1\nAnswer: 2", ("answer_phrase",)) == "2"


@pytest.mark.parametrize(
    ("extractors", "message"),
    [
        (("boxd",), "did you mean 'boxed'"),
        (("zzz",), "unknown extractor 'zzz'"),
        ((), "at least one of"),
        ("hash", "at least one of"),
    ],
)
def test_bad_extractors_are_named(extractors: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_extractors(extractors)


MEGABYTE = {
    "digits": "1" * 10**6,
    "open braces": "{" * 10**6,
    "open boxes": "\\boxed{" * 150_000,
    "nested boxes": "\\boxed{" * 5_000 + "5" + "}" * 5_000,
    "bare boxes": "\\boxed 5" * 125_000,
    "dots in a box": "\\boxed{" + "." * 10**6 + "}",
    "thousands": "1,111" * 200_000,
    "well-formed thousands": "1" + ",111" * 250_000 + "1",
    "hashes": "#" * 10**6,
    "empty marks": "####\n" * 200_000,
    "marks": "#### a:\n" * 125_000,
    "phrases": "answer is " * 100_000,
    "blanks after a phrase": "answer" + " " * 10**6,
    "blanks after a mark": "####" + " " * 10**6,
    "backslashes": "\\" * 10**6,
    "dollars": "$" * 10**6,
    "signs": "-" * 10**6,
    "slashes": "1/" * 500_000,
    "numbers": "1 " * 500_000,
    "fractions": "\\frac{1" * 150_000,
    "NUL": "\0" * 10**6,
    "lone surrogates": "\ud800" * 10**6,
    "newlines": "\n" * 10**6,
}


@pytest.mark.parametrize("name", MEGABYTE)
def test_a_megabyte_takes_linear_time(name: str) -> None:
    # A quadratic scan of 1 MB takes minutes; the linear ones take about 0.3 s here.
    start = time.monotonic()
    extract_answer(MEGABYTE[name], ("hash", "boxed", "answer_phrase", "last_number"))
    assert time.monotonic() - start < 20
