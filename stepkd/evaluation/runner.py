"""``stepkd evaluate``: sample, grade and summarise, in fixed batches, resumable at any moment.

The folder holds ``manifest.json`` (what decides the numbers), ``results.jsonl`` (one line per problem, whole batches
only) and ``summary.json`` (metrics with intervals). Batches have a fixed composition and every sample its own keyed
noise, so a killed run, given the same command, goes on where it stood and ends with the same result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stepkd.data.benchmarks import Benchmark, benchmark_data, default_ks, get_benchmark
from stepkd.data.encode import Example
from stepkd.data.io import fingerprint
from stepkd.data.rows import PROBLEM, check_unique_ids
from stepkd.data.spec import DataSpec, load_rows, resolve_split
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError
from stepkd.evaluation.folder import SUMMARY_NAME, check_folder, prepare_folder
from stepkd.evaluation.manifest import RESULTS_NAME, build_manifest
from stepkd.evaluation.metrics import summarise
from stepkd.evaluation.store import ResultStore
from stepkd.grading import EXTRACTOR_VERSION, Grader
from stepkd.grading.judge import judge
from stepkd.models import Policy
from stepkd.models.checkpoint import load_trained, tokenizer_fingerprint, weights_fingerprint
from stepkd.models.source import template_for
from stepkd.rollout import SamplingSpec, TransformersSampler
from stepkd.rollout.transformers_sampler import encode_prompts, fixed_batches
from stepkd.runs.files import write_json
from stepkd.scorers.load import pick_device

logger = logging.getLogger(__name__)

MOST_CUT_OFF = 0.05
"""Share of cut-off completions above which an evaluation says so."""
Report = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class EvaluationSpec:
    """One evaluation."""

    model: str
    """Run folder, checkpoint, model folder, hub id, ``.gguf`` file or tiny preset."""
    benchmark: str = "gsm8k"
    """Benchmark name."""
    out: str = "runs/evaluation"
    """Folder for manifest, results and summary."""
    data: str | None = None
    """File, folder or data settings; None: the benchmark's own hub data set."""
    limit: int | None = None
    """Number of problems; None for all."""
    samples: int = 1
    """Completions per problem."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy (then one sample is enough)."""
    top_p: float = 1.0
    """Nucleus threshold, in (0, 1]."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is off."""
    max_new_tokens: int | None = None
    """Longest completion; None: the benchmark's default."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    template: str | PromptTemplate | None = None
    """Prompt template: a name, a YAML file, or settings; None: the one that the model was trained with, else the
    benchmark's."""
    extractors: tuple[str, ...] | None = None
    """How answers are found; None: the benchmark's."""
    convention: str = "stepkd"
    """When two answers are equal: by stepkd's rules, or (``prm800k``) by those of PRM800K's official grader, too."""
    deadline_s: float = 2.0
    """Hard limit per graded answer (s)."""
    dtype: str | None = None
    """Weights' dtype; None: as stored."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU when there is one."""
    attention: str | None = None
    """Attention implementation; None lets transformers choose."""
    max_rows: int = 32
    """Completions decoded at once; part of the manifest, because batch shapes decide rounding."""
    seed: int = 0
    """Keys the sampling noise."""
    ks: tuple[int, ...] = field(default=())
    """Values of k to report; empty: powers of two up to ``samples``."""

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(f"{self.samples} samples at temperature 0 would all be the same: set --temperature")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit}: at least one problem, or none for all")
        if self.max_rows < 1:
            raise ConfigError(f"max_rows={self.max_rows}: at least one completion must be decoded at once")
        if bad := [k for k in self.ks if not 1 <= k <= self.samples]:
            raise ConfigError(
                f"k={bad[0]} of pass@k: must lie between 1 and the number of samples per problem, {self.samples}"
            )

    def sampling(self, benchmark: Benchmark) -> SamplingSpec:
        """The sampler's settings."""
        return SamplingSpec(
            n=self.samples,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=benchmark.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            stop=self.stop,
            seed=self.seed,
        )


def evaluate(
    spec: EvaluationSpec, *, policy: Policy | None = None, report: Report | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Run (or go on with) an evaluation.

    Args:
        spec: what to evaluate, and where to write.
        policy: an already loaded model to use in place of loading ``spec.model``.
        report: called after every batch with (problems done, problems in all, running figures).
        overwrite: delete an earlier evaluation in the folder, once everything else has been found to be in order.

    Returns:
        The summary that ``summary.json`` holds: metrics with intervals (:func:`stepkd.evaluation.metrics.summarise`)
        and ``tokens_per_second``; and the manifest.

    Raises:
        ConfigError: the folder holds another evaluation, or settings contradict each other.
        DataError, ModelError: the data or the model cannot be used.
    """
    benchmark = get_benchmark(spec.benchmark)
    sampling = spec.sampling(benchmark)
    given = None if spec.template is None else get_template(spec.template)
    grader = Grader(
        extractors=spec.extractors or benchmark.extractors, convention=spec.convention, deadline_s=spec.deadline_s
    )
    device, out = pick_device(spec.device), Path(spec.out)
    check_folder(out, overwrite=overwrite)
    data = benchmark_data(benchmark, spec.data, spec.limit)
    rows = load_rows(data, contract=PROBLEM)
    check_unique_ids(rows, path=spec.data)
    if policy is None:
        policy = load_trained(spec.model, dtype=spec.dtype, attention=spec.attention)
    policy.to(device)
    template = template_for(spec.model, benchmark.template, given)
    prompts = encode_prompts(policy, template, rows)
    manifest = _manifest(spec, benchmark, data, policy, template, sampling, grader.extractors)
    prepare_folder(out, manifest, overwrite=overwrite)
    sampler = TransformersSampler(policy, max_rows=spec.max_rows)
    with ResultStore(out / RESULTS_NAME) as store, grader:
        for number, batch in enumerate(fixed_batches(prompts, spec.samples, spec.max_rows)):
            if number in store.finished_batches:
                continue
            start = time.perf_counter()
            rollouts = sampler.sample(
                [prompts[i].prompt_ids for i in batch], sampling, purpose="evaluate", indices=batch
            )
            judged = judge([rows[i] for i in batch], rollouts, grader)
            seconds = (time.perf_counter() - start) / len(batch)
            store.append_batch(
                number,
                [
                    _result_row(policy, rows[i], i, prompts[i], samples, seconds)
                    for i, samples in zip(batch, judged, strict=True)
                ],
            )
            if report is not None:
                report(len(store), len(rows), _running(store.rows()))
        results = store.rows()
    summary = summarise(results, spec.ks or default_ks(spec.samples), seed=spec.seed)
    seconds = sum(row["seconds"] for row in results)
    summary["tokens_per_second"] = summary["total_tokens"] / seconds if seconds else None
    summary["benchmark"] = benchmark.name
    summary["model"] = spec.model
    _warn_of_cut_off(summary["metrics"], sampling.max_new_tokens)
    write_json(out / SUMMARY_NAME, summary)
    return summary | {"manifest": manifest}


def _warn_of_cut_off(metrics: dict[str, Any], limit: int) -> None:
    cut, answered = (metrics[name]["value"] for name in ("truncated_rate", "truncated_answered_rate"))
    if cut > MOST_CUT_OFF:
        logger.warning(
            f"{cut:.1%} of the completions were cut off at {limit} new tokens; {cut - answered:.1%} have no complete "
            "answer and count as incorrect: raise --max-new-tokens"
        )


def _running(rows: list[dict[str, Any]]) -> dict[str, float]:
    samples = [sample for row in rows for sample in row["samples"]]
    seconds = sum(row["seconds"] for row in rows)
    return {
        "accuracy": sum(sample["verdict"] == "correct" for sample in samples) / len(samples),
        "tokens_per_second": sum(sample["tokens"] for sample in samples) / max(seconds, 1e-9),
    }


def _result_row(
    policy: Policy, row: dict[str, Any], index: int, prompt: Example, samples: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    ids = list(prompt.prompt_ids)
    return {
        "id": str(row["id"]),
        "index": index,
        "prompt": policy.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        "answer": str(row["answer"]),
        "samples": samples,
        "seconds": round(seconds, 4),
    }


def _manifest(
    spec: EvaluationSpec,
    benchmark: Benchmark,
    data: DataSpec,
    policy: Policy,
    template: PromptTemplate,
    sampling: SamplingSpec,
    extractors: Sequence[str],
) -> dict[str, Any]:
    settings = asdict(sampling)
    settings.pop("seed")
    # The whole file, so that runs with different limits can still be compared problem by problem.
    whole = load_rows(replace(data, limit=None, offset=0, shuffle_seed=None), contract=PROBLEM)
    return build_manifest(
        model=spec.model,
        revision=None if policy.spec is None else policy.spec.revision,
        weights_fingerprint=weights_fingerprint(policy),
        prompt_id=template.prompt_id(policy.tokenizer),
        extractor_version=EXTRACTOR_VERSION,
        dtype=str(next(policy.parameters()).dtype).removeprefix("torch."),
        seed=spec.seed,
        backend="transformers",
        device=policy.device.type,
        sampling=settings,
        batch_size=spec.max_rows,
        benchmark=benchmark.name,
        benchmark_source=f"{data.source}:{resolve_split(data)}",
        data_fingerprint=fingerprint(whole),
        limit=data.limit,
        extra={
            "template": asdict(template),
            "extractors": list(extractors),
            "convention": spec.convention,
            "deadline_s": spec.deadline_s,
            "tokenizer": tokenizer_fingerprint(policy.tokenizer),
            "end_ids": sorted(policy.eos_ids),
            "attention": policy.causal_lm.config._attn_implementation,
            "data_options": dict(data.options),
            "offset": data.offset,
            "shuffle_seed": data.shuffle_seed,
        },
    )
