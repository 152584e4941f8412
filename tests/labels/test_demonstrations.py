"""Labelled solutions to demonstrations: which are kept, which are left out, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig
from stepkd.data.load import load_rows
from stepkd.data.rows import DEMONSTRATION
from stepkd.errors import DataError
from stepkd.labels.convert import Demonstrations, convert_rows


def completion(name: str, correct: bool | None, labels: list[bool | None], finish: str = "stop") -> dict[str, Any]:
    return {
        "id": name,
        "problem_id": "p",
        "prompt": "1+1=",
        "answer": "2",
        "completion": "1+1=2\n#### 2",
        "token_ids": [5, 6],
        "step_ends": [1, 2],
        "finish": finish,
        "correct": correct,
        "step_labels": labels,
        "labelling": {"labeller": "checker"},
    }


ROWS = [
    completion("a", True, [True, True]),
    completion("b", True, [False, True]),
    completion("c", False, [False, False]),
    completion("d", True, [True, True], finish="length"),
    completion("e", None, [True, None]),
]


def test_correct_answers_are_kept() -> None:
    converted = convert_rows(ROWS, Demonstrations())
    assert [row["id"] for row in converted.rows] == ["a", "b"]
    assert converted.counts == {"rows": 2, "cut_off": 1, "ungraded": 1, "incorrect_answer": 1}
    assert converted.rows[0] == {
        "id": "a",
        "problem_id": "p",
        "prompt": "1+1=",
        "answer": "2",
        "solution": "1+1=2\n#### 2",
        "labelling": {"labeller": "checker"},
    }


def test_clean_demonstrations_have_no_incorrect_step() -> None:
    converted = convert_rows(ROWS, Demonstrations(clean=True))
    assert [row["id"] for row in converted.rows] == ["a"]
    assert converted.counts["incorrect_step"] == 1


def test_stepwise_rows_are_joined_as_written() -> None:
    row = {"id": "a", "prompt": "?", "completions": ["one", "two\n", "#### 2"], "labels": [True, True, True]}
    (found,) = convert_rows([row | {"outcome": True}], Demonstrations()).rows
    assert found["solution"] == "one\ntwo\n#### 2"
    with pytest.raises(DataError, match=r"none of 1 rows is left \(1 ungraded\)"):
        convert_rows([row], Demonstrations())


def test_none_left_says_why() -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl: none of 2 rows is left \(1 cut_off, 1 incorrect_answer\)"):
        convert_rows(ROWS[2:4], Demonstrations(clean=True), path="rows.jsonl")


def test_written_rows_can_be_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert Demonstrations().write(convert_rows(ROWS, Demonstrations()).rows, path) == 2
    rows = load_rows(DataConfig(path=str(path)), contract=DEMONSTRATION)
    assert [row["solution"] for row in rows] == ["1+1=2\n#### 2"] * 2
