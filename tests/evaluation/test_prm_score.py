"""PRMScore against its definition: F1 over correct and over incorrect steps, by class and over all."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from stepkd.evaluation.prm_score import prm_score, prm_score_difference, prm_scores
from stepkd.evaluation.step_metrics import labelled_steps

FAST: dict[str, Any] = {"n_resamples": 300}


def rows() -> list[dict[str, Any]]:
    """Two solutions with errors and one without, which name their class."""
    return [
        {"error_type": "circular", "scores": [0.9, 0.2, 0.4], "labels": [True, False, True], "prompt": "p"},
        {
            "error_type": "deception",
            "scores": [0.9, 0.7, 0.1, 0.8],
            "labels": [True, False, False, True],
            "prompt": "q",
        },
        {"error_type": "multi_solutions", "scores": [0.6, 0.3], "labels": [True, True], "prompt": "r"},
    ]


def official(scores: list[float], labels: list[bool]) -> dict[str, float]:
    """The repository's evaluate_function on the counts of one class, step by step."""
    tp = sum(score >= 0.5 and label for score, label in zip(scores, labels, strict=True))
    fn = sum(score < 0.5 and label for score, label in zip(scores, labels, strict=True))
    fp = sum(score >= 0.5 and not label for score, label in zip(scores, labels, strict=True))
    tn = sum(score < 0.5 and not label for score, label in zip(scores, labels, strict=True))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    negative_precision, negative_recall = tn / (tn + fn), tn / (tn + fp)
    f1 = 2 * precision * recall / (precision + recall)
    negative_f1 = 2 * negative_precision * negative_recall / (negative_precision + negative_recall)
    return {"f1": f1, "negative_f1": negative_f1, "score": 0.5 * f1 + 0.5 * negative_f1}


def test_score_of_pooled_steps_is_that_of_the_origin() -> None:
    found = prm_scores(rows())
    assert found is not None
    assert list(found) == ["all", "circular", "deception", "multi_solutions"]
    pooled = [[value for row in rows() for value in row[key]] for key in ("scores", "labels")]
    for key, value in official(*pooled).items():
        assert found["all"][key]["value"] == pytest.approx(value)
    # Correct steps: 4 of 6 called so; incorrect ones: 2 of 3. F1 8/11, negative F1 4/7.
    assert found["all"]["score"]["value"] == pytest.approx((8 / 11 + 4 / 7) / 2)
    assert found["all"]["acc_correct"]["value"] == pytest.approx(4 / 6)
    assert found["all"]["acc_incorrect"]["value"] == pytest.approx(2 / 3)
    assert (found["all"]["n_correct"], found["all"]["n_incorrect"]) == (6, 3)
    assert found["circular"]["score"]["value"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    json.dumps(found)


def test_a_class_without_incorrect_steps_has_its_f1_alone() -> None:
    found = prm_scores(rows())
    assert found is not None
    alone = found["multi_solutions"]
    assert alone["score"]["value"] == alone["f1"]["value"] == pytest.approx(2 / 3)
    assert (alone["negative_f1"], alone["acc_incorrect"]) == (None, None)


def test_baselines_by_hand() -> None:
    found = prm_scores(rows(), threshold=0.25)
    assert found is not None
    # Always correct: F1 of 6 hits and 3 passed over, and none of the incorrect steps is found.
    assert found["all"]["baselines"]["always positive"] == pytest.approx(12 / 15 / 2)
    # Random at 0.25: 4.5 and 1.5 of 6 correct steps, 2.25 and 0.75 of 3 incorrect ones.
    expected = (9 / (9 + 1.5 + 2.25) + 1.5 / (1.5 + 1.5 + 2.25)) / 2
    assert found["all"]["baselines"]["random"] == pytest.approx(expected)
    assert found["multi_solutions"]["baselines"]["always positive"] == 1.0


def test_intervals_resample_problems() -> None:
    rng = np.random.default_rng(0)
    labels = [(rng.random(8) < 0.7).tolist() for _ in range(60)]
    scores = [
        [float(np.clip(0.5 + (0.2 if mark else -0.2) + rng.normal(0, 0.3), 0, 1)) for mark in each] for each in labels
    ]
    one = prm_score(labelled_steps(scores, labels), **FAST)
    assert one.score.low < one.score.value < one.score.high
    twice = prm_score(labelled_steps(scores * 2, labels * 2, problems=[*range(60)] * 2), **FAST)
    assert twice.score == one.score, "a problem that is there twice is one problem"


def test_perfect_and_constant_scorers() -> None:
    labels = [[True, False, True], [True, True, False]]
    perfect = prm_score(labelled_steps([[float(mark) for mark in row] for row in labels], labels), **FAST)
    assert (perfect.score.value, perfect.f1.value) == (1.0, 1.0)
    assert math.isnan(perfect.score.low), "no interval where every resample is perfect"
    constant = prm_score(labelled_steps([[0.9] * 3] * 2, labels), **FAST)
    assert constant.score.value == pytest.approx(constant.baselines["always positive"])
    assert constant.acc_incorrect is not None
    assert constant.acc_incorrect.value == 0.0


def test_rows_without_a_class_have_no_score() -> None:
    assert prm_scores([{"scores": [0.5], "labels": [True], "prompt": "p"}]) is None


def test_a_class_without_a_labelled_step_is_left_out() -> None:
    found = prm_scores([*rows(), {"error_type": "empty", "scores": [0.5], "labels": [None], "prompt": "s"}])
    assert found is not None
    assert list(found) == ["all", "circular", "deception", "multi_solutions"]


def test_difference_is_that_of_the_scores_with_problems_drawn_for_both() -> None:
    other = [{**row, "scores": [1 - score for score in row["scores"]]} for row in rows()]
    found = prm_score_difference(rows(), other, (0.5, 0.4), **FAST)
    a, b = prm_scores(rows()), prm_scores(other, threshold=0.4)
    assert a is not None
    assert b is not None
    assert list(found) == ["score", "acc_correct", "acc_incorrect"]
    for part, each in found.items():
        assert each.value == pytest.approx(b["all"][part]["value"] - a["all"][part]["value"])
    same = prm_score_difference(rows(), rows(), (0.5, 0.5), **FAST)["score"]
    assert same.value == 0.0
    assert math.isnan(same.high), "every resample is the same"
    assert list(prm_score_difference(rows()[2:], rows()[2:], (0.5, 0.5), **FAST)) == ["score", "acc_correct"]


def test_error_numbers_behind_the_last_step_are_counted() -> None:
    found = prm_scores([{**row, "ignored_errors": number} for number, row in enumerate(rows())])
    assert found is not None
    assert [each["ignored_errors"] for each in found.values()] == [3, 0, 1, 2]
