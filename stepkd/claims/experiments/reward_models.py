"""Reward models of one sloppy student, by outcome, exact, Monte-Carlo and AdaptiveStep labels; judged by best-of-N.

One unit trains a teacher, makes a student with *systematic* errors of it (some operand pairs are mislearnt, so majority
voting keeps the errors), labels the student's solutions in four ways, trains one reward model per labelling from the
student's weights with the same solutions and steps, and picks among 16 fresh solutions per held-out problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.claims.sloppy_student import train_teacher_and_student
from stepkd.errors import ConfigError

SMALL_N = 4
"""The smaller N of the curve, against which the gap is to grow."""


_COUNTS = (
    "teacher_steps",
    "student_steps",
    "label_problems",
    "rollout_problems",
    "reward_steps",
    "rollout_reward_steps",
    "problems",
)


@dataclass(frozen=True)
class RewardModelSettings:
    """Task, budgets and noise of the experiment."""

    task: str = "modular:terms=4,modulus=10"
    """Tiny-world task with its settings."""
    model: str = "tiny-0.5m"
    """Tiny model preset of teacher and student."""
    teacher_steps: int = 800
    """Optimiser steps of 64 clean solutions, >= 1."""
    student_steps: int = 60
    """Further optimiser steps of 64 solutions with systematic slips, >= 1."""
    slips: float = 0.3
    """Share of operand combinations that are mislearnt, in [0, 1]."""
    recover: float = 0.3
    """Share of slips that the next line silently recovers from, in [0, 1]."""
    demonstrations: int = 20_000
    """Different problems in the training set of teacher and student, >= 1."""
    label_problems: int = 4000
    """Problems whose sampled solutions the exact checker and the outcome label, >= 1."""
    rollout_problems: int = 600
    """How many of them get Monte-Carlo labels too, >= 1."""
    label_samples: int = 4
    """Solutions per problem, >= 1; equal ones are labelled once."""
    rollouts_per_step: int = 8
    """Monte-Carlo continuations per step (J), >= 1."""
    quantile: float = 0.02
    """Share of tokens that AdaptiveStep divides at."""
    reward_steps: int = 600
    """Optimiser steps of 64 solutions of the reward models on exact and outcome labels, >= 1. The language-model loss
    on right steps, weight 1, is trained beside the labels in all reward models."""
    rollout_reward_steps: int = 250
    """The same of the reward models on Monte-Carlo labels, >= 1."""
    reward_lr: float = 1e-3
    """Peak learning rate of the reward models."""
    problems: int = 200
    """Held-out problems per seed, >= 1."""
    samples: int = 16
    """Solutions per held-out problem (N), more than 4."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.samples <= SMALL_N:
            raise ConfigError(f"samples={self.samples}: must be more than {SMALL_N}, the smaller N of the curve")


ARMS: Mapping[str, Mapping[str, Any]] = {
    name: {} for name in ("majority", "orm", "prm", "orm_mc", "prm_mc", "prm_adaptive", "consensus", "ceiling")
}
_LABELS = {
    "orm": "checker",
    "prm": "checker",
    "orm_mc": "monte_carlo",
    "prm_mc": "monte_carlo",
    "prm_adaptive": "adaptive",
}
"""Whose labels a reward model learns from; ``orm_mc`` learns the outcomes of the solutions that ``prm_mc`` learns from,
so that what their steps add can be told."""
_MEANINGS: dict[str, Any] = {
    "orm": "outcome",
    "prm": "correctness",
    "orm_mc": "outcome",
    "prm_mc": "value",
    "prm_adaptive": "value",
}
_REDUCTIONS: dict[str, Any] = {
    "orm": "last",
    "prm": "product",
    "orm_mc": "last",
    "prm_mc": "min",
    "prm_adaptive": "min",
}
"""How step scores become one: Let's Verify's product for exact labels, Math-Shepherd's minimum for Monte-Carlo ones."""


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """See the module's text."""
    from stepkd.claims.tiny_reward import align_scores, curves_tiny, score_tiny
    from stepkd.scorers import reduce_solutions

    settings: RewardModelSettings = unit.settings
    noise = {"rate": settings.slips, "kind": "systematic", "recover": settings.recover, "seed": unit.seed}
    teacher, student = train_teacher_and_student(unit, report, noise)
    labels, facts = _label(unit, student, teacher, report)
    held_out = _held_out(unit, student, labels["adaptive"].parent / "threshold.json", report)
    problems = list(dict.fromkeys(row["problem_id"] for row in held_out["newline"]))
    scores = {}
    for arm, labelling in _LABELS.items():
        report(f"training the reward model {arm}, {_reward_steps(unit, arm)} steps")
        model = _reward_model(unit, arm, student, labels[labelling])
        report(f"scoring with {arm}")
        rows = held_out["adaptive" if arm == "prm_adaptive" else "newline"]
        found = reduce_solutions(score_tiny(model, rows), _REDUCTIONS[arm], meaning=_MEANINGS[arm])
        scores[arm] = align_scores(rows, found, held_out["newline"])
    curve = curves_tiny(held_out["newline"], scores, (SMALL_N, settings.samples), seed=unit.seed)
    names = {"majority": "majority", "ceiling": "pass"} | {arm: arm for arm in scores}
    results = []
    for arm in unit.arms:
        metrics = {}
        if arm in names:
            values = curve.per_problem[names[arm]]
            metrics = {"best_of_n": values[:, 1].tolist(), "growth": (values[:, 1] - values[:, 0]).tolist()}
        results.append(ArmResult(arm, problems, metrics, facts.get(arm, {})))
    return results


def _label(
    unit: Unit, student: Path, teacher: Path, report: Report
) -> tuple[dict[str, Path], dict[str, dict[str, float]]]:
    """Label files by labelling, and what the labels cost and are worth."""
    from stepkd.data.io import read_rows
    from stepkd.labels.consensus import consensus_filter
    from stepkd.labels.quality import label_quality

    settings: RewardModelSettings = unit.settings
    problems = f'task:task="{settings.task}",n={settings.label_problems},seed={unit.seed},split=train'
    report("sampling solutions and labelling them with the exact checker")
    checker, _ = _job(
        unit, "checker", problems=problems, model=student, labeller="checker", samples=settings.label_samples
    )
    few, _ = _job(
        unit,
        "few",
        problems=problems,
        model=student,
        labeller="checker",
        samples=settings.label_samples,
        limit=settings.rollout_problems,
    )
    again: dict[str, Any] = {"rollouts": str(few), "labeller": "monte_carlo"}
    again["rollouts_per_step"] = settings.rollouts_per_step
    report(f"Monte-Carlo labels, {settings.rollouts_per_step} continuations per step")
    monte_carlo, cost = _job(unit, "monte_carlo", model=student, **again)
    report("Monte-Carlo labels by the teacher, for the consensus")
    second, _ = _job(unit, "teacher_monte_carlo", model=teacher, **again)
    report("Monte-Carlo labels at AdaptiveStep's steps")
    adaptive, adaptive_cost = _job(
        unit, "adaptive", model=student, segmenter="adaptive_step", quantile=settings.quantile, **again
    )
    rows = {
        name: [row for row, _ in read_rows(path)]
        for name, path in (("truth", few), ("mc", monte_carlo), ("second", second))
    }
    agreed = consensus_filter(rows["mc"], rows["second"])
    facts = {}
    for arm, labelled in (("prm_mc", rows["mc"]), ("consensus", agreed.rows)):
        quality = label_quality(labelled, rows["truth"], up_to_first_error=True)
        shares = {
            "label_balanced_accuracy": quality.balanced_accuracy,
            "label_accuracy": quality.accuracy,
            "always_positive_accuracy": quality.always_positive,
            "label_precision": quality.precision,
            "error_precision": quality.error_precision,
            "recoverable": quality.recoverable,
        }
        facts[arm] = {name: float(share.value) for name, share in shares.items() if share is not None}
        facts[arm]["labelled_solutions"] = float(len(labelled))
    facts["prm_mc"] |= {"label_tokens": cost, **_step_counts(rows["mc"])}
    facts["prm_adaptive"] = {"label_tokens": adaptive_cost, **_step_counts([row for row, _ in read_rows(adaptive)])}
    return {"checker": checker, "monte_carlo": monte_carlo, "adaptive": adaptive}, facts


def _step_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How finely solutions are cut: with one step a solution, a process reward model is an outcome reward model."""
    counts = [len(row["steps"]) for row in rows]
    return {
        "steps_per_solution": sum(counts) / len(counts),
        "one_step_share": sum(count == 1 for count in counts) / len(counts),
    }


def _job(unit: Unit, name: str, *, model: Path, **settings: Any) -> tuple[Path, float]:
    """Run (or go on with) a labelling job; returns its labels and the tokens that the labels took to generate."""
    from stepkd.claims.tiny_reward import label_tiny

    labels, summary = label_tiny(unit.folder / f"labels-{name}", model=model, seed=unit.seed, **settings)
    return labels, float(summary["labelling"].get("generated_tokens", 0))


def _held_out(unit: Unit, student: Path, threshold: Path, report: Report) -> dict[str, list[dict[str, Any]]]:
    """Fresh solutions of held-out problems, cut in two ways; problems in one order."""
    from stepkd.data.io import read_rows

    settings: RewardModelSettings = unit.settings
    report(f"sampling {settings.samples} solutions of {settings.problems} held-out problems")
    problems = f'task:task="{settings.task}",n={settings.problems},seed={unit.seed},split=test'
    lines, _ = _job(
        unit,
        "held_out",
        problems=problems,
        model=student,
        labeller="outcome",
        outcome_scope="all",
        samples=settings.samples,
        dedupe=False,
    )
    cuts, _ = _job(
        unit,
        "held_out_adaptive",
        rollouts=str(lines),
        model=student,
        labeller="outcome",
        outcome_scope="all",
        segmenter=f"adaptive_step:{threshold}",
        dedupe=False,
    )
    return {name: [row for row, _ in read_rows(path)] for name, path in (("newline", lines), ("adaptive", cuts))}


def _reward_steps(unit: Unit, arm: str) -> int:
    return int(unit.settings.reward_steps if _LABELS[arm] == "checker" else unit.settings.rollout_reward_steps)


def _reward_model(unit: Unit, arm: str, student: Path, labels: Path) -> Path:
    """Train a reward model from the student's weights and export it; a finished one is used again."""
    from stepkd.claims.tiny_reward import train_tiny_prm

    settings: RewardModelSettings = unit.settings
    return train_tiny_prm(
        unit.folder / arm,
        start=student,
        labels=labels,
        steps=_reward_steps(unit, arm),
        lr=settings.reward_lr,
        seed=unit.seed,
        meaning=_MEANINGS[arm],
        separator="" if arm == "prm_adaptive" else "\n",
        after_error="truncate" if arm == "prm" else "keep",
        allow_one_class=True,  # the barely trained models of --quick get nothing right
        reuse=True,
    )


EXPERIMENT = Experiment(
    run=run,
    settings=RewardModelSettings,
    metrics=("best_of_n", "growth"),
    arms=ARMS,
    facts=(
        "label_balanced_accuracy",
        "label_accuracy",
        "always_positive_accuracy",
        "label_precision",
        "error_precision",
        "recoverable",
        "labelled_solutions",
        "label_tokens",
        "steps_per_solution",
        "one_step_share",
    ),
)
