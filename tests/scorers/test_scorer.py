"""Scores for rows (where step texts come from, grouping, scores as JSON), and one score per solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkd.errors import ConfigError, DataError
from stepkd.models.spec import tiny_tokenizer
from stepkd.scorers.scorer import (
    Solutions,
    default_reduction,
    problem_key,
    reduce_scores,
    reduce_solutions,
    row_steps,
    score_rows,
    step_scores,
)

# --- rows -------------------------------------------------------------------------------------------------------------


class Recorder:
    """Scores a step by its length, and keeps what it was asked."""

    meaning = "correctness"

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[list[str]]]] = []

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        self.asked += [(p.row["id"], [list(s) for s in p.solutions]) for p in problems]
        return [[[len(step) / 100 for step in steps] for steps in p.solutions] for p in problems]

    def provenance(self) -> dict[str, Any]:
        return {}


def sampled(text: str, ends: list[int], *, eos: bool = True) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * eos
    return {"id": "r", "prompt": "p", "completion": text, "token_ids": ids, "step_ends": ends}


def test_rows_of_one_problem_are_scored_together_and_in_their_order() -> None:
    scorer = Recorder()
    rows = [
        {"id": "0", "prompt": "p", "completions": ["a", "bb"]},
        {"id": "1", "prompt": "q", "completions": ["ccc"]},
        {"id": "2", "prompt": "p", "completions": ["dddd"]},
        {"id": "3", "problem_id": "x", "prompt": "p", "completions": ["e"]},
        {"id": "4", "problem_id": "x", "prompt": "p", "steps": ["ff", "g"]},
    ]
    assert score_rows(scorer, rows) == [[0.01, 0.02], [0.03], [0.04], [0.01], [0.02, 0.01]]
    assert scorer.asked == [("0", [["a", "bb"], ["dddd"]]), ("1", [["ccc"]]), ("3", [["e"], ["ff", "g"]])]
    assert score_rows(scorer, []) == []
    chat = [{"role": "user", "content": "p"}]
    assert problem_key({"prompt": chat}) == problem_key({"prompt": [dict(chat[0])]}) != problem_key({"prompt": "p"})


def test_step_texts() -> None:
    tokenizer = tiny_tokenizer()
    assert row_steps({"completions": ["a", "b"], "completion": "c"}) == ["a", "b"]
    assert row_steps({"steps": ["a\n", "b"], "token_ids": [5], "step_ends": [1]}) == ["a\n", "b"]
    text = "1+1=2\n#### 2"
    assert row_steps(sampled(text, [6, 10]), tokenizer) == ["1+1=2\n", "#### 2"]
    assert row_steps(sampled(text, [6, 7, 10]), tokenizer) == ["1+1=2\n", "####", " 2"]
    assert row_steps({"completion": text}) == ["1+1=2\n", "#### 2"]
    assert row_steps({"solution": text}) == ["1+1=2\n", "#### 2"]
    assert row_steps({"completion": "a. b", "segmenter": "sentence"}) == ["a.", " b"]


def test_a_step_of_the_end_token_alone_is_none() -> None:
    assert row_steps(sampled("ab", [2, 3]), tiny_tokenizer()) == ["ab"]
    assert step_scores(sampled("ab", [2, 3]), [0.5]) == [0.5, None]


def test_scores_as_json() -> None:
    assert step_scores({"completions": ["a", "b"]}, [0.5, math.nan]) == [0.5, None]
    assert step_scores({"completion": "a"}, [0.5]) == [0.5]
    for row, scores in (({"completions": ["a", "b"]}, [0.5]), (sampled("ab", [3]), [0.5, 0.6])):
        with pytest.raises(DataError, match=r"the row has \d steps and \d were scored"):
            step_scores(row, scores)


def test_without_the_tokenizer_the_text_is_cut_again() -> None:
    text = "1+1=2\n#### 2"
    for tokenizer in (None, tiny_tokenizer()):
        row = sampled(text, [6, 10]) | ({"completion": "another\ntext"} if tokenizer else {})
        assert row_steps(row, tokenizer) == row["completion"].splitlines(keepends=True)
    row = sampled("So. It is", [3, 10]) | {"segmenter": "sentence"}
    assert row_steps(row) == ["So.", " It is"]
    with pytest.raises(DataError, match=r"r, column 'token_ids': the row's 2 steps cannot be told: .* has 1 steps"):
        row_steps(row | {"segmenter": "of my own"})


def test_rows_without_readable_steps() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="z: the row has no steps"):
        row_steps({"id": "z", "prompt": "p"})
    for empty in ({"completion": ""}, {"completion": " \n"}, sampled("", [1])):
        with pytest.raises(DataError, match="solution is empty"):
            row_steps({"id": "z", **empty}, tokenizer)


# --- one score per solution -------------------------------------------------------------------------------------------


NAN = math.nan
PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def test_closed_forms() -> None:
    scores = [0.5, 0.8, 0.25]
    expected = {"product": 0.1, "min": 0.25, "mean": 1.55 / 3, "last": 0.25}
    for reduction, value in expected.items():
        assert reduce_scores(scores, reduction, meaning="correctness") == pytest.approx(value, rel=1e-14)


def test_defaults_follow_the_meaning() -> None:
    assert [default_reduction(meaning) for meaning in ("correctness", "value", "outcome")] == [
        "product",
        "last",
        "last",
    ]
    assert reduce_scores([0.5, 0.5], meaning="correctness") == pytest.approx(0.25)
    assert reduce_scores([0.5, 0.75], meaning="value") == 0.75


@given(PROBABILITIES)
def test_product_equals_multiplication_and_order_of_sizes(scores: list[float]) -> None:
    product = reduce_scores(scores, "product", meaning="correctness")
    assert product == pytest.approx(math.prod(scores), rel=1e-9, abs=1e-300)
    low = reduce_scores(scores, "min", meaning="correctness")
    mean = reduce_scores(scores, "mean", meaning="correctness")
    assert product is not None
    assert low is not None
    assert mean is not None
    assert product <= low * (1 + 1e-12)
    assert low <= mean * (1 + 1e-12)


def test_product_with_zero_and_long_solutions() -> None:
    assert reduce_scores([0.9, 0.0, 0.9], "product", meaning="correctness") == 0.0
    assert reduce_scores([0.4] * 2000, "product", meaning="correctness") == 0.0
    assert reduce_scores([0.4] * 700, "product", meaning="correctness") == pytest.approx(0.4**700, rel=1e-12)


def test_missing_scores() -> None:
    assert reduce_scores([NAN, NAN, 0.7], meaning="outcome") == 0.7
    assert reduce_scores([NAN, 0.7], "product", meaning="outcome") == pytest.approx(0.7)
    assert reduce_scores([0.7, NAN], meaning="outcome") is None
    for reduction in ("product", "min", "mean", "last"):
        assert reduce_scores([0.9, NAN], reduction, meaning="correctness") is None
        assert reduce_scores([NAN, 0.9], reduction, meaning="value") is None


def test_solutions_without_a_score_stay_in_their_place() -> None:
    reduced = reduce_solutions([[[0.5, 0.5], [0.5, NAN]], [[0.25]]], meaning="correctness")
    assert reduced == [[pytest.approx(0.25), None], [pytest.approx(0.25)]]


def test_scores_that_cannot_be_reduced() -> None:
    for scores in ([], [0.5, 1.5], [-0.1]):
        with pytest.raises(DataError, match=r"step scores are probabilities in \[0, 1\], at least one; found"):
            reduce_scores(scores, meaning="value")
    with pytest.raises(ConfigError, match="unknown reduction 'prod'"):
        reduce_scores([0.5], "prod", meaning="value")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown meaning of scores 'correct'"):
        default_reduction("correct")  # type: ignore[arg-type]
