"""Where in a solution the lowest step score falls: is it a process model, or an outcome model in disguise?

A model whose lowest score is nearly always at the last step judges outcomes (core-methods 5.5; Zhang et al. 2025, arXiv
2501.07301). The comparison with a place drawn at random, step by step, is our form.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepkd.errors import DataError
from stepkd.evaluation.step_metrics import cluster_sums, proper_width
from stepkd.statistics import Interval, cluster_bootstrap, plain_dict, ratio_interval, ratio_of_sums


@dataclass(frozen=True)
class ArgminPositions:
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

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return plain_dict(self)


def argmin_positions(
    scores: Sequence[Sequence[float]],
    *,
    problems: Sequence[Hashable] | None = None,
    bins: int = 10,
    level: float = 0.95,
    seed: int = 0,
    n_resamples: int = 10_000,
) -> ArgminPositions:
    """Histogram of where the lowest score falls: a process model whose lowest score is always last is an ORM.

    Args:
        scores: per solution its step scores, none missing.
        problems: per solution the id of its problem; None when every solution belongs to another problem.
        bins: bins of the relative position, at least 1.
        level, seed, n_resamples: as in :func:`~stepkd.statistics.cluster_bootstrap`.

    Raises:
        DataError: a missing score (an outcome scorer has no positions), different lengths, no bins, or no solution
            with at least two steps.
    """
    owners = list(range(len(scores))) if problems is None else list(problems)
    if len(owners) != len(scores) or bins < 1:
        raise DataError(f"{len(scores)} solutions, {len(owners)} problem ids, {bins} bins: one id each, bins >= 1")
    observed, expected = np.zeros(bins), np.zeros(bins)
    number: dict[Hashable, int] = {}
    counted, owner_of = [], []
    for index, row in enumerate(scores):
        values = np.asarray(row, dtype=np.float64)
        if np.isnan(values).any():
            raise DataError(
                f"solution {index}, step {int(np.isnan(values).argmax())} has no score (NaN): the lowest score has no "
                "position in a cut-off solution, nor with an outcome scorer"
            )
        if values.size < 2:
            continue
        lowest = values == values.min()
        # Integers: (2i + 1) / 2H times the bins, rounded down without a rounding error.
        place = (2 * np.arange(values.size) + 1) * bins // (2 * values.size)
        np.add.at(observed, place, lowest / lowest.sum())
        np.add.at(expected, place, 1.0 / values.size)
        counted.append((lowest[-1] / lowest.sum(), 1.0, lowest[-1] / lowest.sum() - 1.0 / values.size))
        owner_of.append(number.setdefault(owners[index], len(number)))
    if not counted:
        raise DataError(f"none of {len(scores)} solutions has two steps or more: there are no positions to compare")
    sums = cluster_sums(np.array(counted), np.array(owner_of, dtype=np.int64))
    settings: dict[str, Any] = {"level": level, "seed": seed, "n_resamples": n_resamples}
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
