"""A student that knows but does not do reliably: the teacher's weights, trained a little more on solutions with slips.

The ground of the other claims: without wrong steps among right answers there is nothing for step labels to mend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.claims.student import TeacherStudentConfig, evaluate_arm, train_teacher_and_student

METRICS = ("greedy", "pass@1", "step_accuracy", "correct_with_wrong_step")


@dataclass(frozen=True)
class NoisyStudentSettings(TeacherStudentConfig):
    """Task, budgets and noise of the experiment."""

    teacher_lr: float = 3e-3
    """Peak learning rate of the teacher."""
    student_lr: float = 1e-3
    """Peak learning rate of the student."""
    rate: float = 0.15
    """Probability that a line of a demonstration slips, in [0, 1]."""
    recover: float = 0.5
    """Share of slips that the next line silently recovers from, in [0, 1]."""
    samples: int = 4
    """Solutions per problem at temperature 1, >= 1."""


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """Train the teacher, start the student from it, and evaluate both greedily and at temperature 1."""
    from stepkd.claims.tiny import GLOBAL_BATCH

    settings: NoisyStudentSettings = unit.settings
    noise = {"rate": settings.rate, "kind": "random", "recover": settings.recover}
    models = train_teacher_and_student(
        unit, report, noise, teacher_lr=settings.teacher_lr, student_lr=settings.student_lr
    )
    steps = {"teacher": settings.teacher_steps, "student": settings.teacher_steps + settings.student_steps}
    results = []
    for arm in unit.arms:
        report(f"evaluating the {arm}")
        model = models[arm == "student"]
        results.append(evaluate_arm(unit, arm, model, METRICS, {"train_solutions": GLOBAL_BATCH * steps[arm]}))
    return results


EXPERIMENT = Experiment(
    run=run,
    settings=NoisyStudentSettings,
    metrics=METRICS,
    arms={"teacher": {}, "student": {}},
    facts=("train_solutions",),
)
