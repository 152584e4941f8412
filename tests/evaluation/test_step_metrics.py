"""Step-level metrics and calibration against torchmetrics, pair counting, closed forms and bootstraps by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from stepkd.errors import DataError
from stepkd.evaluation import step_metrics as module
from stepkd.evaluation.step_metrics import (
    calibration_report,
    labelled_steps,
    step_metrics,
)

FAST: dict[str, Any] = {"n_resamples": 300}
NAN = math.nan


def pairs_won(scores: np.ndarray, labels: np.ndarray) -> float:
    correct, incorrect = scores[labels == 1], scores[labels == 0]
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in correct for b in incorrect]))


def auroc(scores: Any, labels: Any) -> float | None:
    area = step_metrics(labelled_steps([[s] for s in scores], [[int(y)] for y in labels]), n_resamples=1).auroc
    return None if area is None else area.value


def test_auroc_equals_pair_counting_and_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    for trial in range(40):
        labels = np.concatenate([[0, 1], rng.integers(0, 2, size=30)])
        scores = rng.random(32) if trial % 2 else rng.integers(0, 5, size=32) / 4  # many ties
        assert auroc(scores, labels) == pytest.approx(pairs_won(scores, labels), abs=1e-12)
        theirs = binary_auroc(torch.tensor(scores), torch.tensor(labels))
        assert auroc(scores, labels) == pytest.approx(float(theirs), abs=1e-6)
    assert auroc([0.1, 0.2], [1, 1]) is None
    assert auroc([0.5, 0.5], [1, 0]) == 0.5


@pytest.mark.parametrize("chunk", [1, 100, 1 << 16])
def test_auroc_interval_equals_the_bootstrap_done_by_hand(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    rng = np.random.default_rng(1)
    problems = np.repeat(np.arange(8), 5)
    labels = rng.integers(0, 2, size=40)
    scores = (rng.integers(0, 6, size=40) + labels) / 7
    steps = labelled_steps([[s] for s in scores], [[int(y)] for y in labels], problems=problems.tolist())
    area = step_metrics(steps, n_resamples=200, seed=5).auroc
    assert area is not None
    draws = np.random.default_rng(5).integers(8, size=(200, 8))
    by_hand = []
    for drawn in draws:
        rows = np.concatenate([np.flatnonzero(problems == problem) for problem in drawn])
        by_hand.append(pairs_won(scores[rows], labels[rows]))
    low, high = np.quantile(by_hand, [0.025, 0.975])
    assert (area.low, area.high) == (pytest.approx(low), pytest.approx(high))
    assert area.value == pytest.approx(pairs_won(scores, labels))


def test_threshold_metrics() -> None:
    # Correct steps: 0.9, 0.5 (called correct), 0.2 (not); incorrect steps: 0.6 (called correct), 0.1.
    steps = labelled_steps([[0.9, 0.5, 0.6], [0.2, 0.1]], [[1, 1, 0], [True, False]])
    metrics = step_metrics(steps, **FAST)
    assert metrics.accuracy.value == pytest.approx(3 / 5)
    assert metrics.balanced_accuracy is not None
    assert metrics.balanced_accuracy.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics.positive_share.value == pytest.approx(3 / 5)
    assert (metrics.steps, metrics.problems) == (5, 2)


def test_constant_answer_has_balanced_accuracy_one_half() -> None:
    steps = labelled_steps([[0.9] * 10] * 5, [[1] * 9 + [0]] * 5)
    metrics = step_metrics(steps, **FAST)
    assert metrics.accuracy.value == pytest.approx(0.9)
    assert metrics.balanced_accuracy is not None
    assert metrics.balanced_accuracy.value == 0.5
    assert math.isnan(metrics.balanced_accuracy.low)  # no spread is no certainty


def test_one_class_has_neither_auroc_nor_balanced_accuracy() -> None:
    metrics = step_metrics(labelled_steps([[0.9, 0.1]], [[1, 1]]), **FAST).to_dict()
    assert metrics["auroc"] is None
    assert metrics["balanced_accuracy"] is None


def test_up_to_the_first_error() -> None:
    scores, labels = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6]], [[1, 0, 1, 0], [None, 1]]
    everything = labelled_steps(scores, labels)
    assert everything.scores.tolist() == [0.1, 0.2, 0.3, 0.4, 0.6]
    assert everything.labels.tolist() == [True, False, True, False, True]
    cut = labelled_steps(scores, labels, up_to_first_error=True)
    assert cut.scores.tolist() == [0.1, 0.2, 0.6]
    assert cut.problems.tolist() == [0, 0, 1]


def test_steps_that_cannot_be_judged() -> None:
    with pytest.raises(DataError, match="solution 0, step 1: label 1, score nan"):
        labelled_steps([[0.5, NAN]], [[1, 1]])
    assert labelled_steps([[0.5, NAN]], [[1, None]]).scores.tolist() == [0.5]
    with pytest.raises(DataError, match="solution 0 has 1 scores but 2 labels"):
        labelled_steps([[0.5]], [[1, 1]])
    with pytest.raises(DataError, match=r"label -1, score 0\.5: a label is True, False or None"):
        labelled_steps([[0.5]], [[-1]])
    with pytest.raises(DataError, match="none of the steps of 1 solutions has a label"):
        labelled_steps([[0.5]], [[None]])


# --- calibration ------------------------------------------------------------------------------------------------------


def test_ece_equals_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    for bins in (5, 10, 15):
        p = rng.random(500)
        y = (rng.random(500) < p**2).astype(int)
        theirs = binary_calibration_error(torch.tensor(p), torch.tensor(y), n_bins=bins, norm="l1")
        assert calibration_report(p, y, bins=bins, **FAST).ece.value == pytest.approx(float(theirs), abs=1e-6)


def test_ece_closed_form() -> None:
    # Bin of 0.9s: accuracy 0.5, gap 0.4, weight 4/6; bin of 0.2s: accuracy 0, gap 0.2, weight 2/6.
    p, y = [0.9] * 4 + [0.2] * 2, [1, 1, 0, 0, 0, 0]
    expected = 4 / 6 * 0.4 + 2 / 6 * 0.2
    assert calibration_report(p, y, **FAST).ece.value == pytest.approx(expected)
    assert calibration_report(p, y, bins=1, **FAST).ece.value == pytest.approx(abs(2 / 6 - 4 / 6))


def test_bins_hold_their_lower_edge_and_the_last_is_closed() -> None:
    bins = calibration_report([0.0, 0.1, 0.3, 0.6, 0.7, 0.999, 1.0], [0, 1, 0, 1, 1, 1, 0], **FAST).bins
    assert [each["count"] for each in bins] == [1, 1, 0, 1, 0, 0, 1, 1, 0, 2]
    assert (bins[9]["confidence"], bins[9]["accuracy"]) == (pytest.approx(0.9995), 0.5)
    assert (bins[2]["confidence"], bins[2]["accuracy"]) == (None, None)


def test_brier_and_skill() -> None:
    p, y = [0.8, 0.6, 0.2], [1, 0, 0]
    brier = (0.04 + 0.36 + 0.04) / 3
    report = calibration_report(p, y, **FAST)
    assert report.brier.value == pytest.approx(brier)
    assert report.skill_base_rate is not None
    assert report.skill_base_rate.value == pytest.approx(1 - brier / (1 / 3 * 2 / 3))
    base_rate = calibration_report([1 / 3] * 3, y, **FAST).skill_base_rate
    assert base_rate is not None
    assert base_rate.value == pytest.approx(0.0)
    assert report.over_confidence["0.8"] is not None
    assert report.over_confidence["0.8"].value == 0.0
    assert report.over_confidence["0.9"] is None


def test_conditional_mutual_information_is_the_spread_within_a_label() -> None:
    """Against the mean distance from the mean, written out; a table of two by two has it in closed form."""
    entropy = lambda p: -sum(x * math.log(x) for x in (p, 1 - p) if x)  # noqa: E731
    table = calibration_report([0.9, 0.5, 0.2, 0.2], [1, 1, 0, 0], **FAST).conditional_mutual_information
    assert table.value == pytest.approx((2 * entropy(0.7) - entropy(0.9) - entropy(0.5)) / 4, rel=1e-12)
    rng = np.random.default_rng(5)
    p, y = rng.random(50), rng.integers(0, 2, size=50)
    total = 0.0
    for value, label in zip(p, y, strict=True):
        mean = p[y == label].mean()
        total += value * math.log(value / mean) + (1 - value) * math.log((1 - value) / (1 - mean))
    found = calibration_report(p, y, **FAST).conditional_mutual_information
    assert found.value == pytest.approx(total / 50, rel=1e-12)
    assert found.low < found.value < found.high
    assert calibration_report([0.3, 1.0], [0, 1], **FAST).conditional_mutual_information.value == pytest.approx(0.0)
    assert calibration_report([0.0, 1.0], [1, 1], **FAST).conditional_mutual_information.value == pytest.approx(
        math.log(2)
    )


def brier_skill(p: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    return float(1 - np.mean((p - y) ** 2) / (y.mean() * (1 - y.mean())))


def test_report_agrees_with_the_formulas() -> None:
    rng = np.random.default_rng(2)
    p = rng.random(300)
    y = rng.random(300) < p**2
    report = calibration_report(p, y, problems=np.repeat(np.arange(60), 5), **FAST)
    gaps = [
        b["count"] / 300 * abs(b["accuracy"] - b["confidence"])
        for b in calibration_report(p, y, **FAST).bins
        if b["accuracy"] is not None and b["confidence"] is not None
    ]
    assert report.ece.value == pytest.approx(sum(gaps))
    assert report.brier.value == pytest.approx(np.mean((p - y) ** 2))
    assert report.skill_base_rate is not None
    assert report.skill_base_rate.value == pytest.approx(brier_skill(p, y))
    assert report.skill_base_rate.low < report.skill_base_rate.value < report.skill_base_rate.high
    assert report.skill_coin.value == pytest.approx(1 - np.mean((p - y) ** 2) / 0.25)
    assert report.skill_coin.low < report.skill_coin.value < report.skill_coin.high
    over = report.over_confidence["0.9"]
    assert over is not None
    assert over.value == pytest.approx(1 - y[p >= 0.9].mean())
    assert (report.n, report.problems) == (300, 60)
    json.dumps(report.to_dict(), allow_nan=False)


def test_intervals_resample_problems() -> None:
    # Ten copies of each row within a problem say nothing new: the interval must not shrink.
    rng = np.random.default_rng(3)
    p = rng.random(80)
    y = rng.random(80) < p
    single = calibration_report(p, y, **FAST)
    copies = calibration_report(np.repeat(p, 10), np.repeat(y, 10), problems=np.repeat(np.arange(80), 10), **FAST)
    for name in ("ece", "brier", "skill_base_rate"):
        one, ten = getattr(single, name), getattr(copies, name)
        assert (ten.value, ten.low, ten.high) == pytest.approx((one.value, one.low, one.high))
    apart = calibration_report(np.repeat(p, 10), np.repeat(y, 10), **FAST)
    assert apart.brier.high - apart.brier.low < 0.5 * (single.brier.high - single.brier.low)


def test_skill_interval_equals_the_bootstrap_done_by_hand() -> None:
    rng = np.random.default_rng(4)
    p, y = rng.random(40), rng.integers(0, 2, size=40)
    skill = calibration_report(p, y, n_resamples=200, seed=9).skill_base_rate
    draws = np.random.default_rng(9).integers(40, size=(200, 40))
    low, high = np.quantile([brier_skill(p[rows], y[rows]) for rows in draws], [0.025, 0.975])
    assert skill is not None
    assert (skill.low, skill.high) == (pytest.approx(low), pytest.approx(high))


def test_what_labels_of_one_kind_cannot_give_is_none() -> None:
    report = calibration_report([0.2, 0.85], [1, 1], **FAST)
    assert report.skill_base_rate is None
    assert report.over_confidence["0.9"] is None
    same = calibration_report([0.5] * 4, [1] * 4, **FAST)
    assert math.isnan(same.brier.low)
    assert math.isnan(same.ece.low)


def test_probabilities_and_settings_that_cannot_be() -> None:
    for p, y, message in [
        ([0.5], [1, 0], "one label per score"),
        ([], [], "at least one"),
        ([0.5, math.nan], [1, 0], r"score 1 is missing \(NaN\)"),
        ([1.5], [1], r"score 0 is 1\.5"),
        ([0.5], [2], r"label 0 is 2\.0"),
    ]:
        with pytest.raises(DataError, match=message):
            calibration_report(p, y)
