"""The sums that a step writes out, done again: exact, free, and blind to everything else.

In GSM8K and its kin a step says ``48 / 2 = 24 clips``. Whether 48 / 2 is what the problem asks for takes a reader;
whether it is 24 does not. So a score of 0 is nearly always deserved, while one of 1 only says that no sum is wrong.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from stepkd.scorers.scorer import Meaning, Solutions

_LONGEST = 200  # characters of one side of an equation; longer ones are no sums that people write
_LARGEST_EXPONENT, _LARGEST_BASE = 64, 10**12
_MARK = re.compile(r"<<([^<>\n]*)>>")
_SIDE = r"[-+*/^().\d%\s]"
_NUMBER = re.compile(r"-?(\d+(?:\.\d*)?|\.\d+)%?")
_REPLACED = (
    (re.compile(r"\\(?:times|cdot)\b|[×·∙]"), "*"),
    (re.compile(r"\\div\b|÷"), "/"),
    (re.compile(r"\\(?:left|right|,|;|!)"), ""),
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"(\1)/(\2)"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\?\$|[€£]|\\(?=%)"), ""),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=[\d)%])\s*[xX]\s*(?=[\d(.])"), "*"),
    (re.compile(r"\*\*"), "^"),
)
_HALVES = re.compile(r"/\s*\d+\s*/")  # 500/ 2/5: five hundred by two fifths, or divided twice?
# A sum after one of these is a part of a longer one that is said in words: half of 10 + 4 = 9.
_IN_WORDS = re.compile(
    r"(?:\b(?:half|thirds?|quarters?|fourths?|fifths?|percent|twice|thrice|double|triple|plus|minus|times|than|by|over|"
    r"mod|x)|%)(?:\s+of)?\s*$",
    re.IGNORECASE,
)


class Equation(NamedTuple):
    """One written sum."""

    left: str
    """What is computed."""
    right: str
    """What it is said to be."""
    holds: bool
    """Whether that is so, up to rounding."""


class ArithmeticScorer:
    """Scores 0.0 for a step with a wrong sum and 1.0 for one whose sums are right.

    See :func:`equations` for what counts as a sum and when it is right.

    Args:
        unchecked: score of a step without a sum that can be checked: 1.0, as nothing is wrong in it, or NaN, as nothing
            is known of it.
    """

    meaning: Meaning = "correctness"

    def __init__(self, *, unchecked: float = 1.0) -> None:
        self.unchecked = unchecked

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`; the prompts do not matter."""
        return [[[self._score(step) for step in steps] for steps in problem.solutions] for problem in problems]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return {"scorer": "arithmetic", "meaning": self.meaning}

    def _score(self, step: str) -> float:
        found = equations(step)
        return float(all(each.holds for each in found)) if found else self.unchecked


def equations(text: str) -> list[Equation]:
    r"""The sums of a text that can be checked.

    A sum is ``expression = number`` (or ``= expression``) with numbers, ``+ - * / ^``, brackets, per cent signs,
    currency signs, thousands commas and the usual spellings of the operators (``x``, ``×``, ``÷``, ``\times``,
    ``\frac``); calculator marks (``<<48/2=24>>``) count. What holds a unit or a variable inside, follows words that
    belong to the sum ("half of 10 + 4 = 9"), or cannot be read for another reason is passed over, not called wrong.

    A sum is right when both sides are equal exactly; when the stated number is the other side rounded at the stated
    digit, up or down (10 / 3 = 3.33, 10 / 4 = 3); with per cent signs read as such or left out; and when the number
    that the right side begins with fits (10 * 2 = 20 - 5 = 15). A division by zero is wrong.

    Args:
        text: a step.

    Returns:
        The sums in order of appearance, marks first.
    """
    marks = [mark.group(1) for mark in _MARK.finditer(text)]
    return [found for part in (*marks, *_MARK.sub("", text).splitlines()) for found in _line_equations(part)]


def _line_equations(line: str) -> Iterator[Equation]:
    for pattern, by in _REPLACED:
        line = pattern.sub(by, line)
    parts = re.split(r"(?<![<>=!~≈:])=(?![=<>])", line)
    for before, after in itertools.pairwise(parts):
        left, right = _left_side(before[-2 * _LONGEST :]), _right_side(after[: 2 * _LONGEST])
        if left is None or right is None:
            continue
        verdict = _holds(left, right)
        if verdict is not None:
            yield Equation(left, right, verdict)


def _left_side(before: str) -> str | None:
    """The sum that ends where the equals sign stands."""
    run = re.search(rf"{_SIDE}*$", before)
    assert run is not None
    start, text = run.start(), run.group()
    lead = re.match(r"(?:[\s)%]|\.(?!\d))*(?:.*\.\s)?\s*", text)  # of the sentence before: "is 5. 3 + 4", "(so) 3 + 4"
    shift = lead.end() if lead else 0
    text, head = text[shift:].strip(), before[: start + shift]
    glued = bool(head) and (head[-1].isalnum() or head[-1] in ":_\\}^,")
    if not text or glued or text[0] in "+-*/^" or len(text) > _LONGEST:
        return None
    if _IN_WORDS.search(head) or _HALVES.search(text):
        return None
    while text.count("(") > text.count(")") and text[0] == "(":
        text = text[1:].strip()  # an opened aside: "(3 + 4 = 7)"
    return text


def _right_side(after: str) -> str | None:
    """The number or sum that follows the equals sign."""
    run = re.match(rf"{_SIDE}*", after)
    assert run is not None
    text, rest = run.group(), after[run.end() :]
    if re.match(r"[A-Za-z](?![A-Za-z])", rest) and not text.endswith((" ", "\t")):
        return None  # 3 + 4 = 7x
    if rest[:1] in ("{", "\\", "_", ":") or rest.lower().startswith("cent") or len(text) > _LONGEST:
        return None  # $1 / 2 = 50 cents
    text = text.strip().rstrip(".").strip()
    while text.count(")") > text.count("(") and text.endswith(")"):
        text = text[:-1].strip()
    return None if not text or text[-1] in "+-*/^(" else text  # 3 * 30 = 30 + M


def _holds(left: str, right: str) -> bool | None:
    """Whether the sides agree; None where one of them cannot be read, or nothing is computed."""
    tree = _parsed(left)
    if tree is None or not any(isinstance(node, ast.BinOp) for node in ast.walk(tree)) or _parsed(right) is None:
        return None
    try:
        lefts = [value for value in _readings(left) if value is not None]
    except ZeroDivisionError:
        return False
    number = _NUMBER.match(right)
    if not lefts or number is None:
        return None
    digits, stated = len(number.group(1).partition(".")[2]), number.group().rstrip("%")
    claims = [(Fraction(stated), digits)]
    if number.group() != stated:
        claims.append((Fraction(stated) / 100, digits + 2))
    if any(_rounds_to(value, claim, places) for value in lefts for claim, places in claims):
        return True
    if number.end() == len(right):
        return False
    try:
        return any(value == other for value in lefts for other in _readings(right))
    except ZeroDivisionError:
        return False


def _rounds_to(value: Fraction, stated: Fraction, places: int) -> bool:
    """Whether a number is another one rounded (up or down) at a place behind the point."""
    scaled = value * 10**places
    return value == stated or (scaled.denominator > 1 and abs(scaled - stated * 10**places) < 1)


def _readings(text: str) -> list[Fraction | None]:
    """Values of an expression, per cent signs read and left out."""
    plain = [text.replace("%", "")]
    return [_value(_parsed(each)) for each in ([text, *plain] if "%" in text else plain)]


def _parsed(text: str) -> ast.expr | None:
    text = re.sub(r"(\d+(?:\.\d*)?|\.\d+|\))\s*%", r"(\1/100)" if not text.endswith(")%") else r"\1/100", text)
    text = re.sub(r"(?<=[\d)])\s*(?=\()", "*", text)  # 2(3 + 4)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    try:
        return ast.parse(text.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(node: ast.expr | None) -> Fraction | None:
    """Exact value of a parsed expression; None for what is no sum of numbers.

    Raises:
        ZeroDivisionError: it divides by zero.
    """
    match node:
        case ast.Constant(value=int() | float()):
            return Fraction(str(node.value))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            inner = _value(operand)
            return None if inner is None else (-inner if isinstance(node.op, ast.USub) else inner)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left), _value(right)
            if a is None or b is None:
                return None
            if isinstance(op, ast.Pow):
                small = b.denominator == 1 and abs(b) <= _LARGEST_EXPONENT and abs(a) <= _LARGEST_BASE
                return Fraction(a**b.numerator) if small else None
            return _OPERATORS[type(op)](a, b) if type(op) in _OPERATORS else None
    return None
