"""Unpaired rows, by hand and by count."""

from __future__ import annotations

from typing import Any

import pytest

from stepkd.data.rows import UNPAIRED, validate
from stepkd.errors import ConfigError, DataError
from stepkd.labels.convert import Preference, TRLStepwise, Unpaired, convert_rows


def completion(
    problem: str, sample: int, labels: list[Any] | None, correct: bool | None, **given: Any
) -> dict[str, Any]:
    """A completion of ``len(labels)`` steps (three where there are none), one token per step, of a text of its own."""
    steps = [f"{problem}{sample} line {i}\n" for i in range(len(labels or [0, 0, 0]))]
    row = {
        "id": f"{problem}/{sample}",
        "problem_id": problem,
        "prompt": f"{problem}?\n",
        "completion": "".join(steps),
        "token_ids": [7 + i for i in range(len(steps))],
        "logprobs": [-1.0] * len(steps),
        "step_ends": list(range(1, len(steps) + 1)),
        "finish": "stop",
        "correct": correct,
        "model": "m",
        "sampling": {"temperature": 1.0},
        "seed": 0,
        "answer": "1",
        "steps": steps,
        "labelling": {"labeller": "x"},
    }
    return row | ({} if labels is None else {"step_labels": labels}) | given


def stepwise(identity: str, labels: list[Any], outcome: bool | None) -> dict[str, Any]:
    row = {"id": identity, "prompt": f"{identity}?", "completions": [f"{identity} {i}" for i in range(len(labels))]}
    return row | {"labels": labels} | ({} if outcome is None else {"outcome": outcome})


def test_unpaired() -> None:
    rows = [
        completion("a", 0, None, True, task="t", meta={"x": 1}),
        completion("a", 1, None, None),
        completion("b", 0, None, False, finish="length"),
        completion("b", 1, None, False, completion=" \n"),
        stepwise("c", [True, False], False),
    ]
    found = convert_rows([*rows, rows[0] | {"id": "again"}], Unpaired())
    for row in found.rows:
        validate(row, UNPAIRED, extra="error" if row["id"] == "c" else "keep")
    assert found.rows[0] == {
        "id": "a/0",
        "problem_id": "a",
        "prompt": "a?\n",
        "completion": rows[0]["completion"],
        "label": True,
        "answer": "1",
        "task": "t",
        "meta": {"x": 1},
    }
    assert [(row["id"], row["label"]) for row in found.rows] == [("a/0", True), ("b/0", False), ("c", False)]
    assert found.rows[2]["completion"] == "c 0\nc 1", "steps without separators are written on lines"
    assert found.counts == {
        "rows": 3,
        "correct": 1,
        "incorrect": 2,
        "cut_off": 1,
        "rows_without_outcome": 1,
        "empty_completions": 1,
        "duplicates": 1,
    }


def test_a_solution_without_its_end_is_another_solution() -> None:
    one = completion("a", 0, [True], True)
    found = convert_rows([one, one | {"id": "a/1"}, one | {"id": "a/2", "finish": "length"}], Unpaired())
    assert [row["id"] for row in found.rows] == ["a/0", "a/2"]
    assert found.counts["duplicates"] == 1


def test_a_text_that_was_graded_both_ways_has_one_label() -> None:
    rows = [completion("a", j, [True], correct, completion="x\n") for j, correct in enumerate((None, True, False))]
    found = convert_rows(rows, Unpaired())
    assert [(row["id"], row["label"]) for row in found.rows] == [("a/1", True)]
    assert (found.counts["duplicates"], found.counts["rows_without_outcome"]) == (1, 1)


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match=r"none of 1 rows is left .*1 rows_without_outcome"):
        convert_rows([completion("a", 0, [True], None)], Unpaired())
    with pytest.raises(DataError, match=r"x: neither a completion .* nor a stepwise row"):
        convert_rows([{"id": "x", "prompt": "p", "answer": "1"}], Unpaired())
    for kind, incorrect in (
        (TRLStepwise, {"neutral": "rigth"}),
        (TRLStepwise, {"threshold": 1.0}),
        (Preference, {"max_pairs": 0}),
        (Preference, {"chosen_steps": "correct"}),
    ):
        with pytest.raises(ConfigError, match=str(next(iter(incorrect.values())))):
            kind(**incorrect)
