"""A noisy student goes on from rewards, from a teacher that is better but not perfect, or from both (KDRL).

One unit trains a clean model, a teacher and a student on top of it (slips of two rates), and one model per arm from
the student's weights, all on equally many samples of their own; it samples all of them on held-out problems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.claims.student import ExperimentConfig, evaluate_arm, train_on_solutions

METRICS = ("pass@1", "greedy", "step_accuracy", "correct_with_wrong_step", "mean_tokens")
"""Beside those of all experiments: ``greedy`` (right or not)."""


@dataclass(frozen=True)
class ReinforcementSettings(ExperimentConfig):
    """Task, budgets and noise of the experiment."""

    task: str = "modular:terms=3-6,modulus=5"
    """Tiny-world task with its settings; its solutions have different lengths."""
    clean_task: str | None = None
    """Task of the clean steps, for instance shorter problems beside those of the task; null: the task."""
    max_new_tokens: int = 64
    """Longest sampled solution, >= 1."""
    clean_steps: int = 500
    """Optimiser steps of 64 clean solutions that teacher and student begin with, >= 1."""
    teacher_slips: float = 0.06
    """Probability that a line of what the teacher learns from slips, in [0, 1]."""
    student_slips: float = 0.25
    """The same of the student."""
    recover: float = 0.5
    """Share of slips that the next line silently recovers from, in [0, 1]."""
    slip_steps: int = 120
    """Steps of teacher and student on solutions with slips, >= 1."""
    steps: int = 40
    """Optimiser steps of every arm, of 32 problems and 8 samples of each, >= 1."""
    lr: float = 1e-4
    """Peak learning rate of every arm."""


@dataclass(frozen=True)
class ReinforcementArm:
    """How an arm learns; the names are those of :class:`stepkd.modules.SampledKL`."""

    method: Literal["none", "teacher", "train"] = "train"
    """``none`` is the student itself, ``teacher`` the teacher."""
    rewards: float = 1.0
    """Weight of the policy-gradient term; 0 distils only."""
    beta: float = 0.0
    """Weight of the distillation; 0: no teacher."""
    schedule: Literal["constant", "linear", "switch"] = "constant"
    """How it changes; ``linear`` reaches a fifth of it (the paper's ratio) at the end of the first ``until`` steps."""
    until: int = 0
    """Steps of ``linear`` and ``switch``."""
    estimator: Literal["k1", "k2", "k3"] = "k2"
    """Of the KL to the teacher."""
    mask: Literal["none", "response", "group"] = "none"
    """Which samples are distilled on."""
    step_weight: float = 0.0
    """Weight of the exact checker's step rewards; 0: none."""
    outcome_weight: float = 1.0
    """Weight of the answer's reward where steps have some."""


ARMS: Mapping[str, Mapping[str, Any]] = {
    "student": {"method": "none"},
    "grpo": {},
    "kd": {"rewards": 0.0, "beta": 1.0},
    "kdrl": {"beta": 0.5},
}


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """See the module's text."""
    settings: ReinforcementSettings = unit.settings
    report(f"training teacher and student, {settings.clean_steps} clean steps")
    task = settings.clean_task or settings.task
    clean = train_on_solutions(unit, "clean", settings.model, steps=settings.clean_steps, lr=3e-3, task=task)
    models: dict[str, Path] = {}
    rates = {"student": settings.student_slips}
    if any(arm.beta or arm.method == "teacher" for arm in unit.arms.values()):
        rates["teacher"] = settings.teacher_slips
    for name, rate in rates.items():
        report(f"training the {name}, {settings.slip_steps} steps with slips")
        noise = {"rate": rate, "kind": "random", "recover": settings.recover}
        models[name] = train_on_solutions(unit, name, clean, steps=settings.slip_steps, lr=1e-3, noise=noise)
    results = []
    for name, arm in unit.arms.items():
        facts = {"train_samples": 0.0, "train_accuracy": 0.0}
        if arm.method == "train":
            report(f"training {name}, {settings.steps} steps")
            model = _train(unit, name, arm, models)
            facts = _facts(model.parent, settings)
        else:
            model = models["student" if arm.method == "none" else "teacher"]
        report(f"evaluating {name}")
        results.append(evaluate_arm(unit, name, model, METRICS, facts, max_new_tokens=settings.max_new_tokens))
    return results


def _train(unit: Unit, name: str, arm: ReinforcementArm, models: Mapping[str, Path]) -> Path:
    from stepkd.claims.tiny import tiny_kdrl, train_tiny
    from stepkd.modules.settings import (
        Constant,
        Linear,
        PolicyLossConfig,
        SampledKL,
        Schedule,
        StepCreditConfig,
        Switch,
    )

    settings: ReinforcementSettings = unit.settings
    schedule: Schedule = Constant()
    if arm.schedule == "linear":
        schedule = Linear(delta=0.8 * arm.beta / max(arm.until, 1), beta_min=arm.beta / 5)
    elif arm.schedule == "switch":
        schedule = Switch(arm.until)
    credit = None
    if arm.step_weight:
        credit = StepCreditConfig("checker", weight=arm.step_weight, outcome_weight=arm.outcome_weight)
    return train_tiny(
        unit.folder / name,
        tiny_kdrl,
        start=models["student"],
        teacher=models["teacher"] if arm.beta else None,
        task=settings.task,
        demonstrations=settings.demonstrations,
        steps=settings.steps,
        lr=settings.lr,
        seed=unit.seed,
        kd=SampledKL(beta=arm.beta, schedule=schedule, estimator=arm.estimator, mask=arm.mask),
        policy_loss=PolicyLossConfig(weight=arm.rewards),
        step_credit=credit,
        max_new_tokens=settings.max_new_tokens,
    )


def _facts(folder: Path, settings: ReinforcementSettings) -> dict[str, float]:
    """Samples drawn, and the share of right ones among them over the whole training: how fast an arm learns."""
    from stepkd.claims.tiny import GROUP, PROMPTS
    from stepkd.runs.logger import read_metrics

    rows = [row for row in read_metrics(folder) if "train/accuracy" in row]
    return {
        "train_samples": float(PROMPTS * GROUP * settings.steps),
        "train_accuracy": math.fsum(row["train/accuracy"] for row in rows) / len(rows),
    }


EXPERIMENT = Experiment(
    run=run,
    settings=ReinforcementSettings,
    metrics=METRICS,
    arms=ARMS,
    arm_settings=ReinforcementArm,
    facts=("train_samples", "train_accuracy"),
)
