"""Step-level metrics against torchmetrics, pair counting and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from stepkd.errors import DataError
from stepkd.evaluation import step_metrics as module
from stepkd.evaluation.step_metrics import auroc, labelled_steps, step_metrics

FAST: dict[str, Any] = {"n_resamples": 300}
NAN = math.nan


def pairs_won(scores: np.ndarray, labels: np.ndarray) -> float:
    right, wrong = scores[labels == 1], scores[labels == 0]
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in right for b in wrong]))


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
    # Right steps: 0.9, 0.5 (called right), 0.2 (not); wrong steps: 0.6 (called right), 0.1.
    steps = labelled_steps([[0.9, 0.5, 0.6], [0.2, 0.1]], [[1, 1, 0], [True, False]])
    metrics = step_metrics(steps, **FAST)
    assert metrics.accuracy.value == pytest.approx(3 / 5)
    assert metrics.balanced_accuracy is not None
    assert metrics.balanced_accuracy.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics.positive_share.value == pytest.approx(3 / 5)
    assert (metrics.steps, metrics.problems) == (5, 2)
    assert metrics.undefined == {}


def test_constant_answer_has_balanced_accuracy_one_half() -> None:
    steps = labelled_steps([[0.9] * 10] * 5, [[1] * 9 + [0]] * 5)
    metrics = step_metrics(steps, **FAST)
    assert metrics.accuracy.value == pytest.approx(0.9)
    assert metrics.balanced_accuracy is not None
    assert metrics.balanced_accuracy.value == 0.5
    assert math.isnan(metrics.balanced_accuracy.low)  # no spread is no certainty


def test_one_class_is_undefined_with_a_reason() -> None:
    metrics = step_metrics(labelled_steps([[0.9, 0.1]], [[1, 1]]), **FAST).to_dict()
    assert metrics["auroc"] is None
    assert metrics["balanced_accuracy"] is None
    assert metrics["undefined"]["auroc"] == "all 2 steps are labelled right"


def test_up_to_the_first_error() -> None:
    scores, labels = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6]], [[1, 0, 1, 0], [None, 1]]
    everything = labelled_steps(scores, labels)
    assert everything.scores.tolist() == [0.1, 0.2, 0.3, 0.4, 0.6]
    assert (everything.unlabelled, everything.after_error) == (1, 0)
    cut = labelled_steps(scores, labels, up_to_first_error=True)
    assert cut.scores.tolist() == [0.1, 0.2, 0.6]
    assert (cut.unlabelled, cut.after_error) == (1, 2)


def test_bad_input() -> None:
    with pytest.raises(DataError, match=r"solution 0, step 1 has a label but no score \(NaN\)"):
        labelled_steps([[0.5, NAN]], [[1, 1]])
    assert labelled_steps([[0.5, NAN]], [[1, None]]).scores.tolist() == [0.5]
    with pytest.raises(DataError, match="solution 0 has 1 scores but 2 labels"):
        labelled_steps([[0.5]], [[1, 1]])
    with pytest.raises(DataError, match="label -1 is none of"):
        labelled_steps([[0.5]], [[-1]])
    with pytest.raises(DataError, match=r"no labelled step to judge \(1 steps"):
        labelled_steps([[0.5]], [[None]])
    with pytest.raises(DataError, match="must agree"):
        labelled_steps([[0.5]], [[1]], problems=["a", "b"])
