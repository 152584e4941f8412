"""Scores for rows: where step texts come from, grouping, and scores as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from stepkd.errors import DataError
from stepkd.models import tiny_tokenizer
from stepkd.scorers import Solutions, score_rows
from stepkd.scorers.rows import problem_key, row_steps, step_scores


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
    assert row_steps({"completion": "a. b"}, segmenter="sentence") == ["a.", " b"]


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
    for given in (None, tiny_tokenizer()):
        row = sampled(text, [6, 10]) | ({"completion": "another\ntext"} if given else {})
        assert row_steps(row, given) == row["completion"].splitlines(keepends=True)
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
