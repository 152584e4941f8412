"""How well step scores tell right steps from wrong ones.

Steps of one problem are not independent, so every interval resamples problems. An undefined value is None, with the
reason beside it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepkd.errors import DataError
from stepkd.statistics import FloatArray, Interval, Statistic, cluster_bootstrap, plain_dict, ratio_interval

IntArray: TypeAlias = NDArray[np.int64]

CHUNK_ELEMENTS = 1 << 16
"""Step weights held at once by the AUROC bootstrap: what fits into a cache is faster; does not change the result."""


@dataclass(frozen=True)
class LabelledSteps:
    """Scores and labels of many steps, flattened."""

    scores: FloatArray
    """(steps,) scores, none missing."""
    labels: NDArray[np.bool_]
    """(steps,) whether each step is right."""
    problems: IntArray
    """(steps,) number of the problem each step belongs to, from 0."""
    unlabelled: int
    """Steps left out because they have no label (None)."""
    after_error: int
    """Labelled steps left out because an earlier step of their solution is wrong."""


@dataclass(frozen=True)
class StepMetrics:
    """Step-level classification at a threshold, and the ranking quality without one."""

    accuracy: Interval
    """Share of steps on the right side of the threshold."""
    balanced_accuracy: Interval | None
    """Mean of the shares among right and among wrong steps; 0.5 for a constant answer."""
    auroc: Interval | None
    """Probability that a right step scores higher than a wrong one, ties counting half."""
    positive_share: Interval
    """Share of right steps: the accuracy of calling every step right (the always-positive baseline)."""
    threshold: float
    """A step is called right when its score is not below it."""
    steps: int
    """Steps judged."""
    problems: int
    """Problems they come from."""
    unlabelled: int
    """Steps left out because they have no label."""
    after_error: int
    """Steps left out because they follow a wrong one."""
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
        labels: per solution its step labels: True/1 right, False/0 wrong, None unknown (left out, counted).
        problems: per solution the id of its problem; None when every solution belongs to another problem.
        up_to_first_error: leave out the labelled steps after the first wrong one of a solution.

    Raises:
        DataError: different lengths, another label, a labelled step without a score (NaN), or no labelled step.
    """
    owners = list(range(len(scores))) if problems is None else list(problems)
    if not len(scores) == len(labels) == len(owners):
        raise DataError(f"{len(scores)} score lists, {len(labels)} label lists, {len(owners)} problem ids: must agree")
    number: dict[Hashable, int] = {}
    kept: list[tuple[float, bool, int]] = []
    unlabelled = after_error = 0
    for index, (row, marks, owner) in enumerate(zip(scores, labels, owners, strict=True)):
        if len(row) != len(marks):
            raise DataError(f"solution {index} has {len(row)} scores but {len(marks)} labels: give one for each step")
        failed = False
        for step, (score, mark) in enumerate(zip(row, marks, strict=True)):
            if mark is None:
                unlabelled += 1
                continue
            if mark not in (0, 1):
                raise DataError(
                    f"solution {index}, step {step}: label {mark!r} is none of True, False and None; map neutral "
                    "labels to one of them first"
                )
            if failed and up_to_first_error:
                after_error += 1
                continue
            if math.isnan(score):
                raise DataError(
                    f"solution {index}, step {step} has a label but no score (NaN): leave the solution out and count "
                    "it, or set the label to None"
                )
            failed = failed or not mark
            kept.append((float(score), bool(mark), number.setdefault(owner, len(number))))
    if not kept:
        raise DataError(f"there is no labelled step to judge ({unlabelled} steps have the label None)")
    columns = list(zip(*kept, strict=True))
    return LabelledSteps(
        np.array(columns[0], dtype=np.float64),
        np.array(columns[1], dtype=np.bool_),
        np.array(columns[2], dtype=np.int64),
        unlabelled,
        after_error,
    )


def step_metrics(
    steps: LabelledSteps,
    *,
    threshold: float = 0.5,
    level: float = 0.95,
    seed: int = 0,
    n_resamples: int = 10_000,
) -> StepMetrics:
    """Accuracy, balanced accuracy, AUROC and the share of right steps.

    Args:
        steps: what :func:`labelled_steps` gives.
        threshold: a step is called right when its score is not below it.
        level, seed, n_resamples: as in :func:`~stepkd.statistics.cluster_bootstrap`.

    Returns:
        The values with intervals; bounds are NaN where every resample gives the same value (a perfect ranking).
    """
    called, right = steps.scores >= threshold, steps.labels
    columns = np.stack([called == right, np.ones_like(right), called & right, right, ~called & ~right, ~right], axis=1)
    sums = cluster_sums(columns, steps.problems)
    settings: dict[str, Any] = {"level": level, "seed": seed, "n_resamples": n_resamples}
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

    Args:
        scores: (n,) finite scores.
        labels: (n,) 0 or 1.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.bool_)
    steps = LabelledSteps(values, right, np.zeros(values.size, dtype=np.int64), 0, 0)
    if right.all() or not right.any():
        return None
    return float(_auroc_statistic(steps)(np.zeros((1, 1)))[0])


def cluster_sums(columns: ArrayLike, problems: IntArray) -> FloatArray:
    """Sum rows by problem: (rows, columns) and (rows,) numbers from 0 -> (problems, columns)."""
    values = np.asarray(columns, dtype=np.float64)
    sums = np.zeros((int(problems.max()) + 1, values.shape[1]))
    np.add.at(sums, problems, values)
    return sums


def proper_width(interval: Interval) -> Interval:
    """The interval, without bounds when every resample gave the same value: that is no certainty."""
    if interval.low < interval.high:
        return interval
    return Interval(interval.value, math.nan, math.nan, interval.method, interval.level)


def _balanced(resampled: FloatArray) -> FloatArray:
    """Columns called right and right, right, called wrong and wrong, wrong -> mean of the two shares."""
    sums = resampled.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums[:, 0] / sums[:, 1] + sums[:, 2] / sums[:, 3]) / 2, dtype=np.float64)


def _auroc_statistic(steps: LabelledSteps) -> Statistic:
    """Statistic on drawn problem *numbers*: the ranking is sorted once, a resample only weights the steps."""
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
