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
    EffectiveReward,
    Progress,
    ValueRatio,
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


# ---- relative progress ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "values", "pass_rate", "said"),
    [
        (ValueRatio(), [0.5, 0.4, 0.3, 0.9], 0.5, [True, True, False, True]),  # 1, 0.8, 0.75, 3
        (ValueRatio(threshold=0.7), [0.35, 0.24], 0.5, [True, False]),
        (ValueRatio(), [0.6], 0.75, [True]),  # 0.8 exactly, though 0.8 * 0.75 is a little more in binary
        (ValueRatio(), [0.125], 0.0, [True]),  # no sample was correct, and a continuation is
        (ValueRatio(), [0.5, 0.0, 0.0], 0.5, [True, False, False]),
        (ValueRatio(), [0.5, None, 0.4, 0.1], 0.5, [True, None, None, False]),  # whose loss of value it is, is open
        (ValueRatio(), [None, None, None, 0.5, None, 0.375, 0.0, None], 0.75, [*[None] * 6, False, None]),  # binary
        # best of 4: V(0.5) = 0.9375 and V(0.1) = 0.3439, so 0.1 - 0.4 * 0.5936 < 0
        (EffectiveReward(), [0.5, 0.1, 0.1], 0.5, [True, False, True]),
        (EffectiveReward(alpha=0.1), [0.5, 0.1], 0.5, [True, True]),
        (EffectiveReward(alpha=2.0, best_of=1), [0.5, 0.3, 0.375], 0.75, [False, False, True]),  # 0, -0.1, 0.525
        (EffectiveReward(alpha=0.0), [0.1, 0.0], 0.9, [True, False]),  # any success
    ],
)
def test_progress_compares_values_with_those_before(
    progress: Progress, values: list[float | None], pass_rate: float, said: list[bool | None]
) -> None:
    assert progress.labels(values, pass_rate) == said


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_progress_rises_with_the_value_and_falls_with_the_one_before(value: float, before: float, more: float) -> None:
    for progress in (ValueRatio(), EffectiveReward()):
        if progress.advances(value, before):
            assert progress.advances(max(value, more), before)
            assert progress.advances(value, min(before, more))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ValueRatio(threshold=0.0), r"labels\.progress\.threshold=0\.0: must be positive"),
        (lambda: ValueRatio(threshold=math.nan), r"labels\.progress\.threshold=nan"),
        (lambda: EffectiveReward(alpha=-1.0), r"labels\.progress\.alpha=-1\.0"),
        (lambda: EffectiveReward(best_of=0), r"labels\.progress\.best_of=0"),
    ],
)
def test_bad_progress(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
