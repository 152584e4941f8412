"""How well step scores tell correct steps from incorrect ones, and whether probabilities mean what they say.

Accuracy and AUROC at the step level; ECE, reliability bins, Brier score and skill, over-confidence. The latter are also
for outcome scores and a model's own P(True). On imbalanced labels the Brier skill tells a scorer that is no better than
its base rate (standard definitions; core-methods 5, card KalshiBench, arXiv 2512.16030).

Steps of one problem are not independent, so every interval resamples problems. A value that labels of one kind only
cannot give is None.

torchmetrics' ``binary_calibration_error`` agrees on the value where no probability lies on the edge of a bin. It was
tried and is not used: it puts 0.3 below the edge 3/10 (an error of 0.525 in place of 0.175 on four scores) and gives
one number, not the sums per problem that an interval needs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepkd.errors import DataError
from stepkd.scorers.calibration import checked
from stepkd.statistics import (
    FloatArray,
    IntArray,
    Interval,
    Resampling,
    Result,
    Statistic,
    balanced_accuracy,
    cluster_bootstrap,
    cluster_sums,
    numbered,
    proper_width,
    ratio_interval,
    ratio_of_sums,
)
from stepkd.steps.labels import passes

CHUNK_ELEMENTS = 1 << 16
"""Step weights held at once by the AUROC bootstrap: what fits into a cache is faster; does not change the result."""
CONFIDENT = (0.8, 0.9)
"""The values c of the over-confidence rate."""
COIN_BRIER = 0.25
"""Brier score of answering 0.5 always."""


@dataclass(frozen=True)
class LabelledSteps:
    """Scores and labels of many steps, flattened; :func:`labelled_steps` makes one of solutions."""

    scores: FloatArray
    """(steps,) scores, none missing."""
    labels: NDArray[np.bool_]
    """(steps,) whether each step is correct."""
    problems: IntArray
    """(steps,) number of the problem each step belongs to, from 0."""


@dataclass(frozen=True)
class StepMetrics(Result):
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
        labels: per solution its step labels: True/1 correct, False/0 incorrect, None unknown (left out).
        problems: per solution the id of its problem; None when every solution belongs to another problem.
        up_to_first_error: leave out the labelled steps after the first incorrect one of a solution.

    Returns:
        The labelled steps, solution after solution.

    Raises:
        DataError: a solution with another number of labels, another label, a labelled step without a score (NaN), or no
            labelled step.
    """
    owners = range(len(scores)) if problems is None else problems
    kept: list[tuple[float, bool, Hashable]] = []
    for index, (row, marks, owner) in enumerate(zip(scores, labels, owners, strict=True)):
        if len(row) != len(marks):
            raise DataError(f"solution {index} has {len(row)} scores but {len(marks)} labels: give one for each step")
        for step, (score, mark) in enumerate(zip(row, marks, strict=True)):
            if mark not in (0, 1, None) or (mark is not None and math.isnan(score)):
                raise DataError(
                    f"solution {index}, step {step}: label {mark!r}, score {score}: a label is True, False or None "
                    "(map neutral ones first), and a labelled step has a score (leave cut-off solutions out)"
                )
            if mark is not None:
                kept.append((score, bool(mark), owner))
            if up_to_first_error and mark == 0:
                break
    if not kept:
        raise DataError(f"none of the steps of {len(scores)} solutions has a label: give at least one True or False")
    found, correct, owner_of = zip(*kept, strict=True)
    return LabelledSteps(np.array(found, dtype=np.float64), np.array(correct, dtype=np.bool_), numbered(owner_of))


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
    called, correct = np.array([passes(score, threshold) is True for score in steps.scores]), steps.labels
    columns = np.stack(
        [called == correct, np.ones_like(correct), called & correct, correct, ~called & ~correct, ~correct], axis=1
    )
    sums = cluster_sums(columns, steps.problems)
    balanced = area = None
    if correct.any() and not correct.all():
        balanced = proper_width(cluster_bootstrap(sums[:, 2:], balanced_accuracy, **settings))
        area = proper_width(cluster_bootstrap(np.arange(sums.shape[0]), _auroc_statistic(steps), **settings))
    return StepMetrics(
        accuracy=ratio_interval(sums[:, 0], sums[:, 1], **settings),
        balanced_accuracy=balanced,
        auroc=area,
        positive_share=ratio_interval(sums[:, 3], sums[:, 1], **settings),
        threshold=threshold,
        steps=int(correct.size),
        problems=int(sums.shape[0]),
    )


def _auroc_statistic(steps: LabelledSteps) -> Statistic:
    """Statistic on drawn problem *numbers*: the ranking is sorted once, a resample only weights the steps.

    torchmetrics' ``binary_auroc`` agrees where it can: it computes in float32, squeezes scores outside [0, 1], which
    makes ties, and has no weights, so that resampling it by problem takes seven times as long. So it is with
    ``scipy.stats.mannwhitneyu``: no weights, nine times as long.
    """
    order = np.argsort(steps.scores, kind="stable")
    scores, owner = steps.scores[order], steps.problems[order]
    correct = steps.labels[order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
    n_problems = int(owner.max()) + 1
    chunk = max(1, CHUNK_ELEMENTS // scores.size)

    def area(drawn: IntArray) -> FloatArray:
        rows = np.arange(drawn.shape[0])[:, None] * n_problems
        counts = np.bincount((rows + drawn).reshape(-1), minlength=drawn.shape[0] * n_problems)
        weights = counts.reshape(-1, n_problems)[:, owner].astype(np.float64)
        good = np.add.reduceat(weights * correct, starts, axis=1)
        bad = np.add.reduceat(weights * (1.0 - correct), starts, axis=1)
        won = (good * (np.cumsum(bad, axis=1) - bad / 2)).sum(axis=1)
        pairs = good.sum(axis=1) * bad.sum(axis=1)
        return np.divide(won, pairs, out=np.full(won.shape, np.nan), where=pairs > 0)

    def statistic(resampled: FloatArray) -> FloatArray:
        drawn = resampled.astype(np.int64)
        return np.concatenate([area(drawn[i : i + chunk]) for i in range(0, drawn.shape[0], chunk)])

    return statistic


# --- calibration ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationReport(Result):
    """Calibration of probabilities against 0/1 labels."""

    ece: Interval
    """Expected calibration error, sum over bins of count/n * |accuracy - confidence|; biased upward in small samples,
    and its interval with it."""
    brier: Interval
    """Mean of (p - y)^2; 0 is perfect."""
    brier_base_rate: float
    """Brier score of answering the base rate always: ybar (1 - ybar)."""
    skill_base_rate: Interval | None
    """1 - brier / brier_base_rate: above 0 only if better than the base rate of these very labels."""
    skill_coin: Interval
    """1 - brier / 0.25: against answering 0.5 always."""
    base_rate: float
    """Share of positive labels."""
    conditional_mutual_information: Interval
    """I(prediction; input | label) in nats: how far predictions for one label differ; 0 where they are all the same (a
    teacher's: MCMI, arXiv 2401.08732)."""
    over_confidence: Mapping[str, Interval | None]
    """c, 0.8 and 0.9, -> share of negative labels among probabilities >= c."""
    bins: tuple[Mapping[str, float | None], ...]
    """The reliability diagram: per bin ``low`` (included), ``high`` (excluded, save in the last bin), ``count``, and
    its mean ``confidence`` and share of positive labels ``accuracy``, None when it is empty."""
    n: int
    """Probabilities."""
    problems: int
    """Problems they come from."""


def calibration_report(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    problems: Sequence[Hashable] | NDArray[np.int64] | None = None,
    bins: int = 10,
    **settings: Unpack[Resampling],
) -> CalibrationReport:
    """All calibration metrics of a set, with intervals.

    Args:
        probabilities: (n,) numbers in [0, 1], none missing.
        labels: (n,) 0 or 1 (bool).
        problems: (n,) id of the problem each comes from; None when each comes from another one.
        bins: bins of equal width of the reliability diagram and the ECE, at least 1.
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        The report; bounds are NaN where every resample gives the same value.

    Raises:
        DataError: no data, different lengths, a missing or impossible probability, another label.
    """
    p, y = checked(probabilities, labels)
    owners = range(p.size) if problems is None else problems
    edges = np.arange(1, bins) / bins  # not linspace: 3/10 is the float a score of 0.3 is
    place = np.searchsorted(edges, p, side="right")
    gaps = np.ones((p.size, bins + 1))  # the last column counts
    gaps[:, :-1] = np.where(place[:, None] == np.arange(bins), (y - p)[:, None], 0.0)
    squares = cluster_sums(np.stack([(p - y) ** 2, np.ones_like(p), y], axis=1), owners)
    brier = proper_width(cluster_bootstrap(squares[:, :2], ratio_of_sums, **settings))
    coin = 1 - brier.value / COIN_BRIER, 1 - brier.high / COIN_BRIER, 1 - brier.low / COIN_BRIER
    base_rate = float(y.mean())
    skill = proper_width(cluster_bootstrap(squares, _skill, **settings)) if 0.0 < base_rate < 1.0 else None
    over: dict[str, Interval | None] = {}
    for c in CONFIDENT:
        sums = cluster_sums(np.stack([(p >= c) & (y == 0), p >= c], axis=1), owners)
        over[f"{c:g}"] = ratio_interval(sums[:, 0], sums[:, 1], **settings) if sums[:, 1].any() else None
    spread = cluster_sums(np.stack([y == 0, p * (y == 0), y == 1, p * (y == 1), _entropy(p)], axis=1), owners)
    diagram = []
    for index in range(bins):
        count, inside = int((place == index).sum()), place == index
        means = (float(p[inside].mean()), float(y[inside].mean())) if count else (None, None)
        low, high = index / bins, (index + 1) / bins
        diagram.append({"low": low, "high": high, "count": count, "confidence": means[0], "accuracy": means[1]})
    return CalibrationReport(
        ece=proper_width(cluster_bootstrap(cluster_sums(gaps, owners), _ece, **settings)),
        brier=brier,
        brier_base_rate=base_rate * (1 - base_rate),
        skill_base_rate=skill,
        skill_coin=Interval(*coin, brier.method),
        base_rate=base_rate,
        conditional_mutual_information=proper_width(cluster_bootstrap(spread, _conditional_information, **settings)),
        over_confidence=over,
        bins=tuple(diagram),
        n=int(p.size),
        problems=len(squares),
    )


def _ece(resampled: FloatArray) -> FloatArray:
    """Columns: per bin the sum of label - probability, last the count."""
    sums = resampled.sum(axis=1)
    return np.asarray(np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1], dtype=np.float64)


def _skill(resampled: FloatArray) -> FloatArray:
    """Columns: sum of squares, count, sum of labels; NaN where a resample has labels of one kind only."""
    sums = resampled.sum(axis=1)
    rate = sums[:, 2] / sums[:, 1]
    # Counts are compared, not the rate: a mean of equal labels is exact only by luck of the division.
    mixed = (sums[:, 2] > 0) & (sums[:, 2] < sums[:, 1])
    reference = np.where(mixed, rate * (1 - rate), np.nan)
    return np.asarray(1.0 - sums[:, 0] / sums[:, 1] / reference, dtype=np.float64)


def _entropy(p: FloatArray) -> FloatArray:
    """Of a coin with this chance, in nats."""
    from scipy.special import entr

    return np.asarray(entr(p) + entr(1 - p), dtype=np.float64)


def _conditional_information(resampled: FloatArray) -> FloatArray:
    """Columns: for labels 0 and 1 the count and the sum of probabilities, last the sum of entropies.

    The mean distance of predictions from their mean is the entropy of the mean less their mean entropy.
    """
    sums = resampled.sum(axis=1)
    counts, totals = sums[:, 0:4:2], sums[:, 1:4:2]
    of_means = counts * _entropy(np.divide(totals, counts, out=np.zeros_like(totals), where=counts > 0))
    return np.asarray((of_means.sum(axis=1) - sums[:, 4]) / counts.sum(axis=1), dtype=np.float64)
