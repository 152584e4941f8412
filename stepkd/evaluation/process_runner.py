"""Judging a step scorer: score every step of a labelled set, a job of fixed batches, and sum up.

The folder is that of any evaluation: ``settings.json`` (what decides the numbers), ``results.jsonl`` (one line per
solution with its step scores) and ``summary.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepkd.data.io import fingerprint
from stepkd.data.spec import load_rows
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.config import EvaluatePRMConfig
from stepkd.evaluation.diagnostics import task_swaps
from stepkd.evaluation.process import summarise_process
from stepkd.evaluation.score_rows import scorer_settings
from stepkd.runs.job import ALONE, RESULTS_NAME, SUMMARY_NAME, Job, JobOptions, numbered
from stepkd.scorers.load import load_scorer
from stepkd.scorers.scorer import Solutions, StepScorer, score_rows, step_scores
from stepkd.steps.labels import first_incorrect, verdicts
from stepkd.tasks.rows import is_task_row

KIND = "judgement of a step scorer"
SOLUTIONS = "solutions"
"""The one phase of such a job."""


def figure_names(name: str) -> tuple[str, str]:
    """File names of a set's figures: reliability, and where the lowest score falls."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return f"reliability-{safe}.svg", f"argmin-{safe}.svg"


def evaluate_process(
    config: EvaluatePRMConfig, scorer: StepScorer | None = None, *, options: JobOptions = ALONE
) -> dict[str, Any]:
    """Score every step of the sets (or resume) and sum up.

    Args:
        config: what to evaluate, and where to write.
        scorer: an already loaded scorer to use in place of loading ``config.scorer``.
        options: which rank this is, and whether to overwrite an earlier evaluation in the folder.

    Returns:
        The summary that ``summary.json`` holds, and the settings; empty while other ranks have work left: the last one
        to finish writes the results.

    Raises:
        ConfigError: the folder holds another evaluation, or the scorer gives one score per solution only.
        DataError: rows without step labels.
    """
    sets, tune_on = config.data()
    figures = [name for each in sets for name in figure_names(each)]
    job = Job(Path(config.out), KIND, (RESULTS_NAME, SUMMARY_NAME, *figures), options)
    job.check()
    rows = [(name, _with_steps(row)) for name, data in sets.items() for row in load_rows(data, contract=None)]
    loaded = scorer or load_scorer(config.scorer, device=config.device, max_rows=config.max_rows)
    if loaded.meaning == "outcome":
        raise ConfigError("an outcome reward model has one score per solution and finds no first error: use best-of-N")
    settings = job.begin(
        {
            **scorer_settings(loaded, config.max_rows),
            "benchmark": {
                "name": config.benchmark,
                "sets": list(sets),
                "data": fingerprint([row for _, row in rows]),
                "limit": config.limit,
            },
        }
    )

    def work(batch: list[int]) -> list[dict[str, Any]]:
        # Sampled rows are read by their own token ids where the scorer wrote with the same tokenizer.
        found = score_rows(loaded, [rows[i][1] for i in batch])
        return [
            _result(rows[i][0], rows[i][1], i, step_scores(rows[i][1], scores)) | _swapped(rows[i][1], loaded)
            for i, scores in zip(batch, found, strict=True)
        ]

    starts = range(0, len(rows), config.max_rows)
    units = numbered([list(range(start, min(start + config.max_rows, len(rows)))) for start in starts])
    job.work(SOLUTIONS, units, work, lambda done: {"solutions/s": (len(done), None)})
    results = job.rows(SOLUTIONS, units)
    if results is None:
        return {}
    summary = summarise_process(
        results, threshold=config.threshold, tune_on=tune_on, meaning=loaded.meaning, seed=config.seed
    )
    summary |= {"benchmark": config.benchmark, "model": str(config.scorer), "scorer": loaded.provenance()}
    job.finish(RESULTS_NAME, results, summary)
    return summary | {"settings": settings}


def _with_steps(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with ``completions`` and ``labels``, also where it is a labelled completion (``steps``,
    ``step_labels``)."""
    steps = row.get("completions", row.get("steps"))
    labels = row.get("labels", row.get("step_labels"))
    if steps is None or labels is None or len(steps) != len(labels):
        raise DataError(
            "judging a step scorer needs a step-labelled row: 'completions' and 'labels', or 'steps' and "
            f"'step_labels', of one length; found {len(steps or ())} steps and {len(labels or ())} labels",
            path=str(row.get("id", "?")),
            column="labels",
        )
    return {**row, "completions": steps, "labels": labels}


def _result(name: str, row: Mapping[str, Any], index: int, scores: Sequence[float | None]) -> dict[str, Any]:
    return {
        "id": f"{name}/{row['id']}",
        "index": index,
        "set": name,
        "prompt": row["prompt"],
        "scores": _plain(scores),
        "labels": verdicts(row["labels"]),
        "first_error": first_incorrect(row["labels"]),
    }


def _swapped(row: Mapping[str, Any], scorer: StepScorer) -> dict[str, Any]:
    """Scores for the order-swap test, where the exact checker knows which steps need each other (the tiny world)."""
    if not is_task_row(row) or not (swaps := task_swaps(row)):
        return {}
    scores = scorer.score([Solutions(row, pair) for pair in swaps])
    return {"swaps": [[_plain(part) for part in pair] for pair in scores]}


def _plain(scores: Sequence[float | None]) -> list[float | None]:
    return [None if score is None or math.isnan(score) else round(float(score), 6) for score in scores]
