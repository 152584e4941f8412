"""The exact checker, the outcome, and scorers as labellers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest

from stepkd.errors import ConfigError, DataError
from stepkd.labels.labellers import Outcome, ScorerLabeller, Solution, TaskChecker
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.scorers.scorer import Meaning, Solutions
from stepkd.steps.labels import Reduce, reduce_values
from stepkd.tasks.rows import make_rows

ROW = make_rows("modular:terms=3,modulus=10", 1, seed=0)[0]


def solution(steps: Sequence[str], *, row: Any = ROW, correct: bool | None = None, id: str = "p/0") -> Solution:
    ids = np.arange(len(steps))
    return Solution(np.ones(1), ids, ids + 1, id=id, index=0, row=row, steps=tuple(steps), correct=correct)


def test_checker_truth_and_claims() -> None:
    first, second, answer = ROW["steps"]
    incorrect = f"{first[:-2]}{(int(first[-2]) + 1) % 10}\n"
    rest = [second, answer]
    assert TaskChecker().label([solution(ROW["steps"])])[0].labels == (True, True, True)
    assert TaskChecker().label([solution([incorrect, *rest])])[0].labels == (False, True, True), "a silent recovery"
    claims = TaskChecker(given="claims").label([solution([incorrect, *rest])])[0]
    assert claims.labels[:2] == (False, False), "the second line does not follow from the incorrect claim"
    assert TaskChecker(given="claims").provenance() == {"labeller": "checker", "given": "claims"}


def test_checker_refuses_other_rows() -> None:
    with pytest.raises(DataError, match="task"):
        TaskChecker().label([solution(["x"], row={"id": "p", "prompt": "?"})])
    with pytest.raises(ConfigError, match="unknown given"):
        TaskChecker(given="lies")  # type: ignore[arg-type]


def test_outcome() -> None:
    steps = ["a", "b", "c"]
    for correct in (True, False):
        assert Outcome().label([solution(steps, correct=correct)])[0].labels == (None, None, correct)
        assert Outcome(scope="all").label([solution(steps, correct=correct)])[0].labels == (correct,) * 3
    with pytest.raises(ConfigError, match="unknown scope"):
        Outcome(scope="first")  # type: ignore[arg-type]


class StubScorer:
    """Scores from a table; records how it was asked."""

    def __init__(self, table: dict[str, float], meaning: Meaning = "correctness") -> None:
        self.table, self.meaning = table, meaning
        self.asked: list[list[int]] = []

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        self.asked.append([len(problem.solutions) for problem in problems])
        return [[[self.table[step] for step in steps] for steps in problem.solutions] for problem in problems]

    def provenance(self) -> dict[str, Any]:
        return {"scorer": "stub"}


def test_scorer_hard_soft_and_missing() -> None:
    scorer = StubScorer({"a": 0.9, "b": 0.5, "c": 0.1, "d": math.nan})
    solutions = [solution(["a", "b", "c", "d"])]
    hard = ScorerLabeller(scorer).label(solutions)[0]
    assert hard.labels == (True, True, False, None), "correct from the threshold on; no score, no label"
    assert hard.facts == {"scores": [0.9, 0.5, 0.1, None]}
    assert hard.values is None
    assert ScorerLabeller(scorer, threshold=0.6).label(solutions)[0].labels == (True, False, False, None)
    soft = ScorerLabeller(StubScorer(scorer.table, "value"), threshold=None).label(solutions)[0]
    assert soft.labels == (0.9, 0.5, 0.1, None)
    assert soft.values is None, "a scorer's guess is no continuation's success"
    facts = ScorerLabeller(scorer, threshold=None).provenance()
    assert facts == {
        "labeller": "scorer", "threshold": None, "meaning": "correctness", "scorer": {"scorer": "stub"}
    }  # fmt: skip


def test_neighbours_of_one_problem_are_scored_together() -> None:
    scorer = StubScorer({"a": 0.9, "b": 0.2})
    other = {"id": "q", "prompt": "?"}
    labels = ScorerLabeller(scorer).label(
        [solution(["a"]), solution(["b", "a"]), solution(["b"], row=other), solution(["a"])]
    )
    assert scorer.asked == [[2, 1, 1]]
    assert [each.labels for each in labels] == [(True,), (False, True), (False,), (True,)]


def test_scorer_bad_answers() -> None:
    class Incorrect(StubScorer):
        def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
            return self.answer  # type: ignore[attr-defined]

    scorer = Incorrect({})
    for answer, message in (
        ([], "is longer than|is shorter than"),
        ([[[0.5]]], "1 scores for 2 steps"),
        ([[[0.5, 1.5]]], r"[^ ]+: scores outside \[0, 1\]: \[0.5, 1.5\]"),
    ):
        scorer.answer = answer  # type: ignore[attr-defined]
        with pytest.raises((ValueError, DataError), match=message):
            ScorerLabeller(scorer).label([solution(["a", "b"])])


def test_fixed_cases() -> None:
    values = (1.0, 0.5, 0.0, 0.125, 0.0)
    assert reduce_values(values, "any") == (True, True, False, True, False)
    assert reduce_values(values, "mean") == values
    assert reduce_values(values, "first_error") == (True, True, False, None, None)
    assert reduce_values(values, "propagate") == (True, True, True, True, False)
    assert reduce_values((0.0, 1.0), "first_error") == (False, None)
    assert reduce_values((0.25, 1.0), "first_error") == (True, True)
    assert [reduce_values((), reduce) for reduce in get_args(Reduce)] == [()] * 4


@pytest.mark.parametrize("length", range(6))
def test_brute_force(length: int) -> None:
    for values in itertools.product((0.0, 0.25, 1.0), repeat=length):
        hard = []
        for value in values:
            hard.append(value > 0)
        assert reduce_values(values, "any") == tuple(hard)
        assert reduce_values(values, "mean") == values
        reached = [any(hard[j] for j in range(i, length)) for i in range(length)]
        assert reduce_values(values, "propagate") == tuple(reached)
        cut = [None if any(not hard[j] for j in range(i)) else hard[i] for i in range(length)]
        assert reduce_values(values, "first_error") == tuple(cut)


def test_labels_are_of_one_plain_kind() -> None:
    assert {type(label) for label in reduce_values([1, 0, 0.5], "mean")} == {float}
    assert {type(label) for label in reduce_values([1, 0, 0.5], "propagate")} == {bool}


def test_an_unknown_reduction_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'first_error'"):
        MonteCarlo(reduce="frist_error")  # type: ignore[arg-type]
