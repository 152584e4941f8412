"""KTO against Step-KTO: one student, one set of labelled solutions, equal steps; only the use of step labels differs.

One unit trains a teacher, makes a student of it that slips at random and mostly recovers silently, so that many of its
right answers contain a wrong step, labels the student's own solutions with the exact checker, trains one policy per arm
from the student's weights, and samples all of them on held-out problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.claims.student import METRICS, NoisyStudentConfig, evaluate_arm, label_student, train_noisy_student


@dataclass(frozen=True)
class StepFeedbackSettings(NoisyStudentConfig):
    """Task, budgets and noise of the experiment."""

    steps: int = 60
    """Optimiser steps of every arm, >= 1."""
    allow_one_class: bool = False
    """Train although all labels agree (``claims quick``)."""


@dataclass(frozen=True)
class StepFeedbackArm:
    """How an arm uses the labels."""

    method: Literal["none", "kto", "step_kto"] = "step_kto"
    """``none`` is the student itself."""
    reduction: str = "sum_steps"
    """Step-KTO: see :func:`stepkd.losses.step_kto`."""
    step_weight: float = 1.0
    """Step-KTO: weight of the step term."""
    step_point: str = "mismatch"
    """Step-KTO: reference point of the steps."""


ARMS: Mapping[str, Mapping[str, Any]] = {
    "student": {"method": "none"},
    "kto": {"method": "kto"},
    "step_kto": {},
    "step_kto_mean": {"reduction": "mean_steps"},
}


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """See the module's text."""
    from stepkd.claims.tiny import tiny_preference, train_tiny

    settings: StepFeedbackSettings = unit.settings
    student = train_noisy_student(unit, report)
    labels, summary = label_student(unit, student, report)
    results = []
    for name, arm in unit.arms.items():
        model = student
        if arm.method != "none":
            report(f"training {name}, {settings.steps} steps")
            model = train_tiny(
                unit.folder / name,
                tiny_preference,
                method=arm.method,
                start=student,
                rows=labels,
                steps=settings.steps,
                lr=settings.lr,
                seed=unit.seed,
                global_batch_size=settings.batch,
                allow_one_class=settings.allow_one_class,
                beta=settings.beta,
                **_arm_settings(arm),
            )
        report(f"evaluating {name}")
        facts = {
            "labelled_solutions": float(summary["labelled"]),
            "train_solutions": 0.0 if arm.method == "none" else float(settings.steps * settings.batch),
        }
        results.append(evaluate_arm(unit, name, model, METRICS, facts))
    return results


def _arm_settings(arm: StepFeedbackArm) -> dict[str, Any]:
    if arm.method == "kto":
        return {}
    from stepkd.modules.kto import ReferencePointConfig

    return {
        "reduction": arm.reduction,
        "loss_weights": {"step": arm.step_weight},
        "reference_point": ReferencePointConfig(step=arm.step_point),  # type: ignore[arg-type]
    }


EXPERIMENT = Experiment(
    run=run,
    settings=StepFeedbackSettings,
    metrics=METRICS,
    arms=ARMS,
    arm_settings=StepFeedbackArm,
    facts=("labelled_solutions", "train_solutions"),
)
