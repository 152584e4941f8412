"""What step scores mean, beyond their accuracy: where the lowest one falls, whether they follow a step's number or its
length, and what swapping two steps does.

* A model whose lowest score is nearly always at the last step judges outcomes: it is an outcome model in disguise
  (core-methods 5.5; Zhang et al. 2025, arXiv 2501.07301). The comparison with a place drawn at random, step by step, is
  our form.
* Scores of correct steps that go with the step's number or its length are biased. The form (rank correlations over
  correct steps, and how far predicted first errors lie behind the true ones) is ours.
* Swapping two adjacent steps should cost score when the second needs the first, and leave it alone when it does not:
  our adaptation of CaT-BENCH (arXiv 2406.15823), which asks a model whether one step of a plan must precede another.
  Here the step scorer is not asked, its score of the swapped solution is compared with that of the original.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Unpack

import numpy as np

from stepkd.errors import DataError
from stepkd.scorers.scorer import Meaning, reduce_scores
from stepkd.statistics import (
    FloatArray,
    Resampling,
    cluster_bootstrap,
    cluster_sums,
    proper_width,
    ratio_interval,
    ratio_of_sums,
)
from stepkd.tasks.base import is_answer
from stepkd.tasks.rows import row_problem


def argmin_positions(
    scores: Sequence[Sequence[float]],
    *,
    problems: Sequence[Hashable] | None = None,
    bins: int = 10,
    **settings: Unpack[Resampling],
) -> dict[str, Any]:
    """Histogram of where the lowest score falls: a process model whose lowest score is always last is an ORM.

    Args:
        scores: per solution its step scores, none missing.
        problems: per solution the id of its problem; None when every solution belongs to another problem.
        bins: bins of the relative position, at least 1.
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        JSON values. ``observed``: solutions whose lowest score falls into each bin of the relative position
        (i + 1/2) / H, equal lowest scores sharing their solution, and ``expected``: the same if every step were equally
        likely to be lowest; the bins' ``edges``, from 0 to 1. ``share_last``: share of solutions whose lowest score is
        at the last step, ``expected_last``: the mean of 1/H, and ``excess_last``: the former minus the latter, paired
        by problem; far above 0, the scorer acts as an outcome model. ``solutions`` counted, and those of a
        ``single_step``, which are left out.

    Raises:
        DataError: a missing score (an outcome scorer has no positions), or no solution with at least two steps.
    """
    owners = range(len(scores)) if problems is None else problems
    observed, expected = np.zeros(bins), np.zeros(bins)
    counted, owner_of = [], []
    for index, (row, owner) in enumerate(zip(scores, owners, strict=True)):
        values = np.asarray(row, dtype=np.float64)
        if np.isnan(values).any():
            raise DataError(f"solution {index} has a step without a score (NaN): its lowest score has no position")
        if values.size < 2:
            continue
        lowest = values == values.min()
        share, chance = lowest / lowest.sum(), 1.0 / values.size
        # Integers: (2i + 1) / 2H times the bins, rounded down without a rounding error.
        place = (2 * np.arange(values.size) + 1) * bins // (2 * values.size)
        np.add.at(observed, place, share)
        np.add.at(expected, place, chance)
        counted.append((share[-1], 1.0, share[-1] - chance))
        owner_of.append(owner)
    if not counted:
        raise DataError(f"none of {len(scores)} solutions has two steps or more: there are no positions to compare")
    sums = cluster_sums(counted, owner_of)
    return {
        "edges": (np.arange(bins + 1) / bins).tolist(),
        "observed": observed.tolist(),
        "expected": expected.tolist(),
        "share_last": ratio_interval(sums[:, 0], sums[:, 1], **settings).to_dict(),
        "expected_last": float((sums[:, 0] - sums[:, 2]).sum() / sums[:, 1].sum()),
        "excess_last": proper_width(cluster_bootstrap(sums[:, [2, 1]], ratio_of_sums, **settings)).to_dict(),
        "solutions": len(counted),
        "single_step": len(scores) - len(counted),
    }


PLACES = 10
"""Step numbers that :func:`score_bias` tells apart; the last one stands for all from there on."""


def score_bias(
    scores: Sequence[Sequence[float]],
    labels: Sequence[Sequence[bool | None]],
    steps: Sequence[Sequence[str]],
    first_errors: Sequence[tuple[int | None, int]],
    *,
    problems: Sequence[Hashable],
    **settings: Unpack[Resampling],
) -> dict[str, Any] | None:
    """Whether scores of correct steps follow the step's number or its length, and where first errors are predicted.

    Args:
        scores: per solution its step scores, none missing.
        labels: per solution its step labels; only steps that are labelled correct count.
        steps: per solution its step texts.
        first_errors: per solution the true and the predicted index of the first incorrect step, -1: none; the true one
            is None where labels leave it open.
        problems: per solution the id of its problem.
        **settings: see :class:`~stepkd.statistics.Resampling`; problems are resampled, ranks are kept.

    Returns:
        JSON values. ``position`` and ``length``: Spearman's rank correlation of the score with the step's number and
        with its characters, over correct steps (of fewer than two different values: None). ``lateness``: by how many
        steps the predicted first error is behind the true one, the mean over solutions that have both (None without
        one). ``places``: for each ``step`` number from 1 to `PLACES` (there all behind it, too) the correct ``steps``,
        their mean ``score`` (None without one), and how many first errors are there: ``true``, ``predicted``. None as a
        whole where no step is labelled correct.
    """
    kept = [
        (score, number, len(text), owner)
        for row, marks, texts, owner in zip(scores, labels, steps, problems, strict=True)
        for number, (score, mark, text) in enumerate(zip(row, marks, texts, strict=True), start=1)
        if mark
    ]
    if not kept:
        return None

    def mean(values: Sequence[tuple[float, Hashable]]) -> dict[str, Any] | None:
        sums = cluster_sums([(value, 1.0) for value, _ in values], [owner for _, owner in values]) if values else None
        return None if sums is None else proper_width(cluster_bootstrap(sums, ratio_of_sums, **settings)).to_dict()

    pairs = zip(first_errors, problems, strict=True)
    known = [(true, found, owner) for (true, found), owner in pairs if true is not None]
    places = []
    for at in range(PLACES):
        here = [(score, owner) for score, number, _, owner in kept if min(number, PLACES) == at + 1]
        true = sum(min(each[0], PLACES - 1) == at for each in known)
        predicted = sum(min(each[1], PLACES - 1) == at for each in known)
        places.append({"step": at + 1, "steps": len(here), "score": mean(here), "true": true, "predicted": predicted})
    score_N, number_N, length_N = np.array([each[:3] for each in kept], dtype=np.float64).T
    owners = [each[3] for each in kept]
    return {
        "position": _rank_correlation(score_N, number_N, owners, **settings),
        "length": _rank_correlation(score_N, length_N, owners, **settings),
        "lateness": mean([(found - true, owner) for true, found, owner in known if min(true, found) >= 0]),
        "places": places,
    }


def _rank_correlation(
    a_N: FloatArray, b_N: FloatArray, owners: Sequence[Hashable], **settings: Unpack[Resampling]
) -> dict[str, Any] | None:
    """Pearson's correlation of the ranks (of equal values their mean), from sums by problem; None: all are equal."""
    from scipy.stats import rankdata

    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (a_N, b_N))
    if not (a.any() and b.any()):
        return None

    def pearson(resampled: FloatArray) -> FloatArray:
        n, sum_a, sum_b, aa, bb, ab = resampled.sum(axis=1).T
        spread = (aa - sum_a**2 / n) * (bb - sum_b**2 / n)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((ab - sum_a * sum_b / n) / np.sqrt(spread), dtype=np.float64)

    sums = cluster_sums(np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1), owners)
    return proper_width(cluster_bootstrap(sums, pearson, **settings)).to_dict()


TOLERANCE = 0.05
"""Largest change of a solution's score that counts as none."""


def task_swaps(row: Mapping[str, Any], *, dependent: bool = True) -> list[tuple[list[str], list[str]]]:
    """The correct solution of a tiny-world problem, beside each swap of two adjacent lines of which the second needs
    the first, or does not.

    The exact checker tells what a line needs (``given="claims"``): the line before, or in the task ``independent``
    nothing. The answer line is not swapped (an early answer shows by its form), nor are equal lines.

    Args:
        row: a row of :func:`stepkd.tasks.make_rows`; its solution is made anew, free of slips.
        dependent: which swaps; those that need each other, or the others.

    Returns:
        Original and swapped steps, by the position of the swap; none for solutions of one line and the answer.

    Raises:
        DataError: not such a row.
    """
    task, problem = row_problem(row)
    steps = task.solution(problem)
    swaps = []
    for i, (first, second) in enumerate(pairwise(steps)):
        swapped = [*steps[:i], second, first, *steps[i + 2 :]]
        if first == second or is_answer(second):
            continue
        if all(task.check_solution(problem, swapped, given="claims")) != dependent:
            swaps.append((steps, swapped))
    return swaps


def order_swap_test(
    scores: Sequence[Sequence[Sequence[float | None]]],
    problems: Sequence[Hashable],
    *,
    meaning: Meaning,
    dependent: bool = True,
    **settings: Unpack[Resampling],
) -> dict[str, Any] | None:
    """Compare the scores of original and swapped solutions.

    Args:
        scores: per swap the step scores of its two solutions (:func:`task_swaps`); NaN or None: no score.
        problems: per swap the id of its problem.
        meaning: decides how step scores become one (:func:`~stepkd.scorers.scorer.reduce_scores`).
        dependent: whether the swapped steps need each other.
        **settings: see :class:`~stepkd.statistics.Resampling`; problems are resampled.

    Returns:
        JSON values: ``drop_rate``, the share of swaps whose score falls by more than `TOLERANCE` (1 is best), or of
        independent steps ``change_rate``, the share whose score changes by more than that, up or down (0 is best);
        ``mean_drop``, of original minus swapped score; ``swaps`` scored, and ``unscored`` ones, of which a solution has
        no score. None where all are unscored.
    """
    counted, owners = [], []
    for pair, owner in zip(scores, problems, strict=True):
        numbers = ([math.nan if value is None else value for value in each] for each in pair)
        before, after = (reduce_scores(each, meaning=meaning) for each in numbers)
        if before is not None and after is not None:
            drop = before - after
            moved = drop if dependent else abs(drop)
            counted.append((moved > TOLERANCE + 1e-12, 1.0, drop))  # a change of the tolerance is none
            owners.append(owner)
    if not counted:
        return None
    sums = cluster_sums(counted, owners)
    return {
        "drop_rate" if dependent else "change_rate": ratio_interval(sums[:, 0], sums[:, 1], **settings).to_dict(),
        "mean_drop": cluster_bootstrap(sums[:, [2, 1]], ratio_of_sums, **settings).to_dict(),
        "swaps": len(counted),
        "unscored": len(scores) - len(counted),
    }
