"""Temperature scaling of scores (Guo et al. 2017, arXiv 1706.04599), fitted on held-out labels.

The scaled score is ``sigmoid(logit(score) / T)``. The order of the scores does not change, nor does which are above
0.5: only how sure they are. Fit on data the scorer was not trained on, and not on the set it is judged on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepkd.errors import DataError

CLIP = 1e-6
"""Scores are clipped to [CLIP, 1 - CLIP] before their logit is taken: exactly 0 and 1 have none."""
LOWEST, HIGHEST = 0.01, 100.0
"""Bounds of the fitted temperature."""


def scaled(scores: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Scale scores by a temperature.

    Args:
        scores: numbers in [0, 1] of any shape; NaN (no score) stays NaN.
        temperature: T, positive.

    Returns:
        Scaled scores in (0, 1), same shape.

    Raises:
        DataError: a score outside [0, 1].
    """
    from scipy.special import expit

    values = np.asarray(scores, dtype=np.float64)
    _check_range(values)
    return np.asarray(expit(_logit(values) / temperature), dtype=np.float64)


def fit_temperature(scores: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
    """Fit the temperature that makes the labels most likely.

    The negative log-likelihood is convex in 1/T, so its slope there changes its sign once, and the place is bracketed:
    no start value, no learning rate. It is sought along log T, in which both bounds are equally far from 1.

    Args:
        scores: (n,) numbers in [0, 1], none missing; clipped as `CLIP` says.
        labels: (n,) 0 or 1 (bool), both present.

    Returns:
        ``temperature``, from `LOWEST` to `HIGHEST`: above 1 for over-confident scores, below 1 for timid ones; at a
        bound the optimum lies outside: at the lowest the scores separate the labels without an error, at the highest
        they say nothing about them, or the contrary. ``nll_before``, the mean negative log-likelihood per label at
        T = 1, in nats, and ``nll_after``, at the fitted one, which is never larger. ``n``, the number of labels.

    Raises:
        DataError: different lengths, no data, a missing or impossible score, a label that is not 0 or 1, only one
            class, or all scores 0.5.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    values, targets = checked(scores, labels)
    if targets.min() == targets.max():
        raise DataError(
            f"all {targets.size} labels are {int(targets[0])}: a temperature cannot be fitted on one class; "
            "use held-out data with correct and incorrect steps"
        )
    logits = _logit(values)
    if not logits.any():
        raise DataError("all scores are 0.5: no temperature changes them")

    def slope(log_t: float) -> float:
        """d NLL / d(1/T) = sum logit * (sigmoid(logit/T) - label); it falls as T grows."""
        return float((logits * (expit(logits / math.exp(log_t)) - targets)).sum())

    def nll(divided: NDArray[np.float64]) -> float:
        return float(np.mean(np.logaddexp(0.0, divided) - targets * divided))

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if slope(low) <= 0:
        temperature = LOWEST
    elif slope(high) >= 0:
        temperature = HIGHEST
    else:
        temperature = math.exp(brentq(slope, low, high, xtol=1e-15))
    nlls = {"nll_before": nll(logits), "nll_after": nll(logits / temperature)}
    return {"temperature": temperature, **nlls, "n": int(values.size)}


def checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores and labels as arrays.

    Raises:
        DataError: different lengths, no data, a score that is missing or outside [0, 1], or a label that is not 0 or 1.
    """
    values, targets = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if values.ndim != 1 or values.shape != targets.shape or values.size == 0:
        raise DataError(f"there must be one label per score and at least one, got {values.shape} and {targets.shape}")
    if np.isnan(values).any():
        raise DataError(f"score {int(np.isnan(values).argmax())} is missing (NaN): leave unscored steps out")
    strange = ~np.isin(targets, (0.0, 1.0))
    if strange.any():
        raise DataError(f"label {int(strange.argmax())} is {targets[strange][0]}: must be 0 or 1")
    _check_range(values)
    return values, targets


def _check_range(values: NDArray[np.float64]) -> None:
    outside = (values < 0) | (values > 1)
    if outside.any():
        where = int(outside.argmax())
        raise DataError(f"score {where} is {values.flat[where]}: scores are probabilities in [0, 1]")


def _logit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = np.clip(values, CLIP, 1.0 - CLIP)
    return np.asarray(np.log(clipped) - np.log1p(-clipped), dtype=np.float64)
