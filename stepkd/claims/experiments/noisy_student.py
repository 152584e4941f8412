"""A student that knows but does not do reliably: the teacher's weights, trained a little more on solutions with slips.

The ground of the other claims: without wrong steps among right answers there is nothing for step labels to mend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.claims.sloppy_student import train_teacher_and_student
from stepkd.errors import ConfigError


@dataclass(frozen=True)
class NoisyStudentSettings:
    """Task, budgets and noise of the experiment."""

    task: str = "modular:terms=4,modulus=10"
    """Tiny-world task with its settings."""
    model: str = "tiny-0.5m"
    """Tiny model preset of teacher and student."""
    teacher_steps: int = 800
    """Optimiser steps of 64 clean solutions, >= 1."""
    student_steps: int = 200
    """Further optimiser steps of 64 solutions with slips, >= 1."""
    teacher_lr: float = 3e-3
    """Peak learning rate of the teacher."""
    student_lr: float = 1e-3
    """Peak learning rate of the student."""
    rate: float = 0.15
    """Probability that a line of a demonstration slips, in [0, 1]."""
    recover: float = 0.5
    """Share of slips that the next line silently recovers from, in [0, 1]."""
    demonstrations: int = 20_000
    """Different problems in the training set, >= 1."""
    problems: int = 200
    """Held-out problems per seed, >= 1."""
    samples: int = 4
    """Solutions per problem at temperature 1, >= 1."""

    def __post_init__(self) -> None:
        for name in ("teacher_steps", "student_steps", "demonstrations", "problems", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """Train the teacher, go on from it to the student, and evaluate both greedily and at temperature 1."""
    from stepkd.claims.tiny import GLOBAL_BATCH

    settings: NoisyStudentSettings = unit.settings
    noise = {"rate": settings.rate, "kind": "random", "recover": settings.recover}
    teacher, student = train_teacher_and_student(
        unit, report, noise, teacher_lr=settings.teacher_lr, student_lr=settings.student_lr
    )
    solutions = {
        "teacher": GLOBAL_BATCH * settings.teacher_steps,
        "student": GLOBAL_BATCH * (settings.teacher_steps + settings.student_steps),
    }
    models = {"teacher": teacher, "student": student}
    results = []
    for arm in unit.arms:
        report(f"evaluating the {arm}")
        problems, metrics = _evaluate(unit, arm, str(models[arm]))
        results.append(ArmResult(arm, problems, metrics, facts={"train_solutions": solutions[arm]}))
    return results


def _evaluate(unit: Unit, arm: str, model: str) -> tuple[Sequence[str], dict[str, Any]]:
    from stepkd.claims.tiny import evaluate_tiny, problem_ids, problem_metrics, problem_rows

    settings: NoisyStudentSettings = unit.settings
    rows = {}
    for name, samples, temperature in (("greedy", 1, 0.0), ("sampled", settings.samples, 1.0)):
        folder = unit.folder / f"{arm}-{name}"
        evaluate_tiny(
            folder,
            model,
            task=settings.task,
            problems=settings.problems,
            samples=samples,
            temperature=temperature,
            seed=unit.seed,
        )
        rows[name] = problem_rows(folder)
    sampled = problem_metrics(rows["sampled"])
    metrics = {name: sampled[name] for name in METRICS if name != "greedy"}
    return problem_ids(rows["sampled"]), {"greedy": problem_metrics(rows["greedy"])["pass@1"], **metrics}


METRICS = ("greedy", "pass@1", "step_accuracy", "correct_with_wrong_step")

EXPERIMENT = Experiment(
    run=run,
    settings=NoisyStudentSettings,
    metrics=METRICS,
    arms={"teacher": {}, "student": {}},
    facts=("train_solutions",),
)
