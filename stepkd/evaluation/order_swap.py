"""Order-swap test: swapping two adjacent steps should cost score exactly when the second needs the first.

Our adaptation of CaT-BENCH (arXiv 2406.15823), which asks a model whether one step of a plan must precede another: here
the step scorer is not asked, its score of the swapped solution is compared with that of the original.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.step_metrics import cluster_sums
from stepkd.scorers.reductions import Reduction, reduce_scores
from stepkd.scorers.scorer import Meaning, Solutions
from stepkd.statistics import Interval, cluster_bootstrap, plain_dict, ratio_interval, ratio_of_sums
from stepkd.tasks import row_problem
from stepkd.tasks.base import is_answer


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
class OrderSwapResult:
    """How scores react to swaps; a part without swaps is None."""

    dependent_drop_rate: Interval | None
    """Share of dependent swaps whose score falls by more than the tolerance; 1 is right."""
    independent_stay_rate: Interval | None
    """Share of independent swaps whose score stays within the tolerance; 1 is right."""
    dependent_mean_drop: Interval | None
    """Mean of original minus swapped score over dependent swaps."""
    independent_mean_drop: Interval | None
    """The same over independent swaps; 0 is right."""
    dependent: int
    """Dependent swaps scored."""
    independent: int
    """Independent swaps scored."""
    unscored: int
    """Swaps left out because one of the two solutions has no score."""
    tolerance: float
    """Largest change that counts as staying."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return plain_dict(self)


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
    """All swaps of adjacent lines of a tiny-world problem's right solution, dependency told by the exact checker.

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
        if is_answer(steps[position + 1]):
            continue
        swapped = swap_adjacent(steps, position)
        if swapped == steps:
            continue
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
    level: float = 0.95,
    seed: int = 0,
    n_resamples: int = 10_000,
) -> OrderSwapResult:
    """Compare the scores of original and swapped solutions.

    Args:
        swaps: the swaps.
        scores: for each swap the step scores of its two solutions: ``scorer.score([s.solutions() for s in swaps])``.
        meaning, reduction: how step scores become one, as in :func:`~stepkd.scorers.reductions.reduce_scores`.
        tolerance: changes up to this are no change, in [0, 1].
        level, seed, n_resamples: as in :func:`~stepkd.statistics.cluster_bootstrap`; problems are resampled.

    Raises:
        DataError: no swaps, scores that do not fit them, or none that has both scores.
        ConfigError: a tolerance out of range, or an unknown reduction or meaning.
    """
    if not 0.0 <= tolerance <= 1.0:
        raise ConfigError(f"tolerance={tolerance!r} must lie in [0, 1]")
    if not swaps or len(swaps) != len(scores):
        raise DataError(f"{len(scores)} scored pairs for {len(swaps)} swaps: there must be one for each, at least one")
    number: dict[Hashable, int] = {}
    drops: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    unscored = 0
    for index, (swap, pair) in enumerate(zip(swaps, scores, strict=True)):
        if len(pair) != 2 or [len(each) for each in pair] != [len(swap.steps), len(swap.swapped)]:
            raise DataError(
                f"swap {index} has {[len(each) for each in pair]} step scores, its two solutions have "
                f"{[len(swap.steps), len(swap.swapped)]} steps: score what Swap.solutions gives"
            )
        before, after = (reduce_scores(each, reduction, meaning=meaning) for each in pair)
        if before is None or after is None:
            unscored += 1
            continue
        owner = number.setdefault(swap.row.get("id", f"row {index}"), len(number))
        drops[swap.dependent].append((before - after, owner))
    if not any(drops.values()):
        raise DataError(f"none of {len(swaps)} swaps has a score for both solutions")
    settings: dict[str, Any] = {"level": level, "seed": seed, "n_resamples": n_resamples}
    rates: dict[bool, Interval | None] = {True: None, False: None}
    means: dict[bool, Interval | None] = {True: None, False: None}
    for dependent, pairs in drops.items():
        if not pairs:
            continue
        drop, owner_of = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs], dtype=np.int64)
        # Rounding aside: a change of exactly the tolerance is none.
        good = drop > tolerance + 1e-12 if dependent else np.abs(drop) <= tolerance + 1e-12
        sums = cluster_sums(np.stack([good, np.ones_like(drop), drop], axis=1), owner_of)
        sums = sums[sums[:, 1] > 0]
        rates[dependent] = ratio_interval(sums[:, 0], sums[:, 1], **settings)
        means[dependent] = cluster_bootstrap(sums[:, [2, 1]], ratio_of_sums, **settings)
    return OrderSwapResult(
        dependent_drop_rate=rates[True],
        independent_stay_rate=rates[False],
        dependent_mean_drop=means[True],
        independent_mean_drop=means[False],
        dependent=len(drops[True]),
        independent=len(drops[False]),
        unscored=unscored,
        tolerance=tolerance,
    )
