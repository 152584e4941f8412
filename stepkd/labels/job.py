"""The labelling job: draw or read solutions, cut them into steps, label the steps; a job of :mod:`stepkd.runs.job`.

Two phases. First the solutions are drawn (or those of the rows graded), then they are cut and labelled. A threshold
that is to be fitted is fitted between the two, on all solutions. Every draw is keyed by the solution's number and every
unit has a fixed composition, so the labels do not depend on the number of ranks or on interruptions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from stepkd.data.spec import LABELS_NAME
from stepkd.errors import DataError
from stepkd.labels.labellers import CheckerLabeller, Labeller, OutcomeLabeller, Reduce, ScorerLabeller, Solution
from stepkd.labels.monte_carlo import MonteCarloLabeller
from stepkd.labels.quality import row_labels, summarise_labels
from stepkd.labels.settings import FITTED, SCORER_LABELLERS, LabelConfig
from stepkd.labels.solutions import Candidate, Row, SolutionSource, cut, drop_duplicates, labelled_row
from stepkd.labels.sources import GivenSolutions, SampledSolutions
from stepkd.labels.workbench import Workbench, finish_job, load_judge, open_workbench
from stepkd.models.checkpoint import load_trained, weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.runs.files import write_json
from stepkd.runs.job import ALONE, SUMMARY_NAME, Job, JobOptions, finished_rows, numbered
from stepkd.sampling.sampler import BranchSampler, Sampler
from stepkd.sampling.transformers_sampler import TransformersSampler
from stepkd.scorers.rules import Arithmetic
from stepkd.steps.labels import verdicts
from stepkd.steps.segment import Segmenter, get_segmenter, segmenter_settings
from stepkd.steps.threshold import SegmentThreshold, fit_threshold
from stepkd.tasks.rows import is_task_row

KIND, THRESHOLD_NAME = "labelling job", "threshold.json"
SOLUTIONS, LABELS = "solutions", "labels"


@dataclass(frozen=True)
class JobParts:
    """What a labelling job works with."""

    bench: Workbench
    """Rows, policy, template and grader."""
    source: SolutionSource
    """Where solutions come from."""
    labeller: Labeller
    """What labels them."""
    settings: Mapping[str, Any]
    """What decides the labels."""


def run_label_job(
    spec: LabelConfig, *, options: JobOptions = ALONE, parts: JobParts | None = None
) -> dict[str, Any] | None:
    """Run a labelling job, resume it, or do one rank's share of it.

    Args:
        spec: what to label, how, and where to write.
        options: how this process takes part.
        parts: what :func:`job_parts` makes of ``spec``, already made.

    Returns:
        The summary, written to ``summary.json`` beside ``labels.jsonl``; None while units of other ranks are missing
        (the last rank to finish writes them).

    Raises:
        ConfigError: the folder holds another job (its settings are named), or settings contradict each other.
        DataError, ModelError: data or model cannot be used.
        MachineError: the folder cannot be written.
        StepkdError: other ranks do not come.
    """
    job = Job(Path(spec.out), KIND, (LABELS_NAME, SUMMARY_NAME, THRESHOLD_NAME), options)
    job.check()
    parts = parts or job_parts(spec)
    if options.rank == 0:
        _warn_of_foreign_threshold(spec, parts.bench.model)
    with parts.bench.grader:
        job.begin(parts.settings)
        units = numbered(parts.source.groups())
        job.work(SOLUTIONS, units, parts.source.work, _correct_answers)
        return _label(job, spec, parts, job.wait(SOLUTIONS, units))


def drawn_records(out: str | Path) -> list[dict[str, Any]]:
    """Records of a finished job's first phase: the solutions as they were drawn, also those that were not labelled."""
    return finished_rows(out, SOLUTIONS)


def _label(job: Job, spec: LabelConfig, parts: JobParts, drawn: Sequence[Row]) -> dict[str, Any] | None:
    """This rank's share of the second phase; the summary when nothing is left to do for anybody."""
    bench = parts.bench
    found = [candidate for record in drawn for candidate in parts.source.candidates(record)]
    kept, duplicates = drop_duplicates(found) if spec.dedupe and bench.drawn else (found, 0)
    if not kept:
        raise DataError("no solution is left to label: every row is longer than the model's context")
    segmenter = _segmenter(job.out, spec, parts, kept)
    cut_by = {"name": "of the row"}
    if segmenter is not None:
        cut_by = {"name": spec.segmenter_kind or "newline"} | segmenter_settings(segmenter)
    provenance = parts.labeller.provenance() | {
        "segmenter": cut_by,
        "prompt": bench.prompt_id,
        "data": bench.source,
        "dedupe": spec.dedupe and bench.drawn,
    }
    size = max(1, spec.max_rows // (spec.rollouts_per_step if spec.labeller == "monte_carlo" else 1))
    units = numbered([kept[start : start + size] for start in range(0, len(kept), size)])
    job.work(LABELS, units, lambda group: _label_group(group, parts, segmenter, provenance), _correct_steps)
    records = job.rows(LABELS, units)
    if records is None:
        return None
    too_long = sum(bool(record.get("too_long")) for record in drawn)
    summary = summarise_labels(records, len(found) + too_long, duplicates, drawn, too_long=too_long)
    summary |= {"threshold": getattr(segmenter, "threshold", None), "segmenter": cut_by}
    rows = [record["row"] for record in records if "row" in record]
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items())
    nothing = f"none of {summary['solutions']} solutions could be labelled ({reasons})"
    return finish_job(job, LABELS_NAME, rows, summary, nothing=nothing)


def _segmenter(out: Path, spec: LabelConfig, parts: JobParts, candidates: Sequence[Candidate]) -> Segmenter | None:
    """The job's segmenter; a threshold that is to be fitted is fitted on all solutions, and is one of the outputs."""
    if spec.segmenter is None:
        return get_segmenter("newline") if parts.bench.drawn else None
    if not spec.fits_threshold:
        return get_segmenter(spec.segmenter)
    (signal,) = spec.signals
    threshold = fit_threshold(
        [candidate.signals[signal] for candidate in candidates],
        spec.quantile,
        signal="confidence" if signal == "logprobs" else "entropy",
        model=parts.bench.model,
        sampling=parts.settings["sampling"],
        seed=spec.seed,
    )
    write_json(out / THRESHOLD_NAME, threshold.to_dict())
    return threshold.segmenter()


def _label_group(
    candidates: Sequence[Candidate], parts: JobParts, segmenter: Segmenter | None, provenance: Row
) -> list[dict[str, Any]]:
    default = get_segmenter("newline")
    found = [cut(candidate, parts.bench.policy.tokenizer, segmenter, default) for candidate in candidates]
    solutions = [solution for solution in found if isinstance(solution, Solution)]
    labelled = iter(parts.labeller.label(solutions) if solutions else [])
    records: list[dict[str, Any]] = []
    for candidate, solution in zip(candidates, found, strict=True):
        record: dict[str, Any] = {"id": candidate.id, "index": candidate.index}
        if isinstance(solution, str):
            record["dropped"] = solution
        else:
            labels = next(labelled)
            if all(label is None for label in labels.labels):
                record |= {"dropped": "no_labels", "facts": dict(labels.facts)}
            else:
                earlier = (candidate.columns.get("labelling") or {}).get("segmenter")
                own = {"segmenter": earlier} if segmenter is None and earlier else {}
                record["row"] = labelled_row(candidate, solution, labels, {**provenance, **own})
        records.append(record)
    return records


def _correct_answers(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    known = [sample["correct"] for row in rows for sample in row.get("samples", [row])]
    known = [correct for correct in known if correct is not None]
    return {"answers correct": (sum(known), len(known))}


def _correct_steps(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    marks = [mark for row in rows if "row" in row for mark in verdicts(row_labels(row["row"])) if mark is not None]
    return {"steps correct": (sum(marks), len(marks))}


# ---- from the settings to the parts --------------------------------------------------------------------------------


def job_parts(
    spec: LabelConfig,
    *,
    policy: Policy | None = None,
    sampler: Sampler | None = None,
    labeller: Labeller | None = None,
) -> JobParts:
    """Load what a job needs, checking everything that can be checked before the work begins.

    Args:
        spec: the job's settings.
        policy, sampler, labeller: already made ones to use in place of those that ``spec`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """
    drawn = spec.problems is not None
    word = str(spec.problems if drawn else spec.rollouts)
    bench = open_workbench(spec, word, partial(_check_row, spec), problems=drawn, policy=policy)
    continued = spec.labeller == "monte_carlo" or bool(spec.signals)
    if continued and not drawn:
        bench.check_prompt()
    if continued or drawn:
        bench.policy.to(bench.device)  # else only its tokenizer is used
    teacher = None if spec.teacher is None else load_trained(spec.teacher, dtype=spec.dtype).to(bench.device)
    sampler = sampler or TransformersSampler(bench.policy, max_rows=spec.max_rows)
    labeller = labeller or make_labeller(spec, bench, sampler)
    sampling = spec.drawing(spec.samples, bench.max_new_tokens) if drawn else None
    source: SolutionSource = GivenSolutions(
        bench.rows,
        bench.template,
        bench.grader,
        policy=bench.policy,
        keep_steps=spec.segmenter is None,
        signals=spec.signals,
        teacher=teacher,
    )
    if sampling is not None:
        source = SampledSolutions(bench, sampler, sampling, spec.signals, teacher)
    settings = bench.settings() | {
        "teacher": None if teacher is None else {"name": spec.teacher, "weights": weights_fingerprint(teacher)},
        "sampling": None if sampling is None else asdict(sampling),
        "dedupe": None if sampling is None else spec.dedupe,
        "labeller": labeller.provenance(),
        "segmenter": _segmenter_settings(spec),
    }
    return JobParts(bench, source, labeller, settings)


def _segmenter_settings(spec: LabelConfig) -> dict[str, Any] | None:
    """The segmenter by its settings, so that a threshold file counts by what it says and not by its name."""
    if spec.segmenter is None:
        return None
    if spec.fits_threshold:
        return {"name": spec.segmenter_kind, "threshold": "fitted", "quantile": spec.quantile}
    return {"name": spec.segmenter_kind, **segmenter_settings(get_segmenter(spec.segmenter))}


def _warn_of_foreign_threshold(spec: LabelConfig, model: str) -> None:
    """A threshold file belongs to the model whose samples it was fitted on; another model's signals are others."""
    file = (spec.segmenter or "").partition(":")[2]
    if spec.segmenter_kind not in FITTED or not Path(file).is_file():
        return
    threshold = SegmentThreshold.load(file)
    if threshold.model not in (None, model):
        warnings.warn(
            f"segmenter {spec.segmenter!r}: its threshold was fitted on samples of {threshold.model}, and {model} is "
            f"another model: it may divide at more or fewer than {threshold.quantile:.1%} of the tokens. To fit one "
            f"on this job's solutions, write {spec.segmenter_kind} alone",
            stacklevel=2,
        )


def make_labeller(spec: LabelConfig, bench: Workbench, sampler: Sampler) -> Labeller:
    """The labeller that a job's settings name.

    Args:
        spec: the settings.
        bench: policy and grader of Monte-Carlo continuations, and their longest length.
        sampler: draws them.
    """
    if spec.labeller == "checker":
        return CheckerLabeller(spec.given)
    if spec.labeller == "arithmetic":
        return ScorerLabeller(Arithmetic(unchecked=math.nan), name=spec.labeller)
    if spec.labeller == "outcome":
        return OutcomeLabeller(spec.outcome_scope)
    if spec.labeller in SCORER_LABELLERS:
        named = str(spec.judge)
        word = named if spec.labeller == "prm" or named.startswith("judge:") else f"judge:{named}"
        scorer = load_judge(spec, word, template=spec.judge_template, reference=spec.reference)
        return ScorerLabeller(scorer, threshold=spec.threshold, soft=spec.soft, name=spec.labeller)
    return MonteCarloLabeller(
        cast(BranchSampler, sampler),
        bench.policy,
        bench.grader,
        spec.drawing(spec.rollouts_per_step, bench.max_new_tokens, temperature=spec.continuation_temperature),
        reduce=cast(Reduce, spec.reduce),
        early_stop=spec.early_stop,
        propagate_positive=spec.propagate_positive,
    )


def _check_row(spec: LabelConfig, row: Row, place: str) -> None:
    """Refuse a row that the labeller has no use for, before any work is done."""
    name = str(row["id"])
    if spec.labeller == "monte_carlo" and row.get("answer") is None:
        raise DataError(
            f"row {name!r} has no 'answer', and Monte-Carlo labels compare continuations with it: add the column, "
            "or use another labeller",
            path=place,
            column="answer",
        )
    if spec.labeller == "checker" and not is_task_row(row):
        raise DataError(
            f"row {name!r} has no 'task' and 'meta': only rows of the tiny world (source 'task') have an exact "
            "checker; use another labeller",
            path=place,
            column="task",
        )
    if spec.labeller == "outcome" and row.get("correct", row.get("outcome", row.get("answer"))) is None:
        raise DataError(
            f"row {name!r} has neither an 'answer' nor a stated outcome: nothing says whether its answer is correct",
            path=place,
            column="answer",
        )
