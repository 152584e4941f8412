"""Consensus of two labellings, by brute force over all small cases."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from stepkd.errors import DataError
from stepkd.labels.convert import consensus_filter

CHOICES = (True, False, None)


def row(id: str, labels: list[Any], **extra: Any) -> dict[str, Any]:
    texts = [f"step {i}" for i in range(len(labels))]
    return {"id": id, "prompt": "p", "completions": texts, "labels": labels} | extra


def all_pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every pair of labellings of one to three steps that have a label at all."""
    first, second = [], []
    for length in (1, 2, 3):
        labellings = [list(x) for x in itertools.product(CHOICES, repeat=length) if set(x) != {None}]
        for number, (a, b) in enumerate(itertools.product(labellings, labellings)):
            first.append(row(f"{length}/{number}", a, labelling={"labeller": "a"}))
            second.append(row(f"{length}/{number}", b, labelling={"labeller": "b"}))
    return first, second


def by_hand(labels: list[Any]) -> Any:
    before = list(itertools.takewhile(lambda label: label is True, labels))
    if len(before) == len(labels):
        return "none"
    return len(before) if labels[len(before)] is False else None


def test_consensus_by_brute_force() -> None:
    first, second = all_pairs()
    result = consensus_filter(first, second)
    expected: Counter[str] = Counter()
    kept = []
    for a, b in zip(first, second, strict=True):
        places = by_hand(a["labels"]), by_hand(b["labels"])
        reason = "unlabelled" if None in places else "kept" if places[0] == places[1] else "disagree"
        expected[reason] += 1
        kept += [a] if reason == "kept" else []
    assert result.counts == dict(expected) | {"only_in_first": 0, "only_in_second": 0}
    assert [r["id"] for r in result.rows] == [r["id"] for r in kept]
    assert [r["labels"] for r in result.rows] == [r["labels"] for r in kept], "kept whole"
    assert result.rows[0]["labelling"] == {
        "labeller": "consensus",
        "mode": "first_error",
        "first": {"labeller": "a"},
        "second": {"labeller": "b"},
    }


def test_rows_of_only_one_side_are_counted() -> None:
    result = consensus_filter([row("a", [True]), row("b", [True])], [row("b", [True]), row("c", [True])])
    assert [r["id"] for r in result.rows] == ["b"]
    assert (result.counts["only_in_first"], result.counts["only_in_second"]) == (1, 1)
    with pytest.raises(DataError, match="no solution of A is in B"):
        consensus_filter([row("a", [True])], [row("c", [True])])


def test_a_completion_and_its_stepwise_form_match() -> None:
    completion = {
        "id": "a",
        "steps": ["step 0\n", "step 1"],
        "step_labels": [True, False],
        "token_ids": [1, 2],
        "step_ends": [1, 2],
    }
    result = consensus_filter([completion], [row("a", [0.8, 0.1])])
    assert result.rows[0]["step_labels"] == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_ends": [1, 3]}, "row 'a' of mc and judge differs in step_ends"),
        ({"token_ids": [5, 6, 8]}, "row 'a' of mc and judge differs in token_ids"),
        ({"steps": ["x", "z"]}, "row 'a' of mc and judge differs in steps"),
        ({"steps": ["x"], "step_labels": [True], "step_ends": None}, "differs in number of steps"),
        ({"step_labels": None}, "a: no step labels: label the rows first"),
    ],
)
def test_other_steps_are_refused(change: dict[str, Any], message: str) -> None:
    base = {"id": "a", "steps": ["x", "y"], "step_labels": [True, True], "token_ids": [5, 6, 7], "step_ends": [2, 3]}
    with pytest.raises(DataError, match=message):
        consensus_filter([base], [base | change], names=("mc", "judge"))


def test_repeated_ids() -> None:
    rows = [row("a", [True])]
    with pytest.raises(DataError, match="A, column 'id': rows 1 and 2 share the id 'a'"):
        consensus_filter(rows * 2, rows)
