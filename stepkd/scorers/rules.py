"""Scorers that need no model: the exact checker of the tiny world, the sums that a step writes out, and the gain.

* ``checker``: the ceiling that a reward model is measured against.
* ``arithmetic``: in GSM8K and its kin a step says ``48 / 2 = 24 clips``. Whether 48 / 2 is what the problem asks for
  takes a reader; whether it is 24 does not. The sums are done again: exact, free, and blind to everything else. So a
  score of 0 is nearly always deserved, while one of 1 only says that no sum is incorrect.
* ``gain``: what of a reference solution each step adds, and what it only says again. After StepSearch (arXiv
  2505.15107, section 3), where a round of searching is worth the gain in similarity to the gold documents, less the
  share of documents that were there before. Here the gold units are the lines of the row's own ``solution``, and a step
  takes the place of a round: a transfer, not the paper's setting. It is a heuristic: a correct step that goes another
  way than the solution earns nothing.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stepkd.errors import DataError
from stepkd.scorers.scorer import Meaning, Row, ScorerConfig, Solutions
from stepkd.statistics import FloatArray
from stepkd.tasks.rows import check_row
from stepkd.yaml_files import read_yaml


class RuleScorer(ScorerConfig):
    """A scorer that is nothing but a rule: its settings are the scorer."""

    meaning: Meaning = "correctness"

    def build(self, *, device: str = "auto", max_rows: int = 32) -> Any:
        """See :meth:`ScorerConfig.build`."""
        return self


@dataclass(frozen=True)
class Checker(RuleScorer):
    """Scores 1.0 for a step that is what the tiny-world problem demands at its place, and 0.0 for any other."""

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`.

        Raises:
            DataError: a row that is not of the tiny world.
        """
        return [[list(map(float, check_row(each.row, steps))) for steps in each.solutions] for each in problems]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return {"scorer": "checker", "given": "truth", "meaning": self.meaning}


# --- gain -------------------------------------------------------------------------------------------------------------


NGRAM = 4
"""Words that are looked for in earlier steps; a shorter step counts as one."""

_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]")


@dataclass(frozen=True)
class Gain(RuleScorer):
    """Scores ``(1 + gain - repetition) / 2`` of every step; 0.5 for one that adds nothing and repeats nothing.

    With ``c`` the TF-IDF cosine of a step to each of the n lines of the solution, and ``m`` the best of it so far,

    - gain: ``1/n sum max(c - m, 0)``, in [0, 1]; those of all steps of a solution sum to at most 1;
    - repetition: share of the step's runs of four words that an earlier step has, in [0, 1].
    """

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`.

        Raises:
            DataError: a row without a solution.
        """
        return [[self._of_solution(problem.row, steps) for steps in problem.solutions] for problem in problems]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return {"scorer": "gain", "ngram": NGRAM, "meaning": self.meaning}

    def _of_solution(self, row: Row, steps: Sequence[str]) -> list[float]:
        solution = row.get("solution")
        units = [line for line in str(solution or "").splitlines() if words_of(line)]
        if not units:
            raise DataError(f"row {row.get('id')!r} has no 'solution': the scorer 'gain' compares steps with its lines")
        best_N, seen, scores = np.zeros(len(units)), set[tuple[str, ...]](), []
        for step, found_N in zip(steps, Vectors(units).cosines(steps), strict=True):
            gain = float(np.maximum(found_N - best_N, 0.0).mean())
            best_N = np.maximum(found_N, best_N)
            words = words_of(step)
            runs = {tuple(words[i : i + NGRAM]) for i in range(max(len(words) - NGRAM + 1, 1))} if words else set()
            repetition = len(runs & seen) / len(runs) if runs else 0.0
            seen |= runs
            scores.append((1 + gain - repetition) / 2)
        return scores


def words_of(text: str) -> list[str]:
    """Words, numbers and marks of punctuation of a text, in lower case."""
    return _WORD.findall(text.lower())


class Vectors:
    """TF-IDF vectors of texts, of length 1."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words_of(text)) for text in texts]
        self._frequency = Counter(word for each in counts for word in each)
        self._columns = {word: column for column, word in enumerate(self._frequency)}
        self._units = len(texts)
        self._matrix = self._of(counts).T.tocsr()

    def cosines(self, texts: Sequence[str]) -> FloatArray:
        """(texts, units) cosines to all of them, in [0, 1]."""
        found: FloatArray = (self._of([Counter(words_of(text)) for text in texts]) @ self._matrix).toarray()
        return np.minimum(found, 1.0)  # the products of a long text's weights sum to a little more

    def _of(self, counts: Sequence[Counter[str]]) -> Any:
        """(texts, words) sparse rows; a word of no unit counts for the length alone, as if one unit had it."""
        from scipy.sparse import csr_array

        values, columns, starts = [], [], [0]
        for each in counts:
            weights = {word: n * math.log(1 + self._units / max(self._frequency[word], 1)) for word, n in each.items()}
            length = math.sqrt(math.fsum(weight**2 for weight in weights.values()))
            known = [word for word in weights if word in self._columns]
            values += [weights[word] / length for word in known]
            columns += [self._columns[word] for word in known]
            starts.append(len(values))
        return csr_array(
            (np.array(values), np.array(columns, dtype=int), starts), shape=(len(counts), len(self._columns))
        )


# --- arithmetic -------------------------------------------------------------------------------------------------------

_LONGEST = 200  # characters of one side of an equation; longer ones are no sums that people write
_LARGEST_EXPONENT, _LARGEST_BASE = 64, 10**12
_MARK = re.compile(r"<<([^<>\n]*)>>")
_SIDE = r"[-+*/^().\d%\s]"
_NUMBER = re.compile(r"-?(\d+(?:\.\d*)?|\.\d+)%?")
_SPELLINGS = read_yaml(Path(__file__).with_suffix(".yaml"), "spellings of sums")
_REPLACED = [(re.compile(pattern), by) for pattern, by in _SPELLINGS["replaced"].items()]
_HALVES = re.compile(r"/\s*\d+\s*/")  # 500/ 2/5: five hundred by two fifths, or divided twice?
_UNITS = re.compile(rf"(?:{'|'.join(_SPELLINGS['units'])})\b", re.I)
_SCALES = re.compile(rf"\s*(?:{'|'.join(_SPELLINGS['scales'])})", re.I)
_PLACE = re.compile(r"\b(?:step|day|week|month|year|part|problem|question|case|chapter|number|no|figure)\.?\s*$", re.I)
_SHARE = re.compile(r"\(*\s*(?:[\d.]+\s*%|(\d+)\s*/\s*(\d+))\s*\)*")
_MINUS_PERCENT = re.compile(r"[-+]\s*[\d.]+\s*%")
# A sum after one of these is a part of a longer one that is said in words: half of 10 + 4 = 9.
_IN_WORDS = re.compile(
    r"(?:\b(?:half|percent|twice|thrice|double|triple|plus|minus|negative|times|than|by|over|from|mod|x|log|ln|sin|cos|tan|"
    r"choose|root|(?:sum|average|mean|product|difference|remainder|quotient)\s+of\b[^.;=]*\band)|%|\\[a-z]+)(?:\s+of)?\s*$|"
    r"(?<!total)(?<!sum)(?<!total cost)(?<!total amount)(?<!amount)(?<!cost)(?<!price)(?<!profit)(?<!number)\sof\s*$",
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


@dataclass(frozen=True)
class Arithmetic(RuleScorer):
    """Scores 0.0 for a step with an incorrect sum and 1.0 for one whose sums are correct.

    See :func:`equations` for what counts as a sum and when it is correct.
    """

    unchecked: float = 1.0
    """Score of a step without a sum that can be checked: 1.0, as nothing is incorrect in it, or NaN, as nothing is
    known of it."""

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`; the prompts do not matter."""
        return [[[self._score(step) for step in steps] for steps in problem.solutions] for problem in problems]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        unchecked = None if math.isnan(self.unchecked) else self.unchecked
        return {"scorer": "arithmetic", "unchecked": unchecked, "meaning": self.meaning}

    def _score(self, step: str) -> float:
        found = equations(step)
        return float(all(each.holds for each in found)) if found else self.unchecked


def equations(text: str) -> list[Equation]:
    r"""The sums of a text that can be checked.

    A sum is ``expression = number`` (or ``= expression``) with numbers, ``+ - * / ^``, brackets, per cent signs,
    currency signs, thousands commas and the usual spellings of the operators (``x``, ``×``, ``÷``, ``\times``,
    ``\frac``); calculator marks (``<<48/2=24>>``) count. What holds a unit or a variable inside, follows words that
    belong to the sum ("half of 10 + 4 = 9"), or cannot be read for another reason is passed over, not called incorrect.

    A sum is correct when both sides are equal exactly; when the stated number is the other side rounded at the stated
    digit, up or down (10 / 3 = 3.33, 10 / 4 = 3); with per cent signs read as such or left out; and when the number
    that the right side begins with fits and a further equals sign follows (10 * 2 = 20 - 5 = 15). A division by zero is
    incorrect. Sides that disagree are passed over where they may mean something else: a share of something (25% = 10
    apples), another unit or scale (45 + 15 = 1 hour), a per cent sign behind a minus ($80 - 20% = $64).

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
    for before, after in itertools.pairwise(parts):  # the last part is followed by no further equals sign
        left, right = _left_side(before[-2 * _LONGEST :]), _right_side(after[: 2 * _LONGEST])
        if left is None or right is None:
            continue
        verdict = _holds(left, right, goes_on=after is not parts[-1])
        if verdict is False and _excused(left, right, after):
            continue
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
    known = head.rstrip()[-1:]  # a letter or a mark of punctuation; not a root, a dot for "times", or the like
    glued = bool(head) and (head[-1].isalnum() or head[-1] in ":_\\}^,")
    if not text or glued or not (known == "" or known.isascii() or known.isalpha() or known in "•→⇒∴–—’“”"):
        return None
    if len(text) > _LONGEST or text[0] in "+*/^" or (text[0] == "-" and known not in ("", "=", "(", ":")):
        return None
    if _IN_WORDS.search(head) or _HALVES.search(text) or (_PLACE.search(head) and re.match(r"\d+\s*-", text)):
        return None
    while text.count("(") > text.count(")") and text[0] == "(":
        text = text[1:].strip()  # an opened aside: "(3 + 4 = 7)"
    return text


def _right_side(after: str) -> str | None:
    """The number or sum that follows the equals sign."""
    run = re.match(rf"{_SIDE}*", after)
    assert run is not None
    text, rest = run.group(), after[run.end() :]
    sentence = re.search(r"\.(?=\s|$)", text)
    if sentence is not None:  # "= 9. 9 * 2": the next sentence begins with a number
        text, rest = text[: sentence.start()], ""
    elif text.rstrip().endswith("("):  # "= 8 (since ...)"
        text, rest = text.rstrip()[:-1], ""
    glued = rest[:1].isalpha() and text[-1:].strip() != ""
    if (glued and not _UNITS.match(rest)) or rest[:1] in ("{", "\\", "_", ":", "§") or len(text) > _LONGEST:
        return None  # 3 + 4 = 7x
    if rest.lower().startswith("cent"):
        return None  # $1 / 2 = 50 cents
    text = text.strip()
    while text.count(")") > text.count("(") and text.endswith(")"):
        text = text[:-1].strip()
    return None if not text or text[-1] in "+-*/^(" else text  # 3 * 30 = 30 + M


def _excused(left: str, right: str, after: str) -> bool:
    """Whether sides that disagree may be meant otherwise: shares of something, other units, per cent of the rest."""
    share = _SHARE.fullmatch(left.strip())
    if share is not None and share.group(1) is None:
        return True  # 25% = 10 apples
    if share is not None and int(share.group(1)) <= int(share.group(2)) and right.isdecimal():
        return True  # 3/5 = 12 girls
    if _MINUS_PERCENT.search(left) and re.search(r"\d(?![\d.]*\s*%)(?:\s|$|[-+*/)])", left):
        return True  # $80 - 20% = $64
    return _SCALES.match(after[after.find(right) + len(right) :]) is not None


def _holds(left: str, right: str, *, goes_on: bool) -> bool | None:
    """Whether the sides agree; None where one of them cannot be read, or nothing is computed.

    Args:
        left, right: the sides.
        goes_on: whether another equals sign follows, so that the right side is the left one of the next sum.
    """
    tree = _parsed(left)
    if tree is None or not any(isinstance(node, ast.BinOp) for node in ast.walk(tree)) or _parsed(right) is None:
        return None
    try:
        lefts = _readings(left)
    except ZeroDivisionError:
        return False
    if not lefts:
        return None
    number = _NUMBER.match(right)
    alone = number is not None and number.end() == len(right)
    if number is not None and (alone or goes_on):
        digits, stated = len(number.group(1).partition(".")[2]), number.group().rstrip("%")
        claims = [(Fraction(stated), digits)]
        if number.group() != stated:
            claims.append((Fraction(stated) / 100, digits + 2))
        if any(_rounds_to(value, claim, places) for value in lefts for claim, places in claims):
            return True
        if alone:
            return False
    try:
        others = _readings(right)
    except ZeroDivisionError:
        return False
    return any(value in others for value in lefts) if others else None


def _rounds_to(value: Fraction, stated: Fraction, places: int) -> bool:
    """Whether a number is another one rounded (up or down, but not up to 1 from less than a half) at a place."""
    scaled, claimed = value * 10**places, stated * 10**places
    rounded = scaled.denominator > 1 and abs(scaled - claimed) < 1 and not (claimed == 1 and scaled < Fraction(1, 2))
    return value == stated or rounded


def _readings(text: str) -> list[Fraction]:
    """Values of an expression, per cent signs read and left out; none where it cannot be computed."""
    values = [_value(_parsed(each)) for each in dict.fromkeys((text, text.replace("%", "")))]
    return [value for value in values if value is not None]


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
