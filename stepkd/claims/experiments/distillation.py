"""Students that have seen few solutions go on with the same prompts: by more of the same, or taught by a teacher.

One unit trains a teacher (on slips, if asked: then its distribution has more than one mode), a student from scratch on
a small set of solutions, and one model per arm from the student's weights, all on the problems of that set and for
equally many steps; it samples all of them on held-out problems, and measures how like the teacher each is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.errors import ConfigError

SAMPLED = ("pass@1", "step_accuracy", "clean@1", "mean_tokens")
OF_PROBLEMS = (*SAMPLED, "greedy", "distinct")
FIDELITY = ("forward_kl", "reverse_kl", "agreement", "entropy_gap", "ece")
METRICS = (*OF_PROBLEMS, *FIDELITY, "answers_alike")
"""Beside those of all experiments: ``greedy`` (right or not), ``distinct`` (share of different solutions among a
problem's samples, 1 / samples to 1), the means of :mod:`stepkd.modules.fidelity`, and ``answers_alike`` (share of
problems that student and teacher answer alike, greedily)."""


@dataclass(frozen=True)
class DistillationSettings:
    """Task, budgets and noise of the experiment."""

    task: str = "modular:terms=4,modulus=10"
    """Tiny-world task with its settings."""
    model: str = "tiny-0.5m"
    """Tiny model preset of teacher and student."""
    teacher_steps: int = 800
    """Optimiser steps of the teacher, of 64 solutions, >= 1."""
    demonstrations: int = 20_000
    """Different problems in the teacher's training set, >= 1."""
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
    problems: int = 200
    """Held-out problems per seed, >= 1."""
    samples: int = 8
    """Solutions per held-out problem at temperature 1, >= 1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int" and getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name}={getattr(self, field.name)}: must be at least 1")


@dataclass(frozen=True)
class DistillationArm:
    """How an arm learns."""

    method: Literal["none", "teacher", "sft", "gkd"] = "gkd"
    """``none`` is the student itself, ``sft`` trains it on the solutions further."""
    student: float = 1.0
    """Share of batches that the student samples (lambda); the others are the solutions."""
    of_teacher: float = 0.0
    """Share of the others that the teacher samples."""
    kind: str = "jsd"
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
    from stepkd.claims.tiny import train_tiny_sft

    settings: DistillationSettings = unit.settings
    common: dict[str, Any] = {"task": settings.task, "seed": unit.seed, "reuse": True}
    report(f"training the teacher, {settings.teacher_steps} steps")
    clean = {**common, "demonstrations": settings.demonstrations}
    teacher = train_tiny_sft(
        unit.folder / "teacher", start=settings.model, steps=settings.teacher_steps, lr=3e-3, **clean
    )
    if settings.teacher_slips:
        noise = {"rate": settings.teacher_slips, "kind": "random"}
        teacher = train_tiny_sft(
            unit.folder / "sloppy", start=teacher, steps=settings.slip_steps, lr=1e-3, noise=noise, **clean
        )
    report(f"training the student, {settings.student_steps} steps on {settings.prompts} solutions")
    student = train_tiny_sft(
        unit.folder / "student",
        start=settings.model,
        steps=settings.student_steps,
        lr=3e-3,
        demonstrations=settings.prompts,
        **common,
    )
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
    from stepkd.claims.tiny import train_tiny_sft
    from stepkd.claims.tiny_distillation import distil_tiny

    settings: DistillationSettings = unit.settings
    common: dict[str, Any] = {
        "start": student,
        "task": settings.task,
        "demonstrations": settings.prompts,
        "steps": settings.steps,
        "lr": settings.lr,
        "seed": unit.seed,
        "reuse": True,
    }
    if arm.method == "sft":
        return train_tiny_sft(unit.folder / name, **common)
    divergence = {"kind": arm.kind, "beta": arm.beta, "scaled": True, "top_k": arm.top_k, "tail": arm.tail}
    return distil_tiny(
        unit.folder / name,
        teacher=teacher,
        divergence=divergence,
        student=arm.student,
        of_teacher=arm.of_teacher,
        cache_k=arm.top_k,
        **common,
    )


def _evaluate(unit: Unit, name: str, model: Path, teacher: Path, facts: Mapping[str, float]) -> ArmResult:
    from stepkd.claims.tiny import evaluate_tiny, problem_ids, problem_metrics, problem_rows
    from stepkd.claims.tiny_distillation import tiny_fidelity

    settings: DistillationSettings = unit.settings
    common: dict[str, Any] = {"task": settings.task, "problems": settings.problems, "seed": unit.seed}
    folders = [unit.folder / f"{name}-{how}" for how in ("samples", "greedy")]
    for folder, samples, temperature in zip(folders, (settings.samples, 1), (1.0, 0.0), strict=True):
        evaluate_tiny(folder, model, samples=samples, temperature=temperature, **common)
    rows, greedy = (problem_rows(folder) for folder in folders)
    found = problem_metrics(rows)
    metrics: dict[str, Any] = {metric: found[metric] for metric in SAMPLED}
    metrics["greedy"] = problem_metrics(greedy)["pass@1"]
    metrics["distinct"] = [
        len({sample["completion"] for sample in row["samples"]}) / len(row["samples"]) for row in rows
    ]
    alike = tiny_fidelity(model, teacher, **common)
    metrics |= {metric: alike[metric] for metric in FIDELITY}
    metrics["answers_alike"] = alike["answers_both_right"] + alike["answers_same_wrong"]
    return ArmResult(name, problem_ids(rows), metrics, facts)


EXPERIMENT = Experiment(
    run=run,
    settings=DistillationSettings,
    metrics=METRICS,
    arms=ARMS,
    arm_settings=DistillationArm,
    facts=("train_solutions",),
)
