"""The threshold below which a step counts as wrong, tuned on a split; and what ProcessBench F1 is without a model.

Labels and predictions are those of :mod:`stepkd.evaluation.process_metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.process_metrics import (
    NO_ERROR,
    F1Result,
    check_first_errors,
    check_step_scores,
    harmonic_mean,
    processbench_f1,
)
from stepkd.randomness import generator
from stepkd.statistics import FloatArray


@dataclass(frozen=True)
class TunedThreshold:
    """The threshold of highest F1 on a split, and the values it reaches there (optimistic: it was chosen there)."""

    threshold: float
    """A step with a lower score is predicted wrong."""
    f1: float
    """F1 on the tuning split, in [0, 1]."""
    acc_error: float
    """Accuracy on its solutions with an error."""
    acc_correct: float
    """Accuracy on its solutions without one."""
    candidates: int
    """Thresholds compared."""


@dataclass(frozen=True)
class RandomBaseline:
    """What uniformly random step scores reach."""

    acc_error: float
    """Exact expected accuracy on solutions with an error."""
    acc_correct: float
    """Exact expected accuracy on solutions without one."""
    f1: float
    """Mean F1 over the draws."""
    f1_low: float
    """Lower end of the range that holds 95% of the draws' F1 (not an interval of the mean)."""
    f1_high: float
    """Upper end of that range."""
    draws: int
    """Random score sets drawn."""


def tune_threshold(
    scores: Sequence[Sequence[float]], labels: Sequence[int], *, grid: Sequence[float] | None = None
) -> TunedThreshold:
    """The threshold of highest F1 on a split; use it on other splits.

    Args:
        scores: per solution its step scores in [0, 1], none missing.
        labels: (n,) true indices of the first wrong step, or -1.
        grid: thresholds to compare; None for all that can matter: the mid-points between neighbouring distinct
            scores, 0 (nothing is wrong), one above the highest score, and 0.5.

    Returns:
        The best one; of equal F1 the one nearest to 0.5, then the lower one.

    Raises:
        DataError: no rows, different lengths, a missing score, a label beyond the solution's steps, an empty grid, or a
            split without solutions with an error or without ones without.
    """
    check_step_scores(scores)
    check_first_errors(labels, [len(row) for row in scores])
    n_error = sum(label != NO_ERROR for label in labels)
    n_correct = len(labels) - n_error
    if not n_error or not n_correct:
        raise DataError(
            f"F1 is undefined on {n_error} solutions with an error and {n_correct} without: tune the threshold on a "
            "split that has both"
        )
    candidates = _candidates(scores) if grid is None else np.unique(np.asarray(grid, dtype=np.float64))
    if candidates.size == 0 or not np.isfinite(candidates).all():
        raise DataError(f"the grid of thresholds must hold finite numbers, at least one, got {grid!r}")
    # A solution is predicted rightly for the thresholds t in (low, high]: every earlier step >= t, the wrong one < t.
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for row, label in zip(scores, labels, strict=True):
        wrong = label != NO_ERROR
        spans[wrong].append((row[label] if wrong else -math.inf, min(row[:label] if wrong else row, default=math.inf)))
    accuracy = {}
    for wrong, pairs in spans.items():
        usable = np.array([pair for pair in pairs if pair[0] < pair[1]]).reshape(-1, 2)
        opened = np.searchsorted(np.sort(usable[:, 0]), candidates, side="left")
        closed = np.searchsorted(np.sort(usable[:, 1]), candidates, side="left")
        accuracy[wrong] = (opened - closed) / len(pairs)
    f1 = np.array([harmonic_mean(float(a), float(b)) for a, b in zip(accuracy[True], accuracy[False], strict=True)])
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    chosen = int(min(best, key=lambda i: (abs(candidates[i] - 0.5), candidates[i])))
    return TunedThreshold(
        threshold=float(candidates[chosen]),
        f1=float(f1[chosen]),
        acc_error=float(accuracy[True][chosen]),
        acc_correct=float(accuracy[False][chosen]),
        candidates=int(candidates.size),
    )


def always_positive_baseline(
    labels: Sequence[int], *, level: float = 0.95, seed: int = 0, n_resamples: int = 10_000
) -> F1Result:
    """F1 of calling every solution right: accuracy 1 on those without an error, 0 on the others, so F1 is 0."""
    return processbench_f1([NO_ERROR] * len(labels), labels, level=level, seed=seed, n_resamples=n_resamples)


def random_baseline(
    labels: Sequence[int], n_steps: Sequence[int], *, threshold: float = 0.5, draws: int = 1000, seed: int = 0
) -> RandomBaseline:
    """F1 of uniformly random step scores under the same rule.

    With scores uniform on [0, 1] the first error falls on step l with probability ``(1-t)^l t``, and nowhere in H
    steps with ``(1-t)^H``; so whole draws of hits are made, not single scores.

    Args:
        labels: (n,) true indices of the first wrong step, or -1.
        n_steps: (n,) steps of every solution.
        threshold: t in [0, 1].
        draws: random score sets, at least 1; draw i does not depend on how many there are.
        seed: seed of the draws.

    Raises:
        DataError: as in :func:`~stepkd.evaluation.process_metrics.processbench_f1`, a label beyond the steps, or a
            set without one of the two kinds.
        ConfigError: threshold or draws out of range.
    """
    if not 0.0 <= threshold <= 1.0 or draws < 1:
        raise ConfigError(f"a random baseline needs a threshold in [0, 1] and draws >= 1, got {threshold}, {draws}")
    check_first_errors(labels, n_steps)
    truth, steps = np.asarray(labels), np.asarray(n_steps)
    wrong = truth != NO_ERROR
    if wrong.all() or not wrong.any():
        raise DataError("the random baseline's F1 needs solutions with an error and solutions without")
    chance = np.where(wrong, (1 - threshold) ** np.maximum(truth, 0) * threshold, (1 - threshold) ** steps)
    f1 = np.empty(draws)
    for draw in range(draws):
        hits = generator(seed, "random-baseline", draw).random(truth.size) < chance
        f1[draw] = harmonic_mean(float(hits[wrong].mean()), float(hits[~wrong].mean()))
    low, high = np.quantile(f1, [0.025, 0.975])
    return RandomBaseline(
        float(chance[wrong].mean()), float(chance[~wrong].mean()), float(f1.mean()), float(low), float(high), draws
    )


def _candidates(scores: Sequence[Sequence[float]]) -> FloatArray:
    distinct = np.unique(np.concatenate([np.asarray(row, dtype=np.float64) for row in scores]))
    middle = (distinct[:-1] + distinct[1:]) / 2
    # Between neighbouring floats the mid-point may round down onto the lower score, which it must exceed.
    middle = np.where(middle > distinct[:-1], middle, distinct[1:])
    top = [(distinct[-1] + 1) / 2] if distinct[-1] < 1 else []
    return np.unique(np.concatenate([[0.0, 0.5], middle, top]))
