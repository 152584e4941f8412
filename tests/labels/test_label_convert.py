"""Converters of labelled rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepkd.data.rows import STEPWISE, validate
from stepkd.data.spec import load_rows, parse_spec
from stepkd.errors import ConfigError, DataError
from stepkd.labels import CONVERTERS, Converted, Converter, ConvertOptions, convert_rows
from stepkd.labels.convert import register


def rollout(number: int, labels: list[Any], values: list[float] | None = None) -> dict[str, Any]:
    steps = [f"line {i}\n" for i in range(len(labels) - 1)] + ["#### 1"]
    return {
        "id": f"p{number}/0",
        "problem_id": f"p{number}",
        "prompt": "1+0=\n",
        "completion": "".join(steps),
        "token_ids": list(range(len(steps))),
        "logprobs": [-1.0] * len(steps),
        "step_ends": list(range(1, len(steps) + 1)),
        "finish": "stop",
        "correct": True,
        "model": "m",
        "sampling": {"temperature": 1.0},
        "seed": 0,
        "answer": "1",
        "steps": steps,
        "step_labels": labels,
        "labelling": {"labeller": "x"},
    } | ({} if values is None else {"step_values": values})


ROWS = [rollout(0, [True, False, None], [0.5, 0.0, 0.0]), rollout(1, [True, True], [1.0, 1.0])]


def test_stepwise_hard_and_soft() -> None:
    found = convert_rows(ROWS, "stepwise")
    for row, source in zip(found.rows, ROWS, strict=True):
        validate(row, STEPWISE)
        assert (row["completions"], row["labels"]) == (source["steps"], source["step_labels"])
        assert (row["outcome"], row["answer"], row["labelling"]) == (True, "1", {"labeller": "x"})
    soft = convert_rows(ROWS, "stepwise", ConvertOptions(soft=True))
    assert [row["labels"] for row in soft.rows] == [[0.5, 0.0, 0.0], [1.0, 1.0]]
    assert convert_rows(found.rows, "stepwise").rows == found.rows, "stepwise rows stay as they are"
    assert [row["labels"] for row in convert_rows(found.rows, "stepwise", ConvertOptions(soft=True)).rows] == [
        [0.5, 0.0, 0.0],
        [1.0, 1.0],
    ]


def test_trl_has_three_columns_and_booleans() -> None:
    found = convert_rows(ROWS, "trl")
    assert [sorted(row) for row in found.rows] == [["completions", "labels", "prompt"]] * 2
    assert [row["labels"] for row in found.rows] == [[True, False], [True, True]]
    assert found.counts["cut"] == 1
    ratings = [rollout(0, [1, 0, -1])]
    assert convert_rows(ratings, "trl", ConvertOptions(neutral="wrong")).rows[0]["labels"] == [True, False, False]


def test_math_shepherd_is_read_back(tmp_path: Path) -> None:
    found = convert_rows(ROWS[1:], "math_shepherd")
    path = tmp_path / "ms.jsonl"
    assert CONVERTERS["math_shepherd"].write(found.rows, path) == 1
    back = load_rows(parse_spec(f"math_shepherd:path={path}"))
    assert back[0]["labels"] == [True, True]


def test_balanced_by_count() -> None:
    rows = [rollout(i, [i % 4 != 0, i % 2 == 0]) for i in range(20)]
    found = convert_rows(rows, "balanced", ConvertOptions(seed=1))
    for step, kept in ((0, 5), (1, 10)):
        labels = [row["step_labels"][step] for row in found.rows]
        assert (labels.count(True), labels.count(False)) == (kept, kept)
    assert found.counts["labels_before"] == 40
    assert found.counts["labels_kept"] == 30
    assert convert_rows(rows, "balanced", ConvertOptions(seed=1)).rows == found.rows
    with pytest.raises(DataError, match="none of 3 rows is left"):
        convert_rows([rollout(i, [True]) for i in range(3)], "balanced")


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown --to 'step_wise': did you mean 'stepwise'"):
        convert_rows(ROWS, "step_wise")
    bare = {name: value for name, value in ROWS[0].items() if name != "steps"}
    with pytest.raises(DataError, match="p0/0, column 'steps': no step texts"):
        convert_rows([bare], "stepwise")
    with pytest.raises(DataError, match="no values to take as soft labels"):
        convert_rows(
            [{"id": "a", "prompt": "p", "completions": ["x"], "labels": [True]}], "stepwise", ConvertOptions(soft=True)
        )


def test_a_new_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(CONVERTERS)
    monkeypatch.setattr("stepkd.labels.convert.CONVERTERS", before | {})
    register(Converter("first", "the first row", lambda rows, options: Converted([dict(rows[0])], {"rows": 1})))
    assert convert_rows(ROWS, "first").rows == ROWS[:1]
