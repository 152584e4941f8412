from __future__ import annotations

import pytest

from stepkd.grading.verify import equivalent


@pytest.mark.parametrize(
    ("candidate", "gold"),
    [
        ("1/2", "\\frac12"),
        ("0.5", "\\frac{1}{2}"),
        ("x = \\frac{1}{2}", "\\frac12"),
        ("9/5", "1\\frac{4}{5}"),
        ("137 1/2", "137 \\frac{1}{2}"),
        ("\\frac12 cups", "\\frac12"),
        ("$\\frac12$ cups", "\\frac12"),
        ("\\dfrac{270}{7}", "\\frac{270}7\\text{ degrees}"),
        ("-2, 1", "1,-2"),
        ("10^3", "1000"),
        ("1e6", "10^{6}"),
        ("x(x+1)", "x^2+x"),
        ("3+2\\sqrt2, 3-2\\sqrt2", "3 \\pm 2\\sqrt{2}"),
        ("(3, \\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("C", "(C)"),
    ],
)
def test_equal_mathematics(candidate: str, gold: str) -> None:
    assert equivalent(candidate, gold)


@pytest.mark.parametrize(
    ("candidate", "gold"),
    [
        ("-\\frac12", "\\frac12"),
        ("0.33", "\\frac13"),
        ("5x", "5"),
        ("x^2+1", "x^2+x"),
        ("(2,1)", "(1,2)"),
        ("x > \\infty", "\\mathbb{R}"),
        ("[1,2)", "(1,2)"),
        ("\\frac{", "\\frac12"),
        ("(" * 5000 + "1" + ")" * 5000, "1"),
        ("\ud800", "\\frac12"),
        ("\0", "\\frac12"),
        ("None", "\\frac12"),
    ],
)
def test_different_or_unreadable(candidate: str, gold: str) -> None:
    assert not equivalent(candidate, gold)


@pytest.mark.parametrize(
    ("candidate", "gold", "official"),
    [
        ("2/4", "\\frac12", False),
        ("1/2", "\\frac12", True),
        ("\\frac{-35}{9}", "-\\frac{35}{9}", True),
        ("10/2", "5", False),
        ("5.0", "5", True),
        ("\\$32,348", "32348", True),
        ("0.5", "50\\%", False),
        ("50", "50\\%", True),
        ("-2, 1", "1, -2", False),
        ("1, -2", "1,-2", True),
        ("(3, 3/6)", "(3, \\frac{1}{2})", True),
        ("x = 5", "5", True),
        ("b + 3a = 10", "3a + b = 10", False),
        ("3 < x \\le 4", "(3,4]", False),
        ("x(x+1)", "x^2+x", True),
        ("evelyn", "\\text{Evelyn}", True),
    ],
)
def test_prm800k_convention(candidate: str, gold: str, official: bool) -> None:
    assert equivalent(candidate, gold)
    assert equivalent(candidate, gold, "prm800k") is official
