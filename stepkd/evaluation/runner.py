"""``stepkd evaluate``: sample, grade and summarise, a job of fixed batches (:mod:`stepkd.runs.job`).

The folder holds ``settings.json`` (what decides the numbers), ``parts/`` (a batch each), and at the end
``results.jsonl`` (one line per problem) and ``summary.json`` (metrics with intervals). Batches have a fixed composition
and every sample its own keyed noise, so a killed run, given the same command with any number of ranks, resumes and ends
with the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from stepkd.data.benchmarks import Benchmark, benchmark_data, default_ks, get_benchmark
from stepkd.data.io import fingerprint
from stepkd.data.rows import PROBLEM, check_unique_ids
from stepkd.data.spec import DataConfig, load_rows, resolve_split
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError
from stepkd.evaluation.metrics import summarise
from stepkd.grading.extract import EXTRACTOR_VERSION
from stepkd.grading.judge import judge
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.models.checkpoint import load_trained, tokenizer_fingerprint, weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.models.source import template_for
from stepkd.runs.job import ALONE, RESULTS_NAME, SUMMARY_NAME, Job, JobOptions, numbered, package_versions
from stepkd.sampling.sampler import SamplingConfig
from stepkd.sampling.transformers_sampler import TransformersSampler, encode_prompts, fixed_batches
from stepkd.scorers.load import pick_device

logger = logging.getLogger(__name__)

MOST_CUT_OFF = 0.05
"""Share of cut-off completions above which an evaluation says so."""
COMPARISON_NAME = "comparison.json"
PROBLEMS = "problems"
"""The one phase of an evaluation."""


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation."""

    model: str
    """Run folder, checkpoint, model folder, hub id, ``.gguf`` file or tiny preset."""
    benchmark: str = "gsm8k"
    """Benchmark name."""
    out: str = "runs/evaluation"
    """Folder for settings, results and summary."""
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
    """Completions decoded at once; part of the settings, because batch shapes decide rounding."""
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

    def sampling(self, benchmark: Benchmark) -> SamplingConfig:
        """The sampler's settings."""
        limit = benchmark.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        same = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "stop", "seed")}
        return SamplingConfig(n=self.samples, max_new_tokens=limit, **same)


def evaluate(spec: EvaluationConfig, *, policy: Policy | None = None, options: JobOptions = ALONE) -> dict[str, Any]:
    """Run (or resume) an evaluation.

    Args:
        spec: what to evaluate, and where to write.
        policy: an already loaded model to use in place of loading ``spec.model``.
        options: which rank this is, and whether to overwrite an earlier evaluation in the folder, once everything else
            has been found to be in order.

    Returns:
        The summary that ``summary.json`` holds, metrics with intervals (:func:`stepkd.evaluation.metrics.summarise`),
        and the settings; empty while other ranks have work left: the last one to finish writes the results.

    Raises:
        ConfigError: the folder holds another evaluation, or settings contradict each other.
        DataError, ModelError: the data or the model cannot be used.
    """
    benchmark = get_benchmark(spec.benchmark)
    sampling = spec.sampling(benchmark)
    given = None if spec.template is None else get_template(spec.template)
    grading = {name: getattr(spec, name) for name in ("extractors", "convention", "deadline_s")}
    grader = Grader(GradingConfig(**grading), extractors=benchmark.extractors)
    device = pick_device(spec.device)
    job = Job(Path(spec.out), "evaluation", (RESULTS_NAME, SUMMARY_NAME, COMPARISON_NAME), options)
    job.check()
    data = benchmark_data(benchmark, spec.data, spec.limit)
    rows = load_rows(data, contract=PROBLEM)
    check_unique_ids(rows, path=spec.data)
    if policy is None:
        policy = load_trained(spec.model, dtype=spec.dtype, attention=spec.attention)
    policy.to(device)
    template = template_for(spec.model, benchmark.template, given)
    prompts = encode_prompts(policy, template, rows)
    settings = job.begin(
        _data_settings(benchmark, data)
        | _model_settings(policy, template)
        | {
            "model": {
                "name": spec.model,
                "revision": None if policy.spec is None else policy.spec.revision,
                "weights": weights_fingerprint(policy),
            },
            "sampling": {name: value for name, value in asdict(sampling).items() if name != "seed"},
            "seed": spec.seed,
            "batch_size": spec.max_rows,
            "extractor": EXTRACTOR_VERSION,
            "extractors": list(grader.extractors),
            "convention": spec.convention,
            "deadline_s": spec.deadline_s,
        }
    )
    sampler = TransformersSampler(policy, max_rows=spec.max_rows)
    decode = policy.tokenizer.decode
    exactly = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}

    def work(batch: list[int]) -> list[dict[str, Any]]:
        rollouts = sampler.sample([prompts[i].prompt_ids for i in batch], sampling, purpose="evaluate", indices=batch)
        return [
            {
                "id": str(rows[i]["id"]),
                "index": i,
                "prompt": decode(list(prompts[i].prompt_ids), **exactly),
                "answer": str(rows[i]["answer"]),
                "samples": samples,
            }
            for i, samples in zip(batch, judge([rows[i] for i in batch], rollouts, grader), strict=True)
        ]

    units = numbered(fixed_batches(prompts, spec.samples, spec.max_rows))
    with grader:
        job.work(PROBLEMS, units, work, _running)
    results = job.rows(PROBLEMS, units)
    if results is None:
        return {}
    summary = summarise(results, spec.ks or default_ks(spec.samples), seed=spec.seed)
    summary |= {"benchmark": benchmark.name, "model": spec.model}
    _warn_of_cut_off(summary["metrics"], sampling.longest)
    job.finish(RESULTS_NAME, results, summary)
    return summary | {"settings": settings}


def _warn_of_cut_off(metrics: dict[str, Any], limit: int) -> None:
    cut, answered = (metrics[name]["value"] for name in ("truncated_rate", "truncated_answered_rate"))
    if cut > MOST_CUT_OFF:
        logger.warning(
            f"{cut:.1%} of the completions were cut off at {limit} new tokens; {cut - answered:.1%} have no complete "
            "answer and count as incorrect: raise --max-new-tokens"
        )


def _running(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float | None]]:
    samples = [sample for row in rows for sample in row["samples"]]
    return {
        "correct": (sum(sample["verdict"] == "correct" for sample in samples), len(samples)),
        "tokens/s": (sum(sample["tokens"] for sample in samples), None),
    }


def _data_settings(benchmark: Benchmark, data: DataConfig) -> dict[str, Any]:
    # The whole file, so that runs with different limits can still be compared problem by problem.
    whole = load_rows(replace(data, limit=None, offset=0, shuffle_seed=None), contract=PROBLEM)
    return {
        "benchmark": {
            "name": benchmark.name,
            "source": f"{data.source}:{resolve_split(data)}",
            "data": fingerprint(whole),
            "options": dict(data.options),
            "limit": data.limit,
            "offset": data.offset,
            "shuffle_seed": data.shuffle_seed,
        }
    }


def _model_settings(policy: Policy, template: PromptTemplate) -> dict[str, Any]:
    return {
        "prompt": template.prompt_id(policy.tokenizer),
        "template": asdict(template),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "end_ids": sorted(policy.eos_ids),
        "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
        "attention": policy.causal_lm.config._attn_implementation,
        "backend": "transformers",
        "device": policy.device.type,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
