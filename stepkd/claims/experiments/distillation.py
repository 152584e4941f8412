"""Students that have seen few solutions go on with the same prompts: by more of the same, or taught by a teacher.

One unit trains a teacher (on slips, if asked: then its distribution has more than one mode), a student from scratch on
a small set of solutions, and one model per arm from the student's weights, all on the problems of that set and for
equally many steps; it samples all of them on held-out problems, and measures how like the teacher each is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.claims.student import ExperimentConfig, evaluate_arm, train_on_solutions

OF_PROBLEMS = ("pass@1", "step_accuracy", "clean@1", "mean_tokens", "greedy", "distinct")
FIDELITY = ("forward_kl", "reverse_kl", "agreement", "entropy_gap", "ece")
METRICS = (*OF_PROBLEMS, *FIDELITY, "answers_alike")
"""Beside those of all experiments: ``greedy`` (right or not), ``distinct`` (share of different solutions among a
problem's samples, 1 / samples to 1), the means of :mod:`stepkd.modules.fidelity`, and ``answers_alike`` (share of
problems that student and teacher answer alike, greedily)."""


@dataclass(frozen=True)
class DistillationSettings(ExperimentConfig):
    """Task, budgets and noise of the experiment."""

    teacher_steps: int = 800
    """Optimiser steps of the teacher, of 64 solutions, >= 1."""
    teacher_slips: float = 0.0
    """Probability that a line of what the teacher learns from slips, in [0, 1]; above 0 it goes on for
    ``slip_steps``."""
    slip_steps: int = 200
    """Steps of a sloppy teacher on solutions with slips, >= 1."""
    student_steps: int = 400
    """Steps of the student's own training, >= 1."""
    prompts: int = 2000
    """Different problems of the student's training, and of all arms, >= 1."""
    steps: int = 200
    """Optimiser steps of every arm, >= 1."""
    lr: float = 1e-3
    """Peak learning rate of every arm."""


@dataclass(frozen=True)
class DistillationArm:
    """How an arm learns."""

    method: Literal["none", "teacher", "sft", "gkd"] = "gkd"
    """``none`` is the student itself, ``sft`` trains it on the solutions further."""
    student: float = 1.0
    """Share of batches that the student samples (lambda); the others are the solutions."""
    of_teacher: float = 0.0
    """Share of the others that the teacher samples."""
    kind: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd"
    """Which divergence."""
    beta: float = 0.5
    """Of the JSD, which is scaled."""
    top_k: int | None = None
    """Learn from a cache of so many of the teacher's likeliest tokens."""
    tail: bool = True
    """Whether the rest is a bucket of its own."""


ARMS: Mapping[str, Mapping[str, Any]] = {
    "student": {"method": "none"},
    "sft": {"method": "sft"},
    "kd": {"student": 0.0},
    "gkd": {"student": 1.0},
}


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """See the module's text."""
    settings: DistillationSettings = unit.settings
    report(f"training the teacher, {settings.teacher_steps} steps")
    teacher = train_on_solutions(unit, "teacher", settings.model, steps=settings.teacher_steps, lr=3e-3)
    if settings.teacher_slips:
        noise = {"rate": settings.teacher_slips, "kind": "random"}
        teacher = train_on_solutions(unit, "noisy", teacher, steps=settings.slip_steps, lr=1e-3, noise=noise)
    report(f"training the student, {settings.student_steps} steps on {settings.prompts} solutions")
    few = {"demonstrations": settings.prompts}
    student = train_on_solutions(unit, "student", settings.model, steps=settings.student_steps, lr=3e-3, **few)
    results = []
    for name, arm in unit.arms.items():
        model = {"none": student, "teacher": teacher}.get(arm.method)
        if model is None:
            report(f"training {name}, {settings.steps} steps")
            model = _train(unit, name, arm, student, teacher)
        report(f"evaluating {name}")
        facts = {"train_solutions": 64.0 * settings.steps if arm.method in ("sft", "gkd") else 0.0}
        results.append(_evaluate(unit, name, model, teacher, facts))
    return results


def _train(unit: Unit, name: str, arm: DistillationArm, student: Path, teacher: Path) -> Path:
    from stepkd.claims.tiny import tiny_gkd, train_tiny
    from stepkd.modules.distillation_settings import JSD, ForwardKL, ReverseKL
    from stepkd.teachers.config import TopK

    settings: DistillationSettings = unit.settings
    few: dict[str, Any] = {"demonstrations": settings.prompts}
    if arm.method == "sft":
        return train_on_solutions(unit, name, student, steps=settings.steps, lr=settings.lr, **few)
    return train_tiny(
        unit.folder / name,
        tiny_gkd,
        start=student,
        task=settings.task,
        steps=settings.steps,
        lr=settings.lr,
        seed=unit.seed,
        teacher=teacher,
        divergence={"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}.get(
            arm.kind, JSD(beta=arm.beta, scaled=True)
        ),
        top_k=None if arm.top_k is None else TopK(arm.top_k, arm.tail),
        student=arm.student,
        of_teacher=arm.of_teacher,
        cache=None if arm.top_k is None else unit.folder / name / "cache",
        **few,
    )


def _evaluate(unit: Unit, name: str, model: Path, teacher: Path, facts: Mapping[str, float]) -> ArmResult:
    from stepkd.claims.tiny import tiny_fidelity

    settings: DistillationSettings = unit.settings
    alike = tiny_fidelity(model, teacher, task=settings.task, problems=settings.problems, seed=unit.seed)
    alike["answers_alike"] = alike["answers_both_right"] + alike["answers_same_wrong"]
    return evaluate_arm(unit, name, model, METRICS, facts, more=alike)


EXPERIMENT = Experiment(
    run=run,
    settings=DistillationSettings,
    metrics=METRICS,
    arms=ARMS,
    arm_settings=DistillationArm,
    facts=("train_solutions",),
)
