"""The manifest of a job: everything that decides its labels (or pairs).

The number of ranks and of threads is left out: a job may be resumed with others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Any

from stepkd.evaluation.manifest import MANIFEST_FORMAT, package_versions
from stepkd.grading import EXTRACTOR_VERSION
from stepkd.labels.folder import KIND
from stepkd.labels.job_data import JobData, Workbench
from stepkd.labels.labellers import Labeller
from stepkd.labels.settings import JobSpec, LabelSpec
from stepkd.models import Policy
from stepkd.models.checkpoint import tokenizer_fingerprint, weights_fingerprint
from stepkd.rollout import SamplingSpec
from stepkd.steps import Segmenter, get_segmenter


def base_manifest(spec: JobSpec, kind: str, bench: Workbench, data: JobData) -> dict[str, Any]:
    """Collect what decides the result of any job, as JSON values.

    Args:
        spec: the job's settings.
        kind: what the job makes, a key of :data:`~stepkd.labels.folder.KINDS`.
        bench: model, prompt template and grader.
        data: the rows.
    """
    policy = bench.policy
    return {
        "format": MANIFEST_FORMAT,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": bench.model,
            "revision": None if policy.spec is None else policy.spec.revision,
            "weights": weights_fingerprint(policy),
            "tokenizer": tokenizer_fingerprint(policy.tokenizer),
            "end_ids": sorted(policy.eos_ids),
            "attention": policy.causal_lm.config._attn_implementation,
            "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
        },
        "data": data.facts(),
        "prompt": bench.prompt_id,
        "template": asdict(bench.template),
        "extractor": EXTRACTOR_VERSION,
        "extractors": list(bench.grader.extractors),
        "deadline_s": spec.deadline_s,
        "device": policy.device.type,
        "batch_size": spec.max_rows,
        "seed": spec.seed,
        "versions": package_versions(),
    }


def as_json(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Through JSON once, so that a fresh manifest equals the one read back."""
    return dict(json.loads(json.dumps(manifest)))


def job_manifest(
    spec: LabelSpec,
    bench: Workbench,
    data: JobData,
    *,
    teacher: Policy | None,
    sampling: SamplingSpec | None,
    labeller: Labeller,
) -> dict[str, Any]:
    """Collect what decides a job's labels, as JSON values.

    Args:
        spec: the job's settings.
        bench, data: see :func:`base_manifest`.
        teacher: the second model of the ``reject`` segmenter.
        sampling: how solutions are drawn; None for given ones.
        labeller: what labels them.
    """
    return as_json(
        base_manifest(spec, KIND, bench, data)
        | {
            "teacher": None if teacher is None else {"name": spec.teacher, "weights": weights_fingerprint(teacher)},
            "sampling": None if sampling is None else asdict(sampling),
            "dedupe": None if sampling is None else spec.dedupe,
            "labeller": labeller.provenance(),
            "segmenter": _segmenter(spec),
        }
    )


def segmenter_settings(segmenter: Segmenter) -> dict[str, Any]:
    """A segmenter's settings, where it has any."""
    return asdict(segmenter) if is_dataclass(segmenter) and not isinstance(segmenter, type) else {}


def _segmenter(spec: LabelSpec) -> dict[str, Any] | None:
    """The segmenter by its settings, so that a threshold file counts by what it says and not by its name."""
    if spec.segmenter is None:
        return None
    if spec.fits_threshold:
        return {"name": spec.segmenter_kind, "threshold": "fitted", "quantile": spec.quantile}
    return {"name": spec.segmenter_kind, **segmenter_settings(get_segmenter(spec.segmenter))}
