"""What a step scorer is worth on sets of labelled solutions: the summary of each, and the comparison of two scorers."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepkd.data.sources.problems import SUBSETS
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.diagnostics import argmin_positions, order_swap_test, score_bias
from stepkd.evaluation.first_error import (
    NO_ERROR,
    f1_difference,
    predicted_first_error,
    processbench_f1,
    random_baseline,
    tune_threshold,
)
from stepkd.evaluation.prm_score import mean_over_sets, prm_score_difference, prm_scores
from stepkd.evaluation.step_metrics import calibration_report, labelled_steps, step_metrics
from stepkd.runs.job import read_results
from stepkd.scorers.critiques import critique_costs
from stepkd.scorers.scorer import Meaning, problem_key
from stepkd.statistics import Interval
from stepkd.steps.labels import passes

_RANDOM_GRID = np.round(np.arange(0.02, 1.0, 0.02), 2)
"""Thresholds that the tuned random baseline chooses from."""

Row = Mapping[str, Any]


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
                f"no solution of {name!r} has a score for each of its steps (the context is too short, or "
                "the critiques have no verdicts): raise max_length or max_new_tokens, or leave the set out"
            )
        counted = [row for row in sets[name] if _counts(row)]
        section = sections[name] = _section(rows, counted, threshold, meaning, seed)
        section["unscored_solutions"] = len(sets[name]) - len(rows)
        section |= _critic(sets[name], seed)
        if tuned is not None:
            section["tuned"] = _at(counted, tuned, seed) | {"optimistic": name == tune_on}
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
    f1 = _f1(rows, lambda row: _or_miss(row["prediction"], row), seed)
    without = sum(row["prediction"] is None for row in rows if row["first_error"] is not None)
    return {"critiques": costs, "predicted": f1 | {"without_prediction": without}}


def _or_miss(prediction: int | None, row: Row) -> int:
    """The prediction; without one an index that no step has."""
    return len(row["labels"]) if prediction is None else prediction


def _whole(row: Row) -> bool:
    """Whether all steps have scores."""
    return None not in row["scores"]


def _counts(row: Row) -> bool:
    """Whether a solution is part of F1: a critic's that lacks a score is one that it did not answer."""
    return _whole(row) or "critiques" in (row.get("score_facts") or {})


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
        "fixed": _at(counted, threshold, seed),
        "baselines": {
            "always positive": _f1(counted, lambda row: NO_ERROR, seed),
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


def _f1(rows: Sequence[Row], predict: Callable[[Row], int], seed: int) -> dict[str, Any]:
    """F1 of predictions on the rows whose first error is known, with intervals over problems."""
    known = [row for row in rows if row["first_error"] is not None]
    labels, problems = [row["first_error"] for row in known], [problem_key(row) for row in known]
    return processbench_f1([predict(row) for row in known], labels, problems=problems, seed=seed).to_dict()


def _at(rows: Sequence[Row], threshold: float, seed: int) -> dict[str, Any]:
    """F1 of the first step below a threshold."""
    return _f1(rows, lambda row: _predicted(row, threshold), seed) | {"threshold": threshold}


def _predicted(row: Row, threshold: float) -> int:
    """The first step below the threshold; a miss where a step without a score comes before it."""
    first = next((step for step, score in enumerate(row["scores"]) if not passes(score, threshold)), NO_ERROR)
    return _or_miss(None if first != NO_ERROR and row["scores"][first] is None else first, row)


def _left_out(rows: Sequence[Row], classes: bool) -> str:
    """Why a solution, as each of two folders has it, is not compared; empty where it is."""
    if classes and rows[0].get("error_type") is None:
        return "without a class of error"
    if not classes and rows[0]["first_error"] is None:
        return "with labels that leave the first error open"
    if not all(map(_whole if classes else _counts, rows)):
        return "without scores of all steps (cut off, or no verdict: raise max_length, or max_new_tokens)"
    return ""


def compare_process(a: str | Path, b: str | Path, summaries: tuple[Row, Row], *, seed: int = 0) -> dict[str, Interval]:
    """F1 and both accuracies of B minus those of A, per set that both have and rule, on solutions whose first error
    is known; one that a critic leaves without a score is a miss. Of sets whose rows name classes of errors PRMScore
    and its accuracies at the fixed threshold, of solutions with all scores. Intervals over problems. A warning counts
    the solutions that are left out; the difference of a set without any left is NaN.

    Args:
        a, b: two folders of :func:`~stepkd.evaluation.score_rows.evaluate_process`.
        summaries: their summaries.
        seed: seed of the intervals.

    Returns:
        ``"<set>, fixed"`` and ``"<set>, tuned"``, and where one of both is a critic ``"<set>, own"`` (a critic's own
        predictions, of other scorers those of the fixed threshold) -> difference of F1, and behind each those of both
        accuracies: ``"<set>, fixed, with an error"``, ``"<set>, fixed, all correct"``. PRMScore: ``"<set>, PRMScore"``,
        then ``"<set>, PRMScore, correct steps"`` and ``"<set>, PRMScore, incorrect steps"``.

    Raises:
        ConfigError: no solution in common, or other prompts, steps or labels under the same id.
    """
    sides = [{row["id"]: row for row in read_results(folder)} for folder in (a, b)]
    shared: dict[str, list[str]] = {}
    for i, row in sides[0].items():
        if (other := sides[1].get(i)) is None:
            continue
        if any(row.get(key) != other.get(key) for key in ("prompt", "problem_id", "completions", "labels")):
            raise ConfigError(
                f"{a} and {b} hold different prompts, steps or labels under the id {i!r}: evaluate both on the same "
                "data"
            )
        shared.setdefault(row["set"], []).append(i)
    if not shared:
        raise ConfigError(f"{a} and {b} have no solution in common: evaluate both on the same data")
    differences: dict[str, Interval] = {}
    for name, ids in shared.items():
        classes = any(sides[0][i].get("error_type") is not None for i in ids)
        why = {i: _left_out([side[i] for side in sides], classes) for i in ids}
        whole, left_out = [i for i in ids if not why[i]], Counter(filter(None, why.values()))
        of_both = sum(row["set"] == name for side in sides for row in side.values())
        left_out["in one folder alone"] = of_both - 2 * len(ids)
        if reasons := "; ".join(f"{count} {reason}" for reason, count in left_out.items() if count):
            warnings.warn(
                f"{name}: {len(whole)} solutions of {a} and {b} are compared, others are not: {reasons}", stacklevel=2
            )
        if not whole:
            what = "PRMScore" if classes else "fixed"
            differences[f"{name}, {what}"] = Interval(math.nan, math.nan, math.nan, "bootstrap")
            continue
        if classes:
            a_rows, b_rows = ([side[i] for i in whole] for side in sides)
            fixed = (summaries[0]["threshold"], summaries[1]["threshold"])
            parts = {"score": "", "acc_correct": ", correct steps", "acc_incorrect": ", incorrect steps"}
            for part, each in prm_score_difference(a_rows, b_rows, fixed, seed=seed).items():
                differences[f"{name}, PRMScore{parts[part]}"] = each
            continue
        labels = [sides[0][i]["first_error"] for i in whole]
        problems = [problem_key(sides[0][i]) for i in whole]
        critics = ["predicted" in summary["sets"].get(name, ()) for summary in summaries]
        for rule, key in (("fixed", "threshold"), ("own", "threshold"), ("tuned", "tuned_threshold")):
            thresholds = [summary[key] for summary in summaries]
            if None in thresholds or (rule == "own" and not any(critics)):
                continue
            a_found, b_found = (
                [
                    _or_miss(side[i]["prediction"], side[i]) if rule == "own" and critic else _predicted(side[i], value)
                    for i in whole
                ]
                for side, value, critic in zip(sides, thresholds, critics, strict=True)
            )
            words = {"f1": "", "acc_error": ", with an error", "acc_correct": ", all correct"}
            for part, each in f1_difference(a_found, b_found, labels, problems=problems, seed=seed).items():
                differences[f"{name}, {rule}{words[part]}"] = each
    return differences
