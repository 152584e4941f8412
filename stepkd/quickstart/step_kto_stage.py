"""The stage of preference training: the student learns from its own solutions, whose every step is labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepkd.quickstart.context import Context, compare_samples

SETTINGS: dict[str, Any] = {"beta": 0.5}
"""KTO's beta, of answers and steps."""


def student_labels(context: Context) -> tuple[Path, dict[str, Any]]:
    """The student's own solutions, every step labelled by the exact checker; drawn once for all stages."""
    from stepkd.claims.tiny_reward import label_tiny

    return label_tiny(
        context.out / "labels",
        model=context.model_folder("student"),
        seed=context.seed,
        problems=f'task:task="{context.task}",n={context.problems(2000)},seed={context.seed},split=train',
        labeller="checker",
        samples=4,
    )


def train_step_kto(context: Context) -> dict[str, Any]:
    """Step-KTO from the student's weights, and what it does to right answers and to the wrong steps in them."""
    from stepkd.claims.tiny_preference import train_tiny_preference

    labels, summary = student_labels(context)
    model = train_tiny_preference(
        context.out / "step_kto",
        method="step_kto",
        start=context.model_folder("student"),
        rows=labels,
        steps=context.steps(60),
        lr=1e-4,
        seed=context.seed,
        settings=SETTINGS,
        global_batch_size=64,
        allow_one_class=context.scale < 1,
        progress=True,
    )
    sections = compare_samples(context, {"student": context.model_folder("student"), "step_kto": model})
    return {
        "model": str(model.relative_to(context.out)),
        "steps": context.steps(60),
        "labelled_solutions": summary["labelled"],
        "conflicts": summary["right_answers_with_a_wrong_step"],
        "evaluation": sections["step_kto"],
    }
