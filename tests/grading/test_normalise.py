from __future__ import annotations

from fractions import Fraction

import pytest

from stepkd.grading.normalise import PlainNumber, canonical_answer, quick_verdict, read_number, tidy, unit_scale

NUMBERS = [
    ("1234", 1234, False),
    ("1,234", 1234, False),
    ("$1,234.00", 1234, False),
    ("\\$32,\\!348", 32348, False),
    ("1{,}234", 1234, False),
    ("1234.0", 1234, False),
    ("007", 7, False),
    ("-10", -10, False),
    ("−10", -10, False),
    ("- 5", -5, False),
    ("-$5.50", Fraction(-11, 2), False),
    ("$-5.50$", Fraction(-11, 2), False),
    ("+3", 3, False),
    (".5", Fraction(1, 2), False),
    ("5.", 5, False),
    ("1234 apples", 1234, False),
    ("5 km/h", 5, False),
    ("5cm", 5, False),
    ("18$", 18, False),
    ("30^\\circ", 30, False),
    ("30°", 30, False),
    ("864 \\mbox{ inches}^2", 864, False),
    ("5.4 \\text{ cents}", Fraction(27, 5), False),
    ("1.2 million dollars", 1_200_000, False),
    ("3 dozen", 36, False),
    ("3 quarters", Fraction(3, 4), False),
    ("12 thousandths", Fraction(3, 250), False),
    ("5 hundred thousand", 500_000, False),
    ("50%", 50, True),
    ("50 \\%", 50, True),
    ("12.5 percent", Fraction(25, 2), True),
    ("x = 5", 5, False),
    ("9 * 2 = 18", 18, False),
    ("Total cost = $18", 18, False),
    ("**\\boxed{18}**", 18, False),
]

NOT_NUMBERS = [
    "5x",
    "5 x",
    "5ab",
    "5m",
    "5 pi",
    "5 and 7",
    "5 or 6",
    "3 to 5",
    "3, 5",
    "1,23",
    "2 1/2",
    "3/4",
    "5k",
    "5 K",
    "x = 3, y = 5",
    "x = 3 or x = 5",
    "x \\neq 5",
    "x >= 5",
    "10!",
    "2^3",
    "--5",
    "",
    "$",
    "1" * 41,
    "1 " + "word " * 9,
]


@pytest.mark.parametrize(("text", "value", "percent"), NUMBERS)
def test_plain_numbers_are_read_exactly(text: str, value: int | Fraction, percent: bool) -> None:
    assert read_number(tidy(text)) == PlainNumber(Fraction(value), percent)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_anything_else_is_not_a_plain_number(text: str) -> None:
    assert read_number(tidy(text)) is None


@pytest.mark.parametrize(
    ("candidate", "gold", "verdict"),
    [
        ("50%", "50", True),
        ("50", "50%", True),
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("0.5", "50", False),
        ("0.5%", "50", False),
        ("0.0000671", ".0000672", False),  # exact: math-verify would round both to six decimals
        ("5 thousand", "5000", True),
        ("5 thousand", "5", False),
        ("Evelyn", "\\text{Evelyn}", True),
        ("evelyn.", "\\text{Evelyn}", True),
        ("Navin", "\\text{Evelyn}", False),
        ("neve", "even", False),
        ("(C)", "\\text{(C)}", True),
        ("52_9", "52_8", None),
        ("3a + b = 10", "10", True),
        ("10", "3a + b = 10", None),
        ("y = 5", "x = 5", None),
        ("a + b", "a - b", None),
        ("1.4142136", "1.41421356", None),
        ("x=5", "5", True),
        ("\\frac{1}{2}", "0.5", None),
        ("2x", "x+x", None),
        ("5" * 3000, "5" * 3000, True),
        ("5" * 3000, "5", False),
        ("\0", "5", False),
    ],
)
def test_quick_verdict(candidate: str, gold: str, verdict: bool | None) -> None:
    assert quick_verdict(candidate, gold) is verdict


def test_unit_scale() -> None:
    assert unit_scale("") == 1
    assert unit_scale("square metres") == 1
    assert unit_scale("thousand dollars") == 1000
    assert unit_scale("times pi") is None


def test_canonical_answer_is_equal_for_equal_answers() -> None:
    assert {canonical_answer(t) for t in ("1,234", "$1234.00", "1234 apples", "x = 1234")} == {"1234"}
    assert canonical_answer("50%") == "50%"
    assert canonical_answer("\\text{Evelyn}") == canonical_answer("evelyn")
    assert canonical_answer("\\left( 3, \\frac{1}{2} \\right)") == canonical_answer("(3,\\frac{1}{2})")
    assert canonical_answer("5" * 3000) == "5" * 3000


def test_tidy_keeps_matrix_rows_apart() -> None:
    matrix = "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"
    assert tidy(f"$$\\boxed{{{matrix}}}$$") == matrix
    assert tidy("$5$ or $6$") == "$5$ or $6$"
    assert tidy("\\boxed{3}, \\boxed{5}") == "\\boxed{3}, \\boxed{5}"
