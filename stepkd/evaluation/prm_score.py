"""PRMBench: are correct steps told from incorrect ones, by class of error and over all? And the mean of ProcessBench.

Source: PRMBench (Song et al. 2025, arXiv 2501.03124) and its code, github ssmisya/PRMBench. Unlike in ProcessBench
every step is judged, also behind the first error, and steps are pooled: F1 takes the correct steps for positive, the
negative F1 the incorrect ones, and PRMScore is half of each (the weights of the code). A class without incorrect steps
(``multi_solutions``) has its F1 in place of it, as in the code's tables. There a step is correct above a threshold of
the model's own, here at or above one for all; redundant and circular steps count as incorrect.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike

from stepkd.evaluation.step_metrics import LabelledSteps, labelled_steps
from stepkd.scorers.scorer import problem_key
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
from stepkd.steps.labels import passes

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PRMScore(Result):
    """PRMBench's numbers of one class, or of all; what has no steps to judge is None."""

    score: Interval
    """PRMScore: the mean of both F1, or the F1 alone where there is no incorrect step."""
    f1: Interval
    """F1 of calling steps correct, over steps."""
    negative_f1: Interval | None
    """F1 of calling steps incorrect, over steps."""
    acc_correct: Interval | None
    """Share of the correct steps that are called correct."""
    acc_incorrect: Interval | None
    """Share of the incorrect steps that are called incorrect."""
    n_correct: int
    """Correct steps."""
    n_incorrect: int
    """Incorrect steps."""
    baselines: Mapping[str, float]
    """PRMScore of calling every step correct (``always positive``), and of uniformly random scores (``random``: of its
    expected counts)."""


def harmonic_mean(a: ArrayLike, b: ArrayLike) -> FloatArray:
    """``2ab / (a + b)``, as in F1.

    Args:
        a, b: numbers >= 0, of shapes that broadcast.

    Returns:
        float64 of the broadcast shape; 0 where both are 0, NaN where one of them is.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    total = a + b
    return np.divide(2 * a * b, total, out=np.zeros(np.shape(total)), where=total != 0)


def prm_score(steps: LabelledSteps, *, threshold: float = 0.5, **settings: Unpack[Resampling]) -> PRMScore:
    """PRMScore, both F1 and both accuracies of a set of steps.

    Args:
        steps: what :func:`~stepkd.evaluation.step_metrics.labelled_steps` gives, all steps of all solutions.
        threshold: a step is called correct when its score is not below it.
        **settings: see :class:`~stepkd.statistics.Resampling`; problems are resampled.

    Returns:
        The values; an F1 without a step that is so labelled or so called is NaN.
    """
    counts = _counts(steps, threshold)
    n_correct, n_incorrect = int(steps.labels.sum()), int((~steps.labels).sum())

    def interval(which: Any) -> Interval:
        return proper_width(cluster_bootstrap(counts, lambda drawn: which(drawn.sum(axis=1)), **settings))

    def share(hits: int, misses: int) -> Interval:
        return ratio_interval(*_of_all(counts, hits, misses).T, **settings)

    always = np.array([n_correct, 0, n_incorrect, 0])
    chance = np.array([1 - threshold, threshold, 1 - threshold, threshold]) * np.repeat([n_correct, n_incorrect], 2)
    return PRMScore(
        score=interval(lambda drawn: _score(drawn, n_incorrect > 0)),
        f1=interval(lambda drawn: _both_f1(drawn)[0]),
        negative_f1=interval(lambda drawn: _both_f1(drawn)[1]) if n_incorrect else None,
        acc_correct=share(0, 1) if n_correct else None,
        acc_incorrect=share(3, 2) if n_incorrect else None,
        n_correct=n_correct,
        n_incorrect=n_incorrect,
        baselines={
            "always positive": float(_score(always, n_incorrect > 0)),
            "random": float(_score(chance, n_incorrect > 0)),
        },
    )


def prm_score_difference(
    a: Sequence[Row], b: Sequence[Row], thresholds: tuple[float, float], **settings: Unpack[Resampling]
) -> dict[str, Interval]:
    """PRMScore and both accuracies of B minus those of A on the same solutions.

    Args:
        a, b: rows of the two scorers, in one order, with a score of every step.
        thresholds: A's and B's.
        **settings: see :class:`~stepkd.statistics.Resampling`; problems are resampled, for both together.

    Returns:
        The differences of ``score``, and of ``acc_correct`` and ``acc_incorrect`` where there are such steps; one has
        no bounds where all problems have the same.

    Raises:
        DataError: no labelled step.
    """
    steps = [_steps(rows) for rows in (a, b)]
    both = np.concatenate([_counts(*each) for each in zip(steps, thresholds, strict=True)], axis=1)
    errors = not steps[0].labels.all()

    def difference(measure: Callable[[FloatArray], FloatArray]) -> Interval:
        return proper_width(
            cluster_bootstrap(both, lambda drawn: measure(drawn[..., 4:]) - measure(drawn[..., :4]), **settings)
        )

    def share(hits: int, misses: int) -> Interval:
        return difference(lambda counts: ratio_of_sums(_of_all(counts, hits, misses)))

    found = {"score": difference(lambda counts: _score(counts.sum(axis=1), errors))}
    found |= {"acc_correct": share(0, 1)} if steps[0].labels.any() else {}
    return found | ({"acc_incorrect": share(3, 2)} if errors else {})


def _of_all(counts: FloatArray, hits: int, misses: int) -> FloatArray:
    """(..., 2): one of the columns of :func:`_counts`, and its sum with another."""
    return np.stack([counts[..., hits], counts[..., hits] + counts[..., misses]], axis=-1)


def _steps(rows: Sequence[Row]) -> LabelledSteps:
    scores, labels = ([row[key] for row in rows] for key in ("scores", "labels"))
    return labelled_steps(scores, labels, problems=[problem_key(row) for row in rows])


def _counts(steps: LabelledSteps, threshold: float) -> FloatArray:
    """(problems, 4): correct steps called correct and incorrect, incorrect ones called correct and incorrect."""
    called, correct = np.array([passes(score, threshold) is True for score in steps.scores]), steps.labels
    columns = [called & correct, ~called & correct, called & ~correct, ~called & ~correct]
    return cluster_sums(np.stack(columns, axis=1), steps.problems)


def _score(counts_R4: FloatArray, errors: bool) -> FloatArray:
    """PRMScore of (..., 4) counts: half of each F1, or the F1 alone where the set has no incorrect step."""
    f1, negative = _both_f1(counts_R4)
    return (f1 + negative) / 2 if errors else f1


def _both_f1(counts_R4: FloatArray) -> tuple[FloatArray, FloatArray]:
    """F1 and negative F1 of (..., 4) counts: correct steps called correct and incorrect, then incorrect steps."""
    hits, missed, passed, found = np.moveaxis(np.asarray(counts_R4, dtype=np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        f1, negative = (2 * n / (2 * n + missed + passed) for n in (hits, found))
    return f1, negative


def prm_scores(rows: Sequence[Row], *, threshold: float = 0.5, seed: int = 0) -> dict[str, Any] | None:
    """PRMScore of all rows, and of every class of error.

    Args:
        rows: rows of ``results.jsonl`` with a score of every step; those without ``error_type`` are left out.
        threshold: a step is called correct when its score is not below it.
        seed: seed of the intervals.

    Returns:
        JSON values: :class:`PRMScore` of ``all`` and of each class by its name, each with its ``solutions``, and with
        the ``ignored_errors`` that its rows name behind their last step. A class without a labelled step is left out;
        None where no row has a class.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("error_type") is not None:
            groups["all"].append(row)
            groups[row["error_type"]].append(row)
    found = {}
    for name, group in groups.items():
        if all(label is None for row in group for label in row["labels"]):
            continue
        counts = {"solutions": len(group), "ignored_errors": sum(row.get("ignored_errors", 0) for row in group)}
        found[name] = prm_score(_steps(group), threshold=threshold, seed=seed).to_dict() | counts
    return found or None


def mean_over_sets(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Means of F1 and of both accuracies of ProcessBench over its subsets.

    Args:
        results: of every subset :class:`~stepkd.evaluation.first_error.F1Result` as JSON values.

    Returns:
        JSON values: ``f1``, ``acc_error`` and ``acc_correct``, undefined where that of a subset is, and the number of
        ``sets``; None without one. The distances to the ends of the subsets' intervals are added in squares (MOVER,
        Zou & Donner 2008), because they have no solution in common.
    """
    if not results:
        return None
    means: dict[str, Any] = {"sets": len(results)}
    for key in ("f1", "acc_error", "acc_correct"):
        rows = [[(each[key] or {}).get(end) for end in ("value", "low", "high")] for each in results]
        value_M, low_M, high_M = np.array(rows, dtype=np.float64).T
        value = float(value_M.mean())
        down, up = (math.sqrt(((value_M - end_M) ** 2).sum()) / len(results) for end_M in (low_M, high_M))
        means[key] = Interval(value, value - down, value + up, "mover").to_dict()
    return means
