"""Reward models of one noisy student, by outcome, exact, Monte-Carlo and AdaptiveStep labels; judged by best-of-N.

One unit trains a teacher, makes a student with *systematic* errors of it (some operand pairs are mislearnt, so majority
voting keeps the errors), labels the student's solutions in four ways, trains one reward model per labelling from the
student's weights with the same solutions and steps, and picks among 16 fresh solutions per held-out problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.claims.student import TeacherStudentConfig, problem_source, train_teacher_and_student
from stepkd.errors import ConfigError

SMALL_N = 4
"""The smaller N of the curve, against which the gap is to grow."""


@dataclass(frozen=True)
class RewardModelSettings(TeacherStudentConfig):
    """Task, budgets and noise of the experiment."""

    student_steps: int = 60
    """Further optimiser steps of 64 solutions with systematic slips, >= 1."""
    slips: float = 0.3
    """Share of operand combinations that are mislearnt, in [0, 1]."""
    recover: float = 0.3
    """Share of slips that the next line silently recovers from, in [0, 1]."""
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
    samples: int = 16
    """Solutions per held-out problem (N), more than 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples <= SMALL_N:
            raise ConfigError(f"samples={self.samples}: must be more than {SMALL_N}, the smaller N of the curve")


ARMS: Mapping[str, Mapping[str, Any]] = {
    name: {} for name in ("majority", "orm", "prm", "orm_mc", "prm_mc", "prm_adaptive", "consensus", "ceiling")
}


class _Reward(NamedTuple):
    """How a reward model is trained and used."""

    labels: str
    """Whose labels it learns from."""
    meaning: Any
    """What its scores estimate."""
    reduction: Any
    """How step scores become one: Let's Verify's product for exact labels, Math-Shepherd's minimum for Monte-Carlo
    ones."""


_REWARDS = {
    "orm": _Reward("checker", "outcome", "last"),
    "prm": _Reward("checker", "correctness", "product"),
    "orm_mc": _Reward("monte_carlo", "outcome", "last"),
    "prm_mc": _Reward("monte_carlo", "value", "min"),
    "prm_adaptive": _Reward("adaptive", "value", "min"),
}
"""``orm_mc`` learns the outcomes of the solutions that ``prm_mc`` learns from, so that what their steps add can be
told."""


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """See the module's text."""
    from stepkd.claims.tiny import tiny_prm, train_tiny
    from stepkd.claims.tiny_samples import align_scores, curves_tiny, score_tiny
    from stepkd.scorers.scorer import reduce_solutions

    settings: RewardModelSettings = unit.settings
    noise = {"rate": settings.slips, "kind": "systematic", "recover": settings.recover, "seed": unit.seed}
    teacher, student = train_teacher_and_student(unit, report, noise)
    labels, facts = _label(unit, student, teacher, report)
    held_out = _held_out(unit, student, labels["adaptive"].parent / "threshold.json", report)
    problems = list(dict.fromkeys(row["problem_id"] for row in held_out["newline"]))
    scores = {}
    for arm, reward in _REWARDS.items():
        steps = settings.reward_steps if reward.labels == "checker" else settings.rollout_reward_steps
        report(f"training the reward model {arm}, {steps} steps")
        model = train_tiny(
            unit.folder / arm,
            tiny_prm,
            start=student,
            labels=labels[reward.labels],
            steps=steps,
            lr=settings.reward_lr,
            seed=unit.seed,
            meaning=reward.meaning,
            separator="" if arm == "prm_adaptive" else "\n",
            after_error="truncate" if arm == "prm" else "keep",
            allow_one_class=True,  # the barely trained models of `claims quick` get nothing right
        )
        report(f"scoring with {arm}")
        rows = held_out["adaptive" if arm == "prm_adaptive" else "newline"]
        found = reduce_solutions(score_tiny(model, rows), reward.reduction, meaning=reward.meaning)
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
    from stepkd.claims.tiny_samples import read_labels, sampled, sampling
    from stepkd.labels.consensus import consensus_filter
    from stepkd.labels.labellers import MonteCarlo, TaskChecker
    from stepkd.labels.quality import label_quality
    from stepkd.labels.settings import Existing, Fitted

    settings: RewardModelSettings = unit.settings
    problems = problem_source(unit, settings.label_problems)
    drawn: dict[str, Any] = {"samples": settings.label_samples, "seed": unit.seed}
    report("sampling solutions and labelling them with the exact checker")
    checker, _ = _job(unit, "checker", sampled(student, problems, **drawn), TaskChecker())
    fewer = sampled(student, f"{problems},limit={settings.rollout_problems}", **drawn)
    few, _ = _job(unit, "few", fewer, TaskChecker())
    again = Existing(rollouts=str(few), model=str(student))
    by_rollouts = MonteCarlo(sampling=sampling(unit.seed, settings.rollouts_per_step))
    report(f"Monte-Carlo labels, {settings.rollouts_per_step} continuations per step")
    monte_carlo, cost = _job(unit, "monte_carlo", again, by_rollouts)
    report("Monte-Carlo labels by the teacher, for the consensus")
    second, _ = _job(unit, "teacher_monte_carlo", replace(again, model=str(teacher)), by_rollouts)
    report("Monte-Carlo labels at AdaptiveStep's steps")
    adaptive, adaptive_cost = _job(unit, "adaptive", again, by_rollouts, Fitted(quantile=settings.quantile))
    rows = {name: read_labels(path) for name, path in (("truth", few), ("mc", monte_carlo), ("second", second))}
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
    facts["prm_adaptive"] = {"label_tokens": adaptive_cost, **_step_counts(read_labels(adaptive))}
    return {"checker": checker, "monte_carlo": monte_carlo, "adaptive": adaptive}, facts


def _step_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How finely solutions are cut: with one step a solution, a process reward model is an outcome reward model."""
    counts = [len(row["steps"]) for row in rows]
    return {
        "steps_per_solution": sum(counts) / len(counts),
        "one_step_share": sum(count == 1 for count in counts) / len(counts),
    }


def _job(unit: Unit, name: str, *parts: Any) -> tuple[Path, float]:
    """Run (or resume) a labelling job; returns its labels and the tokens that the labels took to generate."""
    from stepkd.claims.tiny_samples import label_tiny

    labels, summary = label_tiny(unit.folder / f"labels-{name}", *parts)
    return labels, float(summary["labelling"].get("generated_tokens", 0))


def _held_out(unit: Unit, student: Path, threshold: Path, report: Report) -> dict[str, list[Mapping[str, Any]]]:
    """Fresh solutions of held-out problems, cut in two ways; problems in one order."""
    from stepkd.claims.tiny_samples import read_labels, sampled
    from stepkd.labels.labellers import Outcome
    from stepkd.labels.settings import Cut, Existing

    settings: RewardModelSettings = unit.settings
    report(f"sampling {settings.samples} solutions of {settings.problems} held-out problems")
    problems = problem_source(unit, settings.problems, "test")
    solutions = sampled(student, problems, samples=settings.samples, seed=unit.seed, dedupe=False)
    lines, _ = _job(unit, "held_out", solutions, Outcome(scope="all"))
    existing = Existing(rollouts=str(lines), model=str(student))
    cuts, _ = _job(
        unit, "held_out_adaptive", existing, Outcome(scope="all"), Cut(segmenter=f"adaptive_step:{threshold}")
    )
    return {"newline": read_labels(lines), "adaptive": read_labels(cuts)}


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
