"""A step is worth what it adds of the solution, less what was said before."""

from __future__ import annotations

import math

import pytest

from stepkd.errors import DataError
from stepkd.scorers import load_scorer, score_one
from stepkd.scorers.gain import GainScorer
from stepkd.scorers.scorer import Solutions

ROW = {"id": "p1", "prompt": "?", "solution": "He buys 3 apples for 6\nShe sells 4 pears for 8\n#### 14"}


def of(*steps: str) -> list[float]:
    return GainScorer().score([Solutions(ROW, [steps])])[0][0]


def test_the_solution_itself_covers_everything() -> None:
    scores = of("He buys 3 apples for 6\n", "She sells 4 pears for 8\n", "#### 14")
    # "for" stands in two lines, so the first step has a part of the second already.
    assert math.fsum(2 * score - 1 for score in scores) == pytest.approx(1.0)
    assert scores[0] > 0.5 + 1 / 6 - 1e-12
    assert scores[1] < 0.5 + 1 / 6


def test_written_out() -> None:
    """Two units with one word in common: log(1 + 2/1) for the others, log(1 + 2/2) for it."""
    row = {"id": "q", "prompt": "?", "solution": "a b\nb c"}
    rare, common = math.log(3), math.log(2)
    norm = math.hypot(rare, common)
    found = GainScorer().score([Solutions(row, [["a b", "b", "d"]])])[0][0]
    other = common**2 / norm**2  # of "a b" to "b c"
    first = (1 + other) / 2
    second = (max(common / norm - 1, 0) + max(common / norm - other, 0)) / 2
    assert found == pytest.approx([(1 + first) / 2, (1 + second) / 2, 0.5])


def test_repetition_costs() -> None:
    step = "He buys 3 apples for 6"
    first, again, once_more = of(step, "\n" + step.upper(), "So " + step)
    assert first > 0.5
    assert again == 0.0
    assert once_more == pytest.approx(0.5 * (1 - 3 / 4))  # three of its four runs of words were there
    assert of("something else altogether") == [0.5]


def test_order_and_companions() -> None:
    """A step's worth depends on those before it only, and solutions of one problem know nothing of each other."""
    steps = ["He buys 3 apples", "nothing at all", "She sells 4 pears for 8"]
    whole = of(*steps)
    assert of(*steps[:2]) == whole[:2]
    assert GainScorer().score([Solutions(ROW, [steps, steps])])[0] == [whole, whole]
    assert all(0 <= score <= 1 for score in whole)


def test_rows_without_a_solution() -> None:
    with pytest.raises(DataError, match="row '0' has no 'solution'"):
        score_one(load_scorer("gain"), "1+1=", ["2"])
