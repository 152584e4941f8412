"""From values to labels: fixed cases, brute force over all small cases, balance by prefix length, bad input."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.errors import ConfigError, DataError
from stepkd.labels.reductions import (
    balance_by_prefix_length,
    check_reduction,
    cut_after_first_error,
    label_any,
    label_mean,
    positives_reach_back,
    reduce_values,
)


def test_fixed_cases() -> None:
    values = (1.0, 0.5, 0.0, 0.125, 0.0)
    assert reduce_values(values, "any") == (True, True, False, True, False)
    assert reduce_values(values, "mean") == values
    assert reduce_values(values, "first_error") == (True, True, False, None, None)
    assert reduce_values(values, "any", propagate_positive=True) == (True, True, True, True, False)
    assert reduce_values(values, "first_error", propagate_positive=True) == (True, True, True, True, False)
    assert reduce_values((0.0, 1.0), "first_error") == (False, None)
    assert reduce_values((0.25, 1.0), "first_error") == (True, True)
    assert [reduce_values((), reduce) for reduce in ("any", "mean", "first_error")] == [(), (), ()]


@pytest.mark.parametrize("length", range(6))
def test_brute_force(length: int) -> None:
    for values in itertools.product((0.0, 0.25, 1.0), repeat=length):
        hard = []
        for value in values:
            hard.append(value > 0)
        assert label_any(values) == tuple(hard)
        assert label_mean(values) == values
        reached = [any(hard[j] for j in range(i, length)) for i in range(length)]
        assert positives_reach_back(hard) == tuple(reached)
        for labels in (hard, reached):
            cut = [None if any(not labels[j] for j in range(i)) else labels[i] for i in range(length)]
            assert cut_after_first_error(labels) == tuple(cut)
            assert reduce_values(values, "first_error", propagate_positive=labels is reached) == tuple(cut)


def test_labels_are_of_one_plain_kind() -> None:
    assert {type(label) for label in reduce_values([1, 0, 0.5], "mean")} == {float}
    assert {type(label) for label in reduce_values([1, 0, 0.5], "any", propagate_positive=True)} == {bool}


LABELS = st.lists(st.lists(st.sampled_from([True, False, None]), max_size=5), max_size=12)


@settings(max_examples=150, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 3), signs=st.booleans())
def test_balance_against_counting(labels: list[list[bool | None]], seed: int, signs: bool) -> None:
    """At every prefix length as many positives as negatives remain, and as many as can."""
    as_signs = {True: 1, False: -1, None: None}
    used: list[list[Any]] = [[as_signs[label] for label in row] for row in labels] if signs else [[*r] for r in labels]
    rows = [{"id": str(i), "labels": row} for i, row in enumerate(used)]
    before = [list(row) for row in used]
    balanced, steps, num_emptied = balance_by_prefix_length(rows, seed)
    assert [row["labels"] for row in rows] == before  # the rows given are left alone
    assert [row["id"] for row in balanced] == [row["id"] for row in rows]
    assert [record.step for record in steps] == list(range(max(map(len, used), default=0)))
    for record in steps:
        there = [(old[record.step], new["labels"][record.step]) for old, new in zip(used, balanced, strict=True)
                 if len(old) > record.step]  # fmt: skip
        positive, negative = (1, -1) if signs else (True, False)
        count = Counter(old for old, _ in there)
        kept = Counter(new for _, new in there)
        assert (record.positives, record.negatives) == (count[positive], count[negative])
        assert kept[positive] == kept[negative] == record.kept == min(count[positive], count[negative])
        assert all(new is None or new == old for old, new in there)
    emptied = [
        any(label is not None for label in old) and not any(label is not None for label in new["labels"])
        for old, new in zip(used, balanced, strict=True)
    ]
    assert num_emptied == sum(emptied)


def test_balance_is_keyed_and_fair() -> None:
    rows = [{"labels": [True]}] * 40 + [{"labels": [False]}] * 20
    once = balance_by_prefix_length(rows, 3)
    assert balance_by_prefix_length(rows, 3) == once
    assert balance_by_prefix_length(rows, 4) != once
    kept = Counter[int]()
    for seed in range(200):
        kept.update(i for i, row in enumerate(balance_by_prefix_length(rows, seed).rows) if row["labels"][0])
    # Every positive is kept half of the time: 200 draws, standard deviation 7.
    assert len(kept) == 40
    assert all(65 <= count <= 135 for count in kept.values())


def test_neutral_labels_stay() -> None:
    rows: list[dict[str, Any]] = [{"labels": [1, 0]}, {"labels": [1, 0]}, {"labels": (-1, 1)}, {"labels": [0]}]
    balanced, steps, num_emptied = balance_by_prefix_length(rows, 0)
    assert [row["labels"][1] for row in balanced[:3]] == [0, 0, None]
    assert balanced[3]["labels"] == [0]
    assert [tuple(record) for record in steps] == [(0, 2, 1, 1), (1, 1, 0, 0)]
    assert num_emptied == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_reduction("frist_error"), ConfigError, "did you mean 'first_error'?"),
        (
            lambda: check_reduction("mean", propagate_positive=True),
            ConfigError,
            "propagate_positive needs labels that are right or wrong",
        ),
        (lambda: reduce_values([0.5, 1.5], "any"), DataError, "1.5 is no share of continuations"),
        (lambda: reduce_values([float("nan")], "mean"), DataError, "nan is no share of continuations"),
        (
            lambda: balance_by_prefix_length([{"labels": [True]}, {"labels": [0.5]}], 0),
            DataError,
            "line 2, column 'labels': 0.5 is no hard label",
        ),
        (lambda: balance_by_prefix_length([{"labels": [2]}], 0), DataError, "2 is no hard label"),
        (lambda: balance_by_prefix_length([{"label": 1}], 0), DataError, "line 1, column 'labels': no list of labels"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
