"""The sloppy student of the experiments: trained right, then on solutions with slips, many of them silently recovered.

Experiments on preference training and iteration begin with it, and have its settings among theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stepkd.claims.experiment import ArmResult, Report, Unit
from stepkd.errors import ConfigError

METRICS = ("pass@1", "step_accuracy", "correct_with_wrong_step", "clean@1", "mean_tokens")
"""Metrics of :func:`evaluate_arm`."""


@dataclass(frozen=True)
class SloppyStudentSettings:
    """Task, budgets and noise of teacher and student, and how models are evaluated."""

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
    batch: int = 64
    """Solutions or pairs per step, >= 1."""
    lr: float = 1e-4
    """Peak learning rate of every arm."""
    beta: float = 0.5
    """Beta of the preference losses."""
    problems: int = 200
    """Held-out problems per seed, >= 1."""
    samples: int = 8
    """Solutions per held-out problem at temperature 1, >= 1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int" and getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name}={getattr(self, field.name)}: must be at least 1")


def train_teacher_and_student(
    unit: Unit,
    report: Report,
    noise: Mapping[str, Any],
    *,
    teacher_lr: float = 3e-3,
    student_lr: float = 1e-3,
) -> tuple[Path, Path]:
    """Train a teacher on clean solutions, and go on from it with noisy ones.

    Args:
        unit: its settings have ``task``, ``model``, ``teacher_steps``, ``student_steps`` and ``demonstrations``; models
            that an interrupted unit left are used again.
        report: told what goes on.
        noise: slips of the student's demonstrations, fields of :class:`stepkd.tasks.Noise`.
        teacher_lr, student_lr: peak learning rates.

    Returns:
        Model folders of teacher and student.
    """
    from stepkd.claims.tiny import train_tiny_sft

    settings = unit.settings
    common: dict[str, Any] = {
        "task": settings.task,
        "seed": unit.seed,
        "demonstrations": settings.demonstrations,
        "reuse": True,
    }
    report(f"training the teacher, {settings.teacher_steps} steps")
    teacher = train_tiny_sft(
        unit.folder / "teacher", start=settings.model, steps=settings.teacher_steps, lr=teacher_lr, **common
    )
    report(f"training the student, {settings.student_steps} steps")
    student = train_tiny_sft(
        unit.folder / "student", start=teacher, steps=settings.student_steps, lr=student_lr, noise=noise, **common
    )
    return teacher, student


def train_sloppy_student(unit: Unit, report: Report) -> Path:
    """The student of :class:`SloppyStudentSettings`; returns its model folder."""
    settings: SloppyStudentSettings = unit.settings
    noise = {"rate": settings.slips, "kind": "random", "recover": settings.recover}
    return train_teacher_and_student(unit, report, noise)[1]


def training_problems(unit: Unit) -> str:
    """Data word of the problems whose solutions are labelled."""
    settings: SloppyStudentSettings = unit.settings
    return f'task:task="{settings.task}",n={settings.label_problems},seed={unit.seed},split=train'


def label_student(unit: Unit, student: Path, report: Report) -> tuple[Path, dict[str, Any]]:
    """The student's own solutions with the exact checker's step labels: the rows' file, and the job's summary."""
    from stepkd.claims.tiny_reward import label_tiny

    report("sampling solutions and labelling them with the exact checker")
    return label_tiny(
        unit.folder / "labels",
        model=student,
        seed=unit.seed,
        problems=training_problems(unit),
        labeller="checker",
        samples=unit.settings.label_samples,
    )


def evaluate_arm(unit: Unit, name: str, model: Path, facts: Mapping[str, float]) -> ArmResult:
    """Sample a model on the seed's held-out problems, and grade every step."""
    from stepkd.claims.tiny import evaluate_tiny, problem_ids, problem_metrics, problem_rows

    settings: SloppyStudentSettings = unit.settings
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
    return ArmResult(name, problem_ids(rows), {metric: found[metric] for metric in METRICS}, facts)
