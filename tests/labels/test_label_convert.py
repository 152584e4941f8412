"""Converters of labelled rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.data.config import parse_spec
from stepkd.data.encode import LabelRule, step_targets
from stepkd.data.load import load_rows
from stepkd.data.rows import STEPWISE, validate
from stepkd.errors import DataError
from stepkd.labels.convert import (
    Balanced,
    Converted,
    ConverterConfig,
    MathShepherd,
    Stepwise,
    TRLStepwise,
    balance_by_prefix_length,
    convert_rows,
)


def completion(number: int, labels: list[Any], values: list[float] | None = None) -> dict[str, Any]:
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


ROWS = [completion(0, [True, False, None], [0.5, 0.0, 0.0]), completion(1, [True, True], [1.0, 1.0])]


def test_stepwise_rows() -> None:
    found = convert_rows(ROWS, Stepwise())
    for row, source in zip(found.rows, ROWS, strict=True):
        validate(row, STEPWISE)
        assert (row["completions"], row["labels"]) == (source["steps"], source["step_labels"])
        assert (row["outcome"], row["answer"], row["labelling"]) == (True, "1", {"labeller": "x"})
    assert convert_rows(found.rows, Stepwise()).rows == found.rows, "stepwise rows stay as they are"


def test_trl_has_three_columns_and_booleans() -> None:
    found = convert_rows(ROWS, TRLStepwise())
    assert [sorted(row) for row in found.rows] == [["completions", "labels", "prompt"]] * 2
    assert [row["labels"] for row in found.rows] == [[True, False], [True, True]]
    assert found.counts["cut"] == 1
    ratings = [completion(0, [1, 0, -1])]
    assert convert_rows(ratings, TRLStepwise(neutral="incorrect")).rows[0]["labels"] == [True, False, False]


def test_math_shepherd_is_read_back(tmp_path: Path) -> None:
    found = convert_rows(ROWS[1:], MathShepherd())
    path = tmp_path / "ms.jsonl"
    assert MathShepherd().write(found.rows, path) == 1
    back = load_rows(parse_spec(f"math_shepherd:path={path}"))
    assert back[0]["labels"] == [True, True]


def test_balanced_by_count() -> None:
    rows = [completion(i, [i % 4 != 0, i % 2 == 0]) for i in range(20)]
    found = convert_rows(rows, Balanced(seed=1))
    for step, kept in ((0, 5), (1, 10)):
        labels = [row["step_labels"][step] for row in found.rows]
        assert (labels.count(True), labels.count(False)) == (kept, kept)
    assert found.counts["labels_before"] == 40
    assert found.counts["labels_kept"] == 30
    assert convert_rows(rows, Balanced(seed=1)).rows == found.rows
    with pytest.raises(DataError, match="none of 3 rows is left"):
        convert_rows([completion(i, [True]) for i in range(3)], Balanced())


def test_a_reward_model_learns_as_many_correct_as_incorrect_steps_of_balanced_rows(tmp_path: Path) -> None:
    """Where the steps behind an incorrect one keep their labels; hidden, there are more correct ones."""
    path = tmp_path / "balanced.jsonl"
    rows = [completion(i, [i % 4 < 3, i % 4 < 2, i % 4 < 1]) for i in range(8)]
    Balanced().write(convert_rows(rows, Balanced()).rows, path)

    def counts(rule: LabelRule) -> list[tuple[int, int]]:
        targets = [step_targets(row, 3, 2, rule) for row in load_rows(parse_spec(str(path)))]
        return [(step.count((0.0, 1.0)), step.count((1.0, 0.0))) for step in zip(*targets, strict=True)]

    assert counts(LabelRule(after_error="keep")) == [(2, 2), (4, 4), (2, 2)]
    assert counts(LabelRule(after_error="mask"))[:2] == [(2, 2), (4, 2)]


def test_what_is_refused() -> None:
    bare = {name: value for name, value in ROWS[0].items() if name != "steps"}
    with pytest.raises(DataError, match="p0/0, column 'steps': the completion has no steps"):
        convert_rows([bare], Stepwise())


def test_a_new_converter() -> None:
    class First(ConverterConfig):
        def convert(self, rows: Sequence[Any]) -> Converted:
            return Converted([dict(rows[0])], {"rows": 1})

    assert convert_rows(ROWS, First()).rows == ROWS[:1]


LABELS = st.lists(st.lists(st.sampled_from([True, False, None]), max_size=5), max_size=12)


@settings(max_examples=150, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 3), signs=st.booleans())
def test_balance_against_counting(labels: list[list[bool | None]], seed: int, signs: bool) -> None:
    """At every prefix length as many positives as negatives remain, and as many as can."""
    as_signs = {True: 1, False: -1, None: None}
    used: list[list[Any]] = [[as_signs[label] for label in row] for row in labels] if signs else [[*r] for r in labels]
    before = [list(row) for row in used]
    balanced = balance_by_prefix_length(used, seed)
    assert used == before, "the labels given are left alone"
    for step in range(max(map(len, used), default=0)):
        there = [(old[step], new[step]) for old, new in zip(used, balanced, strict=True) if len(old) > step]
        positive, negative = (1, -1) if signs else (True, False)
        count = Counter(old for old, _ in there)
        kept = Counter(new for _, new in there)
        assert kept[positive] == kept[negative] == min(count[positive], count[negative])
        assert all(new is None or new == old for old, new in there)


def test_balance_is_keyed_and_fair() -> None:
    labels = [[True]] * 40 + [[False]] * 20
    once = balance_by_prefix_length(labels, 3)
    assert balance_by_prefix_length(labels, 3) == once
    assert balance_by_prefix_length(labels, 4) != once
    kept = Counter[int]()
    for seed in range(200):
        kept.update(i for i, each in enumerate(balance_by_prefix_length(labels, seed)) if each[0])
    # Every positive is kept half of the time: 200 draws, standard deviation 7.
    assert len(kept) == 40
    assert all(65 <= count <= 135 for count in kept.values())


def test_neutral_labels_stay() -> None:
    balanced = balance_by_prefix_length([[1, 0], [1, 0], [-1, 1], [0]], 0)
    assert [labels[1] for labels in balanced[:3]] == [0, 0, None]
    assert balanced[3] == [0]
    rows = [completion(i, labels) for i, labels in enumerate([[1, 0], [1, 1], [-1, 1]])]
    assert convert_rows(rows, Balanced()).counts["labels_before"] == 5, "a neutral one has no sign"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (completion(1, [0.5]), "p1/0, column 'step_labels': soft labels cannot be balanced"),
        (completion(1, [2]), "label 1 of 1 is 2: a label is true/false"),
        ({"id": "a", "label": 1}, "a: no step labels: label the rows first"),
    ],
)
def test_what_cannot_be_balanced(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        convert_rows([completion(0, [True]), row], Balanced())
