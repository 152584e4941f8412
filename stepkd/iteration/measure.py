"""What the models' held-out solutions say: a row per problem, metrics with intervals over problems, and one table.

A row is what :func:`stepkd.evaluation.metrics.summarise` reads, and every sample also has ``log_ratio``: the log of
how much likelier the model makes it than M0 does, summed over its tokens. Its mean over samples drawn at temperature 1
is a Monte-Carlo estimate of the divergence KL(model || M0) of whole solutions (those cut off count as far as they go).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from stepkd.data.config import LABELS_NAME, parse_spec
from stepkd.data.io import read_rows
from stepkd.data.load import load_rows
from stepkd.data.rows import PROBLEM
from stepkd.data.templates import PromptTemplate
from stepkd.evaluation.metrics import compare_runs, paired_differences, summarise
from stepkd.grading.judge import votes_of
from stepkd.grading.pool import Grader
from stepkd.iteration.spec import IterateConfig
from stepkd.labels.job import drawn_records
from stepkd.labels.quality import row_labels
from stepkd.labels.settings import LabelConfig, Sampled
from stepkd.labels.solutions import at_temperature_one
from stepkd.models.checkpoint import load_trained
from stepkd.runs.job import read_results, read_settings
from stepkd.sampling.annotate import annotate
from stepkd.sampling.transformers_engine import encode_prompts
from stepkd.scorers.load import pick_device
from stepkd.statistics import Resampling, cluster_bootstrap, ratio_of_sums, shown
from stepkd.steps.labels import verdicts

Row = Mapping[str, Any]


def problem_rows(samples: Path, labels: Path | None, spec: LabelConfig, *, seed_model: str) -> list[dict[str, Any]]:
    """One row per held-out problem with all its samples, also those that could not be cut into steps or labelled.

    Args:
        samples: folder of the finished labelling job that drew the solutions, duplicates kept.
        labels: folder of the job whose step labels count; None where nothing says whether a step is correct.
        spec: settings of the job in ``samples``.
        seed_model: M0, whose log-probabilities the samples get; the model's own name gives ratios of exactly 0.
    """
    assert isinstance(spec.solutions, Sampled)
    records = drawn_records(samples)
    problems = {str(row["id"]): row for row in load_rows(parse_spec(spec.solutions.problems), contract=PROBLEM)}
    extractors = read_settings(samples)["extractors"]
    marks = {} if labels is None else _step_marks(labels / LABELS_NAME)
    ratios = _log_ratios(records, [problems[record["id"]] for record in records], spec, seed_model)
    texts = [[{"completion": s["text"], "finish": s["finish"]} for s in record["samples"]] for record in records]
    with Grader() as grader:
        votes = votes_of(texts, extractors, grader)
    rows = []
    for record, own_votes in zip(records, votes, strict=True):
        answer = problems[record["id"]]["answer"]
        rows.append(
            {
                "id": record["id"],
                "index": record["index"],
                "answer": answer,
                "samples": [
                    {
                        "completion": sample["text"],
                        "verdict": "correct" if sample["correct"] else "incorrect",
                        "tokens": len(sample["token_ids"]),
                        "finish": sample["finish"],
                        "vote": own_votes[j],
                        "step_labels": marks.get(f"{record['id']}/{j}"),
                        "log_ratio": next(ratios) if ratios is not None else None,
                    }
                    for j, sample in enumerate(record["samples"])
                ],
            }
        )
    return rows


def _step_marks(path: Path) -> dict[str, list[bool | None]]:
    """What the labels say of the steps of every solution that has any, by its id."""
    marks = {str(row["id"]): verdicts(row_labels(row)) for row, _ in read_rows(path)}
    return {name: steps for name, steps in marks.items() if any(mark is not None for mark in steps)}


def _log_ratios(records: Sequence[Row], problems: Sequence[Row], spec: LabelConfig, seed_model: str) -> Any:
    """Iterator over the samples' log-ratios in order; None where the samples were not drawn at temperature 1.

    Both models read the samples in the same batches (and not the sampler's own log-probabilities, whose rounding in
    bfloat16 is another one), so that equal weights give exactly 0.
    """
    solutions = spec.solutions
    assert isinstance(solutions, Sampled)
    if not at_temperature_one(asdict(solutions.sampling)):
        return None
    if solutions.model == seed_model:
        return iter([0.0] * sum(len(record["samples"]) for record in records))
    policy, seed_policy = (
        load_trained(name, dtype=spec.dtype).to(pick_device(spec.device)) for name in (solutions.model, seed_model)
    )
    template = PromptTemplate(**read_settings(spec.out)["template"])
    prompts = encode_prompts(policy, template, [dict(row) for row in problems])
    pairs = [
        (prompt.prompt_ids.tolist(), sample["token_ids"])
        for prompt, record in zip(prompts, records, strict=True)
        for sample in record["samples"]
    ]
    signals = annotate(policy, [p for p, _ in pairs], [c for _, c in pairs], teacher=seed_policy)
    return iter(
        [
            math.fsum(own - other for own, other in zip(each.logprobs, each.teacher_logprobs or (), strict=True))
            for each in signals
        ]
    )


def model_metrics(rows: Sequence[Row], greedy: Sequence[Row], **settings: Unpack[Resampling]) -> dict[str, Any]:
    """Metrics of one model, each with a 95% interval over problems; None where there is nothing to measure.

    Args:
        rows: what :func:`problem_rows` gives.
        greedy: rows of the greedy evaluation (``stepkd evaluate``).
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        ``greedy_pass@1``, ``pass@1``, ``maj@S``, ``step_accuracy``, ``correct_with_incorrect_step``, ``mean_tokens``,
        ``truncated_rate``, ``kl_per_solution`` and ``kl_per_token`` (nats).
    """
    samples = min(len(row["samples"]) for row in rows)
    found = summarise(rows, (samples,), **settings)["metrics"]
    metrics = {"greedy_pass@1": summarise(greedy, (1,), **settings)["metrics"]["pass@1"]}
    steps = ("step_accuracy", "correct_with_incorrect_step")
    for name in ("pass@1", f"maj@{samples}", *steps, "mean_tokens", "truncated_rate"):
        metrics[name] = found.get(name)
    return metrics | divergence(rows, **settings)


def divergence(rows: Sequence[Row], **settings: Unpack[Resampling]) -> dict[str, Any]:
    """Estimated KL(model || M0) in nats, per solution and per token, with intervals over problems."""
    if any(sample["log_ratio"] is None for row in rows for sample in row["samples"]):
        return {"kl_per_solution": None, "kl_per_token": None}
    sums = np.array([math.fsum(sample["log_ratio"] for sample in row["samples"]) for row in rows])
    tokens = np.array([sum(sample["tokens"] for sample in row["samples"]) for row in rows], dtype=np.float64)
    counts = np.array([len(row["samples"]) for row in rows], dtype=np.float64)
    per_solution = cluster_bootstrap(np.stack([sums, counts], axis=1), ratio_of_sums, **settings)
    per_token = cluster_bootstrap(np.stack([sums, tokens], axis=1), ratio_of_sums, **settings)
    return {"kl_per_solution": per_solution.to_dict(), "kl_per_token": per_token.to_dict()}


# ---- the table of all models ---------------------------------------------------------------------------------------

_PLAIN = {"mean_tokens": ".1f", "kl_per_solution": ".3f", "kl_per_token": ".4f"}
"""Formats of what is no share."""


def summarise_run(spec: IterateConfig, folders: Sequence[Path], facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the models that are evaluated.

    Args:
        spec: the settings.
        folders: ``iteration-0``, ``iteration-1``, ...; their evaluations are finished.
        facts: of every iteration, the facts of its stages.

    Returns:
        ``models``: per model ``name``, ``metrics`` (95% intervals over problems), ``minus_M0`` (paired differences on
        the same problems) and ``training`` (None for M0: solutions, rows, what was dropped and why); and
        ``samples``, ``problems``, ``labeller``.
    """
    rows = [read_results(folder / "evaluation") for folder in folders]
    models = []
    for k, folder in enumerate(folders):
        greedy = folder / "evaluation" / "greedy"
        metrics = model_metrics(rows[k], read_results(greedy), seed=spec.seed)
        minus = None
        if k:
            paired = compare_runs(folders[0] / "evaluation" / "greedy", greedy, seed=spec.seed).to_dict()
            first = {name: paired[name] for name in ("mcnemar_p", "mcnemar_mid_p")}
            counts = {name: len(paired[name]) for name in ("fixed", "broken")}
            minus = {"greedy_pass@1": paired["difference"] | counts | first}
            minus |= paired_differences(rows[k], rows[0], seed=spec.seed)
        models.append(
            {"name": f"M{k}", "metrics": metrics, "minus_M0": minus, "training": _training(facts[k]) if k else None}
        )
    return {
        "problems": len(rows[0]),
        "samples": spec.evaluation.sampling.n,
        "labeller": type(spec.held_out_spec(out="samples", model=spec.model).labeller).__name__,
        "models": models,
    }


def _training(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What an iteration learnt from, by the facts of its stages."""
    label = facts["label"]
    return {name: label[name] for name in _TRAINED_ON if name in label} | {
        "steps": label["balance"],
        "converted": facts.get("convert") or facts.get("pairs"),
        "rows": facts["train"]["rows"],
    }


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """The table (a column per model), paired differences to M0, and what every iteration's labels kept and dropped."""
    titles = {
        "greedy_pass@1": "correct answers, greedy",
        "pass@1": "correct answers, sampled",
        f"maj@{summary['samples']}": f"majority of {summary['samples']}",
        "correct_with_incorrect_step": "correct answers with\nan incorrect step",
        "step_accuracy": "correct steps",
        "mean_tokens": "tokens per solution",
        "truncated_rate": "cut off",
        "kl_per_solution": "KL to M0, per solution",
        "kl_per_token": "KL to M0, per token",
    }
    models = summary["models"]
    table = Table("", *(Column(model["name"], justify="right") for model in models), title_justify="left")
    table.title = f"{summary['problems']} held-out problems, 95% intervals"
    for name, title in titles.items():
        metrics = (model["metrics"][name] for model in models)
        table.add_row(title, *(shown(each, _PLAIN.get(name, ".1%"), gap="\n") for each in metrics))
    table.add_section()
    for name in ("greedy_pass@1", "pass@1", "correct_with_incorrect_step"):
        minus = ((model["minus_M0"] or {}).get(name) for model in models)
        table.add_row(
            f"{titles[name]},\nminus M0 (points)", *(shown(each, "+.1f", scale=100.0, gap="\n") for each in minus)
        )
    table.add_section()
    for name, title in _TRAINED_ON.items():
        table.add_row(title, *(_counted((model["training"] or {}).get(name)) for model in models))
    console.print(table)
    for line in notes(summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


_TRAINED_ON = {
    "problems": "trained on: problems",
    "solutions": "solutions",
    "labelled": "labelled",
    "dropped": "dropped",
    "correct_answers": "correct answers",
    "correct_with_incorrect_step": "with an incorrect step",
    "incorrect_answers": "incorrect answers",
    "converted": "converted",
    "rows": "rows",
}


def _counted(value: Any) -> str:
    """A number, or numbers by their names."""
    if isinstance(value, Mapping):
        return "\n".join(f"{count:,} {name.replace('_', ' ')}" for name, count in value.get("counts", value).items())
    return "-" if value is None else f"{value:,}"


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Lines below the table."""
    lines = []
    if summary["labeller"] == "Outcome":
        lines.append("steps: the outcome does not say whether a step is correct")
    if summary["labeller"] == "MonteCarlo":
        lines.append("held-out steps are labelled by continuations of M0, for every model alike")
    if any(model["metrics"]["kl_per_solution"] is None for model in summary["models"]):
        lines.append("KL to M0: needs solutions sampled at temperature 1, without top-p or top-k")
    return lines
