"""Binary step feedback and unpaired rows, by hand and by count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepkd.data.rows import COMPLETION, UNPAIRED, validate
from stepkd.data.spec import load_rows, parse_spec
from stepkd.errors import ConfigError, DataError
from stepkd.labels.convert import Binary, Preference, Unpaired, convert_rows


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


def test_binary_by_count() -> None:
    rows = [
        completion("a", 0, [True, False, None], True),  # a conflict
        completion("a", 1, [True, True], None),  # not graded
        completion("b", 0, [1, 0, -1], False),
        completion("c", 0, [0.9, 0.4, 0], True),  # 0.4 is below the threshold, 0 is a chance; a conflict
        completion("d", 0, None, True),
        completion("d", 1, [None, None], True),
        stepwise("e", [1, 0], True),
    ]
    twin = rows[0] | {"id": "a/9"}
    found = convert_rows([*rows, twin], Binary())
    assert [(row["id"], row.get("step_labels", row.get("labels"))) for row in found.rows] == [
        ("a/0", [True, False, None]),
        ("a/1", [True, True]),
        ("b/0", [True, True, False]),
        ("c/0", [True, False, False]),
        ("e", [True, True]),
    ]
    assert found.counts == {
        "rows": 5,
        "correct_steps": 8,
        "incorrect_steps": 4,
        "neutral_steps": 2,
        "unlabelled_steps": 1,
        "correct_answers_with_an_incorrect_step": 2,
        "rows_without_labels": 2,
        "rows_without_outcome": 1,
        "duplicates": 1,
        "problems_all_identical": 0,
    }
    for row, source in zip(found.rows, [*rows[:4], rows[6]], strict=True):
        same = {name: value for name, value in source.items() if name not in ("step_labels", "labels")}
        assert same == {name: row[name] for name in same}, "ids, outcome and provenance are untouched"


@pytest.mark.parametrize(("neutral", "marks"), [("incorrect", [True, False, False]), ("mask", [True, None, False])])
def test_binary_neutral(neutral: Any, marks: list[Any]) -> None:
    found = convert_rows([completion("b", 0, [1, 0, -1], False)], Binary(neutral=neutral))
    assert found.rows[0]["step_labels"] == marks
    assert found.counts["neutral_steps"] == 1
    assert found.counts["unlabelled_steps"] == 0, "a masked rating is counted as neutral, not twice"


def test_binary_hardens_soft_labels() -> None:
    rows = [completion("a", 0, [1.0, 0.25], True), completion("a", 1, [None, None], True)]
    found = convert_rows(rows, Binary(threshold=0.25))
    assert [row["step_labels"] for row in found.rows] == [[True, True]]
    assert found.counts["rows_without_labels"] == 1
    assert convert_rows(rows, Binary()).rows[0]["step_labels"] == [True, False]


def test_problems_whose_samples_are_all_alike() -> None:
    one = completion("a", 0, [True], True)
    rows = [one, one | {"id": "a/1"}, completion("b", 0, [True], True), completion("c", 0, [True], True)]
    rows.append(one | {"id": "a/2", "finish": "length"})
    assert convert_rows(rows[:4], Binary()).counts["problems_all_identical"] == 1
    cut_off = convert_rows(rows, Binary())
    assert cut_off.counts["problems_all_identical"] == 0, "without its end token it is another solution"
    assert cut_off.counts["duplicates"] == 1


def test_binary_is_written_and_read(tmp_path: Path) -> None:
    found = convert_rows([completion("a", 0, [True, False], True), completion("b", 0, [True], False)], Binary())
    assert Binary().write(found.rows, tmp_path / "b.jsonl") == 2
    assert load_rows(parse_spec(str(tmp_path / "b.jsonl")), contract=COMPLETION) == found.rows


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
        "problems_all_identical": 0,
    }


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match=r"none of 1 rows is left .*1 rows_without_outcome"):
        convert_rows([completion("a", 0, [True], None)], Unpaired())
    with pytest.raises(DataError, match="a/0: has 2 labels for 1 steps"):
        convert_rows([completion("a", 0, [True, True], True, step_ends=[1])], Binary())
    with pytest.raises(DataError, match="a/0, column 'step_labels': mixes true/false with numbers"):
        convert_rows([completion("a", 0, [True, 0.5], True)], Binary())
    with pytest.raises(DataError, match=r"x: neither a completion .* nor a stepwise row"):
        convert_rows([{"id": "x", "prompt": "p", "answer": "1"}], Binary())
    for incorrect in ({"neutral": "rigth"}, {"threshold": 1.0}, {"max_pairs": 0}, {"chosen_steps": "correct"}):
        with pytest.raises(ConfigError, match=str(next(iter(incorrect.values())))):
            Preference(**incorrect)  # type: ignore[arg-type]
