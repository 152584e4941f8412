"""What step scores mean, beyond their accuracy: where the lowest one falls, and what swapping two steps does.

* A model whose lowest score is nearly always at the last step judges outcomes: it is an outcome model in disguise
  (core-methods 5.5; Zhang et al. 2025, arXiv 2501.07301). The comparison with a place drawn at random, step by step, is
  our form.
* Swapping two adjacent steps should cost score when the second needs the first: our adaptation of CaT-BENCH
  (arXiv 2406.15823), which asks a model whether one step of a plan must precede another. Here the step scorer is not
  asked, its score of the swapped solution is compared with that of the original.
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


TOLERANCE = 0.05
"""Largest change of a solution's score that counts as none."""


def task_swaps(row: Mapping[str, Any]) -> list[tuple[list[str], list[str]]]:
    """The correct solution of a tiny-world problem, beside each swap of two adjacent lines of which the second needs
    the first.

    The exact checker tells what a line needs (``given="claims"``); in every present task it is the line before. The
    answer line is not swapped (an early answer shows by its form), nor are equal lines.

    Args:
        row: a row of :func:`stepkd.tasks.make_rows`; its solution is made anew, free of slips.

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
        if first != second and not is_answer(second) and not all(task.check_solution(problem, swapped, given="claims")):
            swaps.append((steps, swapped))
    return swaps


def order_swap_test(
    scores: Sequence[Sequence[Sequence[float | None]]],
    problems: Sequence[Hashable],
    *,
    meaning: Meaning,
    **settings: Unpack[Resampling],
) -> dict[str, Any] | None:
    """Compare the scores of original and swapped solutions.

    Args:
        scores: per swap the step scores of its two solutions (:func:`task_swaps`); NaN or None: no score.
        problems: per swap the id of its problem.
        meaning: decides how step scores become one (:func:`~stepkd.scorers.scorer.reduce_scores`).
        **settings: see :class:`~stepkd.statistics.Resampling`; problems are resampled.

    Returns:
        JSON values: ``drop_rate``, the share of swaps whose score falls by more than `TOLERANCE` (1 is best);
        ``mean_drop``, of original minus swapped score; ``swaps`` scored, and ``unscored`` ones, of which a solution has
        no score. None where all are unscored.
    """
    counted, owners = [], []
    for pair, owner in zip(scores, problems, strict=True):
        numbers = ([math.nan if value is None else value for value in each] for each in pair)
        before, after = (reduce_scores(each, meaning=meaning) for each in numbers)
        if before is not None and after is not None:
            drop = before - after
            counted.append((drop > TOLERANCE + 1e-12, 1.0, drop))  # a change of the tolerance is none
            owners.append(owner)
    if not counted:
        return None
    sums = cluster_sums(counted, owners)
    return {
        "drop_rate": ratio_interval(sums[:, 0], sums[:, 1], **settings).to_dict(),
        "mean_drop": cluster_bootstrap(sums[:, [2, 1]], ratio_of_sums, **settings).to_dict(),
        "swaps": len(counted),
        "unscored": len(scores) - len(counted),
    }
