"""From a job's settings to its parts: data, models, labeller, and the manifest that says what decides the labels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stepkd.errors import DataError
from stepkd.grading import Grader
from stepkd.labels.folder import check_job_folder
from stepkd.labels.given import GivenSolutions
from stepkd.labels.job_data import JobData, Workbench, check_prompt, load_job_data, open_workbench
from stepkd.labels.labellers import CheckerLabeller, Labeller, OutcomeLabeller, Reduce, ScorerLabeller
from stepkd.labels.manifest import job_manifest
from stepkd.labels.monte_carlo import MonteCarloLabeller
from stepkd.labels.sampled import SampledSolutions
from stepkd.labels.settings import FITTED, SCORER_LABELLERS, LabelSpec
from stepkd.labels.solutions import SolutionSource
from stepkd.models import Policy
from stepkd.models.checkpoint import load_trained
from stepkd.rollout import BranchSampler, Sampler, TransformersSampler
from stepkd.rollout.transformers_sampler import encode_prompts
from stepkd.scorers.load import ScorerOptions, load_scorer, pick_device
from stepkd.scorers.rules import ArithmeticScorer
from stepkd.steps import SegmentThreshold


@dataclass(frozen=True)
class JobParts:
    """What a labelling job works with."""

    source: SolutionSource
    """Where solutions come from."""
    labeller: Labeller
    """What labels them."""
    grader: Grader
    """Judges final answers; closed at the job's end."""
    tokenizer: Any
    """Tokenizer of the policy."""
    model: str
    """Name of the policy."""
    manifest: Mapping[str, Any]
    """What decides the labels."""
    drawn: bool
    """Whether the solutions are drawn from the policy, not given."""
    group_size: int
    """Solutions labelled and stored together; what a kill can lose."""


def job_parts(
    spec: LabelSpec,
    *,
    rank: int = 0,
    overwrite: bool = False,
    policy: Policy | None = None,
    sampler: Sampler | None = None,
    labeller: Labeller | None = None,
) -> JobParts:
    """Load what a job needs, checking everything that can be checked before the work begins.

    Args:
        spec: the job's settings.
        rank: this process; only rank 0 may find the folder half begun.
        overwrite: whether an earlier job in the folder is to be deleted later.
        policy, sampler, labeller: already made ones to use in place of those that ``spec`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """
    if rank == 0:
        check_job_folder(spec.out, overwrite=overwrite)
    drawn = spec.problems is not None
    data = load_job_data(str(spec.problems if drawn else spec.rollouts), problems=drawn, limit=spec.limit)
    _check_rows(spec, data)
    device = pick_device(spec.device)
    bench = open_workbench(spec, data, policy=policy)
    policy, grader, length = bench.policy, bench.grader, bench.max_new_tokens
    if rank == 0:
        _warn_of_foreign_threshold(spec, bench.model)
    if spec.template is None and not data.drawn and (spec.labeller == "monte_carlo" or spec.signals):
        check_prompt(data.rows, bench.prompt_id)
    if data.drawn or spec.labeller == "monte_carlo" or spec.signals:
        policy.to(device)  # else only its tokenizer is used
    teacher = None if spec.teacher is None else load_trained(spec.teacher, dtype=spec.dtype).to(device)
    sampler = sampler or TransformersSampler(policy, max_rows=spec.max_rows)
    labeller = labeller or make_labeller(spec, policy=policy, sampler=sampler, grader=grader, max_new_tokens=length)
    source = _solution_source(spec, data, bench, sampler, teacher)
    per_solution = spec.rollouts_per_step if spec.labeller == "monte_carlo" else 1
    return JobParts(
        source=source,
        labeller=labeller,
        grader=grader,
        tokenizer=policy.tokenizer,
        model=bench.model,
        manifest=job_manifest(
            spec,
            bench,
            data,
            teacher=teacher,
            sampling=spec.sampling(length) if data.drawn else None,
            labeller=labeller,
        ),
        drawn=data.drawn,
        group_size=max(1, spec.max_rows // per_solution),
    )


def _warn_of_foreign_threshold(spec: LabelSpec, model: str) -> None:
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


def _solution_source(
    spec: LabelSpec, data: JobData, bench: Workbench, sampler: Sampler, teacher: Policy | None
) -> SolutionSource:
    """Solutions to be drawn, or those of the rows."""
    if data.drawn:
        return SampledSolutions(
            encode_prompts(bench.policy, bench.template, data.rows),
            sampler,
            spec.sampling(bench.max_new_tokens),
            bench.grader,
            policy=bench.policy,
            model=bench.model,
            signals=spec.signals,
            teacher=teacher,
            max_rows=spec.max_rows,
        )
    return GivenSolutions(
        data.rows,
        bench.template,
        bench.grader,
        policy=bench.policy,
        keep_steps=spec.segmenter is None,
        signals=spec.signals,
        teacher=teacher,
    )


def make_labeller(
    spec: LabelSpec, *, policy: Policy, sampler: Sampler, grader: Grader, max_new_tokens: int
) -> Labeller:
    """The labeller that a job's settings name.

    Args:
        spec: the settings.
        policy, sampler: what Monte-Carlo continuations come from.
        grader: judges the continuations' answers.
        max_new_tokens: longest continuation in tokens.
    """
    if spec.labeller == "checker":
        return CheckerLabeller(spec.given)
    if spec.labeller == "arithmetic":
        return ScorerLabeller(ArithmeticScorer(unchecked=math.nan), name=spec.labeller)
    if spec.labeller == "outcome":
        return OutcomeLabeller(spec.outcome_scope)
    if spec.labeller in SCORER_LABELLERS:
        options = ScorerOptions(
            template=spec.judge_template,
            reference=spec.reference,
            dtype=spec.dtype,
            device=spec.device,
            max_rows=spec.max_rows,
        )
        named = str(spec.judge)
        word = named if spec.labeller == "prm" or named.startswith("judge:") else f"judge:{named}"
        return ScorerLabeller(load_scorer(word, options), threshold=spec.threshold, soft=spec.soft, name=spec.labeller)
    return MonteCarloLabeller(
        cast(BranchSampler, sampler),
        policy,
        grader,
        spec.continuation(max_new_tokens),
        reduce=cast(Reduce, spec.reduce),
        early_stop=spec.early_stop,
        propagate_positive=spec.propagate_positive,
    )


def _check_rows(spec: LabelSpec, data: JobData) -> None:
    """Refuse rows that the labeller has no use for, before any work is done."""
    for row in data.rows:
        name = str(row["id"])
        if spec.labeller == "monte_carlo" and row.get("answer") is None:
            raise DataError(
                f"row {name!r} has no 'answer', and Monte-Carlo labels compare continuations with it: add the column, "
                "or use another labeller",
                path=data.place,
                column="answer",
            )
        if spec.labeller == "checker" and not ("task" in row and "meta" in row):
            raise DataError(
                f"row {name!r} has no 'task' and 'meta': only rows of the tiny world (source 'task') have an exact "
                "checker; use another labeller",
                path=data.place,
                column="task",
            )
        outcome = row.get("correct", row.get("outcome", row.get("answer")))
        if spec.labeller == "outcome" and outcome is None:
            raise DataError(
                f"row {name!r} has neither an 'answer' nor a stated outcome: nothing says whether its answer is right",
                path=data.place,
                column="answer",
            )
