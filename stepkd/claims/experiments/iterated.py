"""Iterated training: M0 is the noisy student, M1 to MK learn from their predecessor's labelled solutions.

One unit runs ``stepkd iterate`` with the exact checker as labeller. The arms are the models: ``m0`` to ``mK``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepkd.claims.experiment import ArmResult, Experiment, Report, Unit
from stepkd.claims.student import METRICS as SAMPLED
from stepkd.claims.student import NoisyStudentConfig, problem_source, train_noisy_student

METRICS = (*SAMPLED, "greedy")
ITERATIONS = 3


@dataclass(frozen=True)
class IteratedSettings(NoisyStudentConfig):
    """Task, budgets and noise of the experiment."""

    epochs: int = 1
    """Passes of every iteration over the solutions it has labelled, >= 1. Equal ones are labelled once, so a better
    model leaves fewer: a fixed number of steps would go over them more and more often."""
    reference: Literal["reset", "kept"] = "reset"
    """The reference model of iteration k: M_{k-1}, or M0 throughout."""
    reduction: str = "sum_steps"
    """Step-KTO: see :func:`stepkd.losses.step_kto`."""
    allow_one_class: bool = False
    """Train although all labels agree (``claims quick``)."""


ARMS: Mapping[str, Mapping[str, Any]] = {f"m{k}": {} for k in range(ITERATIONS + 1)}


def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
    """See the module's text."""
    from stepkd.claims.tiny_samples import JOB, problem_metrics, sampling
    from stepkd.iteration.loop import run_iterations
    from stepkd.iteration.spec import HeldOutConfig, IterateConfig, SampledLabels, TrainConfig
    from stepkd.labels.labellers import TaskChecker
    from stepkd.runs.job import read_results
    from stepkd.sampling.sampler import SamplingConfig

    settings: IteratedSettings = unit.settings
    student = train_noisy_student(unit, report)
    spec = IterateConfig(
        model=str(student),
        problems=problem_source(unit, settings.label_problems),
        iterations=ITERATIONS,
        reference=settings.reference,
        label=SampledLabels(labeller=TaskChecker(), sampling=sampling(0, settings.label_samples), **JOB),
        train=TrainConfig(recipes=["recipes/tiny/step_kto.yaml"], overrides=_overrides(settings)),
        evaluation=HeldOutConfig(
            problems=problem_source(unit, settings.problems, "test"), sampling=SamplingConfig(n=settings.samples)
        ),
        seed=unit.seed,
    )
    folder = unit.folder / "iterated"
    run_iterations(spec, folder, report=report)
    results = []
    for name in unit.arms:
        evaluation = folder / f"iteration-{name.removeprefix('m')}" / "evaluation"
        rows, greedy = (read_results(each) for each in (evaluation, evaluation / "greedy"))
        correct = {str(row["id"]): row["samples"][0]["verdict"] == "correct" for row in greedy}
        problems = [str(row["id"]) for row in rows]
        found = problem_metrics(rows) | {"greedy": [float(correct[problem]) for problem in problems]}
        results.append(ArmResult(name, problems, {metric: found[metric] for metric in METRICS}, {}))
    return results


def _overrides(settings: IteratedSettings) -> dict[str, Any]:
    return {
        "trainer.max_steps": -1,
        "trainer.max_epochs": settings.epochs,
        "trainer.val_check_interval": None,
        "model.init_args.beta": settings.beta,
        "model.init_args.reduction": settings.reduction,
        "model.init_args.optimizer.lr": settings.lr,
        "data.init_args.validation": None,
        "data.init_args.global_batch_size": settings.batch,
        "data.init_args.allow_one_class": settings.allow_one_class,
    }


EXPERIMENT = Experiment(run=run, settings=IteratedSettings, metrics=METRICS, arms=ARMS)
