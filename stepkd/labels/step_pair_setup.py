"""From the settings of a Step-DPO pair job to its parts."""

from __future__ import annotations

from typing import cast

from stepkd.errors import ConfigError, DataError
from stepkd.labels.folder import PAIR_KIND, check_job_folder
from stepkd.labels.job_data import JobData, check_prompt, load_job_data, open_workbench
from stepkd.labels.labellers import StepCheck
from stepkd.labels.manifest import as_json, base_manifest
from stepkd.labels.next_step import segmenter_of
from stepkd.labels.pair_job import PairParts
from stepkd.labels.pair_settings import StepPairSpec
from stepkd.labels.step_pairs import StepPairBuilder, first_wrong_step
from stepkd.models import Policy
from stepkd.rollout import BranchSampler, TransformersSampler
from stepkd.scorers.load import ScorerOptions, load_scorer, pick_device


def step_pair_parts(
    spec: StepPairSpec,
    *,
    rank: int = 0,
    overwrite: bool = False,
    policy: Policy | None = None,
    sampler: BranchSampler | None = None,
) -> PairParts:
    """Load what a Step-DPO pair job needs, checking everything that can be checked before the work begins.

    Args:
        spec: the job's settings.
        rank: this process; only rank 0 may find the folder half begun.
        overwrite: whether an earlier job in the folder is to be deleted later.
        policy, sampler: already made ones to use in place of those that ``spec`` describes.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """
    if rank == 0:
        check_job_folder(spec.out, overwrite=overwrite, kind=PAIR_KIND)
    data = load_job_data(spec.rollouts, problems=False, limit=spec.limit)
    _check_rows(data, spec)
    device = pick_device(spec.device)
    bench = open_workbench(spec, data, policy=policy)
    if spec.template is None:
        check_prompt(data.rows, bench.prompt_id)
    bench.policy.to(device)
    check = make_step_check(spec) if spec.check_step else None
    sampler = sampler or cast(BranchSampler, TransformersSampler(bench.policy, max_rows=spec.max_rows))
    builder = StepPairBuilder(data.rows, spec, bench, sampler, check)
    manifest = base_manifest(spec, PAIR_KIND, bench, data)
    return PairParts(builder, bench.grader, as_json(manifest | {"pairing": builder.provenance()}))


def _check_rows(data: JobData, spec: StepPairSpec) -> None:
    for row in data.rows:
        name = str(row["id"])
        if "token_ids" not in row:
            raise DataError(
                f"row {name!r} is no rollout: the wrong step of a pair is kept in the ids that were sampled; sample "
                "solutions with `stepkd label --problems`",
                path=data.place,
                column="token_ids",
            )
        if row.get("answer") is None:
            raise DataError(f"row {name!r} has no 'answer' to grade continuations by", path=data.place, column="answer")
        if spec.segmenter is None and isinstance(first_wrong_step(row, spec), int):
            segmenter_of(row)
        if spec.check_step and spec.judge is None and not ("task" in row and "meta" in row):
            raise ConfigError(
                f"--check-step has no exact checker for row {name!r}, which is not of the tiny world (source 'task'): "
                "give a model that scores steps, --judge"
            )


def make_step_check(spec: StepPairSpec) -> StepCheck:
    """The check that a pair job's settings name: ``judge``, else the exact checker.

    Raises:
        ConfigError, ModelError: a scorer that cannot be loaded.
    """
    if spec.judge is None:
        return StepCheck(load_scorer("checker"), spec.threshold)
    options = ScorerOptions(reference=spec.reference, dtype=spec.dtype, device=spec.device, max_rows=spec.max_rows)
    return StepCheck(load_scorer(spec.judge, options), spec.threshold)
