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
from rich.table import Table

from stepkd.data.config import LABELS_NAME, parse_spec
from stepkd.data.io import read_rows
from stepkd.data.load import load_rows
from stepkd.data.rows import PROBLEM
from stepkd.data.sources import asking
from stepkd.evaluation.metrics import compare_runs, problem_counts, summarise
from stepkd.grading.judge import votes_of
from stepkd.grading.pool import Grader
from stepkd.iteration.spec import IterateConfig
from stepkd.labels.job import drawn_records
from stepkd.labels.quality import row_labels
from stepkd.labels.settings import LabelConfig, Sampled
from stepkd.labels.solutions import at_temperature_one
from stepkd.models.checkpoint import load_trained
from stepkd.models.source import template_for
from stepkd.runs.job import read_results, read_settings
from stepkd.sampling.annotate import annotate
from stepkd.sampling.transformers_sampler import encode_prompts
from stepkd.scorers.load import pick_device
from stepkd.statistics import FloatArray, Interval, Resampling, cluster_bootstrap, ratio_of_sums, shown
from stepkd.steps.labels import verdicts
from stepkd.tasks.rows import is_task_row

Row = Mapping[str, Any]

PAIRED = {
    "pass@1": ("correct", "samples"),
    "correct_with_incorrect_step": ("correct_flawed", "correct_labelled"),
    "step_accuracy": ("correct_steps", "steps"),
    "mean_tokens": ("tokens", "samples"),
}
"""Metrics whose difference to M0 is given: which of :func:`~stepkd.evaluation.metrics.problem_counts` over which."""


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
    source = parse_spec(solutions.problems).source
    is_task = all(map(is_task_row, problems))
    template = template_for(solutions.model, asking(source, is_task=is_task).template, spec.template)
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
    names = (
        "pass@1",
        f"maj@{samples}",
        "step_accuracy",
        "correct_with_incorrect_step",
        "mean_tokens",
        "truncated_rate",
    )
    metrics = {"greedy_pass@1": summarise(greedy, (1,), **settings)["metrics"]["pass@1"]}
    metrics |= {name: found.get(name) for name in names}
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


def differences(rows: Sequence[Row], base: Sequence[Row], **settings: Unpack[Resampling]) -> dict[str, Any]:
    """A model minus M0 on the same problems, for :data:`PAIRED` metrics of the sampled solutions.

    Problems are resampled with both models' solutions together. A share without denominator on either side is None.

    Args:
        rows, base: :func:`problem_rows` of the model and of M0, over the same problems.
        **settings: see :class:`~stepkd.statistics.Resampling`.
    """
    before = {row["id"]: problem_counts(row).counts for row in base}
    pairs = [(problem_counts(row).counts, before[row["id"]]) for row in rows]
    shares: dict[str, Any] = {}
    for name, (top, bottom) in PAIRED.items():
        counts = np.array([[new[top], new[bottom], old[top], old[bottom]] for new, old in pairs], dtype=np.float64)
        known = counts[:, 1].sum() and counts[:, 3].sum()
        shares[name] = ratio_difference(counts, **settings).to_dict() if known else None
    return shares


def ratio_difference(counts: FloatArray, **settings: Unpack[Resampling]) -> Interval:
    """``sum(c0) / sum(c1) - sum(c2) / sum(c3)`` of (problems, 4) counts, problems resampled together."""

    def statistic(resampled: FloatArray) -> FloatArray:
        return ratio_of_sums(resampled[:, :, :2]) - ratio_of_sums(resampled[:, :, 2:])

    return cluster_bootstrap(counts, statistic, **settings)


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
        the same problems) and ``training`` (None for M0: solutions, rows, what was dropped and why, conflicts); and
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
            minus |= differences(rows[k], rows[0], seed=spec.seed)
        models.append(
            {"name": f"M{k}", "metrics": metrics, "minus_M0": minus, "training": _training(facts[k]) if k else None}
        )
    labeller = type(spec.held_out_spec(out="samples", model=spec.model).labeller).__name__
    return {
        "problems": len(rows[0]),
        "samples": spec.evaluation.sampling.n,
        "labeller": labeller,
        "models": models,
    }


def _training(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What an iteration learnt from, by the facts of its stages."""
    label = facts["label"]
    same = ("problems", "solutions", "labelled", "dropped", "correct_answers", "incorrect_answers")
    return {name: label[name] for name in same} | {
        "conflicts": label["correct_answers_with_an_incorrect_step"],
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
        "correct_with_incorrect_step": "incorrect step in\ncorrect answers",
        "step_accuracy": "correct steps",
        "mean_tokens": "tokens per solution",
        "truncated_rate": "cut off",
        "kl_per_solution": "KL to M0, per solution",
        "kl_per_token": "KL to M0, per token",
    }
    table = Table(title=f"{summary['problems']} held-out problems, 95% intervals", title_justify="left")
    table.add_column("")
    for model in summary["models"]:
        table.add_column(model["name"], justify="right")
    for name, title in titles.items():
        table.add_row(
            title, *(shown(model["metrics"][name], _PLAIN.get(name, ".1%"), gap="\n") for model in summary["models"])
        )
    table.add_section()
    trainings = [model["training"] for model in summary["models"]]
    for name, title in (
        ("rows", "rows trained on"),
        ("conflicts", "correct answers with an\nincorrect step in the labels"),
    ):
        table.add_row(title, *("-" if training is None else f"{training[name]:,}" for training in trainings))
    console.print(table)
    for line in notes(summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Lines below the table."""
    lines = []
    for model in summary["models"][1:]:
        minus = [
            f"{title} {shown(model['minus_M0'][name], '+.1f', scale=100.0)}"
            for name, title in (
                ("greedy_pass@1", "correct, greedy"),
                ("pass@1", "correct, sampled"),
                ("correct_with_incorrect_step", "incorrect step in correct answers"),
            )
            if model["minus_M0"][name] is not None
        ]
        lines.append(f"{model['name']} minus M0 on the same problems: {'; '.join(minus)}")
    for k, model in enumerate(summary["models"]):
        if model["training"] is not None:
            lines.append(_training_line(k, model["training"]))
    if summary["labeller"] == "Outcome":
        lines.append("steps: the outcome does not say whether a step is correct")
    if summary["labeller"] == "MonteCarlo":
        lines.append("held-out steps are labelled by continuations of M0, for every model alike")
    if any(model["metrics"]["kl_per_solution"] is None for model in summary["models"]):
        lines.append("KL to M0: needs solutions sampled at temperature 1, without top-p or top-k")
    return lines


def _training_line(k: int, training: Mapping[str, Any]) -> str:
    dropped = _counts(training["dropped"])
    line = (
        f"iteration {k}: {training['labelled']} of {training['solutions']} solutions of {training['problems']} "
        f"problems labelled{f' (dropped: {dropped})' if dropped else ''}; {training['correct_answers']} correct "
        f"answers, {training['conflicts']} of them with an incorrect step, {training['incorrect_answers']} incorrect"
    )
    if training["converted"] is not None:
        line += f"; {training['converted']['to']}: {_counts(training['converted']['counts'])}"
    return line


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
