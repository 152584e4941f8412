"""How well step scores tell correct steps from incorrect ones.

Steps of one problem are not independent, so every interval resamples problems. An undefined value is None, with the
reason beside it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepkd.errors import DataError
from stepkd.statistics import (
    FloatArray,
    IntArray,
    Interval,
    Resampling,
    Statistic,
    cluster_bootstrap,
    cluster_sums,
    numbered,
    plain_dict,
    proper_width,
    ratio_interval,
)
from stepkd.steps.labels import passes

CHUNK_ELEMENTS = 1 << 16
"""Step weights held at once by the AUROC bootstrap: what fits into a cache is faster; does not change the result."""


@dataclass(frozen=True)
class LabelledSteps:
    """Scores and labels of many steps, flattened."""

    scores: FloatArray
    """(steps,) scores, none missing."""
    labels: NDArray[np.bool_]
    """(steps,) whether each step is correct."""
    problems: IntArray
    """(steps,) number of the problem each step belongs to, from 0."""
    unlabelled: int
    """Steps left out because they have no label (None)."""
    after_error: int
    """Labelled steps left out because an earlier step of their solution is incorrect."""


@dataclass(frozen=True)
class StepMetrics:
    """Step-level classification at a threshold, and the ranking quality without one."""

    accuracy: Interval
    """Share of steps whose label the threshold predicts."""
    balanced_accuracy: Interval | None
    """Mean of the shares among correct and among incorrect steps; 0.5 for a constant answer."""
    auroc: Interval | None
    """Probability that a correct step scores higher than an incorrect one, ties counting half."""
    positive_share: Interval
    """Share of correct steps: the accuracy of calling every step correct (the always-positive baseline)."""
    threshold: float
    """A step is called correct when its score is not below it."""
    steps: int
    """Steps judged."""
    problems: int
    """Problems they come from."""
    unlabelled: int
    """Steps left out because they have no label."""
    after_error: int
    """Steps left out because they follow an incorrect one."""
    undefined: Mapping[str, str]
    """Name of a value that is None -> why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return plain_dict(self)


def labelled_steps(
    scores: Sequence[Sequence[float]],
    labels: Sequence[Sequence[bool | int | None]],
    *,
    problems: Sequence[Hashable] | None = None,
    up_to_first_error: bool = False,
) -> LabelledSteps:
    """Flatten the scores and labels of solutions.

    Args:
        scores: per solution its step scores; a step that has a label must have a score.
        labels: per solution its step labels: True/1 correct, False/0 incorrect, None unknown (left out, counted).
        problems: per solution the id of its problem; None when every solution belongs to another problem.
        up_to_first_error: leave out the labelled steps after the first incorrect one of a solution.

    Raises:
        DataError: different lengths, another label, a labelled step without a score (NaN), or no labelled step.
    """
    owners = range(len(scores)) if problems is None else problems
    if not len(scores) == len(labels) == len(owners):
        raise DataError(f"{len(scores)} score lists, {len(labels)} label lists, {len(owners)} problem ids: must agree")
    kept: list[tuple[float, bool, Hashable]] = []
    unlabelled = after_error = 0
    for index, (row, marks, owner) in enumerate(zip(scores, labels, owners, strict=True)):
        if len(row) != len(marks):
            raise DataError(f"solution {index} has {len(row)} scores but {len(marks)} labels: give one for each step")
        failed = False
        for step, (score, mark) in enumerate(zip(row, marks, strict=True)):
            if mark not in (0, 1, None):
                raise DataError(
                    f"solution {index}, step {step}: label {mark!r} is none of True, False and None; map neutral "
                    "labels to one of them first"
                )
            if mark is None:
                unlabelled += 1
            elif failed and up_to_first_error:
                after_error += 1
            elif math.isnan(score):
                raise DataError(
                    f"solution {index}, step {step} has a label but no score (NaN): leave the solution out and count "
                    "it, or set the label to None"
                )
            else:
                failed = failed or not mark
                kept.append((score, bool(mark), owner))
    if not kept:
        raise DataError(f"there is no labelled step to judge ({unlabelled} steps have the label None)")
    found, correct, owner_of = zip(*kept, strict=True)
    return LabelledSteps(
        np.array(found, dtype=np.float64),
        np.array(correct, dtype=np.bool_),
        numbered(owner_of),
        unlabelled,
        after_error,
    )


def step_metrics(
    steps: LabelledSteps,
    *,
    threshold: float = 0.5,
    **settings: Unpack[Resampling],
) -> StepMetrics:
    """Accuracy, balanced accuracy, AUROC and the share of correct steps.

    Args:
        steps: what :func:`labelled_steps` gives.
        threshold: a step is called correct when its score is not below it.
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        The values with intervals; bounds are NaN where every resample gives the same value (a perfect ranking).
    """
    called, right = np.array([passes(score, threshold) is True for score in steps.scores]), steps.labels
    columns = np.stack([called == right, np.ones_like(right), called & right, right, ~called & ~right, ~right], axis=1)
    sums = cluster_sums(columns, steps.problems)
    balanced = area = None
    undefined = {}
    if right.all() or not right.any():
        reason = f"all {right.size} steps are labelled {'right' if right.all() else 'wrong'}"
        undefined = {"balanced_accuracy": reason, "auroc": reason}
    else:
        balanced = proper_width(cluster_bootstrap(sums[:, 2:], _balanced, **settings))
        area = proper_width(cluster_bootstrap(np.arange(sums.shape[0]), _auroc_statistic(steps), **settings))
    return StepMetrics(
        accuracy=ratio_interval(sums[:, 0], sums[:, 1], **settings),
        balanced_accuracy=balanced,
        auroc=area,
        positive_share=ratio_interval(sums[:, 3], sums[:, 1], **settings),
        threshold=threshold,
        steps=int(right.size),
        problems=int(sums.shape[0]),
        unlabelled=steps.unlabelled,
        after_error=steps.after_error,
        undefined=undefined,
    )


def auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the ROC curve by ranks, ties counting half; None when a class is absent.

    torchmetrics' ``binary_auroc`` agrees where it can: it computes in float32, squeezes scores outside [0, 1], which
    makes ties, and has no weights, so that resampling it by problem takes seven times as long as here.

    Args:
        scores: (n,) finite scores.
        labels: (n,) 0 or 1.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.bool_)
    steps = LabelledSteps(values, right, np.zeros(values.size, dtype=np.int64), 0, 0)
    if right.all() or not right.any():
        return None
    return float(_auroc_statistic(steps)(np.zeros((1, 1)))[0])


def _balanced(resampled: FloatArray) -> FloatArray:
    """Columns hits among correct steps, correct steps, hits among incorrect ones, incorrect ones -> mean share."""
    sums = resampled.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums[:, 0] / sums[:, 1] + sums[:, 2] / sums[:, 3]) / 2, dtype=np.float64)


def _auroc_statistic(steps: LabelledSteps) -> Statistic:
    """Statistic on drawn problem *numbers*: the ranking is sorted once, a resample only weights the steps.

    ``scipy.stats.mannwhitneyu`` takes no weights; sorting every resample anew, it takes nine times as long.
    """
    order = np.argsort(steps.scores, kind="stable")
    scores, owner = steps.scores[order], steps.problems[order]
    right = steps.labels[order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
    n_problems = int(owner.max()) + 1
    chunk = max(1, CHUNK_ELEMENTS // scores.size)

    def area(drawn: IntArray) -> FloatArray:
        rows = np.arange(drawn.shape[0])[:, None] * n_problems
        counts = np.bincount((rows + drawn).reshape(-1), minlength=drawn.shape[0] * n_problems)
        weights = counts.reshape(-1, n_problems)[:, owner].astype(np.float64)
        good = np.add.reduceat(weights * right, starts, axis=1)
        bad = np.add.reduceat(weights * (1.0 - right), starts, axis=1)
        won = (good * (np.cumsum(bad, axis=1) - bad / 2)).sum(axis=1)
        pairs = good.sum(axis=1) * bad.sum(axis=1)
        return np.divide(won, pairs, out=np.full(won.shape, np.nan), where=pairs > 0)

    def statistic(resampled: FloatArray) -> FloatArray:
        drawn = resampled.astype(np.int64)
        return np.concatenate([area(drawn[i : i + chunk]) for i in range(0, drawn.shape[0], chunk)])

    return statistic
