"""Does a process reward model find the first wrong step? ProcessBench F1 and differences of it.

Source: ProcessBench (Zheng et al. 2024, arXiv 2412.06559). A label is the 0-based index of the first wrong step, or -1
when every step is right; a prediction has the same form. Every problem has one solution here, so problems are the rows.
All values are shares in [0, 1], not percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepkd.errors import DataError
from stepkd.statistics import FloatArray, Interval, cluster_bootstrap, plain_dict, wilson_interval
from stepkd.steps.labels import passes

NO_ERROR = -1
"""Label and prediction of a solution without a wrong step."""


@dataclass(frozen=True)
class F1Result:
    """ProcessBench F1 of one set; a part that has no rows is None, and then so is the F1."""

    acc_error: Interval | None
    """Share of solutions with an error whose first error is predicted exactly."""
    acc_correct: Interval | None
    """Share of solutions without an error that are predicted to have none."""
    f1: Interval | None
    """Harmonic mean of the two; 0 when both are 0."""
    n_error: int
    """Solutions with an error."""
    n_correct: int
    """Solutions without an error."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return plain_dict(self)


def predicted_first_error(scores: Sequence[float], threshold: float = 0.5) -> int:
    """The first step with a score below the threshold.

    Args:
        scores: (steps,) scores, at least one, none missing.
        threshold: a step is wrong when its score is strictly below it.

    Returns:
        The step's 0-based index, or -1.

    Raises:
        DataError: no scores, or a step without a score (NaN).
    """
    check_step_scores([scores])
    return next((index for index, score in enumerate(scores) if not passes(score, threshold)), NO_ERROR)


def harmonic_mean(a: float, b: float) -> float:
    """``2ab / (a + b)`` of two numbers >= 0, and 0 when both are 0."""
    return 0.0 if a + b == 0 else 2.0 * a * b / (a + b)


def processbench_f1(
    predictions: Sequence[int],
    labels: Sequence[int],
    *,
    level: float = 0.95,
    seed: int = 0,
    n_resamples: int = 10_000,
) -> F1Result:
    """Harmonic mean of the accuracies on solutions with and without an error.

    Args:
        predictions: (n,) predicted index of the first wrong step, or -1.
        labels: (n,) true ones.
        level, seed, n_resamples: as in :func:`~stepkd.statistics.cluster_bootstrap`.

    Returns:
        The accuracies with Wilson intervals; the F1 with the bootstrap over problems. Where every resample gives the
        same F1 (an accuracy of 0, or both 1), its bounds are the F1 of the accuracies' lower and of their upper bounds:
        F1 rises with both, so this is wider.

    Raises:
        DataError: no rows, different lengths, or an index that is not an integer >= -1.
    """
    hit_error, errors, hit_correct, corrects = counts = _hits(predictions, labels)
    n_error, n_correct = int(errors.sum()), int(corrects.sum())
    acc_error = wilson_interval(hit_error.sum(), n_error, level) if n_error else None
    acc_correct = wilson_interval(hit_correct.sum(), n_correct, level) if n_correct else None
    f1 = None
    if acc_error and acc_correct:
        f1 = cluster_bootstrap(counts.T, _f1_statistic, n_resamples=n_resamples, level=level, seed=seed)
        if f1.low == f1.high or math.isnan(f1.low):
            low, high = harmonic_mean(acc_error.low, acc_correct.low), harmonic_mean(acc_error.high, acc_correct.high)
            f1 = Interval(f1.value, low, high, "wilson", level)
    return F1Result(acc_error, acc_correct, f1, n_error, n_correct)


def f1_difference(
    predictions_a: Sequence[int],
    predictions_b: Sequence[int],
    labels: Sequence[int],
    *,
    level: float = 0.95,
    seed: int = 0,
    n_resamples: int = 10_000,
) -> Interval | None:
    """F1 of B minus F1 of A on the same problems, with an interval that resamples the problems for both together.

    Args:
        predictions_a, predictions_b: (n,) predictions of the two scorers, same order.
        labels: (n,) true indices of the first wrong step, or -1.
        level, seed, n_resamples: as in :func:`processbench_f1`.

    Returns:
        The difference; None when the set has no solution with an error, or none without.

    Raises:
        DataError: as in :func:`processbench_f1`.
    """
    a, b = _hits(predictions_a, labels), _hits(predictions_b, labels)
    if not (a[1].any() and a[3].any()):
        return None

    def statistic(resampled: FloatArray) -> FloatArray:
        return _f1_statistic(resampled[..., 4:]) - _f1_statistic(resampled[..., :4])

    columns = np.concatenate([a, b]).T
    return cluster_bootstrap(columns, statistic, n_resamples=n_resamples, level=level, seed=seed)


def _f1_statistic(resampled: FloatArray) -> FloatArray:
    """(resamples, problems, 4 columns of `_hits`) -> (resamples,); NaN where a kind of solution is absent."""
    sums = resampled.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
        return np.where(a + b == 0, 0.0, 2 * a * b / (a + b))


def _hits(predictions: Sequence[int], labels: Sequence[int]) -> FloatArray:
    """(4, n): hit on a solution with an error, has an error, hit on one without, has none; each 0 or 1."""
    check_first_errors(labels)
    if len(predictions) != len(labels):
        raise DataError(f"{len(predictions)} predictions for {len(labels)} labels: give one for each")
    check_first_errors(predictions, what="prediction")
    truth = np.asarray(labels)
    hit, wrong = np.asarray(predictions) == truth, truth != NO_ERROR
    return np.stack([hit & wrong, wrong, hit & ~wrong, ~wrong]).astype(np.float64)


def check_first_errors(labels: Sequence[int], n_steps: Sequence[int] | None = None, *, what: str = "label") -> None:
    """Raises DataError unless all are integers >= -1 and, given the solutions' steps, within them."""
    if len(labels) == 0:
        raise DataError(f"there are no {what}s: a set needs at least one solution")
    if n_steps is not None and len(n_steps) != len(labels):
        raise DataError(f"{len(n_steps)} solutions for {len(labels)} labels: give one for each")
    for index, label in enumerate(labels):
        whole = isinstance(label, int | np.integer) and not isinstance(label, bool)
        if not whole or label < NO_ERROR:
            raise DataError(f"{what} {index} is {label!r}: it is the index of the first wrong step, or -1 for none")
        if n_steps is not None and label >= n_steps[index]:
            raise DataError(f"{what} {index} is {label}, but that solution has {n_steps[index]} steps (0-based)")


def check_step_scores(scores: Sequence[Sequence[float]]) -> None:
    """Raises DataError for a solution without scores or with a missing (NaN) one, naming solution and step."""
    for index, row in enumerate(scores):
        where = f"solution {index}: " if len(scores) > 1 else ""
        if len(row) == 0:
            raise DataError(f"{where}a solution without step scores has no first error")
        missing = np.flatnonzero(np.isnan(np.asarray(row, dtype=np.float64)))
        if missing.size:
            raise DataError(
                f"{where}step {missing[0]} has no score (NaN): it was cut off or comes from an outcome scorer; leave "
                "the solution out and count it"
            )
