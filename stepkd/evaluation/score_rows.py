"""``stepkd score``: rows with solutions in, the same rows with scores out, a job of batches (:mod:`stepkd.runs.job`).

The folder is that of any job; ``results.jsonl`` holds the scored rows in the order of the input, ``summary.json`` also
a temperature that was fitted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stepkd.data.io import fingerprint
from stepkd.data.spec import load_rows, parse_spec
from stepkd.data.step_labels import LabelRule, step_targets
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.config import ScoreConfig
from stepkd.runs.job import (
    ALONE,
    PARTS,
    RESULTS_NAME,
    SETTINGS_NAME,
    SUMMARY_NAME,
    Job,
    JobOptions,
    numbered,
    package_versions,
)
from stepkd.scorers.calibration import fit_temperature, scaled
from stepkd.scorers.load import load_scorer
from stepkd.scorers.prm import packed
from stepkd.scorers.scorer import (
    StepScorer,
    by_problem,
    default_reduction,
    reduce_scores,
    score_rows,
    step_scores,
)

KIND = "scoring job"
SOLUTIONS, TEMPERATURE = "solutions", "temperature"
"""The phases of a scoring job."""


def score_file(config: ScoreConfig, *, scorer: StepScorer | None = None, options: JobOptions = ALONE) -> dict[str, Any]:
    """Score all rows of a file, or resume.

    Args:
        config: what to score, and where to write.
        scorer: an already loaded scorer to use in place of loading ``config.scorer``.
        options: which rank this is, and whether to replace an earlier result of such a job.

    Returns:
        Counts and mean scores, see :func:`summarise_scores`; empty while other ranks have work left: the last one to
        finish writes the rows.

    Raises:
        ConfigError: the folder holds another job, or settings contradict each other.
        DataError, ModelError: rows or scorer cannot be used.
    """
    job = Job(Path(config.out), KIND, (RESULTS_NAME, SUMMARY_NAME), options)
    job.check()
    rows = _to_cut(load_rows(parse_spec(config.completions)), config.segmenter)
    labelled = None if config.fit_temperature is None else load_rows(parse_spec(config.fit_temperature))
    if labelled is not None and fingerprint(labelled) == fingerprint(rows):
        raise ConfigError("the rows to fit a temperature on are the rows to score: give held-out ones")
    loaded = scorer or load_scorer(config.scorer, device=config.device, max_rows=config.max_rows)
    reduction = config.reduction or default_reduction(loaded.meaning)
    if options.world_size == 1 and not any((job.out / name).exists() for name in (PARTS, RESULTS_NAME)):
        (job.out / SETTINGS_NAME).unlink(missing_ok=True)  # nothing is done: mended rows are not refused
    settings = job.begin(
        {
            **scorer_settings(loaded, config.max_rows),
            "reduction": reduction,
            "rows": fingerprint(rows),
            "temperature_fitted_on": None if labelled is None else fingerprint(labelled),
        }
    )
    temperature, fit = getattr(loaded, "temperature", None), None
    if labelled is not None:
        unit = {"fit": labelled}
        job.work(TEMPERATURE, unit, lambda given: [asdict(fit_temperature(*labelled_scores(loaded, given)))])
        fit = job.wait(TEMPERATURE, unit)[0]
        temperature = fit["temperature"]
    units = numbered(_blocks(rows, config.max_rows))
    job.work(SOLUTIONS, units, lambda block: _scored(loaded, rows, block, first=block is units["000000"]))
    found = job.rows(SOLUTIONS, units)
    if found is None:
        return {}
    provenance = {key: settings["scorer"].get(key) for key in ("scorer", "model", "weights", "meaning")}
    provenance |= {"reduction": reduction, "temperature": temperature}
    scored = []
    for row, result in zip(rows, found, strict=True):
        values = [math.nan if value is None else value for value in result["scores"]]
        if fit is not None:
            values = scaled(values, fit["temperature"]).tolist()
        scored.append(
            {
                **row,
                "step_scores": step_scores(row, values),
                "score": reduce_scores(values, reduction, meaning=loaded.meaning),
                "scorer": provenance,
                **({} if result["error"] is None else {"score_error": result["error"]}),
            }
        )
    summary = summarise_scores(scored) | {"temperature_fit": fit}
    job.finish(RESULTS_NAME, scored, summary)
    return summary


def scorer_settings(scorer: StepScorer, batch_size: int) -> dict[str, Any]:
    """What decides the scores of given rows."""
    policy = getattr(scorer, "policy", None)
    return {
        "scorer": scorer.provenance(),
        "batch_size": batch_size,
        "device": "cpu" if policy is None else policy.device.type,
        "attention": None if policy is None else policy.causal_lm.config._attn_implementation,
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
    }


def _blocks(rows: Sequence[Mapping[str, Any]], limit: int) -> list[list[int]]:
    """Numbers of rows, whole problems of about one length together, at most ``limit`` where a problem has no more."""

    def length(row: Mapping[str, Any]) -> int:
        return len(json.dumps(row.get("prompt"))) + len(str(row.get("completion", row.get("completions"))))

    problems = sorted(by_problem(rows), key=lambda numbers: -max(length(rows[n]) for n in numbers))
    blocks = packed([len(numbers) for numbers in problems], limit)
    return [[number for i in block for number in problems[i]] for block in blocks]


def _scored(
    scorer: StepScorer, rows: Sequence[Mapping[str, Any]], block: Sequence[int], *, first: bool
) -> list[dict[str, Any]]:
    """Scores of the rows of a block; a row that cannot be read goes without.

    Raises:
        DataError: it is the first block, and none of its rows can be read.
    """
    try:
        found = score_rows(scorer, [rows[number] for number in block])
        return [_row_scores(scorer, rows[n], n, scores) for n, scores in zip(block, found, strict=True)]
    except DataError:
        results, failure = [], None
    for number in block:
        row = rows[number]
        try:
            results.append(_row_scores(scorer, row, number, score_rows(scorer, [row])[0]))
        except DataError as error:
            failure = failure or error
            steps = row.get("completions") if row.get("step_ends") is None else row["step_ends"]
            results.append({"index": number, "scores": [None] * len(steps or [None]), "error": str(error)})
    if first and failure and all(result["error"] for result in results):
        raise failure
    return results


def _row_scores(scorer: StepScorer, row: Mapping[str, Any], number: int, scores: Sequence[float]) -> dict[str, Any]:
    """A row's scores, with the reason where the scorer could not read the solution at all."""
    reason = getattr(scorer, "unreadable", None)
    error = None if reason is None or not all(map(math.isnan, scores)) else reason(row)
    return {"index": number, "scores": [None if math.isnan(value) else value for value in scores], "error": error}


def summarise_scores(scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and means of scored rows.

    Args:
        scored: rows with their scores.

    Returns:
        ``rows``, ``problems``, ``steps``, ``unscored_rows``, ``unreadable_rows`` among them with the first
        ``unreadable_reason``, ``reduction``, ``temperature``, ``mean_score``, and ``mean_score_correct`` and
        ``mean_score_incorrect`` by the rows' ``correct`` or ``outcome``; a mean without a row is null.
    """
    errors = [row["score_error"] for row in scored if "score_error" in row]
    verdicts = [row.get("outcome") if row.get("correct") is None else row["correct"] for row in scored]
    kept = [(row["score"], good) for row, good in zip(scored, verdicts, strict=True) if row["score"] is not None]

    def mean(scores: list[float]) -> float | None:
        return math.fsum(scores) / len(scores) if scores else None

    return {
        "rows": len(scored),
        "problems": len(by_problem(scored)),
        "steps": sum(len(row["step_scores"]) for row in scored),
        "unscored_rows": len(scored) - len(kept),
        "unreadable_rows": len(errors),
        "unreadable_reason": errors[0] if errors else None,
        "reduction": scored[0]["scorer"]["reduction"],
        "temperature": scored[0]["scorer"]["temperature"],
        "mean_score": mean([score for score, _ in kept]),
        "mean_score_correct": mean([score for score, good in kept if good is True]),
        "mean_score_incorrect": mean([score for score, good in kept if good is False]),
    }


def labelled_scores(scorer: StepScorer, rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Scores of labelled steps with their labels, for a temperature.

    Args:
        scorer: the scorer.
        rows: rows with ``labels`` (or ``step_labels``), for an outcome scorer with ``outcome`` (or ``correct``); a
            rating of 0 counts as correct. Steps after the first incorrect one are left out, as where scorers are
            judged: whether a step that follows from a mistake is correct is a matter of convention.

    Returns:
        Scores and labels (0 or 1) of the steps that have both.

    Raises:
        DataError: a row without labels, or soft ones.
    """
    rule = LabelRule(after_error="truncate", scope="outcome" if scorer.meaning == "outcome" else "steps")
    scores, labels = [], []
    for row, values in zip(rows, score_rows(scorer, rows), strict=True):
        for target, value in zip(step_targets(row, len(values), 2, rule), values, strict=True):
            if target is None or math.isnan(value):
                continue
            if target[1] not in (0.0, 1.0):
                raise DataError(
                    f"label {target[1]} is neither correct nor incorrect: a temperature is fitted on hard labels",
                    path=str(row.get("id", "?")),
                    column="labels",
                )
            scores.append(value)
            labels.append(target[1])
    return scores, labels


def _to_cut(rows: list[Any], segmenter: str | None) -> list[Any]:
    """Rows with the name of the segmenter that cuts them, where they have no steps."""
    if segmenter is None:
        return rows
    has_steps = ("completions", "steps", "step_ends", "segmenter")
    return [
        row if any(row.get(name) is not None for name in has_steps) else row | {"segmenter": segmenter} for row in rows
    ]
