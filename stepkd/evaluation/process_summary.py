"""Step scores of labelled sets to one summary: ProcessBench F1, calibration, argmin positions, baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.argmin_positions import argmin_positions
from stepkd.evaluation.calibration_metrics import calibration_report
from stepkd.evaluation.manifest import RESULTS_NAME
from stepkd.evaluation.order_swap import Swap, order_swap_test
from stepkd.evaluation.process_metrics import f1_difference, predicted_first_error, processbench_f1
from stepkd.evaluation.process_threshold import always_positive_baseline, random_baseline, tune_threshold
from stepkd.evaluation.step_metrics import labelled_steps, step_metrics
from stepkd.evaluation.store import read_rows
from stepkd.scorers.scorer import Meaning
from stepkd.statistics import Interval

Row = Mapping[str, Any]
_RANDOM_GRID = tuple(np.round(np.arange(0.02, 1.0, 0.02), 2))


def summarise_process(
    results: Sequence[Row],
    *,
    threshold: float = 0.5,
    tune_on: str | None = None,
    meaning: Meaning = "correctness",
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers of one evaluation of a step scorer.

    Args:
        results: rows of ``results.jsonl``.
        threshold: the fixed threshold.
        tune_on: name of the set whose F1 decides the tuned threshold; None for none. On that set itself the tuned F1
            is optimistic, and marked so.
        meaning: what the scores estimate; decides how they are reduced in the order-swap test.
        seed: seed of the intervals.

    Returns:
        JSON values: ``sets`` (one entry per set), ``tuned_threshold`` and settings. Solutions with a step that has no
        score (cut off by the context) are left out of every metric and counted; those whose first error missing labels
        leave open are left out of F1, and counted. A number that a set cannot give (F1 without a solution with an
        error, or without one without) is None.
    """
    sets: dict[str, list[Row]] = {}
    for row in results:
        sets.setdefault(row["set"], []).append(row)
    whole = {name: [row for row in rows if None not in row["scores"]] for name, rows in sets.items()}
    tuned = random_threshold = None
    undefined: dict[str, str] = {}
    if tune_on is not None:
        rows = _located(whole[tune_on])
        labels, steps = [row["first_error"] for row in rows], [len(row["scores"]) for row in rows]
        try:
            tuned = tune_threshold([row["scores"] for row in rows], labels)
            random_threshold = max(
                _RANDOM_GRID, key=lambda value: random_baseline(labels, steps, threshold=value, draws=50, seed=seed).f1
            )
        except DataError as error:
            undefined["tuned_threshold"] = str(error)
    summary: dict[str, Any] = {
        "kind": "process",
        "threshold": threshold,
        "tuned_on": tune_on,
        "tuned_threshold": None if tuned is None else tuned.threshold,
        "undefined": undefined,
        "sets": {},
    }
    for name, rows in whole.items():
        if not rows:
            raise DataError(f"no solution of {name!r} has a score for each of its steps: the context is too short")
        section = _section(rows, threshold, seed)
        section["order_swap"] = _order_swap(rows, meaning, seed)
        section["unscored_solutions"] = len(sets[name]) - len(rows)
        if tuned is not None:
            section["tuned"] = _f1(rows, tuned.threshold, seed) | {"optimistic": name == tune_on}
            section["baselines"]["random, tuned"] = _random(rows, float(random_threshold or 0.5), seed)
        summary["sets"][name] = section
    return summary


def _section(rows: Sequence[Row], threshold: float, seed: int) -> dict[str, Any]:
    scores, problems = [row["scores"] for row in rows], [str(row["prompt"]) for row in rows]
    located = _located(rows)
    labels = [row["first_error"] for row in located]
    section: dict[str, Any] = {
        "solutions": len(rows),
        "unknown_first_error": len(rows) - len(located),
        "fixed": _f1(rows, threshold, seed),
        "baselines": {
            "always positive": always_positive_baseline(labels, seed=seed).to_dict() if labels else None,
            "random": _random(rows, threshold, seed),
        },
        "argmin": None,
    }
    if any(len(found) > 1 for found in scores):
        section["argmin"] = argmin_positions(scores, problems=problems, seed=seed).to_dict()
    steps = labelled_steps(scores, [row["labels"] for row in rows], problems=problems, up_to_first_error=True)
    section["steps"] = step_metrics(steps, threshold=threshold, seed=seed).to_dict()
    calibration = calibration_report(steps.scores, steps.labels, problems=steps.problems, seed=seed)
    section["calibration"] = calibration.to_dict()
    return section


def _located(rows: Sequence[Row]) -> list[Row]:
    """Rows whose first error is known: labels may be missing after it, not before."""
    return [row for row in rows if row["first_error"] is not None]


def _random(rows: Sequence[Row], threshold: float, seed: int) -> dict[str, Any] | None:
    """The random baseline; None where the F1 is undefined (no solution with an error, or none without)."""
    located = _located(rows)
    labels, steps = [row["first_error"] for row in located], [len(row["scores"]) for row in located]
    if all(label == -1 for label in labels) or -1 not in labels:
        return None
    return asdict(random_baseline(labels, steps, threshold=threshold, seed=seed))


def _order_swap(rows: Sequence[Row], meaning: Meaning, seed: int) -> dict[str, Any] | None:
    """The order-swap test over the rows that have swaps; None without one."""
    swaps, scores = [], []
    for row in rows:
        for found in row.get("swaps", ()):
            steps = ("",) * len(found["scores"][0])  # the test counts them; their texts are not stored
            swaps.append(Swap({"id": row["prompt"]}, steps, steps, found["position"], found["dependent"]))
            scores.append([[math.nan if value is None else value for value in part] for part in found["scores"]])
    return order_swap_test(swaps, scores, meaning=meaning, seed=seed).to_dict() if swaps else None


def _f1(rows: Sequence[Row], threshold: float, seed: int) -> dict[str, Any]:
    located = _located(rows)
    if not located:
        empty: dict[str, Any] = {"acc_error": None, "acc_correct": None, "f1": None, "n_error": 0, "n_correct": 0}
        return empty | {"threshold": threshold}
    predictions = [predicted_first_error(row["scores"], threshold) for row in located]
    result = processbench_f1(predictions, [row["first_error"] for row in located], seed=seed)
    return result.to_dict() | {"threshold": threshold}


def compare_process(a: str | Path, b: str | Path, summaries: tuple[Row, Row], *, seed: int = 0) -> dict[str, Interval]:
    """F1 of B minus F1 of A on the solutions both scored, per set and threshold rule, with intervals.

    Args:
        a, b: two folders of :func:`~stepkd.evaluation.process_runner.evaluate_process`.
        summaries: their summaries.
        seed: seed of the intervals.

    Returns:
        ``"<set>, fixed"`` and ``"<set>, tuned"`` -> difference.

    Raises:
        ConfigError: no set in common.
    """
    sides = [{row["id"]: row for row in read_rows(Path(folder) / RESULTS_NAME)} for folder in (a, b)]
    shared = [
        i
        for i, row in sides[0].items()
        if i in sides[1] and row["first_error"] is not None and not any(None in side[i]["scores"] for side in sides)
    ]
    if not shared:
        raise ConfigError(f"{a} and {b} have no scored solution in common: evaluate both on the same data")
    differences: dict[str, Interval] = {}
    for name in dict.fromkeys(sides[0][i]["set"] for i in shared):
        ids = [i for i in shared if sides[0][i]["set"] == name]
        labels = [sides[0][i]["first_error"] for i in ids]
        for rule, key in (("fixed", "threshold"), ("tuned", "tuned_threshold")):
            thresholds = [summary[key] for summary in summaries]
            if None in thresholds:
                continue
            predictions = [
                [predicted_first_error(side[i]["scores"], value) for i in ids]
                for side, value in zip(sides, thresholds, strict=True)
            ]
            found = f1_difference(predictions[0], predictions[1], labels, seed=seed)
            if found is not None:
                differences[f"{name}, {rule}"] = found
    return differences
