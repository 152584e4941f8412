"""Label quality against the truth: by hand, by brute force, and what is left out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from stepkd.errors import DataError
from stepkd.labels.quality import label_quality
from stepkd.statistics import Interval


def row(id: str, labels: list[Any], **extra: Any) -> dict[str, Any]:
    return {"id": id, "labels": labels, "completions": [f"s{i}" for i in range(len(labels))]} | extra


def test_by_hand() -> None:
    truth = [row("a", [True, True, False, False]), row("b", [True, False]), row("c", [True, True])]
    rows = [
        row("a", [True, False, True, True], step_values=[1.0, 0.0, 0.25, 0.5]),
        row("b", [True, False], step_values=[0.5, 0.0]),
        row("c", [True, None], step_values=[1.0, None]),
    ]
    found = label_quality(rows, truth)
    # Up to the first error: correct steps a0 a1 b0 c0 (labelled T F T T), incorrect ones a2 b1 (labelled T F).
    assert found.steps == 6, "a3 is behind the first error, c1 has no label"
    assert found.recall.value == pytest.approx(3 / 4)  # type: ignore[union-attr]
    assert found.precision.value == pytest.approx(3 / 4)  # type: ignore[union-attr]
    assert found.error_recall.value == pytest.approx(1 / 2)  # type: ignore[union-attr]
    assert found.error_precision.value == pytest.approx(1 / 2)  # type: ignore[union-attr]
    assert found.balanced_accuracy.value == pytest.approx((3 / 4 + 1 / 2) / 2)  # type: ignore[union-attr]
    assert found.accuracy.value == pytest.approx(4 / 6)
    assert found.always_positive.value == pytest.approx(4 / 6)
    assert found.recoverable.value == pytest.approx(1 / 2), "a2: incorrect, yet one in four succeeded"  # type: ignore[union-attr]
    assert found.first_error_accuracy.value == pytest.approx(1 / 3), "b; in c a label is missing"
    assert found.solutions == 3
    assert json.loads(json.dumps(found.to_dict()))["precision"]["value"] == pytest.approx(3 / 4)


def test_constant_labels_have_a_balanced_accuracy_of_one_half() -> None:
    rng = np.random.default_rng(0)
    truth = [row(str(i), [bool(x) for x in rng.random(4) < 0.7]) for i in range(30)]
    for constant in (True, False):
        rows = [row(str(i), [constant] * 4) for i in range(30)]
        found = label_quality(rows, truth)
        assert found.balanced_accuracy.value == pytest.approx(0.5)  # type: ignore[union-attr]
        assert found.accuracy.value == pytest.approx(
            found.always_positive.value if constant else 1 - found.always_positive.value
        )


def test_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        lengths = rng.integers(1, 6, size=12)
        truth = [
            row(str(i), [bool(x) for x in rng.random(n) < 0.7], problem_id=str(i % 4)) for i, n in enumerate(lengths)
        ]
        rows = [
            row(t["id"], [bool(x) for x in rng.random(len(t["labels"])) < 0.6], problem_id=t["problem_id"])
            for t in truth
        ]
        found = label_quality(rows, truth)
        pairs, exact = [], 0
        for r, t in zip(rows, truth, strict=True):
            stop = t["labels"].index(False) + 1 if False in t["labels"] else len(t["labels"])
            pairs += list(zip(r["labels"][:stop], t["labels"][:stop], strict=True))
            exact += (r["labels"] + [False]).index(False) == (t["labels"] + [False]).index(False)
        correct = [label for label, true in pairs if true]
        incorrect = [label for label, true in pairs if not true]
        assert found.steps == len(pairs)
        assert found.recall.value == pytest.approx(np.mean(correct))  # type: ignore[union-attr]
        assert found.error_recall.value == pytest.approx(1 - np.mean(incorrect))  # type: ignore[union-attr]
        assert found.balanced_accuracy.value == pytest.approx((np.mean(correct) + 1 - np.mean(incorrect)) / 2)  # type: ignore[union-attr]
        assert found.balanced_accuracy.low <= found.balanced_accuracy.value <= found.balanced_accuracy.high  # type: ignore[union-attr]
        assert found.first_error_accuracy.value == pytest.approx(exact / len(rows))


def test_steps_without_a_value_say_nothing_of_how_many_recover() -> None:
    """As binary search leaves them: incorrect steps with a label and no value."""
    truth = [row(str(i), [True, False]) for i in range(4)]
    values = [[0.5, 0.25], [0.5, None], [0.5, None], [0.5, 0.0]]
    rows = [row(str(i), [True, False], step_values=own) for i, own in enumerate(values)]
    assert label_quality(rows, truth).recoverable.value == 0.5  # type: ignore[union-attr]
    assert label_quality(rows[1:3], truth).recoverable is None


def test_shares_of_nothing_are_none() -> None:
    found = label_quality([row("a", [True, True])], [row("a", [True, True])])
    assert found.balanced_accuracy is None
    assert found.error_precision is None
    assert found.error_recall is None
    assert found.recoverable is None
    assert found.precision.value == 1.0  # type: ignore[union-attr]


def test_a_truth_that_does_not_tell_the_first_error_is_not_held_against_labels() -> None:
    open_truth = row("a", [True, None, True])
    rows = [row("a", [True, False, True]), row("b", [True, False])]
    found = label_quality(rows, [open_truth, row("b", [True, False])])
    assert found.first_error_accuracy.value == 1.0  # type: ignore[union-attr]
    assert found.solutions == 2
    assert label_quality(rows[:1], [open_truth]).first_error_accuracy is None


def test_rows_of_one_prompt_are_of_one_problem() -> None:
    labels = [[True, False], [True, True], [False, True], [True, True]] * 3
    truth = [row(str(i), [True, True]) for i, _ in enumerate(labels)]

    def interval(**of: str) -> Interval:
        rows = [
            row(str(i), each) | {key: form.format(i, i // 4) for key, form in of.items()}
            for i, each in enumerate(labels)
        ]
        return label_quality(rows, truth).accuracy

    together = interval(prompt="p{1}")
    assert together == interval(problem_id="{1}", prompt="p{0}")
    apart = interval(prompt="p{0}")
    assert together.high - together.low > apart.high - apart.low


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="row 'b' has no true labels"):
        label_quality([row("b", [True])], [row("a", [True])])
    with pytest.raises(DataError, match="row 'a' of the labels and the truth differs in number of steps"):
        label_quality([row("a", [True])], [row("a", [True, True])])
    with pytest.raises(DataError, match="no step of 1 rows has both a label and a true one"):
        label_quality([row("a", [True, None])], [row("a", [None, True])])
    with pytest.raises(DataError, match="the truth, column 'id'"):
        label_quality([row("a", [True])], [row("a", [True])] * 2)
