"""What a step label says: verdicts of every kind, the first incorrect step, and thresholds that are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkd.errors import ConfigError, DataError
from stepkd.steps.labels import (
    ANY_SUCCESS,
    check_threshold,
    correct_targets,
    first_incorrect,
    is_settled,
    passes,
    tally,
    verdicts,
)


@pytest.mark.parametrize(
    ("labels", "settings", "said", "first"),
    [
        ([True, False, None], {}, [True, False, None], 1),
        ([1, 0, -1], {}, [True, True, False], 2),
        ([1, 0, -1, None], {"neutral": "incorrect"}, [True, False, False, None], 1),
        ([1, 0, -1], {"neutral": "mask"}, [True, None, False], None),
        ([1, 0, -1], {"threshold": 0.9}, [True, True, False], 2),
        ([1.0, 0.5, 0.25], {}, [True, True, False], 2),
        ([1, 0.75, 0.5, 0], {"threshold": 0.75}, [True, True, False, False], 2),
        ([1.0, 0.125, 0.0], {"threshold": ANY_SUCCESS}, [True, True, False], 2),
        ([True, None, False], {}, [True, None, False], None),
        ([False, None], {}, [False, None], 0),
        ([True, True], {}, [True, True], -1),
        ([None, None], {}, [None, None], None),
        ([], {}, [], -1),
    ],
)
def test_verdicts_and_the_first_incorrect_step(
    labels: list[Any], settings: dict[str, Any], said: list[Any], first: int | None
) -> None:
    assert verdicts(labels, **settings) == said
    assert first_incorrect(labels, **settings) == first


@given(st.lists(st.floats(0, 1), min_size=1), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_probability_is_correct_exactly_from_the_threshold_on(labels: list[float], threshold: float) -> None:
    marks = verdicts(labels, threshold=threshold)
    assert marks == [not label < threshold for label in labels] == [passes(label, threshold) for label in labels]
    assert verdicts([*labels, threshold], threshold=threshold)[-1] is True


@given(st.floats(0, 1))
def test_targets_of_two_classes_say_what_their_probability_says(label: float) -> None:
    assert bool(correct_targets(np.array((1.0 - label, label)))) is passes(label)


def test_a_neutral_class_is_correct() -> None:
    assert correct_targets(np.eye(3)).tolist() == [False, True, True]


def test_a_missing_score_is_no_verdict() -> None:
    assert passes(None) is passes(math.nan) is None


@pytest.mark.parametrize(
    ("labels", "message"), [([True, 0.5], "mixes"), ([1.5], "a float in"), ([2], "a whole number -1")]
)
def test_labels_that_are_no_verdicts_are_refused(labels: list[Any], message: str) -> None:
    for read in (verdicts, first_incorrect):
        with pytest.raises(DataError, match=message):
            read(labels)


def test_the_share_of_correct_answers_with_an_incorrect_step_is_of_the_labelled_ones() -> None:
    outcomes = [True, True, True, True, True, True, False, None]
    marks = [[True, True], [True, False], [False, None], [True, None], None, [], [False], [False]]
    counts = tally(outcomes, marks)
    assert counts == (6, 3, 2), "two with an incorrect step, one without, three of which labels do not say"
    assert counts.share == 2 / 3
    assert tally([True, False], [None, [True]]).share is None


def test_labels_settle_arrays_as_they_settle_lists() -> None:
    marks: list[list[bool | None]] = [[True, True], [True, False], [False, None], [True, None], [None], []]
    steps, correct, incorrect = (np.array([count(each) for each in marks]) for count in (len, positives, negatives))
    expected = [bool(tally([True], [each]).labelled) for each in marks]
    assert is_settled(steps, correct, incorrect).tolist() == expected == [True, True, True, False, False, False]


def positives(marks: list[bool | None]) -> int:
    return marks.count(True)


def negatives(marks: list[bool | None]) -> int:
    return marks.count(False)


def test_thresholds_that_judge_nothing_are_refused() -> None:
    for threshold in (-0.1, 0, 1, math.nan):
        with pytest.raises(ConfigError, match=rf"^focus.threshold={threshold}: must lie between 0 and 1"):
            check_threshold(threshold, "focus.threshold")
    with pytest.raises(ConfigError, match="would call every step correct; for 'any continuation succeeded' take a sma"):
        verdicts([0.5], threshold=0)
