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
from stepkd.errors import ConfigError

_COUNTS = ("teacher_steps", "student_steps", "label_problems", "label_samples", "steps", "batch", "problems", "samples")


@dataclass(frozen=True)
class StepFeedbackSettings:
    """Task, budgets and noise of the experiment."""

    task: str = "modular:terms=4,modulus=10"
    """Tiny-world task with its settings."""
    model: str = "tiny-0.5m"
    """Tiny model preset of teacher and student."""
    teacher_steps: int = 800
    """Optimiser steps of 64 clean solutions, >= 1."""
    student_steps: int = 200
    """Further optimiser steps of 64 solutions with random slips, >= 1."""
    slips: float = 0.25
    """Probability that a line slips, in [0, 1]."""
    recover: float = 0.9
    """Share of slips that the next line silently recovers from, in [0, 1]."""
    demonstrations: int = 20_000
    """Different problems in the training set of teacher and student, >= 1."""
    label_problems: int = 768
    """Problems whose sampled solutions are labelled, >= 1."""
    label_samples: int = 6
    """Solutions per problem, >= 1; equal ones are labelled once."""
    steps: int = 60
    """Optimiser steps of every arm, >= 1."""
    batch: int = 64
    """Solutions per step, >= 1."""
    lr: float = 1e-4
    """Peak learning rate of every arm."""
    beta: float = 0.5
    """KTO's beta, of outcomes and steps."""
    problems: int = 200
    """Held-out problems per seed, >= 1."""
    samples: int = 8
    """Solutions per held-out problem at temperature 1, >= 1."""
    allow_one_class: bool = False
    """Train although all labels agree (``--quick``)."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class StepFeedbackArm:
    """How an arm uses the labels."""

    method: Literal["none", "kto", "step_kto"] = "step_kto"
    """``none`` is the student itself."""
    reduction: str = "mean_steps"
    """Step-KTO: see :func:`stepkd.losses.step_kto`."""
    step_weight: float = 1.0
    """Step-KTO: weight of the step term."""
    step_point: str = "mismatch"
    """Step-KTO: reference point of the steps."""


ARMS: Mapping[str, Mapping[str, Any]] = {
    "student": {"method": "none"},
    "kto": {"method": "kto"},
    "step_kto": {},
    "step_kto_sum": {"reduction": "sum_steps"},
}


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """See the module's text."""
    from stepkd.claims.tiny import evaluate_tiny, problem_ids, problem_metrics, problem_rows, train_tiny_sft
    from stepkd.claims.tiny_preference import train_tiny_preference
    from stepkd.claims.tiny_reward import label_tiny

    settings: StepFeedbackSettings = unit.settings
    common: dict[str, Any] = {"task": settings.task, "seed": unit.seed, "demonstrations": settings.demonstrations}
    report(f"training the teacher, {settings.teacher_steps} steps")
    teacher = train_tiny_sft(
        unit.folder / "teacher", start=settings.model, steps=settings.teacher_steps, lr=3e-3, reuse=True, **common
    )
    report(f"training the student, {settings.student_steps} steps")
    noise = {"rate": settings.slips, "kind": "random", "recover": settings.recover}
    student = train_tiny_sft(
        unit.folder / "student",
        start=teacher,
        steps=settings.student_steps,
        lr=1e-3,
        noise=noise,
        reuse=True,
        **common,
    )
    report("sampling solutions and labelling them with the exact checker")
    labels, summary = label_tiny(
        unit.folder / "labels",
        model=student,
        seed=unit.seed,
        problems=f'task:task="{settings.task}",n={settings.label_problems},seed={unit.seed},split=train',
        labeller="checker",
        samples=settings.label_samples,
    )
    results = []
    for name, arm in unit.arms.items():
        model = student
        if arm.method != "none":
            report(f"training {name}, {settings.steps} steps")
            model = train_tiny_preference(
                unit.folder / name,
                method=arm.method,
                start=student,
                rows=labels,
                steps=settings.steps,
                lr=settings.lr,
                seed=unit.seed,
                settings=_arm_settings(arm, settings.beta),
                global_batch_size=settings.batch,
                allow_one_class=settings.allow_one_class,
                reuse=True,
            )
        report(f"evaluating {name}")
        folder = unit.folder / f"{name}-evaluation"
        evaluate_tiny(
            folder,
            model,
            task=settings.task,
            problems=settings.problems,
            samples=settings.samples,
            temperature=1.0,
            seed=unit.seed,
        )
        rows = problem_rows(folder)
        found = problem_metrics(rows)
        facts = {
            "labelled_solutions": float(summary["labelled"]),
            "train_solutions": 0.0 if arm.method == "none" else float(settings.steps * settings.batch),
        }
        results.append(ArmResult(name, problem_ids(rows), {metric: found[metric] for metric in METRICS}, facts))
    return results


def _arm_settings(arm: StepFeedbackArm, beta: float) -> dict[str, Any]:
    if arm.method == "kto":
        return {"beta": beta}
    from stepkd.modules import ReferencePointSpec

    return {
        "beta": beta,
        "reduction": arm.reduction,
        "step_weight": arm.step_weight,
        "reference_point": ReferencePointSpec(step=arm.step_point),  # type: ignore[arg-type]
    }


METRICS = ("pass@1", "step_accuracy", "correct_with_wrong_step", "mean_tokens")

EXPERIMENT = Experiment(
    run=run,
    settings=StepFeedbackSettings,
    metrics=METRICS,
    arms=ARMS,
    arm_settings=StepFeedbackArm,
    facts=("labelled_solutions", "train_solutions"),
)
