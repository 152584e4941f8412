"""Does a process reward model find the first incorrect step? ProcessBench F1, its threshold, and a set's summary.

Source: ProcessBench (Zheng et al. 2024, arXiv 2412.06559). A label is the 0-based index of the first incorrect step, or
-1 when every step is correct; a prediction has the same form. Every problem has one solution here, so problems are the
rows. All values are shares in [0, 1], not percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from stepkd.data.sources.problems import SUBSETS
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.diagnostics import argmin_positions, order_swap_test, score_bias
from stepkd.evaluation.prm_score import harmonic_mean, mean_over_sets, prm_score_difference, prm_scores
from stepkd.evaluation.step_metrics import calibration_report, labelled_steps, step_metrics
from stepkd.runs.job import read_results
from stepkd.scorers.critiques import critique_costs
from stepkd.scorers.scorer import Meaning, problem_key
from stepkd.statistics import FloatArray, Interval, Resampling, Result, cluster_bootstrap, wilson_interval
from stepkd.steps.labels import passes

NO_ERROR = -1
"""Label and prediction of a solution without an incorrect step."""
_RANDOM_GRID = np.round(np.arange(0.02, 1.0, 0.02), 2)
"""Thresholds that the tuned random baseline chooses from."""

Row = Mapping[str, Any]


# --- F1 ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class F1Result(Result):
    """ProcessBench F1 of one set; a part that has no rows is None, and then so is the F1."""

    acc_error: Interval | None
    """Share of solutions with an error whose first error is predicted exactly."""
    acc_correct: Interval | None
    """Share of solutions without an error that are predicted to have none."""
    f1: Interval | None
    """Harmonic mean of the two; 0 when both are 0."""
    n_error: int
    """Solutions with an error."""
    n_correct: int
    """Solutions without an error."""


def predicted_first_error(scores: Sequence[float], threshold: float = 0.5) -> int:
    """The first step with a score below the threshold.

    Args:
        scores: (steps,) scores, at least one, none missing.
        threshold: a step is incorrect when its score is strictly below it.

    Returns:
        The step's 0-based index, or -1.

    Raises:
        DataError: no scores, or a step without a score (NaN).
    """
    if len(scores) == 0 or any(map(math.isnan, scores)):
        raise DataError(
            f"a first error cannot be told from the step scores {list(scores)}: a step without a score (NaN) was cut "
            "off or comes from an outcome scorer; leave the solution out and count it"
        )
    return next((index for index, score in enumerate(scores) if not passes(score, threshold)), NO_ERROR)


def processbench_f1(predictions: Sequence[int], labels: Sequence[int], **settings: Unpack[Resampling]) -> F1Result:
    """Harmonic mean of the accuracies on solutions with and without an error.

    Args:
        predictions: (n,) predicted index of the first incorrect step, or -1.
        labels: (n,) true ones.
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        The accuracies with Wilson intervals; the F1 with the bootstrap over problems. Where every resample gives the
        same F1 (an accuracy of 0, or both 1), its bounds are the F1 of the accuracies' lower and of their upper bounds:
        F1 rises with both, so this is wider.

    Raises:
        DataError: different lengths, or an index below -1.
    """
    hit_error, errors, hit_correct, corrects = counts = _hits(predictions, labels)
    n_error, n_correct = int(errors.sum()), int(corrects.sum())
    acc_error = wilson_interval(hit_error.sum(), n_error) if n_error else None
    acc_correct = wilson_interval(hit_correct.sum(), n_correct) if n_correct else None
    f1 = None
    if acc_error and acc_correct:
        f1 = cluster_bootstrap(counts.T, lambda drawn: _parts(drawn)[0], **settings)
        if f1.low == f1.high or math.isnan(f1.low):
            low, high = harmonic_mean([acc_error.low, acc_error.high], [acc_correct.low, acc_correct.high])
            f1 = Interval(f1.value, float(low), float(high), "wilson")
    return F1Result(acc_error, acc_correct, f1, n_error, n_correct)


def f1_difference(
    predictions_a: Sequence[int],
    predictions_b: Sequence[int],
    labels: Sequence[int],
    **settings: Unpack[Resampling],
) -> dict[str, Interval] | None:
    """F1 and accuracies of B minus those of A on the same problems, which the intervals resample for both together.

    Args:
        predictions_a, predictions_b: (n,) predictions of the two scorers, same order.
        labels: (n,) true indices of the first incorrect step, or -1.
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        The differences of ``f1``, ``acc_error`` and ``acc_correct``; None when the set has no solution with an error,
        or none without.

    Raises:
        DataError: as in :func:`processbench_f1`.
    """
    a, b = _hits(predictions_a, labels), _hits(predictions_b, labels)
    if not (a[1].any() and a[3].any()):
        return None

    columns = np.concatenate([a, b]).T

    def difference(part: int) -> Interval:
        return cluster_bootstrap(
            columns, lambda drawn: _parts(drawn[..., 4:])[part] - _parts(drawn[..., :4])[part], **settings
        )

    return {name: difference(part) for part, name in enumerate(("f1", "acc_error", "acc_correct"))}


def _parts(resampled: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(resamples, problems, 4 columns of `_hits`) -> (resamples,) F1, both accuracies; NaN without such solutions."""
    sums = resampled.sum(axis=1)
    with np.errstate(invalid="ignore"):
        error, correct = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
    return harmonic_mean(error, correct), error, correct


def _hits(predictions: Sequence[int], labels: Sequence[int]) -> FloatArray:
    """(4, n): hit on a solution with an error, has an error, hit on one without, has none; each 0 or 1."""
    predicted, truth = np.asarray(predictions), np.asarray(labels)
    if predicted.shape != truth.shape or np.minimum(predicted, truth).min(initial=NO_ERROR) < NO_ERROR:
        raise DataError(
            f"{len(predictions)} predictions for {len(labels)} labels: give one for each, the index of the first "
            "incorrect step or -1 for none"
        )
    hit, error = predicted == truth, truth != NO_ERROR
    return np.stack([hit & error, error, hit & ~error, ~error]).astype(np.float64)


# --- the threshold, and F1 without a model ----------------------------------------------------------------------------


def tune_threshold(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The threshold of highest F1 on a split; use it on other splits: on this one its F1 is optimistic.

    Compared are all thresholds that can matter: the mid-points between neighbouring distinct scores, 0 (nothing is
    incorrect), one above the highest score, and 0.5. Of equal ones the nearest to 0.5 is taken.

    Args:
        scores: per solution its step scores in [0, 1], none missing.
        labels: (n,) true indices of the first incorrect step, or -1.

    Returns:
        The threshold: a step with a lower score is predicted incorrect.

    Raises:
        DataError: a missing score, or a split without one of the two kinds of solutions.
    """
    error = np.asarray(labels) != NO_ERROR
    if error.all() or not error.any():
        raise DataError(
            f"F1 is undefined on {error.sum()} solutions with an error and {(~error).sum()} without: tune the "
            "threshold on a split that has both"
        )
    candidates = _candidates(np.concatenate([np.asarray(row, dtype=np.float64) for row in scores]))
    if np.isnan(candidates).any():
        raise DataError("a step has no score (NaN): leave its solution out and count it")
    # A solution is predicted correctly for the thresholds t in (low, high]: every step before the error >= t, it < t.
    ends = [None if label == NO_ERROR else label for label in labels]
    low_N = np.array([-math.inf if end is None else row[end] for row, end in zip(scores, ends, strict=True)])
    high_N = np.array([min(row[:end], default=math.inf) for row, end in zip(scores, ends, strict=True)])

    def accuracy(kind_N: NDArray[np.bool_]) -> FloatArray:
        usable = kind_N & (low_N < high_N)
        opened, closed = (np.searchsorted(np.sort(bound_N[usable]), candidates) for bound_N in (low_N, high_N))
        return np.asarray((opened - closed) / kind_N.sum(), dtype=np.float64)

    f1 = harmonic_mean(accuracy(error), accuracy(~error))
    best = candidates[f1 >= f1.max() - 1e-12]
    return float(min(best, key=lambda threshold: (abs(threshold - 0.5), threshold)))


def _candidates(scores: FloatArray) -> FloatArray:
    distinct = np.unique(scores)
    middle = (distinct[:-1] + distinct[1:]) / 2
    # Between neighbouring floats the mid-point may round down onto the lower score, which it must exceed.
    middle = np.where(middle > distinct[:-1], middle, distinct[1:])
    top = [(distinct[-1] + 1) / 2] if distinct[-1] < 1 else []
    return np.unique(np.concatenate([[0.0, 0.5], middle, top]))


def random_baseline(labels: Sequence[int], n_steps: Sequence[int], threshold: float = 0.5) -> dict[str, float]:
    """What uniformly random step scores are expected to give under the same rule.

    With scores uniform on [0, 1] the first error falls on step l with probability ``(1-t)^l t``, and nowhere in H
    steps with ``(1-t)^H``.

    Args:
        labels: (n,) true indices of the first incorrect step, or -1; both kinds of solutions among them.
        n_steps: (n,) steps of every solution.
        threshold: t in [0, 1].

    Returns:
        ``acc_error`` and ``acc_correct``, the expected accuracies, and ``f1``, their harmonic mean.
    """
    truth, lengths = np.asarray(labels), np.asarray(n_steps)
    error = truth != NO_ERROR
    acc_error = float(((1 - threshold) ** truth[error] * threshold).mean())
    acc_correct = float(((1 - threshold) ** lengths[~error]).mean())
    return {"acc_error": acc_error, "acc_correct": acc_correct, "f1": float(harmonic_mean(acc_error, acc_correct))}


# --- the summary of a set ---------------------------------------------------------------------------------------------


def summarise_process(
    results: Sequence[Row],
    *,
    threshold: float = 0.5,
    tune_on: str | None = None,
    meaned: Sequence[str] = SUBSETS,
    meaning: Meaning = "correctness",
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers of one evaluation of a step scorer.

    Args:
        results: rows of ``results.jsonl``.
        threshold: the fixed threshold.
        tune_on: name of the set whose F1 decides the tuned threshold; None for none. On that set itself the tuned F1
            is optimistic, and marked so.
        meaned: sets that enter the mean, where they are ProcessBench's subsets; not one that is there for tuning alone.
        meaning: what the scores estimate; decides how they are reduced in the order-swap test.
        seed: seed of the intervals.

    Returns:
        JSON values: ``sets`` (one entry per set), ``mean`` (over those that are ProcessBench's subsets, F1 and both
        accuracies at the fixed threshold, of a critic those of its own predictions; None without one),
        ``tuned_threshold`` and settings. Solutions with a step that has no score (cut off by the context, or without a
        verdict) are left out and counted; of a critic they are misses in every F1, as in ProcessBench's code. Those
        whose first error missing labels leave open are left out of F1, and counted. A number that a set cannot give (F1
        without a solution with an error, or without one without) is None.
    """
    sets: dict[str, list[Row]] = {}
    for row in results:
        sets.setdefault(row["set"], []).append(row)
    whole = {name: [row for row in rows if None not in row["scores"]] for name, rows in sets.items()}
    tuned, random_threshold = None, 0.5
    undefined: dict[str, str] = {}
    if tune_on is not None:
        scores, labels = _located(whole[tune_on])
        lengths = list(map(len, scores))
        try:
            tuned = tune_threshold(scores, labels)
            random_threshold = max(_RANDOM_GRID, key=lambda value: random_baseline(labels, lengths, value)["f1"])
        except DataError as error:
            undefined["tuned_threshold"] = str(error)
    sections = {}
    for name, rows in whole.items():
        if not rows:
            raise DataError(
                f"no solution of {name!r} has a score for each of its steps: the context is too short, "
                "or the critiques have no verdicts"
            )
        counted = [row for row in sets[name] if _counts(row)]
        section = sections[name] = _section(rows, counted, threshold, meaning, seed)
        section["unscored_solutions"] = len(sets[name]) - len(rows)
        section |= _critic(sets[name], seed)
        if tuned is not None:
            section["tuned"] = _f1(counted, tuned, seed) | {"optimistic": name == tune_on}
            section["baselines"]["random, tuned"] = _random(counted, random_threshold)
    judged = [sections[name] for name in SUBSETS if name in sections and name in meaned]
    return {
        "kind": "process",
        "threshold": threshold,
        "tuned_on": tune_on,
        "tuned_threshold": tuned,
        "undefined": undefined,
        "sets": sections,
        "mean": mean_over_sets([section.get("predicted", section["fixed"]) for section in judged]),
    }


def _critic(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """What critiques cost, and F1 of the critic's own predictions, over all solutions: one without is a miss, as in
    ProcessBench's code. Empty for other scorers."""
    if not (costs := critique_costs(rows)):
        return {}
    known = [row for row in rows if row["first_error"] is not None]
    predictions = [_or_miss(row["prediction"], row) for row in known]
    f1 = processbench_f1(predictions, [row["first_error"] for row in known], seed=seed).to_dict()
    without = sum(row["prediction"] is None for row in known)
    return {"critiques": costs, "predicted": f1 | {"without_prediction": without}}


def _or_miss(prediction: int | None, row: Row) -> int:
    """The prediction; without one an index that no step has."""
    return len(row["labels"]) if prediction is None else prediction


def _counts(row: Row) -> bool:
    """Whether a solution is part of F1: a critic's that lacks a score is one that it did not answer."""
    return None not in row["scores"] or "critiques" in row.get("score_facts", {})


def _section(
    rows: Sequence[Row], counted: Sequence[Row], threshold: float, meaning: Meaning, seed: int
) -> dict[str, Any]:
    """The numbers of a set, of ``rows`` that have all scores; F1 and its baselines of those that count in it."""
    scores, problems = [row["scores"] for row in rows], [problem_key(row) for row in rows]
    labels = _located(counted)[1]
    first_errors = [(row["first_error"], predicted_first_error(row["scores"], threshold)) for row in rows]
    texts = [row.get("completions", row.get("steps")) for row in rows]
    steps = labelled_steps(scores, [row["labels"] for row in rows], problems=problems, up_to_first_error=True)
    several_steps = any(len(found) > 1 for found in scores)
    return {
        "solutions": len(rows),
        "unknown_first_error": len(counted) - len(labels),
        "fixed": _f1(counted, threshold, seed),
        "baselines": {
            "always positive": processbench_f1([NO_ERROR] * len(labels), labels, seed=seed).to_dict(),
            "random": _random(counted, threshold),
        },
        "argmin": argmin_positions(scores, problems=problems, seed=seed) if several_steps else None,
        "order_swap": _swaps(rows, "swaps", meaning, seed),
        "independent_swap": _swaps(rows, "independent_swaps", meaning, seed),
        "bias": score_bias(scores, [row["labels"] for row in rows], texts, first_errors, problems=problems, seed=seed),
        "prm_score": prm_scores(rows, threshold=threshold, seed=seed),
        "steps": step_metrics(steps, threshold=threshold, seed=seed).to_dict(),
        "calibration": calibration_report(steps.scores, steps.labels, problems=steps.problems, seed=seed).to_dict(),
    }


def _swaps(rows: Sequence[Row], key: str, meaning: Meaning, seed: int) -> dict[str, Any] | None:
    pairs = [(pair, problem_key(row)) for row in rows for pair in row.get(key, ())]
    scores, problems = [pair for pair, _ in pairs], [problem for _, problem in pairs]
    return order_swap_test(scores, problems, meaning=meaning, dependent=key == "swaps", seed=seed)


def _located(rows: Sequence[Row]) -> tuple[list[list[float]], list[int]]:
    """Scores and first errors of the rows whose first error is known: labels may be missing after it, not before."""
    known = [row for row in rows if row["first_error"] is not None]
    return [row["scores"] for row in known], [row["first_error"] for row in known]


def _random(rows: Sequence[Row], threshold: float) -> dict[str, float] | None:
    """The random baseline; None where the F1 is undefined (no solution with an error, or none without)."""
    scores, labels = _located(rows)
    both_kinds = len({label == NO_ERROR for label in labels}) == 2
    return random_baseline(labels, list(map(len, scores)), threshold) if both_kinds else None


def _f1(rows: Sequence[Row], threshold: float, seed: int) -> dict[str, Any]:
    known = [row for row in rows if row["first_error"] is not None]
    predictions, labels = [_predicted(row, threshold) for row in known], [row["first_error"] for row in known]
    return processbench_f1(predictions, labels, seed=seed).to_dict() | {"threshold": threshold}


def _predicted(row: Row, threshold: float) -> int:
    """The first step below the threshold; a miss where a step without a score comes before it."""
    first = next((step for step, score in enumerate(row["scores"]) if not passes(score, threshold)), NO_ERROR)
    return _or_miss(None if first != NO_ERROR and row["scores"][first] is None else first, row)


def compare_process(a: str | Path, b: str | Path, summaries: tuple[Row, Row], *, seed: int = 0) -> dict[str, Interval]:
    """F1 and both accuracies of B minus those of A on the solutions both scored, per set and threshold rule; what a
    critic leaves without a score is a miss. Of sets whose rows name classes of errors PRMScore at the fixed threshold,
    of solutions with all scores, with intervals over problems.

    Args:
        a, b: two folders of :func:`~stepkd.evaluation.score_rows.evaluate_process`.
        summaries: their summaries.
        seed: seed of the intervals.

    Returns:
        ``"<set>, fixed"`` and ``"<set>, tuned"`` -> difference of F1, and behind each those of both accuracies:
        ``"<set>, fixed, with an error"``, ``"<set>, fixed, all correct"``. PRMScore: ``"<set>, PRMScore"``.

    Raises:
        ConfigError: no set in common.
    """
    sides = [{row["id"]: row for row in read_results(folder)} for folder in (a, b)]
    shared: dict[str, list[str]] = {}
    for i, row in sides[0].items():
        if i in sides[1] and row["first_error"] is not None and all(_counts(side[i]) for side in sides):
            shared.setdefault(row["set"], []).append(i)
    if not shared:
        raise ConfigError(f"{a} and {b} have no scored solution in common: evaluate both on the same data")
    differences: dict[str, Interval] = {}
    for name, ids in shared.items():
        if any(sides[0][i].get("error_type") is not None for i in ids):
            named = [i for i in ids if sides[0][i].get("error_type") is not None]
            whole = [i for i in named if not any(None in side[i]["scores"] for side in sides)]
            a_rows, b_rows = ([side[i] for i in whole] for side in sides)
            fixed = (summaries[0]["threshold"], summaries[1]["threshold"])
            differences[f"{name}, PRMScore"] = prm_score_difference(a_rows, b_rows, fixed, seed=seed)
            continue
        labels = [sides[0][i]["first_error"] for i in ids]
        for rule, key in (("fixed", "threshold"), ("tuned", "tuned_threshold")):
            thresholds = [summary[key] for summary in summaries]
            if None in thresholds:
                continue
            a_found, b_found = (
                [_predicted(side[i], value) for i in ids] for side, value in zip(sides, thresholds, strict=True)
            )
            if (found := f1_difference(a_found, b_found, labels, seed=seed)) is not None:
                words = {"f1": "", "acc_error": ", with an error", "acc_correct": ", all correct"}
                differences |= {f"{name}, {rule}{words[part]}": each for part, each in found.items()}
    return differences
