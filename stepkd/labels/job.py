"""The labelling job: draw or read solutions, cut them into steps, label the steps; a job of :mod:`stepkd.runs.job`.

Two phases. First the solutions are drawn (or those of the rows graded), then they are cut and labelled. A threshold
that is to be fitted is fitted between the two, on all solutions. Every draw is keyed by the solution's number and every
unit has a fixed composition, so the labels do not depend on the number of ranks or on interruptions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepkd.data.spec import LABELS_NAME
from stepkd.errors import DataError
from stepkd.labels.labellers import MonteCarlo
from stepkd.labels.quality import row_labels, summarise_labels
from stepkd.labels.settings import Cut, Fitted, LabelConfig, OwnSteps, Reject, Sampled
from stepkd.labels.solutions import (
    ExistingSolutions,
    SampledSolutions,
    cut,
    drop_duplicates,
    labelled_row,
)
from stepkd.labels.step_labels import Labeller, Row, Solution
from stepkd.labels.workbench import Workbench, finish_job, open_workbench
from stepkd.models.checkpoint import load_trained, weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.runs.files import write_json
from stepkd.runs.job import ALONE, SUMMARY_NAME, Job, JobOptions, finished_rows, numbered
from stepkd.sampling.sampler import Sampler
from stepkd.sampling.transformers_sampler import TransformersSampler
from stepkd.steps.labels import verdicts
from stepkd.steps.segment import Segmenter, get_segmenter, segmenter_settings
from stepkd.steps.threshold import SegmentThreshold, fit_threshold

KIND, THRESHOLD_NAME = "labelling job", "threshold.json"
SOLUTIONS, LABELS = "solutions", "labels"
Source = SampledSolutions | ExistingSolutions


@dataclass(frozen=True)
class JobParts:
    """What a labelling job works with."""

    bench: Workbench
    """Rows, policy, template and grader."""
    source: Source
    """Where solutions come from."""
    labeller: Labeller
    """What labels them."""
    settings: Mapping[str, Any]
    """What decides the labels."""


def run_label_job(
    config: LabelConfig, *, options: JobOptions = ALONE, parts: JobParts | None = None
) -> dict[str, Any] | None:
    """Run a labelling job, resume it, or do one rank's share of it.

    Args:
        config: what to label, how, and where to write.
        options: how this process takes part.
        parts: what :func:`job_parts` makes of ``config``, already made.

    Returns:
        The summary, written to ``summary.json`` beside ``labels.jsonl``; None while units of other ranks are missing
        (the last rank to finish writes them).

    Raises:
        ConfigError: the folder holds another job (its settings are named), or settings contradict each other.
        DataError, ModelError: data or model cannot be used.
        MachineError: the folder cannot be written.
        StepkdError: other ranks do not come.
    """
    job = Job(Path(config.out), KIND, (LABELS_NAME, SUMMARY_NAME, THRESHOLD_NAME), options)
    job.check()
    parts = parts or job_parts(config)
    if options.rank == 0:
        _warn_of_foreign_threshold(config, parts.bench.model)
    with parts.bench.grader:
        job.begin(parts.settings)
        units = numbered(parts.source.groups())
        job.work(SOLUTIONS, units, parts.source.work, _correct_answers)
        return _label(job, config, parts, job.wait(SOLUTIONS, units))


def drawn_records(out: str | Path) -> list[dict[str, Any]]:
    """Records of a finished job's first phase: the solutions as they were drawn, also those that were not labelled."""
    return finished_rows(out, SOLUTIONS)


def _label(job: Job, config: LabelConfig, parts: JobParts, drawn: Sequence[Row]) -> dict[str, Any] | None:
    """This rank's share of the second phase; the summary when nothing is left to do for anybody."""
    found = [solution for record in drawn for solution in parts.source.solutions(record)]
    dedupe = isinstance(config.solutions, Sampled) and config.solutions.dedupe
    kept, duplicates = drop_duplicates(found) if dedupe else (found, 0)
    if not kept:
        raise DataError("no solution is left to label: every row is longer than the model's context")
    segmenter, cut_by = _segmenter(job.out, config, parts, kept)
    provenance = parts.labeller.provenance() | {
        "segmenter": cut_by,
        "prompt": parts.bench.prompt_id,
        "data": parts.bench.source,
        "dedupe": dedupe,
    }
    continuations = config.labeller.sampling.n if isinstance(config.labeller, MonteCarlo) else 1
    size = max(1, config.max_rows // continuations)
    units = numbered([kept[start : start + size] for start in range(0, len(kept), size)])
    job.work(LABELS, units, lambda group: _label_group(group, parts, segmenter, provenance), _correct_steps)
    records = job.rows(LABELS, units)
    if records is None:
        return None
    too_long = sum(bool(record.get("too_long")) for record in drawn)
    summary = summarise_labels(records, len(found) + too_long, duplicates, drawn, too_long=too_long)
    summary |= {"threshold": getattr(segmenter, "threshold", None), "segmenter": cut_by}
    rows = [record["row"] for record in records if "row" in record]
    nothing = f"none of {summary['solutions']} solutions could be labelled"
    return finish_job(job, LABELS_NAME, rows, summary, nothing=nothing)


def _segmenter(
    out: Path, config: LabelConfig, parts: JobParts, solutions: Sequence[Solution]
) -> tuple[Segmenter, dict[str, Any]]:
    """The job's segmenter, and what rows say of it; a threshold that is to be fitted is fitted on all solutions."""
    steps = config.steps
    if isinstance(steps, OwnSteps):
        sampled = isinstance(config.solutions, Sampled)
        return get_segmenter("newline"), {"name": "newline" if sampled else "of the row"}
    assert isinstance(steps, Cut | Fitted | Reject)
    if isinstance(steps, Fitted):
        (signal,) = steps.signals
        threshold = fit_threshold(
            [solution.signals[signal] for solution in solutions],
            steps.quantile,
            signal="confidence" if signal == "logprobs" else "entropy",
            model=parts.bench.model,
            sampling=parts.settings["sampling"],
        )
        write_json(out / THRESHOLD_NAME, threshold.to_dict())
        segmenter: Segmenter = threshold.segmenter()
    else:
        segmenter = get_segmenter(steps.segmenter)
    return segmenter, {"name": steps.segmenter.partition(":")[0]} | segmenter_settings(segmenter)


def _label_group(
    solutions: Sequence[Solution], parts: JobParts, segmenter: Segmenter, provenance: Row
) -> list[dict[str, Any]]:
    found = [cut(solution, parts.bench.policy.tokenizer, segmenter) for solution in solutions]
    usable = [solution for solution in found if isinstance(solution, Solution)]
    labelled = iter(parts.labeller.label(usable) if usable else [])
    records: list[dict[str, Any]] = []
    for solution, steps in zip(solutions, found, strict=True):
        record: dict[str, Any] = {"id": solution.id, "index": solution.index}
        if isinstance(steps, str):
            records.append(record | {"dropped": steps})
            continue
        labels = next(labelled)
        if labels.labels.count(None) == len(labels.labels):
            record |= {"dropped": "no_labels", "facts": dict(labels.facts)}
        else:
            earlier = (solution.columns.get("labelling") or {}).get("segmenter")
            own = provenance["segmenter"] == {"name": "of the row"} and earlier
            record["row"] = labelled_row(steps, labels, {**provenance, **({"segmenter": earlier} if own else {})})
        records.append(record)
    return records


def _correct_answers(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    known = [sample["correct"] for row in rows for sample in row.get("samples", [row])]
    known = [correct for correct in known if correct is not None]
    return {"answers correct": (sum(known), len(known))}


def _correct_steps(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    marks = [mark for row in rows if "row" in row for mark in verdicts(row_labels(row["row"])) if mark is not None]
    return {"steps correct": (sum(marks), len(marks))}


def job_parts(
    config: LabelConfig,
    *,
    policy: Policy | None = None,
    sampler: Sampler | None = None,
    labeller: Labeller | None = None,
) -> JobParts:
    """Load what a job needs, checking everything that can be checked before the work begins.

    Args:
        config: the job's settings.
        policy, sampler, labeller: already made ones to use in place of those that ``config`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """
    solutions, steps = config.solutions, config.steps
    drawn = isinstance(solutions, Sampled)
    bench = open_workbench(
        config, solutions.source, solutions.model, config.labeller.check, problems=drawn, policy=policy
    )
    continues = config.labeller.continues or bool(steps.signals)
    if continues and not drawn:
        bench.check_prompt()
    if continues or drawn:
        bench.policy.to(bench.device)  # else only its tokenizer is used
    teacher = None if steps.teacher is None else load_trained(steps.teacher, dtype=config.dtype).to(bench.device)
    sampler = sampler or TransformersSampler(bench.policy, max_rows=config.max_rows)
    labeller = labeller or config.labeller.build(bench, sampler)
    sampling = None
    if isinstance(solutions, Sampled):
        sampling = bench.limited(solutions.sampling)
        source: Source = SampledSolutions(bench, sampler, sampling, steps.signals, teacher)
    else:
        keep = isinstance(steps, OwnSteps)
        source = ExistingSolutions(bench, keep_steps=keep, signals=steps.signals, teacher=teacher)
    settings = bench.settings() | {
        "teacher": None if teacher is None else {"name": steps.teacher, "weights": weights_fingerprint(teacher)},
        "sampling": None if sampling is None else asdict(sampling),
        "dedupe": solutions.dedupe if isinstance(solutions, Sampled) else None,
        "labeller": labeller.provenance(),
        "segmenter": steps.settings(),
    }
    return JobParts(bench, source, labeller, settings)


def _warn_of_foreign_threshold(config: LabelConfig, model: str) -> None:
    """A threshold file belongs to the model whose samples it was fitted on; another model's signals are others."""
    steps = config.steps
    if not isinstance(steps, Cut) or not steps.signals or not Path(file := steps.segmenter.partition(":")[2]).is_file():
        return
    threshold = SegmentThreshold.load(file)
    if threshold.model not in (None, model):
        warnings.warn(
            f"segmenter {steps.segmenter!r}: its threshold was fitted on samples of {threshold.model}, and {model} is "
            f"another model: it may divide at more or fewer than {threshold.quantile:.1%} of the tokens. To fit one "
            "on this job's solutions, choose Fitted steps",
            stacklevel=2,
        )
