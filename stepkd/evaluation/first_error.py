"""Where is the first incorrect step? ProcessBench F1, the threshold of highest F1, and F1 without a model.

Source: ProcessBench (Zheng et al. 2024, arXiv 2412.06559). A label is the 0-based index of the first incorrect step, or
-1 when every step is correct; a prediction has the same form. All values are shares in [0, 1], not percent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from stepkd.errors import DataError
from stepkd.evaluation.prm_score import harmonic_mean
from stepkd.statistics import (
    FloatArray,
    Interval,
    Resampling,
    Result,
    cluster_bootstrap,
    cluster_sums,
    ratio_interval,
    wilson_interval,
)
from stepkd.steps.labels import passes

NO_ERROR = -1
"""Label and prediction of a solution without an incorrect step."""


# --- F1 ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class F1Result(Result):
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


def predicted_first_error(scores: Sequence[float], threshold: float = 0.5) -> int:
    """The first step with a score below the threshold.

    Args:
        scores: (steps,) scores, at least one, none missing.
        threshold: a step is incorrect when its score is strictly below it.

    Returns:
        The step's 0-based index, or -1.

    Raises:
        DataError: no scores, or a step without a score (NaN).
    """
    if len(scores) == 0 or any(map(math.isnan, scores)):
        raise DataError(
            f"a first error cannot be told from the step scores {list(scores)}: a step without a score (NaN) was cut "
            "off or comes from an outcome scorer; leave the solution out and count it"
        )
    return next((index for index, score in enumerate(scores) if not passes(score, threshold)), NO_ERROR)


def processbench_f1(
    predictions: Sequence[int],
    labels: Sequence[int],
    *,
    problems: Sequence[Hashable] | None = None,
    **settings: Unpack[Resampling],
) -> F1Result:
    """Harmonic mean of the accuracies on solutions with and without an error.

    Args:
        predictions: (n,) predicted index of the first incorrect step, or -1.
        labels: (n,) true ones.
        problems: (n,) ids of the problems that they solve; None: every solution is of a problem of its own.
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        The accuracies with Wilson intervals, or, where some problem has several solutions of that kind, with the
        bootstrap over problems, as the F1 has. Where every resample gives the same F1 (an accuracy of 0, both 1, or
        one problem), its bounds are the F1 of the accuracies' lower and of their upper bounds: F1 rises with both, so
        this is wider; its method is ``bootstrap`` where one of theirs is.

    Raises:
        DataError: different lengths, or an index below -1.
    """
    counts = _hits(predictions, labels, problems)
    hit_error, errors, hit_correct, corrects = counts.T
    n_error, n_correct = int(errors.sum()), int(corrects.sum())
    acc_error = _accuracy(hit_error, errors, **settings) if n_error else None
    acc_correct = _accuracy(hit_correct, corrects, **settings) if n_correct else None
    f1 = None
    if acc_error and acc_correct:
        f1 = cluster_bootstrap(counts, lambda drawn: _parts(drawn)[0], **settings)
        if f1.low == f1.high or math.isnan(f1.low):
            low, high = harmonic_mean([acc_error.low, acc_error.high], [acc_correct.low, acc_correct.high])
            method = acc_error.method if acc_error.method == acc_correct.method else "bootstrap"
            f1 = Interval(f1.value, float(low), float(high), method)
    return F1Result(acc_error, acc_correct, f1, n_error, n_correct)


def f1_difference(
    predictions_a: Sequence[int],
    predictions_b: Sequence[int],
    labels: Sequence[int],
    *,
    problems: Sequence[Hashable] | None = None,
    **settings: Unpack[Resampling],
) -> dict[str, Interval]:
    """F1 and accuracies of B minus those of A on the same problems, which the intervals resample for both together.

    Args:
        predictions_a, predictions_b: (n,) predictions of the two scorers, same order.
        labels: (n,) true indices of the first incorrect step, or -1.
        problems: (n,) ids of the problems that the solutions are of; None: every solution is of a problem of its own.
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        The differences of ``f1``, ``acc_error`` and ``acc_correct``; of a set that has no solution with an error, or
        none without, the accuracy on the others alone.

    Raises:
        DataError: as in :func:`processbench_f1`.
    """
    a, b = (_hits(found, labels, problems) for found in (predictions_a, predictions_b))
    columns = np.concatenate([a, b], axis=1)

    def difference(part: int) -> Interval:
        return cluster_bootstrap(
            columns, lambda drawn: _parts(drawn[..., 4:])[part] - _parts(drawn[..., :4])[part], **settings
        )

    with_error, without = bool(a[:, 1].any()), bool(a[:, 3].any())
    defined = {"f1": with_error and without, "acc_error": with_error, "acc_correct": without}
    return {name: difference(part) for part, (name, known) in enumerate(defined.items()) if known}


def _parts(resampled: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(resamples, problems, 4 columns of `_hits`) -> (resamples,) F1, both accuracies; NaN without such solutions."""
    sums = resampled.sum(axis=1)
    with np.errstate(invalid="ignore"):
        error, correct = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
    return harmonic_mean(error, correct), error, correct


def _hits(predictions: Sequence[int], labels: Sequence[int], problems: Sequence[Hashable] | None) -> FloatArray:
    """(problems, 4): hits on solutions with an error, solutions with one, hits on those without, those without."""
    predicted, truth = np.asarray(predictions), np.asarray(labels)
    if predicted.shape != truth.shape or np.minimum(predicted, truth).min(initial=NO_ERROR) < NO_ERROR:
        raise DataError(
            f"{len(predictions)} predictions for {len(labels)} labels: give one for each, the index of the first "
            "incorrect step or -1 for none"
        )
    if problems is not None and len(problems) != len(labels):
        raise DataError(f"{len(problems)} problems for {len(labels)} labels: give the problem of each solution")
    hit, error = predicted == truth, truth != NO_ERROR
    hits = np.stack([hit & error, error, hit & ~error, ~error], axis=1).astype(np.float64)
    return hits if problems is None or not len(hits) else cluster_sums(hits, problems)


def _accuracy(hits: FloatArray, solutions: FloatArray, **settings: Unpack[Resampling]) -> Interval:
    """Share of hits, of (problems,) counts."""
    if solutions.max() <= 1:
        return wilson_interval(hits.sum(), int(solutions.sum()))
    return ratio_interval(hits, solutions, **settings)


# --- the threshold, and F1 without a model ----------------------------------------------------------------------------


def tune_threshold(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The threshold of highest F1 on a split; use it on other splits: on this one its F1 is optimistic.

    Compared are all thresholds that can matter: the mid-points between neighbouring distinct scores, 0 (nothing is
    incorrect), one above the highest score, and 0.5. Of equal ones the nearest to 0.5 is taken.

    Args:
        scores: per solution its step scores in [0, 1], none missing.
        labels: (n,) true indices of the first incorrect step, or -1.

    Returns:
        The threshold: a step with a lower score is predicted incorrect.

    Raises:
        DataError: a missing score, or a split without one of the two kinds of solutions.
    """
    error = np.asarray(labels) != NO_ERROR
    if error.all() or not error.any():
        raise DataError(
            f"F1 is undefined on {error.sum()} solutions with an error and {(~error).sum()} without: tune the "
            "threshold on a split that has both"
        )
    candidates = _candidates(np.concatenate([np.asarray(row, dtype=np.float64) for row in scores]))
    if np.isnan(candidates).any():
        raise DataError("a step has no score (NaN): leave its solution out and count it")
    # A solution is predicted correctly for the thresholds t in (low, high]: every step before the error >= t, it < t.
    ends = [None if label == NO_ERROR else label for label in labels]
    low_N = np.array([-math.inf if end is None else row[end] for row, end in zip(scores, ends, strict=True)])
    high_N = np.array([min(row[:end], default=math.inf) for row, end in zip(scores, ends, strict=True)])

    def accuracy(kind_N: NDArray[np.bool_]) -> FloatArray:
        usable = kind_N & (low_N < high_N)
        opened, closed = (np.searchsorted(np.sort(bound_N[usable]), candidates) for bound_N in (low_N, high_N))
        return np.asarray((opened - closed) / kind_N.sum(), dtype=np.float64)

    f1 = harmonic_mean(accuracy(error), accuracy(~error))
    best = candidates[f1 >= f1.max() - 1e-12]
    return float(min(best, key=lambda threshold: (abs(threshold - 0.5), threshold)))


def _candidates(scores: FloatArray) -> FloatArray:
    distinct = np.unique(scores)
    middle = (distinct[:-1] + distinct[1:]) / 2
    # Between neighbouring floats the mid-point may round down onto the lower score, which it must exceed.
    middle = np.where(middle > distinct[:-1], middle, distinct[1:])
    top = [(distinct[-1] + 1) / 2] if distinct[-1] < 1 else []
    return np.unique(np.concatenate([[0.0, 0.5], middle, top]))


def random_baseline(labels: Sequence[int], n_steps: Sequence[int], threshold: float = 0.5) -> dict[str, float]:
    """What uniformly random step scores are expected to give under the same rule.

    With scores uniform on [0, 1] the first error falls on step l with probability ``(1-t)^l t``, and nowhere in H
    steps with ``(1-t)^H``.

    Args:
        labels: (n,) true indices of the first incorrect step, or -1; both kinds of solutions among them.
        n_steps: (n,) steps of every solution.
        threshold: t in [0, 1].

    Returns:
        ``acc_error`` and ``acc_correct``, the expected accuracies, and ``f1``, their harmonic mean.
    """
    truth, lengths = np.asarray(labels), np.asarray(n_steps)
    error = truth != NO_ERROR
    acc_error = float(((1 - threshold) ** truth[error] * threshold).mean())
    acc_correct = float(((1 - threshold) ** lengths[~error]).mean())
    return {"acc_error": acc_error, "acc_correct": acc_correct, "f1": float(harmonic_mean(acc_error, acc_correct))}
