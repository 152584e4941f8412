"""The stage of the process reward model: label the student's own solutions, train, and choose among its samples."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from stepkd.errors import DataError
from stepkd.quickstart.context import Context, percent, student_labels

SAMPLES = 8
"""Solutions per held-out problem that the reward model chooses from."""


def train_prm(context: Context) -> dict[str, Any]:
    """Labels of the student's solutions, a reward model from the student's weights, best-of-8."""
    from stepkd.claims.tiny_reward import train_tiny_prm

    folder, student = context.out / "prm", context.model_folder("student")
    labels, summary = student_labels(context)
    model = train_tiny_prm(
        folder,
        start=student,
        labels=labels,
        steps=context.steps(400),
        lr=1e-3,
        seed=context.seed,
        allow_one_class=context.scale < 1,
        progress=True,
    )
    section = {
        "model": str(model.relative_to(context.out)),
        "steps": context.steps(400),
        "labelled_solutions": summary["labelled"],
        "monte_carlo": _monte_carlo(context, str(student)),
    }
    return section | _choose(context, str(model), str(student))


def _monte_carlo(context: Context, student: str) -> dict[str, Any]:
    """How true labels from 8 continuations per step are, for when there is no checker."""
    from stepkd.claims.tiny_reward import label_tiny
    from stepkd.data.io import read_rows
    from stepkd.labels.quality import label_quality

    folder = context.out / "prm"
    problems = f'task:task="{context.task}",n={context.problems(60)},seed={context.seed + 1},split=train'
    labels, _ = label_tiny(
        folder / "monte-carlo", model=student, seed=context.seed, problems=problems, labeller="monte_carlo", samples=4
    )
    truth, _ = label_tiny(folder / "truth", model=student, seed=context.seed, rollouts=str(labels), labeller="checker")
    quality = label_quality([row for row, _ in read_rows(labels)], [row for row, _ in read_rows(truth)]).to_dict()
    accuracy = quality["balanced_accuracy"]
    if accuracy is not None:
        context.console.print(
            f"Monte-Carlo labels (8 continuations per step) against the exact checker: balanced accuracy "
            f"{percent(accuracy)}".replace("\n", " "),
            highlight=False,
        )
    return quality


def _choose(context: Context, model: str, student: str) -> dict[str, Any]:
    """Best-of-8 by the reward model against the majority, and how well it tells right steps from wrong ones."""
    from stepkd.claims.tiny_reward import by_problem, curves_tiny, label_tiny, score_tiny
    from stepkd.data.io import read_rows
    from stepkd.evaluation.step_metrics import labelled_steps, step_metrics
    from stepkd.scorers import reduce_solutions

    problems = f'task:task="{context.task}",n={context.problems(150)},seed={context.seed},split=test'
    held_out, _ = label_tiny(
        context.out / "prm" / "held-out",
        model=student,
        seed=context.seed,
        problems=problems,
        labeller="checker",
        samples=SAMPLES,
        dedupe=False,
    )
    rows = [row for row, _ in read_rows(held_out)]
    scores = score_tiny(model, rows)
    curve = curves_tiny(
        rows,
        {"prm": reduce_solutions(scores, "product", meaning="correctness")},
        (1, 2, 4, SAMPLES),
        seed=context.seed,
    )
    judged = [
        (found, row["step_labels"], name)
        for solutions, (name, group) in zip(scores, by_problem(rows).items(), strict=True)
        for found, row in zip(solutions, group, strict=True)
        if not any(math.isnan(score) for score in found)
    ]
    if not judged:
        raise DataError("the reward model scored no solution: every one holds the step marker or has no text")
    steps = labelled_steps(
        [found for found, _, _ in judged],
        [labels for _, labels, _ in judged],
        problems=[name for _, _, name in judged],
        up_to_first_error=True,
    )
    metrics = step_metrics(steps, seed=context.seed).to_dict()
    table = Table(title=f"choosing among {SAMPLES} of the student's solutions, 95% intervals", title_justify="left")
    table.add_column("choice")
    for k in curve.ks:
        table.add_column(f"N={k}", justify="right")
    for name, title in (("majority", "majority"), ("prm", "process reward model"), ("pass", "any right (ceiling)")):
        table.add_row(title, *(percent(each.to_dict()) for each in curve.curves[name]))
    context.console.print(table)
    auroc = metrics["auroc"]
    if auroc is not None:
        context.console.print(
            f"right against wrong steps, up to the first error: AUROC {auroc['value']:.3f} "
            f"({auroc['low']:.3f} to {auroc['high']:.3f})",
            highlight=False,
        )
    return {"best_of_n": curve.to_dict(), "step_metrics": metrics, "unscored": len(rows) - len(judged)}
