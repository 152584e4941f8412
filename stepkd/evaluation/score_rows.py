"""``stepkd score``: rows with solutions in, the same rows with scores out, resumable at any moment.

While it runs, finished problems lie in ``<out>.work/`` (whole batches only, under the manifest of the job). At the end
the scored rows are written in the order of the input, with ``<name>.manifest.json`` beside them, and the work folder
goes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stepkd.data.io import fingerprint, read_rows
from stepkd.data.spec import load_rows, parse_spec
from stepkd.data.step_labels import LabelRule, step_targets
from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.evaluation.manifest import (
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    RESULTS_NAME,
    check_resumable,
    package_versions,
    read_manifest,
    write_manifest,
)
from stepkd.evaluation.score_batches import Report, score_batches
from stepkd.runs.files import write_file, write_jsonl
from stepkd.scorers.calibration import TemperatureScaling, fit_temperature
from stepkd.scorers.load import ScorerOptions, load_scorer
from stepkd.scorers.scorer import (
    Reduction,
    StepScorer,
    default_reduction,
    problem_key,
    reduce_scores,
    score_rows,
    step_scores,
)
from stepkd.steps import SEGMENTERS

_TEMPERATURE = "temperature.json"


@dataclass(frozen=True)
class ScoreJob:
    """One file to score."""

    model: str
    """Scorer, as for :func:`stepkd.scorers.load.load_scorer`."""
    rollouts: str
    """File or data settings of the rows."""
    out: Path
    """File to write, ``.jsonl``."""
    reduction: Reduction | None = None
    """Step scores to one score; None: what suits the scorer."""
    fit_on: str | None = None
    """File or data settings of held-out labelled rows to fit a temperature on."""
    segmenter: str | None = None
    """Cuts solutions that come as one text; None: ``newline``. Steps that a row has, or a segmenter that it names, stay
    as they are."""
    options: ScorerOptions = field(default_factory=ScorerOptions)
    """How the scorer runs."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".jsonl":
            raise ConfigError(f"--out {self.out}: scored rows are JSON Lines, let the name end in .jsonl")
        if self.segmenter is not None:
            check_choice("segmenter", self.segmenter, SEGMENTERS)
        if self.fit_on is not None and self.options.temperature is not None:
            raise ConfigError("a fitted temperature and rows to fit one on contradict each other: give one of them")

    @property
    def work(self) -> Path:
        """Folder of a job that is not finished."""
        return self.out.with_name(f"{self.out.name}.work")

    def beside(self, name: str) -> Path:
        """A file that belongs to the result."""
        return self.out.with_name(f"{self.out.stem}.{name}")


def score_file(
    job: ScoreJob, *, scorer: StepScorer | None = None, report: Report | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Score all rows of a file, or go on with it.

    Args:
        job: what to score, and where to write.
        scorer: an already loaded scorer to use in place of loading ``job.model``.
        report: called after every batch with (solutions scored, solutions in all).
        overwrite: replace an earlier result of such a job.

    Returns:
        Counts and mean scores, see :func:`summarise_scores`.

    Raises:
        ConfigError: the file is there and was made otherwise, or settings contradict each other.
        DataError, ModelError: rows or scorer cannot be used.
    """
    _check_out(job, overwrite=overwrite)
    rows = _to_cut(load_rows(parse_spec(job.rollouts)), job.segmenter)
    labelled = None if job.fit_on is None else load_rows(parse_spec(job.fit_on))
    if labelled is not None and fingerprint(labelled) == fingerprint(rows):
        raise ConfigError("the rows to fit a temperature on are the rows to score: give held-out ones")
    scorer = load_scorer(job.model, job.options) if scorer is None else scorer
    reduction = job.reduction or default_reduction(scorer.meaning)
    manifest = _manifest(job, scorer, reduction, rows, labelled)
    if not _begin(job, manifest, overwrite=overwrite):
        return summarise_scores([row for row, _ in read_rows(job.out)], scorer.meaning)
    temperature = job.options.temperature if labelled is None else _fitted(job.work / _TEMPERATURE, scorer, labelled)
    results = score_batches(job.work / RESULTS_NAME, scorer, rows, job.options.max_rows, report)
    if labelled is not None and temperature is not None:
        results = [replace(result, scores=temperature.apply(result.scores).tolist()) for result in results]
    provenance = {key: manifest["scorer"].get(key) for key in ("scorer", "model", "weights", "meaning")}
    provenance |= {"reduction": reduction, "temperature": None if temperature is None else temperature.temperature}
    scored = [
        {
            **row,
            "step_scores": step_scores(row, result.scores),
            "score": reduce_scores(result.scores, reduction, meaning=scorer.meaning),
            "scorer": provenance,
            **({} if result.error is None else {"score_error": result.error}),
        }
        for row, result in zip(rows, results, strict=True)
    ]
    _finish(job, scored)
    return summarise_scores(scored, scorer.meaning)


def summarise_scores(scored: Sequence[Mapping[str, Any]], meaning: str) -> dict[str, Any]:
    """Counts and means of scored rows.

    Args:
        scored: rows with their scores.
        meaning: what the scores estimate.

    Returns:
        ``rows``, ``problems``, ``steps``, ``unscored_rows``, their ``unscored_steps`` (an outcome scorer owes only the
        last), ``unreadable_rows`` among them with the first ``unreadable_reason``, ``reduction``, ``temperature``,
        ``mean_score``, and ``mean_score_right`` and ``mean_score_wrong`` by the rows' ``correct`` or ``outcome``; a
        mean without a row is null.
    """
    unscored = [row["step_scores"] for row in scored if row["score"] is None]
    errors = [row["score_error"] for row in scored if "score_error" in row]
    owed = [values[-1:] if meaning == "outcome" else values for values in unscored]
    verdicts = [row.get("outcome") if row.get("correct") is None else row["correct"] for row in scored]

    def mean(wanted: Callable[[Any], bool]) -> float | None:
        kept = [
            row["score"]
            for row, right in zip(scored, verdicts, strict=True)
            if row["score"] is not None and wanted(right)
        ]
        return math.fsum(kept) / len(kept) if kept else None

    return {
        "rows": len(scored),
        "problems": len({problem_key(row) for row in scored}),
        "steps": sum(len(row["step_scores"]) for row in scored),
        "unscored_rows": len(unscored),
        "unscored_steps": sum(value is None for values in owed for value in values),
        "unreadable_rows": len(errors),
        "unreadable_reason": errors[0] if errors else None,
        "reduction": scored[0]["scorer"]["reduction"],
        "temperature": scored[0]["scorer"]["temperature"],
        "mean_score": mean(lambda _: True),
        "mean_score_right": mean(lambda right: right is True),
        "mean_score_wrong": mean(lambda right: right is False),
    }


def labelled_scores(scorer: StepScorer, rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Scores of labelled steps with their labels, for a temperature.

    Args:
        scorer: the scorer.
        rows: rows with ``labels`` (or ``step_labels``), for an outcome scorer with ``outcome`` (or ``correct``); a
            rating of 0 counts as right. Steps after the first wrong one are left out, as where scorers are judged:
            whether a step that follows from a mistake is right is a matter of convention.

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
                    f"label {target[1]} is neither right nor wrong: a temperature is fitted on hard labels",
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


def _fitted(path: Path, scorer: StepScorer, labelled: Sequence[Mapping[str, Any]]) -> TemperatureScaling:
    """The temperature of this job: read when it was fitted before the job was interrupted."""
    if path.is_file():
        return TemperatureScaling.load(path)
    temperature = fit_temperature(*labelled_scores(scorer, labelled))
    temperature.save(path)
    return temperature


def _manifest(
    job: ScoreJob,
    scorer: StepScorer,
    reduction: Reduction,
    rows: Sequence[Mapping[str, Any]],
    labelled: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    policy = getattr(scorer, "policy", None)
    manifest = {
        "format": MANIFEST_FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "scorer": scorer.provenance(),
        "reduction": reduction,
        "rows": fingerprint(rows),
        "temperature_fitted_on": None if labelled is None else fingerprint(labelled),
        "batch_size": job.options.max_rows,
        "device": "cpu" if policy is None else policy.device.type,
        "attention": None if policy is None else policy.causal_lm.config._attn_implementation,
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
    }
    return dict(json.loads(json.dumps(manifest)))


def _check_out(job: ScoreJob, *, overwrite: bool) -> None:
    """Refuse, before anything slow, a file that is not of such a job."""
    if not job.out.exists() or job.beside(MANIFEST_NAME).is_file() or (job.work / MANIFEST_NAME).is_file():
        return
    what = "so --overwrite does not replace it" if overwrite else "so it cannot be gone on with"
    raise ConfigError(
        f"{job.out} is there and has no {job.beside(MANIFEST_NAME).name} beside it: it is no result of stepkd score, "
        f"{what}; give another --out"
    )


def _begin(job: ScoreJob, manifest: dict[str, Any], *, overwrite: bool) -> bool:
    """Make the work folder ready; False when the result is there already and of the same settings."""
    finished = job.beside(MANIFEST_NAME)
    if overwrite:
        for path in (job.out, finished, job.beside(_TEMPERATURE)):
            path.unlink(missing_ok=True)
        shutil.rmtree(job.work, ignore_errors=True)
    if job.out.exists() and finished.is_file():
        _check_same(json.loads(finished.read_text(encoding="utf-8")), manifest)
        return False
    if (job.work / MANIFEST_NAME).is_file() and _has_results(job.work):
        _check_same(read_manifest(job.work), manifest)
    else:
        write_manifest(job.work, manifest)
    return True


def _has_results(work: Path) -> bool:
    """Whether an interrupted job got as far as a result."""
    results = work / RESULTS_NAME
    return (work / _TEMPERATURE).is_file() or (results.is_file() and results.stat().st_size > 0)


def _check_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    try:
        check_resumable(old, new)
    except ConfigError as error:
        raise ConfigError(str(error).replace("another --out folder", "another --out, or --overwrite")) from None


def _finish(job: ScoreJob, scored: Sequence[Mapping[str, Any]]) -> None:
    """Rows first, then what makes them a finished result; a kill in between leaves the work folder, which goes last."""
    write_jsonl(job.out, scored)
    if (job.work / _TEMPERATURE).is_file():
        write_file(job.beside(_TEMPERATURE), (job.work / _TEMPERATURE).read_bytes())
    write_file(job.beside(MANIFEST_NAME), (job.work / MANIFEST_NAME).read_bytes())
    shutil.rmtree(job.work, ignore_errors=True)
