"""The stage of the process reward model: label the student's own solutions, train, and choose among its samples."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from stepkd.quickstart.context import Context, percent

SAMPLES = 8
"""Solutions per held-out problem that the reward model chooses from."""


def train_prm(context: Context) -> dict[str, Any]:
    """Monte-Carlo labels of the student's solutions, a reward model from the student's weights, best-of-8."""
    from stepkd.claims.tiny_reward import label_tiny, train_tiny_prm
    from stepkd.data.io import read_rows
    from stepkd.labels.quality import label_quality

    folder, student = context.out / "prm", context.model_folder("student")
    problems = f'task:task="{context.task}",n={context.problems(300)},seed={context.seed},split=train'
    context.console.print("labelling: 8 continuations from every step of the student's solutions", style="dim")
    labels, summary = label_tiny(
        folder / "labels", model=student, seed=context.seed, problems=problems, labeller="monte_carlo", samples=4
    )
    truth, _ = label_tiny(folder / "truth", model=student, seed=context.seed, rollouts=str(labels), labeller="checker")
    quality = label_quality([row for row, _ in read_rows(labels)], [row for row, _ in read_rows(truth)])
    model = train_tiny_prm(
        folder, start=student, labels=labels, steps=context.steps(200), lr=1e-3, seed=context.seed, meaning="value",
        progress=True,
    )  # fmt: skip
    section = {
        "model": str(model.relative_to(context.out)),
        "steps": context.steps(200),
        "labelled_solutions": summary["labelled"],
        "label_quality": quality.to_dict(),
    }
    return section | _choose(context, str(model), str(student))


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
        rows, {"prm": reduce_solutions(scores, "min", meaning="value").values}, (1, 2, 4, SAMPLES), seed=context.seed
    )
    groups = by_problem(rows)
    steps = labelled_steps(
        [found for solutions in scores for found in solutions],
        [row["step_labels"] for group in groups.values() for row in group],
        problems=[name for name, group in groups.items() for _ in group],
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
    return {"best_of_n": curve.to_dict(), "step_metrics": metrics}
