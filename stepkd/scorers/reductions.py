"""Step scores of a solution -> one score of the solution.

Which reduction suits which scores (Zhang et al. 2025, arXiv 2501.07301; core-methods 5.4): judged or human labels say
whether a step is right, so a solution is as good as all its steps together (``product``, Lightman et al. 2023, or
``min``, Wang et al. 2023); Monte-Carlo labels estimate future success, so the ``last`` one already sums up the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from stepkd.errors import DataError, check_choice
from stepkd.scorers.scorer import Meaning

Reduction = Literal["product", "min", "mean", "last"]
"""How step scores become one: their product (favours short solutions), lowest, mean, or last score."""


@dataclass(frozen=True)
class ReducedScores:
    """One score per solution, and how many have none."""

    values: list[list[float | None]]
    """Per problem and solution a score in [0, 1], or None where the solution is unscored."""
    solutions: int
    """Number of solutions."""
    unscored: int
    """Solutions with a missing (NaN) step score that the reduction needs."""


def default_reduction(meaning: Meaning) -> Reduction:
    """The reduction that suits what the scores mean: ``product`` for correctness, ``last`` for value and outcome.

    Raises:
        ConfigError: an unknown meaning.
    """
    check_choice("meaning of scores", meaning, get_args(Meaning))
    return "product" if meaning == "correctness" else "last"


def log_product(scores: Sequence[float]) -> float:
    """Sum of the logarithms: ranks solutions whose product would underflow; ``-inf`` when a score is 0.

    Args:
        scores: numbers in [0, 1], at least one, none missing.

    Raises:
        DataError: no scores, or a score outside [0, 1] or NaN.
    """
    values = _checked(scores)
    missing = next((index for index, value in enumerate(values) if math.isnan(value)), None)
    if missing is not None:
        raise DataError(f"step {missing} has no score (NaN): leave the solution out, or use reduce_scores")
    return -math.inf if 0.0 in values else math.fsum(map(math.log, values))


def reduce_scores(scores: Sequence[float], reduction: Reduction | None = None, *, meaning: Meaning) -> float | None:
    """Reduce the step scores of one solution to one.

    Args:
        scores: (steps,) numbers in [0, 1], the higher the better; NaN where a step has no score.
        reduction: how; None for the one that suits ``meaning``.
        meaning: what the scores estimate. An ``outcome`` scorer judges only the last step: NaN before it is ignored.

    Returns:
        A score in [0, 1]; None (the solution is unscored) when a step is NaN, save those just named: half a solution's
        product or minimum is not comparable with a whole one's.

    Raises:
        DataError: no scores, or a score outside [0, 1].
        ConfigError: an unknown reduction or meaning.
    """
    default = default_reduction(meaning)
    reduction = default if reduction is None else reduction
    check_choice("reduction", reduction, get_args(Reduction))
    values = _checked(scores)
    if meaning == "outcome":
        values = [value for value in values[:-1] if not math.isnan(value)] + values[-1:]
    if any(map(math.isnan, values)):
        return None
    if reduction == "product":
        return math.exp(log_product(values))
    if reduction == "min":
        return min(values)
    return math.fsum(values) / len(values) if reduction == "mean" else values[-1]


def reduce_solutions(
    scores: Sequence[Sequence[Sequence[float]]], reduction: Reduction | None = None, *, meaning: Meaning
) -> ReducedScores:
    """Reduce what `StepScorer.score` returns, and count the solutions that come out unscored.

    Args:
        scores: per problem and solution the step scores.
        reduction, meaning: as in `reduce_scores`.

    Raises:
        DataError: as in `reduce_scores`, naming problem and solution (both counted from 0).
        ConfigError: an unknown reduction or meaning.
    """
    values: list[list[float | None]] = []
    for problem, solutions in enumerate(scores):
        values.append([])
        for index, steps in enumerate(solutions):
            try:
                values[-1].append(reduce_scores(steps, reduction, meaning=meaning))
            except DataError as error:
                raise DataError(f"problem {problem}, solution {index}: {error}") from None
    flat = [value for row in values for value in row]
    return ReducedScores(values, len(flat), sum(value is None for value in flat))


def _checked(scores: Sequence[float]) -> list[float]:
    values = [float(score) for score in scores]
    if not values:
        raise DataError("a solution without step scores cannot be reduced: give at least one step")
    for index, value in enumerate(values):
        if not (math.isnan(value) or 0.0 <= value <= 1.0):
            raise DataError(f"step {index} has score {value!r}: step scores are probabilities in [0, 1]")
    return values
