"""DPO against Step-DPO: one student, its own labelled solutions, equally many pairs and steps; only the pairs differ.

One unit makes the noisy student and labels its solutions with the exact checker. DPO's pairs are a right and a wrong
solution of a problem, Step-DPO's the first wrong step of a solution and a better one behind the same right steps. Of
every kind the same number of pairs is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.claims.student import METRICS, NoisyStudentConfig, evaluate_arm, label_student, train_noisy_student
from stepkd.errors import ConfigError, DataError
from stepkd.randomness import generator

Row = Mapping[str, Any]


@dataclass(frozen=True)
class StepPairSettings(NoisyStudentConfig):
    """Task, budgets and noise of the experiment."""

    steps: int = 60
    """Optimiser steps of every arm, >= 1."""
    pairs: int = 512
    """Pairs of every arm, >= 1; fewer when some arm has fewer."""
    continuations: int = 8
    """Step-DPO: continuations of every right prefix, >= 1."""


@dataclass(frozen=True)
class StepPairArm:
    """Which pairs an arm learns from."""

    pairs: Literal["none", "answers", "steps"] = "steps"
    """``none`` is the student itself, ``answers`` is DPO, ``steps`` is Step-DPO."""
    chosen_steps: Literal["any", "clean"] = "any"
    """DPO: ``clean`` prefers no solution with a wrong step."""
    take: Literal["wrong", "all"] = "wrong"
    """Step-DPO: ``all`` also takes wrong steps of solutions with a right answer."""
    check_step: bool = True
    """Step-DPO: whether the better step must itself be right."""


ARMS: Mapping[str, Mapping[str, Any]] = {
    "student": {"pairs": "none"},
    "dpo": {"pairs": "answers"},
    "step_dpo": {},
    "step_dpo_unchecked": {"check_step": False},
    "step_dpo_all": {"take": "all"},
}


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """See the module's text."""
    from stepkd.claims.tiny import tiny_preference, train_tiny
    from stepkd.runs.files import write_jsonl

    settings: StepPairSettings = unit.settings
    if all(arm.pairs == "none" for arm in unit.arms.values()):
        raise ConfigError("no arm trains on pairs")
    student = train_noisy_student(unit, report)
    labels, _ = label_student(unit, student, report)
    pairs = {name: _pairs(unit, arm, student, labels, report) for name, arm in unit.arms.items()}
    count = min(settings.pairs, *(len(found) for found in pairs.values() if found is not None))
    results = []
    for name in unit.arms:
        model, found = student, pairs[name]
        facts = {"train_pairs": 0.0, "available_pairs": 0.0}
        if found is not None:
            report(f"training {name}, {settings.steps} steps on {count} of {len(found)} pairs")
            facts = {"train_pairs": float(count), "available_pairs": float(len(found))}
            rows = unit.folder / f"{name}-pairs.jsonl"
            picked = sorted(generator(unit.seed, "step pairs", name).permutation(len(found))[:count])
            write_jsonl(rows, [found[i] for i in picked])
            model = train_tiny(
                unit.folder / name,
                tiny_preference,
                method="dpo",
                start=student,
                rows=rows,
                steps=settings.steps,
                lr=settings.lr,
                seed=unit.seed,
                global_batch_size=settings.batch,
                beta=settings.beta,
            )
        report(f"evaluating {name}")
        results.append(evaluate_arm(unit, name, model, METRICS, facts))
    return results


def _pairs(unit: Unit, arm: StepPairArm, student: Path, labels: Path, report: Report) -> list[Row] | None:
    """All pairs that an arm could learn from."""
    if arm.pairs == "none":
        return None
    if arm.pairs == "answers":
        from stepkd.claims.tiny_samples import read_labels
        from stepkd.labels.convert import convert_rows
        from stepkd.labels.feedback import Preference

        to = Preference(seed=unit.seed, max_pairs=unit.settings.label_samples, chosen_steps=arm.chosen_steps)
        found: list[Row] = list(convert_rows(read_labels(labels), to).rows)
        return found
    report(f"drawing step pairs from {'all' if arm.take == 'all' else 'wrong'} solutions")
    return _step_pairs(unit, arm, student, labels)


def _step_pairs(unit: Unit, arm: StepPairArm, student: Path, labels: Path) -> list[Row]:
    from stepkd.claims.tiny_samples import JOB, read_labels, sampling
    from stepkd.data.spec import PAIRS_NAME
    from stepkd.labels.pair_job import run_pair_job
    from stepkd.labels.settings import StepPairConfig

    out = unit.folder / f"pairs-{arm.take}{'' if arm.check_step else '-unchecked'}"
    spec = StepPairConfig(
        out=str(out),
        rollouts=str(labels.parent),
        model=str(student),
        take=arm.take,
        check="checker" if arm.check_step else None,
        sampling=sampling(unit.seed, unit.settings.continuations),
        **JOB,
    )
    if run_pair_job(spec) is None:
        raise DataError("one rank does all the work, and groups are missing", path=out)
    return read_labels(out / PAIRS_NAME)


EXPERIMENT = Experiment(
    run=run,
    settings=StepPairSettings,
    metrics=METRICS,
    arms=ARMS,
    arm_settings=StepPairArm,
    facts=("train_pairs", "available_pairs"),
)
