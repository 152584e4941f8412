"""Values of states: shares of correct continuations, scores of the newest step, the judge with the reference shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from stepkd.errors import ConfigError
from stepkd.models.policy import Policy
from stepkd.models.spec import build_tiny
from stepkd.scorers.judge import PromptedJudge
from stepkd.scorers.rules import Checker
from stepkd.scorers.scorer import Judged, Solutions
from stepkd.search.generate import ContinuationValue, ScorerValue
from stepkd.search.state import Problem, State
from stepkd.tasks.rows import make_rows


def state(problem: Problem, *steps: str, correct: bool | None = None) -> State:
    return State(problem, steps, tuple(range(len(steps))), tuple(0 for _ in steps), correct)


def test_share_of_correct_continuations(scripted: Any, known_tree: Any, grader: Any, problem: Problem) -> None:
    """From ``a`` one of two answers is correct; a finished state is what its answer is, and is not continued."""
    generator = scripted(known_tree)
    value = ContinuationValue(generator, grader, continuations=2)
    over = [state(problem, "a\n", "#### 1", correct=True), state(problem, "b\n", "#### 3", correct=False)]
    assert value.values([state(problem, "a\n"), over[0], state(problem, "b\n"), over[1]]) == [0.5, 1.0, 0.0, 0.0]
    assert value.values(over) == [1.0, 0.0]
    assert value.provenance() == {"value": "continuation", "continuations": 2}
    with pytest.raises(ConfigError, match="continuations=0"):
        ContinuationValue(generator, grader, continuations=0)


class Lengths:
    """Scores a step by its length; one that holds an ``x`` has no score."""

    def __init__(self, meaning: Any = "correctness") -> None:
        self.meaning = meaning
        self.asked: list[list[int]] = []

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        self.asked.append([len(problem.solutions) for problem in problems])
        return [
            [[math.nan if "x" in step else len(step) / 10 for step in steps] for steps in problem.solutions]
            for problem in problems
        ]

    def provenance(self) -> dict[str, Any]:
        return {"scorer": "lengths"}


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("last", [0.2, 0.1, None, 0.3]),
        (None, [0.08, 0.1, None, None]),
        ("product", [0.08, 0.1, None, None]),
        ("min", [0.2, 0.1, None, None]),
    ],
)
def test_scores_of_steps(problem: Problem, reduction: Any, expected: list[float | None]) -> None:
    """A blank last step (the end token alone) is left out; steps before the newest count only where they are asked."""
    other = Problem(1, {"id": "q", "prompt": "??"}, (1,))
    states = [
        state(problem, "aaaa", "bb"),
        state(other, "c", " \n"),
        state(problem, "aa", "x"),
        state(problem, "xx", "ccc"),
    ]
    scorer = Lengths()
    value = ScorerValue(scorer, reduction=reduction)
    found = value.values(states)
    assert [None if v is None else pytest.approx(v) for v in expected] == found
    assert scorer.asked == [[3, 1]], "states of a problem go together"
    assert value.values([state(problem, "\n")]) == [None]
    assert value.values([]) == []
    assert value.provenance() == {
        "value": "scorer",
        "reduction": reduction or "product",
        "scorer": {"scorer": "lengths"},
    }


def test_an_outcome_scorer_counts_for_its_last_step(problem: Problem) -> None:
    value = ScorerValue(Lengths("outcome"))
    assert value.values([state(problem, "xx", "aaaa")]) == [0.4]


def test_unknown_reduction() -> None:
    with pytest.raises(ConfigError, match="reduction"):
        ScorerValue(Lengths(), reduction="lst")  # type: ignore[arg-type]


def test_exact_checker() -> None:
    (row,) = make_rows("modular:terms=3,modulus=5", 1, seed=0)
    problem = Problem(0, row, (1,))
    first, second, *_ = row["solution"].splitlines(keepends=True)
    value = ScorerValue(Checker())
    states = [state(problem, first), state(problem, "1+1=3\n"), state(problem, "1+1=3\n", second)]
    assert value.values(states) == [1.0, 0.0, 0.0], "the product: no state is good behind an incorrect step"


def test_self_evaluation_reads_the_reference() -> None:
    """P(yes) of the judge for all steps, with the answer shown: another answer, another value."""
    model, tokenizer = build_tiny("tiny-0.1m", seed=3, dtype="float64")
    judge = PromptedJudge(Policy(model, tokenizer), reference=True, answers=[("y", "n")])
    value = ScorerValue(judge, name="self_evaluation")
    rows = [{"id": str(i), "prompt": "1+1=", "answer": answer} for i, answer in enumerate("27")]
    states = [state(Problem(i, row, (1,)), "1+1=2\n", "#### 2") for i, row in enumerate(rows)]
    expected = [
        math.prod(scores[0]) for scores in judge.score([Solutions(row, [list(states[0].steps)]) for row in rows])
    ]
    assert value.values(states) == pytest.approx(expected)
    assert expected[0] != expected[1]
    assert value.provenance()["value"] == "self_evaluation"
    assert value.provenance()["scorer"]["reference"] is True


def test_methods_pay_for_critiques_that_others_asked_for(problem: Problem) -> None:
    """A critique of 50 tokens counts for every method that is told its verdict, as prompt and solution do."""

    class Critic(Lengths):
        def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
            facts = {"generated_tokens": 50, "critiques": ["..."]}
            return [[Judged(each, facts=facts, prediction=None) for each in own] for own in super().score(problems)]

    scorer = Critic()
    value = ScorerValue(scorer)
    costs = []
    for states in ([state(problem, "aa", "b"), state(problem, "c")], [state(problem, "c"), state(problem, "c")]):
        value.values(states)
        costs.append(value.costs.pop(0))
    assert scorer.asked == [[2]]
    assert [each["scored_tokens"] for each in costs] == [2 * 51 + 3, 2 * 52]
    assert all(type(scores) is list for scores, _ in value._known.values()), "texts of critiques are not remembered"


def test_steps_and_solutions_are_judged_in_one_reading(problem: Problem) -> None:
    """Blank steps, and those that the scorer could not read, have no score."""
    scorer = Lengths()
    value = ScorerValue(scorer)
    states = [state(problem, "aa\n", "\n", "bbbb"), state(problem, "x", "aa"), state(problem, " ")]
    assert value.judged(states) == [
        (pytest.approx(0.3 * 0.4), (0.3, None, 0.4)),
        (None, (None, 0.2)),
        (None, (None,)),
    ]
    assert scorer.asked == [[2]]
    assert value.values(states) == [pytest.approx(0.12), None, None]
    assert value.judged(states[1:2], "last") == [(0.2, (None, 0.2))]
    assert scorer.asked == [[2]]
    assert (value.costs[0]["scorer_calls"], value.costs[0]["unscored"]) == (5, 4)
