"""The summary of an iterated training: one row per model, and what its labels kept and dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stepkd.evaluation.metrics import compare_runs
from stepkd.iteration.measure import differences, model_metrics
from stepkd.iteration.spec import IterateConfig
from stepkd.runs.job import read_results

Summary = Mapping[str, Any]


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


def print_summary(console: Console, summary: Summary) -> None:
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
        table.add_row(title, *(metric_text(name, model["metrics"][name]) for model in summary["models"]))
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


def notes(summary: Summary) -> list[str]:
    """Lines below the table."""
    lines = []
    for model in summary["models"][1:]:
        shown = [
            f"{title} {difference_text(name, model['minus_M0'][name])}"
            for name, title in (
                ("greedy_pass@1", "correct, greedy"),
                ("pass@1", "correct, sampled"),
                ("correct_with_incorrect_step", "incorrect step in correct answers"),
            )
            if model["minus_M0"][name] is not None
        ]
        lines.append(f"{model['name']} minus M0 on the same problems: {'; '.join(shown)}")
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


_PLAIN = {"mean_tokens": ".1f", "kl_per_solution": ".3f", "kl_per_token": ".4f"}


def metric_text(name: str, metric: Mapping[str, Any] | None) -> str:
    """A value with its interval below; a dash where it is undefined."""
    if metric is None or metric["value"] is None:
        return "-"
    scale, number, unit = (1, _PLAIN[name], "") if name in _PLAIN else (100, ".1f", "%")
    text = f"{metric['value'] * scale:{number}}{unit}"
    if metric["low"] is None or metric["low"] == metric["high"]:
        return text
    return f"{text}\n{metric['low'] * scale:{number}} to {metric['high'] * scale:{number}}"


def difference_text(name: str, metric: Mapping[str, Any]) -> str:
    """A signed difference in points, with its interval."""
    text = f"{metric['value'] * 100:+.1f}"
    if metric["low"] is None:
        return text
    return f"{text} ({metric['low'] * 100:+.1f} to {metric['high'] * 100:+.1f})"
