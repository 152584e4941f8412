"""``stepkd evaluate``: sample, grade and summarise, a job of fixed batches (:mod:`stepkd.runs.job`).

The folder holds ``settings.json`` (what decides the numbers), ``parts/`` (a batch each), and at the end
``results.jsonl`` (one line per problem) and ``summary.json`` (metrics with intervals). Batches have a fixed composition
and every sample its own keyed noise, so a killed run, given the same command with any number of ranks, resumes and ends
with the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stepkd.data.completion import Completion
from stepkd.data.config import DataConfig, benchmark_data, resolve_split
from stepkd.data.io import fingerprint
from stepkd.data.load import load_rows
from stepkd.data.rows import PROBLEM, check_unique_ids
from stepkd.data.sources import get_benchmark
from stepkd.data.sources.source import Benchmark
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.evaluation.config import BenchmarkJobConfig, EvaluateConfig
from stepkd.evaluation.metrics import COMPARISON_NAME, default_ks, summarise
from stepkd.evaluation.score_rows import machine_settings
from stepkd.grading.extract import EXTRACTOR_VERSION
from stepkd.grading.judge import judge
from stepkd.grading.pool import Grader
from stepkd.models.checkpoint import load_trained, tokenizer_fingerprint, weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.models.source import template_for
from stepkd.runs.job import ALONE, RESULTS_NAME, SUMMARY_NAME, Job, JobOptions, numbered
from stepkd.sampling.dtype import settled_dtype
from stepkd.sampling.engine import Engine
from stepkd.sampling.transformers_engine import encode_prompts, fixed_batches
from stepkd.scorers.load import pick_device

logger = logging.getLogger(__name__)

MOST_CUT_OFF = 0.05
"""Share of cut-off completions above which an evaluation says so."""
PROBLEMS = "problems"
"""The one phase of an evaluation."""


def evaluate(config: EvaluateConfig, *, policy: Policy | None = None, options: JobOptions = ALONE) -> dict[str, Any]:
    """Run (or resume) an evaluation.

    Args:
        config: what to evaluate, and where to write.
        policy: an already loaded model to use in place of loading ``config.model``; an engine elsewhere is given its
            weights.
        options: which rank this is, and whether to overwrite an earlier evaluation in the folder, once everything else
            has been found to be in order.

    Returns:
        The summary that ``summary.json`` holds, metrics with intervals (:func:`stepkd.evaluation.metrics.summarise`),
        and the settings; empty while other ranks have work left: the last one to finish writes the results.

    Raises:
        ConfigError: the folder holds another evaluation, or settings contradict each other.
        DataError, ModelError: the data or the model cannot be used.
    """
    sampling = config.drawn
    job = Job(Path(config.out), "evaluation", (RESULTS_NAME, SUMMARY_NAME, COMPARISON_NAME), options)
    opened = open_benchmark(config, job, policy)
    rows, prompts, engine, grader = opened.rows, opened.prompts, opened.engine, opened.grader
    drawn_by = {name: value for name, value in asdict(sampling).items() if name != "seed"}
    settings = job.begin({**opened.settings, "sampling": drawn_by, "seed": sampling.seed})

    def work(batch: list[int]) -> list[dict[str, Any]]:
        drawn = engine.generate([prompts[i].prompt_ids for i in batch], sampling, purpose="evaluate", indices=batch)
        judged = judge([rows[i] for i in batch], drawn, grader)
        return [opened.problem(i) | {"samples": samples} for i, samples in zip(batch, judged, strict=True)]

    units = numbered(fixed_batches(prompts, sampling.n, config.engine.at_once))
    with grader:
        job.work(PROBLEMS, units, work, running)
    results = job.rows(PROBLEMS, units)
    if results is None:
        return {}
    summary = summarise(results, config.ks or default_ks(sampling.n), seed=sampling.seed)
    summary |= {"benchmark": config.benchmark, "model": config.model}
    _warn_of_cut_off(summary["metrics"], sampling.longest)
    job.finish(RESULTS_NAME, results, summary)
    return summary | {"settings": settings}


@dataclass(frozen=True)
class OpenedBenchmark:
    """What a job on a benchmark works with."""

    rows: Sequence[dict[str, Any]]
    """The problems."""
    prompts: Sequence[Completion]
    """Their prompts, encoded."""
    policy: Policy
    """The model."""
    engine: Engine
    """Samples from it."""
    grader: Grader
    """Finds and compares answers; enter it before it is used."""
    template: PromptTemplate
    """How the prompts were made."""
    settings: Mapping[str, Any]
    """The part of the job's settings that says what all this is: data, model, prompt, engine, grading, machine."""

    def problem(self, index: int) -> dict[str, Any]:
        """What a result row says of its problem: ``id``, ``index``, ``prompt`` (as the model reads it), ``answer``."""
        row, ids = self.rows[index], self.prompts[index].prompt_ids.tolist()
        prompt = self.policy.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {"id": str(row["id"]), "index": index, "prompt": prompt, "answer": str(row["answer"])}


def open_benchmark(config: BenchmarkJobConfig, job: Job, policy: Policy | None = None) -> OpenedBenchmark:
    """Load what a job on a benchmark works with; the job's folder is checked first, and nothing is written.

    Args:
        config: which model and problems.
        job: keeps what is measured (dtype ``auto``).
        policy: an already loaded model to use in place of loading ``config.model``; an engine elsewhere is given its
            weights.

    Raises:
        ConfigError: the folder holds another job, or settings contradict each other.
        DataError, ModelError: the data or the model cannot be used.
    """
    benchmark = get_benchmark(config.benchmark)
    given = None if config.template is None else get_template(config.template)
    grader = Grader(config.grading, extractors=benchmark.extractors)
    device = pick_device(config.device)
    job.check()
    data = benchmark_data(benchmark, config.data, config.limit)
    rows = load_rows(data, contract=PROBLEM)
    check_unique_ids(rows, path=config.data)
    if policy is None:
        dtype = settled_dtype(config.dtype, config.model, config.engine, device, job, "dtype")
        weights = config.engine.holds_weights
        policy = load_trained(config.model, dtype=dtype, attention=config.attention, weights=weights)
    asked = {name: value for name in ("style", "system", "few_shot") if (value := getattr(config, name)) is not None}
    template = replace(template_for(config.model, benchmark.template, given), **asked)
    prompts = encode_prompts(policy, template, rows)
    engine = config.engine.for_job(policy, device)
    settings = {
        **_data_settings(benchmark, data, rows),
        **_model_settings(config.model, policy, template),
        "engine": {"name": type(config.engine).__name__} | engine.facts(),
        "batch_size": config.engine.at_once,
        "extractor": EXTRACTOR_VERSION,
        "extractors": list(grader.extractors),
        **config.grading.decides(),
    }
    return OpenedBenchmark(rows, prompts, policy, engine, grader, template, settings)


def _warn_of_cut_off(metrics: dict[str, Any], limit: int) -> None:
    cut, answered = (metrics[name]["value"] for name in ("truncated_rate", "truncated_answered_rate"))
    if cut > MOST_CUT_OFF:
        logger.warning(
            f"{cut:.1%} of the completions were cut off at {limit} new tokens; {cut - answered:.1%} have no complete "
            "answer and count as incorrect: raise sampling.max_new_tokens"
        )


def running(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Running figures of result rows, for the progress line: the share of correct samples, and tokens per second."""
    samples = [sample for row in rows for sample in row["samples"]]
    return {
        "correct": (sum(sample["verdict"] == "correct" for sample in samples), len(samples)),
        "tokens/s": (sum(sample["tokens"] for sample in samples), None),
    }


def _data_settings(benchmark: Benchmark, data: DataConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # The whole file, so that runs with different limits can still be compared problem by problem.
    everything = replace(data, limit=None, offset=0, shuffle_seed=None)
    whole = rows if data == everything else load_rows(everything, contract=PROBLEM)
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


def _model_settings(name: str, policy: Policy, template: PromptTemplate) -> dict[str, Any]:
    revision = None if policy.spec is None else policy.spec.revision
    return {
        "model": {"name": name, "revision": revision, "weights": weights_fingerprint(policy)},
        "prompt": template.prompt_id(policy.tokenizer),
        "template": asdict(template),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "end_ids": sorted(policy.eos_ids),
        "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
        **machine_settings(policy),
    }
