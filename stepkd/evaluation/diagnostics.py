"""What step scores mean, beyond their accuracy: where the lowest one falls, and what swapping two steps does.

* A model whose lowest score is nearly always at the last step judges outcomes: it is an outcome model in disguise
  (core-methods 5.5; Zhang et al. 2025, arXiv 2501.07301). The comparison with a place drawn at random, step by step, is
  our form.
* Swapping two adjacent steps should cost score exactly when the second needs the first: our adaptation of CaT-BENCH
  (arXiv 2406.15823), which asks a model whether one step of a plan must precede another. Here the step scorer is not
  asked, its score of the swapped solution is compared with that of the original.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from stepkd.errors import ConfigError, DataError
from stepkd.scorers.scorer import Meaning, Reduction, Solutions, reduce_scores
from stepkd.statistics import (
    FloatArray,
    Interval,
    Resampling,
    Result,
    cluster_bootstrap,
    cluster_sums,
    proper_width,
    ratio_interval,
    ratio_of_sums,
)
from stepkd.tasks.base import is_answer
from stepkd.tasks.rows import row_problem


@dataclass(frozen=True)
class ArgminPositions(Result):
    """Where in its solution the lowest step score falls, against a place drawn at random."""

    edges: tuple[float, ...]
    """Bin edges of the relative position (i + 1/2) / H, from 0 to 1."""
    observed: tuple[float, ...]
    """Solutions whose lowest score falls into each bin; equal lowest scores share their solution."""
    expected: tuple[float, ...]
    """The same if every step were equally likely to be lowest."""
    share_last: Interval
    """Share of solutions whose lowest score is at the last step."""
    expected_last: float
    """The same at random: the mean of 1/H."""
    excess_last: Interval
    """The former minus the latter, paired by problem: far above 0, the scorer acts as an outcome model."""
    solutions: int
    """Solutions counted."""
    single_step: int
    """Solutions left out because they have one step only."""


def argmin_positions(
    scores: Sequence[Sequence[float]],
    *,
    problems: Sequence[Hashable] | None = None,
    bins: int = 10,
    **settings: Unpack[Resampling],
) -> ArgminPositions:
    """Histogram of where the lowest score falls: a process model whose lowest score is always last is an ORM.

    Args:
        scores: per solution its step scores, none missing.
        problems: per solution the id of its problem; None when every solution belongs to another problem.
        bins: bins of the relative position, at least 1.
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Raises:
        DataError: a missing score (an outcome scorer has no positions), different lengths, no bins, or no solution
            with at least two steps.
    """
    owners = range(len(scores)) if problems is None else problems
    if len(owners) != len(scores) or bins < 1:
        raise DataError(f"{len(scores)} solutions, {len(owners)} problem ids, {bins} bins: one id each, bins >= 1")
    observed, expected = np.zeros(bins), np.zeros(bins)
    counted, owner_of = [], []
    for index, (row, owner) in enumerate(zip(scores, owners, strict=True)):
        values = np.asarray(row, dtype=np.float64)
        if np.isnan(values).any():
            raise DataError(
                f"solution {index}, step {int(np.isnan(values).argmax())} has no score (NaN): the lowest score has no "
                "position in a cut-off solution, nor with an outcome scorer"
            )
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
    return ArgminPositions(
        edges=tuple((np.arange(bins + 1) / bins).tolist()),
        observed=tuple(observed.tolist()),
        expected=tuple(expected.tolist()),
        share_last=ratio_interval(sums[:, 0], sums[:, 1], **settings),
        expected_last=float((sums[:, 0] - sums[:, 2]).sum() / sums[:, 1].sum()),
        excess_last=proper_width(cluster_bootstrap(sums[:, [2, 1]], ratio_of_sums, **settings)),
        solutions=len(counted),
        single_step=len(scores) - len(counted),
    )


@dataclass(frozen=True)
class Swap:
    """A solution, and the same with two adjacent steps swapped."""

    row: Mapping[str, Any]
    """The problem row; its ``id`` is the unit of resampling."""
    steps: tuple[str, ...]
    """The original steps."""
    swapped: tuple[str, ...]
    """The steps with ``position`` and ``position + 1`` swapped."""
    position: int
    """0-based index of the first of the two."""
    dependent: bool
    """Whether the second step needs the first."""

    def solutions(self) -> Solutions:
        """What a scorer scores: the original and the swapped solution, in this order."""
        return Solutions(self.row, [self.steps, self.swapped])


@dataclass(frozen=True)
class OrderSwapResult(Result):
    """How scores react to swaps; a part without swaps is None."""

    dependent_drop_rate: Interval | None
    """Share of dependent swaps whose score falls by more than the tolerance; 1 is best."""
    independent_stay_rate: Interval | None
    """Share of independent swaps whose score stays within the tolerance; 1 is best."""
    dependent_mean_drop: Interval | None
    """Mean of original minus swapped score over dependent swaps."""
    independent_mean_drop: Interval | None
    """The same over independent swaps; 0 is best."""
    dependent: int
    """Dependent swaps scored."""
    independent: int
    """Independent swaps scored."""
    unscored: int
    """Swaps left out because one of the two solutions has no score."""
    tolerance: float
    """Largest change that counts as staying."""


def swap_adjacent(steps: Sequence[str], position: int) -> list[str]:
    """Swap step ``position`` with the next; white space at a step's end (its separator) keeps its place.

    Raises:
        ConfigError: there are no two steps there.
    """
    if not 0 <= position < len(steps) - 1:
        raise ConfigError(f"no two adjacent steps at position {position} of {len(steps)}: 0 to {len(steps) - 2} are")
    swapped = list(steps)
    first, second = steps[position], steps[position + 1]
    swapped[position] = second.rstrip() + first[len(first.rstrip()) :]
    swapped[position + 1] = first.rstrip() + second[len(second.rstrip()) :]
    return swapped


def task_swaps(row: Mapping[str, Any]) -> list[Swap]:
    """All swaps of adjacent lines of a tiny-world problem's correct solution, dependency told by the exact checker.

    A swap whose lines all still follow from the lines before them (``given="claims"``) is independent, any other
    dependent. In every present task each line builds on the one before it, so all swaps are dependent; for independent
    ones build `Swap` objects from your own data. The answer line is not swapped (an early answer shows by its form),
    nor are equal lines.

    Args:
        row: a row of :func:`stepkd.tasks.make_rows`; its solution is made anew, free of slips.

    Returns:
        The swaps, in the order of their position; none for solutions of one line and the answer.

    Raises:
        DataError: not such a row.
    """
    task, problem = row_problem(row)
    steps = task.solution(problem)
    swaps = []
    for position in range(len(steps) - 1):
        swapped = swap_adjacent(steps, position)
        if swapped != steps and not is_answer(steps[position + 1]):
            dependent = not all(task.check_solution(problem, swapped, given="claims"))
            swaps.append(Swap(row, tuple(steps), tuple(swapped), position, dependent))
    return swaps


def order_swap_test(
    swaps: Sequence[Swap],
    scores: Sequence[Sequence[Sequence[float]]],
    *,
    meaning: Meaning,
    reduction: Reduction | None = None,
    tolerance: float = 0.05,
    **settings: Unpack[Resampling],
) -> OrderSwapResult:
    """Compare the scores of original and swapped solutions.

    Args:
        swaps: the swaps.
        scores: for each swap the step scores of its two solutions: ``scorer.score([s.solutions() for s in swaps])``.
        meaning, reduction: how step scores become one, as in :func:`~stepkd.scorers.scorer.reduce_scores`.
        tolerance: changes up to this are no change, in [0, 1].
        **settings: see :class:`~stepkd.statistics.Resampling`; problems are resampled.

    Raises:
        DataError: no swaps, scores that do not fit them, or none that has both scores.
        ConfigError: a tolerance out of range, or an unknown reduction or meaning.
    """
    if not 0.0 <= tolerance <= 1.0:
        raise ConfigError(f"tolerance={tolerance!r} must lie in [0, 1]")
    if not swaps or len(swaps) != len(scores):
        raise DataError(f"{len(scores)} scored pairs for {len(swaps)} swaps: there must be one for each, at least one")
    drops, kinds, owners = [], [], []
    for index, (swap, pair) in enumerate(zip(swaps, scores, strict=True)):
        if len(pair) != 2 or [len(each) for each in pair] != [len(swap.steps), len(swap.swapped)]:
            raise DataError(
                f"swap {index} has {[len(each) for each in pair]} step scores, its two solutions have "
                f"{[len(swap.steps), len(swap.swapped)]} steps: score what Swap.solutions gives"
            )
        before, after = (reduce_scores(each, reduction, meaning=meaning) for each in pair)
        if before is not None and after is not None:
            drops.append(before - after)
            kinds.append(swap.dependent)
            owners.append(swap.row.get("id", f"row {index}"))
    if not drops:
        raise DataError(f"none of {len(swaps)} swaps has a score for both solutions")
    drop, dependent = np.array(drops), np.array(kinds)
    falls, stays = drop > tolerance + 1e-12, np.abs(drop) <= tolerance + 1e-12  # a change of the tolerance is none

    def part(kind: Any, good: Any) -> tuple[Interval | None, Interval | None]:
        sums: FloatArray = cluster_sums(np.stack([good & kind, kind, drop * kind], axis=1), owners)
        sums = sums[sums[:, 1] > 0]
        if not len(sums):
            return None, None
        rate = ratio_interval(sums[:, 0], sums[:, 1], **settings)
        return rate, cluster_bootstrap(sums[:, [2, 1]], ratio_of_sums, **settings)

    (drop_rate, dependent_drop), (stay_rate, independent_drop) = part(dependent, falls), part(~dependent, stays)
    return OrderSwapResult(
        dependent_drop_rate=drop_rate,
        independent_stay_rate=stay_rate,
        dependent_mean_drop=dependent_drop,
        independent_mean_drop=independent_drop,
        dependent=int(dependent.sum()),
        independent=int((~dependent).sum()),
        unscored=len(swaps) - len(drops),
        tolerance=tolerance,
    )
