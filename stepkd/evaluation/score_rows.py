"""The jobs that run a step scorer (:mod:`stepkd.runs.job`): ``stepkd score`` scores rows with solutions, ``stepkd
evaluate-prm`` scores every step of a labelled set and sums up how well that tells incorrect steps.

Both folders hold ``settings.json`` (what decides the numbers), ``results.jsonl`` (the scored rows in the order of the
input; for a labelled set a line per solution with its step scores) and ``summary.json``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepkd.data.config import DataConfig, parse_spec
from stepkd.data.encode import LabelRule, step_targets
from stepkd.data.io import fingerprint
from stepkd.data.load import load_rows
from stepkd.data.rows import passed_on
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.config import EvaluatePRMConfig, ScoreConfig
from stepkd.evaluation.diagnostics import task_swaps
from stepkd.evaluation.process import summarise_process
from stepkd.models.policy import Policy
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
from stepkd.scorers.critiques import Tags, critique_costs
from stepkd.scorers.load import load_scorer
from stepkd.scorers.prm import packed
from stepkd.scorers.scorer import (
    Judged,
    Row,
    Solutions,
    StepScorer,
    by_problem,
    declared_steps,
    default_reduction,
    facts_of,
    reduce_scores,
    score_rows,
    step_scores,
)
from stepkd.steps.labels import first_incorrect, verdicts
from stepkd.tasks.rows import is_task_row

SOLUTIONS, TEMPERATURE = "solutions", "temperature"
"""The phases of a scoring job; judging a scorer has the first one only."""
_SCORED = ("score_facts", "prediction", "score_error")
"""Columns that only some scorers write: in scored rows what the earlier one wrote does not stay."""


def machine_settings(policy: Policy | None) -> dict[str, Any]:
    """What of machine and libraries decides a model's numbers; None: there is no model."""
    return {
        "device": "cpu" if policy is None else policy.device.type,
        "attention": None if policy is None else policy.causal_lm.config._attn_implementation,
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
    }


# --- stepkd score -----------------------------------------------------------------------------------------------------


def score_file(config: ScoreConfig, *, scorer: StepScorer | None = None, options: JobOptions = ALONE) -> dict[str, Any]:
    """Score all rows of a file, or resume.

    Args:
        config: what to score, and where to write.
        scorer: an already loaded scorer to use in place of loading ``config.scorer``.
        options: which rank this is, and whether to replace an earlier result of such a job.

    Returns:
        Counts and mean scores, and the temperature that was fitted; empty while other ranks have work left: the last
        one to finish writes the rows.

    Raises:
        ConfigError: the folder holds another job, or settings contradict each other.
        DataError, ModelError: rows or scorer cannot be used.
    """
    job = Job(Path(config.out), "scoring job", (RESULTS_NAME, SUMMARY_NAME), options)
    job.check()
    rows = load_rows(parse_spec(config.completions))
    if config.segmenter is not None:
        has_steps = ("completions", "steps", "step_ends", "segmenter")
        named = {"segmenter": config.segmenter}
        rows = [row if any(row.get(name) is not None for name in has_steps) else row | named for row in rows]
    labelled = None if config.fit_temperature is None else load_rows(parse_spec(config.fit_temperature))
    if labelled is not None and fingerprint(labelled) == fingerprint(rows):
        raise ConfigError("the rows to fit a temperature on are the rows to score: give held-out ones")
    loaded = scorer or load_scorer(config.scorer, device=config.device, max_rows=config.max_rows)
    reduction = config.reduction or default_reduction(loaded.meaning)
    if options.world_size == 1 and not any((job.out / name).exists() for name in (PARTS, RESULTS_NAME)):
        (job.out / SETTINGS_NAME).unlink(missing_ok=True)  # nothing is done: mended rows are not refused
    settings = job.begin(
        {
            **_scorer_settings(loaded, config.max_rows),
            "reduction": reduction,
            "rows": fingerprint(rows),
            "temperature_fitted_on": None if labelled is None else fingerprint(labelled),
        }
    )
    temperature, fit = getattr(loaded, "temperature", None), None
    if labelled is not None:
        unit = {"fit": labelled}
        job.work(TEMPERATURE, unit, lambda given: [fit_temperature(*labelled_scores(loaded, given))])
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
        values, told = _numbers(result["scores"]), passed_on(result, "score_facts", "prediction")
        if fit is not None:
            values = scaled(values, fit["temperature"]).tolist()
            if members := told.get("score_facts", {}).get("members"):
                members = [step_scores(row, scaled(_numbers(each), fit["temperature"]).tolist()) for each in members]
                told["score_facts"] = {**told["score_facts"], "members": members}
        scored.append(
            {
                **{name: value for name, value in row.items() if name not in _SCORED or not row.get("scorer")},
                "step_scores": step_scores(row, values),
                "score": reduce_scores(values, reduction, meaning=loaded.meaning),
                "scorer": provenance,
                **({} if result["error"] is None else {"score_error": result["error"]}),
                **told,
            }
        )
    summary = _summarise_scores(scored) | {"temperature_fit": fit}
    job.finish(RESULTS_NAME, scored, summary)
    return summary


def _scorer_settings(scorer: StepScorer, batch_size: int) -> dict[str, Any]:
    """What decides the scores of given rows."""
    settings = machine_settings(getattr(scorer, "policy", None))
    return settings | {"scorer": scorer.provenance(), "batch_size": batch_size}


def _blocks(rows: Sequence[Mapping[str, Any]], limit: int) -> list[list[int]]:
    """Numbers of rows, whole problems of about one length together, at most ``limit`` where a problem has no more."""

    def length(row: Mapping[str, Any]) -> int:
        return len(json.dumps(row.get("prompt"))) + len(str(row.get("completion", row.get("completions"))))

    problems = sorted(by_problem(rows), key=lambda numbers: -max(length(rows[n]) for n in numbers))
    blocks = packed([len(numbers) for numbers in problems], limit)
    return [[number for i in block for number in problems[i]] for block in blocks]


def _scored(scorer: StepScorer, rows: Sequence[Row], block: Sequence[int], *, first: bool) -> list[dict[str, Any]]:
    """Scores of the rows of a block; a row that cannot be read goes without.

    Raises:
        DataError: it is the first block, and none of its rows can be read.
    """
    try:
        found = score_rows(scorer, [rows[number] for number in block])
        return [_row_scores(scorer, rows[n], n, scores) for n, scores in zip(block, found, strict=True)]
    except DataError as error:
        row, reason = rows[block[0]], str(error)
    if len(block) > 1:
        results = [_scored(scorer, rows, [number], first=False)[0] for number in block]
    else:
        results = [{"index": block[0], "scores": [None] * len(declared_steps(row) or [None]), "error": reason}]
    if first and all(result["error"] for result in results):
        raise DataError(reason)
    return results


def _row_scores(scorer: StepScorer, row: Row, number: int, scores: Sequence[float]) -> dict[str, Any]:
    """A row's scores, with the reason where the scorer could not read the solution at all."""
    reason = getattr(scorer, "unreadable", None)
    error = None if reason is None or not all(map(math.isnan, scores)) else reason(row)
    found = {"index": number, "scores": [None if math.isnan(value) else value for value in scores], "error": error}
    return found | _facts(row, scores)


def _facts(row: Row, scores: Sequence[float]) -> dict[str, Any]:
    """What a scorer says beside its scores, as columns; the members of an ensemble step by step, as the scores are."""
    if not isinstance(scores, Judged):
        return {}
    facts = dict(scores.facts)
    if "members" in facts:
        facts["members"] = [step_scores(row, _numbers(each)) for each in facts["members"]]
    return {"score_facts": facts, "prediction": scores.prediction}


def _numbers(scores: Sequence[float | None]) -> list[float]:
    """Scores with NaN for None."""
    return [math.nan if value is None else value for value in scores]


def _summarise_scores(scored: Sequence[Row]) -> dict[str, Any]:
    """Counts of scored rows, and means: of all, and by the rows' ``correct`` or ``outcome``; null without a row."""
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
    } | ({"critiques": costs} if (costs := critique_costs(scored)) else {})


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


# --- stepkd evaluate-prm ----------------------------------------------------------------------------------------------


def figure_names(name: str) -> tuple[str, str]:
    """File names of a set's figures in the output folder.

    Args:
        name: of the set.

    Returns:
        That of the reliability diagram, and that of where the lowest score falls.
    """
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
    job = Job(Path(config.out), "judgement of a step scorer", (RESULTS_NAME, SUMMARY_NAME, *figures), options)
    job.check()
    rows = [(name, _with_steps(row)) for name, data in sets.items() for row in _limited(data, config.limit)]
    loaded = scorer or load_scorer(config.scorer, device=config.device, max_rows=config.max_rows)
    if loaded.meaning == "outcome":
        raise ConfigError("an outcome reward model has one score per solution and finds no first error: use best-of-N")
    data = {
        "name": config.benchmark,
        "sets": list(sets),
        "data": fingerprint([row for _, row in rows]),
        "limit": config.limit,
    }
    settings = job.begin({**_scorer_settings(loaded, config.max_rows), "benchmark": data})

    def work(batch: list[int]) -> list[dict[str, Any]]:
        # Sampled rows are read by their own token ids where the scorer wrote with the same tokenizer.
        found = score_rows(loaded, [rows[i][1] for i in batch])
        return [_judged(loaded, *rows[i], i, scores) for i, scores in zip(batch, found, strict=True)]

    starts = range(0, len(rows), config.max_rows)
    units = numbered([list(range(start, min(start + config.max_rows, len(rows)))) for start in starts])
    job.work(SOLUTIONS, units, work, lambda done: {"solutions/s": (len(done), None)})
    results = job.rows(SOLUTIONS, units)
    if results is None:
        return {}
    summary = summarise_process(
        results,
        threshold=config.threshold,
        tune_on=tune_on,
        meaned=config.sets,
        meaning=loaded.meaning,
        seed=config.seed,
    )
    summary |= {"benchmark": config.benchmark, "model": str(config.scorer), "scorer": loaded.provenance()}
    job.finish(RESULTS_NAME, results, summary)
    return summary | {"settings": settings}


def _limited(data: DataConfig, limit: int | None) -> Iterator[Row]:
    """Rows of a set, of PRMBench the first so many of every class."""
    seen: Counter[str | None] = Counter()
    for row in load_rows(data):
        seen[row.get("error_type")] += 1
        if limit is None or seen[row.get("error_type")] <= limit:
            yield row


def _with_steps(row: Row) -> dict[str, Any]:
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


def _judged(scorer: StepScorer, name: str, row: Row, index: int, scores: Sequence[float]) -> dict[str, Any]:
    """A line of the results; with the scores for the order-swap test, where the exact checker knows which steps need
    each other (the tiny world), the scorer reads texts and no critique would have to be written for it."""

    def rounded(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None or math.isnan(value) else round(float(value), 6) for value in values]

    result = {
        "id": f"{name}/{row['id']}",
        "index": index,
        "set": name,
        "prompt": row["prompt"],
        "completions": row["completions"],
        "scores": rounded(step_scores(row, scores)),
        "labels": verdicts(row["labels"]),
        "first_error": first_incorrect(row["labels"]),
        **{key: row[key] for key in ("error_type", "problem_id", "ignored_errors") if row.get(key) is not None},
    } | _facts(row, scores)
    written = "critiques" in facts_of(scores) or isinstance(scorer, Tags)
    swappable = is_task_row(row) and not written
    for key, dependent in (("swaps", True), ("independent_swaps", False)) if swappable else ():
        if swaps := task_swaps(row, dependent=dependent):
            swapped = scorer.score([Solutions(row, pair) for pair in swaps])
            result[key] = [[rounded(part) for part in pair] for pair in swapped]
    return result
