"""Labels to targets: every kind, every rule, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from stepkd.data.encode import LabelRule, Target, step_targets
from stepkd.errors import ConfigError, DataError
from stepkd.steps.labels import EffectiveReward, ValueRatio

INCORRECT, CORRECT = (1.0, 0.0), (0.0, 1.0)
ONE_OF_3 = {-1: (1.0, 0.0, 0.0), 0: (0.0, 1.0, 0.0), 1: (0.0, 0.0, 1.0)}


def targets(labels: list[Any], classes: int = 2, **rule: Any) -> list[Target | None]:
    return step_targets({"id": "row-7", "labels": labels}, len(labels), classes, LabelRule(**{**KEEP, **rule}))


KEEP = {"after_error": "keep"}


def test_kinds() -> None:
    assert targets([True, False, None, True]) == [CORRECT, INCORRECT, None, CORRECT]
    assert targets([1, -1, None, 1]) == [CORRECT, INCORRECT, None, CORRECT]
    assert targets([0.25, None, 1.0, 0]) == [(0.75, 0.25), None, CORRECT, INCORRECT]
    assert targets([1, 0, -1, None], 3) == [ONE_OF_3[1], ONE_OF_3[0], ONE_OF_3[-1], None]
    assert targets([True, False], 3) == [ONE_OF_3[1], ONE_OF_3[-1]]


@pytest.mark.parametrize(
    ("neutral", "expected"),
    [("correct", [CORRECT, CORRECT]), ("incorrect", [CORRECT, INCORRECT]), ("mask", [CORRECT, None])],
)
def test_neutral_in_two_classes(neutral: str, expected: list[Target | None]) -> None:
    assert targets([1, 0], neutral=neutral) == expected


def test_harden() -> None:
    soft = [0.0, 0.125, 0.5, 0.51, 1.0, None]
    assert targets(soft, harden=0.5) == [INCORRECT, INCORRECT, CORRECT, CORRECT, CORRECT, None]
    assert targets(soft, harden=0.001) == [INCORRECT, CORRECT, CORRECT, CORRECT, CORRECT, None], (
        "any continuation succeeded"
    )
    assert targets([0.2, 0.9], 3, harden=0.5) == [ONE_OF_3[-1], ONE_OF_3[1]]


@pytest.mark.parametrize("after_error", ["truncate", "mask"])
@pytest.mark.parametrize(
    ("labels", "rule", "kept"),
    [
        ([True, False, True, False], {}, 2),
        ([False, True], {}, 1),
        ([True, None, True], {}, 3),
        ([None, False, True], {}, 2),
        ([1, 0, -1, 1], {}, 3),
        ([1, 0, 1, 1], {"neutral": "incorrect"}, 2),
        ([1, 0, 1, 1], {"neutral": "mask"}, 4),
        ([0.5, 0.125, 0.0, 1.0], {}, 3),
        ([0.75, 0.5, 0.25, 1.0], {"harden": 0.5}, 3),
    ],
)
def test_nothing_behind_the_first_error_is_trained_on(
    labels: list[Any], rule: dict[str, Any], kept: int, after_error: str
) -> None:
    whole = targets(labels, **rule)
    assert targets(labels, after_error=after_error, **rule) == whole[:kept] + [None] * (len(labels) - kept)


def test_a_neutral_rating_of_three_classes_is_no_error_whatever_two_classes_would_make_of_it() -> None:
    expected = [ONE_OF_3[1], ONE_OF_3[0], ONE_OF_3[1]]
    assert targets([1, 0, 1], 3, after_error="truncate", neutral="incorrect") == expected


def test_outcome_scope() -> None:
    rule = LabelRule(scope="outcome")
    assert step_targets({"outcome": True}, 3, 2, rule) == [None, None, CORRECT]
    assert step_targets({"correct": False, "step_labels": [True]}, 1, 2, rule) == [INCORRECT]
    assert step_targets({"outcome": False}, 2, 3, rule) == [None, ONE_OF_3[-1]]
    # In step files of others `correct` and `label` may mean something else: the contract's `outcome` wins, and a
    # `label` (of the first error, say) is no outcome.
    assert step_targets({"outcome": False, "correct": True}, 2, 2, rule) == [None, INCORRECT]
    assert step_targets({"outcome": True, "correct": 1, "label": 3}, 2, 2, rule) == [None, CORRECT]
    for row in ({}, {"outcome": None}, {"outcome": 1}, {"correct": None}, {"outcome": "yes"}):
        with pytest.raises(DataError, match=r"needs whether .*boolean 'outcome'|must be true or false"):
            step_targets(row, 1, 2, rule)
    for label in (True, 3):
        with pytest.raises(DataError, match=r"needs whether .*boolean 'outcome'"):
            step_targets({"label": label}, 2, 2, rule)


def test_which_column_is_read() -> None:
    row = {"step_labels": [True, False], "step_values": [0.25, 0.75]}
    keep = LabelRule(after_error="keep")
    assert step_targets(row, 2, 2, keep) == [CORRECT, INCORRECT]
    assert step_targets(row, 2, 2, LabelRule(kind="soft", after_error="keep")) == [(0.75, 0.25), (0.25, 0.75)]
    assert step_targets({**row, "labels": [False, False]}, 2, 2, keep) == [INCORRECT, INCORRECT]


def test_progress_makes_hard_labels_of_values() -> None:
    row = {"step_labels": [True, True, False], "step_values": [0.5, 0.25, 0.0], "pass_rate": 0.5}
    rule = LabelRule(progress=ValueRatio(), after_error="keep")
    assert step_targets(row, 3, 2, rule) == [CORRECT, INCORRECT, INCORRECT]
    assert step_targets(row, 3, 2, LabelRule(progress=ValueRatio())) == [CORRECT, INCORRECT, None]
    assert step_targets(row, 3, 3, rule) == [ONE_OF_3[1], ONE_OF_3[-1], ONE_OF_3[-1]]
    soft = {"labels": [0.5, None, 0.5], "pass_rate": 0.25}
    assert step_targets(soft, 3, 2, rule) == [CORRECT, None, None]
    whole = {"step_values": [1, 0], "pass_rate": 1}
    for kind in ("auto", "soft"):
        assert step_targets(whole, 2, 2, LabelRule(progress=EffectiveReward(), kind=kind)) == [CORRECT, INCORRECT]


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"labels": [True, False], "pass_rate": 0.5}, "labels", "of kind 'bool', and labels.progress compares values"),
        ({"labels": [1, -1], "pass_rate": 0.5}, "labels", "of kind 'rating'.* label the rows with MonteCarlo"),
        ({"step_values": [0.5, 0.25]}, "pass_rate", r"compares the first step .* --solutions Sampled writes it"),
        ({"step_values": [0.5], "pass_rate": 0.5}, "step_values", "1 labels for 2 steps: give one a step"),
        ({"step_values": [0.5, float("nan")], "pass_rate": 0.5}, "step_values", "label 2 of 2 is nan"),
    ],
)
def test_progress_without_values(row: dict[str, Any], column: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        step_targets({"id": "row-7", **row}, 2, 2, LabelRule(progress=ValueRatio()))
    assert (caught.value.path, caught.value.column) == ("row-7", column)


def test_rows_without_a_single_label_give_no_targets() -> None:
    assert targets([None, None]) == [None, None]


@pytest.mark.parametrize(
    ("labels", "steps", "classes", "rule", "message"),
    [
        (None, 2, 2, {}, "no step labels: label the row first"),
        ([True], 2, 2, {}, "1 labels for 2 steps"),
        ([True, False, True], 2, 2, {}, "3 labels for 2 steps"),
        (
            [True, False],
            2,
            2,
            {"kind": "soft"},
            "labels are of kind 'bool' and labels.kind asks for 'soft': .* Set labels.kind: bool",
        ),
        ([0.5, 1.0], 2, 2, {"kind": "bool"}, "labels are of kind 'soft' and labels.kind asks for 'bool'"),
        ([1, -1], 2, 2, {"kind": "bool"}, "labels are of kind 'rating' and labels.kind asks for 'bool'"),
        ([0.5, 1.0], 2, 3, {}, "soft labels for 3 classes: they need two"),
        ([0.5, float("nan")], 2, 2, {}, "label 2 of 2 is nan: a label is true/false"),
        ([2, 1], 2, 2, {}, "label 1 of 2 is 2: a label is true/false"),
        ([1.5, 1.0], 2, 2, {}, "label 1 of 2 is 1.5: a label is true/false"),
        (["+", "-"], 2, 2, {}, "label 1 of 2 is .+: a label is true/false"),
        ([True, 0.5], 2, 2, {}, "mixes true/false with numbers"),
    ],
)
def test_refused(labels: Any, steps: int, classes: int, rule: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        step_targets({"id": "row-7", "labels": labels}, steps, classes, LabelRule(**rule))
    assert (caught.value.path, caught.value.column) == ("row-7", "labels")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hard"}, "labels.kind"),
        ({"after_error": "cut"}, "labels.after_error"),
        ({"neutral": "half"}, "labels.neutral"),
        ({"scope": "step"}, "unknown labels.scope 'step': did you mean 'steps'"),
        ({"harden": 1.0}, "labels.harden=1.0"),
        ({"harden": -0.1}, "labels.harden=-0.1"),
        ({"harden": 0.0}, "labels.harden=0.0: .* for 'any continuation succeeded' take a small one, such as 0.001"),
        ({"harden": float("nan")}, "labels.harden=nan"),
        ({"progress": ValueRatio(), "harden": 0.5}, r"labels\.harden=0\.5: labels\.progress makes .* to null"),
        ({"progress": ValueRatio(), "scope": "outcome"}, r"labels\.scope=outcome: .*, set it to steps"),
        ({"progress": ValueRatio(), "kind": "bool"}, r"labels\.kind=bool: .*, set it to auto or soft"),
    ],
)
def test_bad_rules(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelRule(**settings)
