"""What experiments share: their settings, how a student is trained, and how an arm is evaluated.

The noisy student is trained on clean solutions, then on some with slips, many of them silently recovered. Experiments
on preference training and iteration begin with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stepkd.claims.experiment import ArmResult, Report, Unit
from stepkd.errors import ConfigError

METRICS = ("pass@1", "step_accuracy", "correct_with_wrong_step", "clean@1", "mean_tokens")
"""What experiments on preference training measure."""


@dataclass(frozen=True)
class ExperimentConfig:
    """What every experiment may set; whole numbers must be at least 1."""

    task: str = "modular:terms=4,modulus=10"
    """Tiny-world task with its settings."""
    model: str = "tiny-0.5m"
    """Tiny model preset of teacher and student."""
    demonstrations: int = 20_000
    """Different problems in the training set of teacher and student, >= 1."""
    problems: int = 200
    """Held-out problems per seed, >= 1."""
    samples: int = 8
    """Solutions per held-out problem at temperature 1, >= 1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int" and getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name}={getattr(self, field.name)}: must be at least 1")


@dataclass(frozen=True)
class TeacherStudentConfig(ExperimentConfig):
    """Budgets of a teacher and of a student that starts from its weights."""

    teacher_steps: int = 800
    """Optimiser steps of 64 clean solutions, >= 1."""
    student_steps: int = 200
    """Further optimiser steps of 64 solutions with slips, >= 1."""
    recover: float = 0.9
    """Share of slips that the next line silently recovers from, in [0, 1]."""


@dataclass(frozen=True)
class NoisyStudentConfig(TeacherStudentConfig):
    """The noisy student, the labels of its solutions, and how arms learn from them."""

    slips: float = 0.25
    """Probability that a line slips, in [0, 1]."""
    label_problems: int = 768
    """Problems whose sampled solutions are labelled, >= 1."""
    label_samples: int = 6
    """Solutions per problem, >= 1; equal ones are labelled once."""
    batch: int = 64
    """Solutions or pairs per step, >= 1."""
    lr: float = 1e-4
    """Peak learning rate of every arm."""
    beta: float = 0.5
    """Beta of the preference losses."""


def train_on_solutions(unit: Unit, name: str, start: str | Path, *, steps: int, lr: float, **changes: Any) -> Path:
    """Train a tiny model on generated solutions of the unit's task; one that an interrupted unit left is used again.

    Args:
        unit: its settings have ``task`` and ``demonstrations``.
        name: of the model's folder in the unit's.
        start: model preset or folder.
        steps, lr: optimiser steps of 64 solutions, and the peak learning rate.
        **changes: other arguments of :func:`stepkd.claims.tiny.tiny_sft`, for instance ``noise``.

    Returns:
        The model folder.
    """
    from stepkd.claims.tiny import tiny_sft, train_tiny

    data = {"task": unit.settings.task, "demonstrations": unit.settings.demonstrations, **changes}
    return train_tiny(unit.folder / name, tiny_sft, steps=steps, start=start, lr=lr, seed=unit.seed, **data)


def train_teacher_and_student(
    unit: Unit, report: Report, noise: Mapping[str, Any], *, teacher_lr: float = 3e-3, student_lr: float = 1e-3
) -> tuple[Path, Path]:
    """Train a teacher on clean solutions, and from its weights a student on noisy ones.

    Args:
        unit: its settings are a :class:`TeacherStudentConfig`.
        report: told what goes on.
        noise: slips of the student's demonstrations, fields of :class:`stepkd.tasks.Noise`.
        teacher_lr, student_lr: peak learning rates.

    Returns:
        Model folders of teacher and student.
    """
    settings: TeacherStudentConfig = unit.settings
    report(f"training the teacher, {settings.teacher_steps} steps")
    teacher = train_on_solutions(unit, "teacher", settings.model, steps=settings.teacher_steps, lr=teacher_lr)
    report(f"training the student, {settings.student_steps} steps")
    return teacher, train_on_solutions(
        unit, "student", teacher, steps=settings.student_steps, lr=student_lr, noise=noise
    )


def train_noisy_student(unit: Unit, report: Report) -> Path:
    """The student of :class:`NoisyStudentConfig`; returns its model folder."""
    settings: NoisyStudentConfig = unit.settings
    noise = {"rate": settings.slips, "kind": "random", "recover": settings.recover}
    return train_teacher_and_student(unit, report, noise)[1]


def problem_source(unit: Unit, n: int, split: str = "train") -> str:
    """Data word of a unit's problems, for instance those whose solutions are labelled."""
    return f'task:task="{unit.settings.task}",n={n},seed={unit.seed},split={split}'


def label_student(unit: Unit, student: Path, report: Report) -> tuple[Path, dict[str, Any]]:
    """The student's own solutions with the exact checker's step labels: the rows' file, and the job's summary."""
    from stepkd.claims.tiny_samples import label_tiny, sampled
    from stepkd.labels.labellers import TaskChecker

    report("sampling solutions and labelling them with the exact checker")
    problems, samples = problem_source(unit, unit.settings.label_problems), unit.settings.label_samples
    solutions = sampled(student, problems, samples=samples, seed=unit.seed)
    return label_tiny(unit.folder / "labels", solutions, TaskChecker())


def evaluate_arm(
    unit: Unit,
    name: str,
    model: Path,
    metrics: Sequence[str],
    facts: Mapping[str, float],
    *,
    more: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> ArmResult:
    """Sample a model on the seed's held-out problems, and grade every step.

    Args:
        unit: its settings are an :class:`ExperimentConfig`.
        name: the arm.
        model: its model folder.
        metrics: which of :func:`stepkd.claims.tiny_samples.problem_metrics`, ``greedy`` (greedily correct or not),
            ``distinct`` (share of different solutions among a problem's samples, 1 / samples to 1) and ``more``.
        facts: as in the result.
        more: further metrics, by name.
        **sampling: other arguments of :func:`stepkd.claims.tiny_samples.evaluate_tiny`.
    """
    from stepkd.claims.tiny_samples import evaluate_tiny, problem_metrics
    from stepkd.runs.job import read_results

    settings: ExperimentConfig = unit.settings

    def sample(how: str, samples: int, temperature: float) -> list[dict[str, Any]]:
        folder = unit.folder / f"{name}-{how}"
        common = {"task": settings.task, "problems": settings.problems, "seed": unit.seed, **sampling}
        evaluate_tiny(folder, model, samples=samples, temperature=temperature, **common)
        return read_results(folder)

    rows = sample("sampled", settings.samples, 1.0)
    found = {**problem_metrics(rows), **(more or {})}
    found["distinct"] = [len({each["completion"] for each in row["samples"]}) / len(row["samples"]) for row in rows]
    if "greedy" in metrics:
        found["greedy"] = problem_metrics(sample("greedy", 1, 0.0))["pass@1"]
    return ArmResult(name, [str(row["id"]) for row in rows], {metric: found[metric] for metric in metrics}, facts)
