"""Solutions that tiny models sample on the CPU: evaluated, labelled, scored by reward models, and chosen among."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepkd.claims.tiny import NEW_TOKENS
from stepkd.data.io import read_rows
from stepkd.evaluation.best_of_n import CurveResult, ProblemSamples, bon_curve
from stepkd.evaluation.config import EvaluateConfig
from stepkd.evaluation.runner import evaluate
from stepkd.grading.judge import votes_of
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.labels.job import run_label_job
from stepkd.labels.labellers import LabellerConfig
from stepkd.labels.settings import LabelConfig, OwnSteps, Sampled, SolutionsConfig, StepsConfig
from stepkd.models.checkpoint import load_trained
from stepkd.sampling.sampler import SamplingConfig
from stepkd.scorers.prm import PRMScorer
from stepkd.steps.labels import tally

Row = Mapping[str, Any]
JOB: dict[str, Any] = {
    "template": "task",
    "grading": GradingConfig(extractors=("hash",)),
    "device": "cpu",
    "max_rows": 256,
}
"""How jobs ask and grade in the tiny world."""


def sampling(seed: int, n: int) -> SamplingConfig:
    """How jobs sample in the tiny world."""
    return SamplingConfig(n=n, max_new_tokens=NEW_TOKENS, seed=seed)


def sampled(model: str | Path, problems: str, *, samples: int, seed: int, dedupe: bool = True) -> Sampled:
    """Solutions to sample in the tiny world."""
    return Sampled(problems=problems, model=str(model), sampling=sampling(seed, samples), dedupe=dedupe)


def evaluate_tiny(
    folder: Path,
    model: str | Path,
    *,
    task: str,
    problems: int,
    samples: int,
    temperature: float,
    seed: int,
    max_new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:
    """Sample a model on held-out problems of a task, and grade every step; resumable.

    Args:
        folder: where settings, per-problem rows and summary go; an interrupted evaluation there is resumed.
        model: model folder or tiny preset.
        task: tiny-world task with its settings.
        problems: number of problems, at least 1; the same seed gives the same ones.
        samples: solutions per problem.
        temperature: 0 is greedy (then one sample is enough).
        seed: seed of the problems and of the sampling noise.
        max_new_tokens: longest solution.

    Returns:
        The summary (:func:`stepkd.evaluation.evaluate`); :func:`stepkd.runs.job.read_results` reads the rows.
    """
    return evaluate(
        EvaluateConfig(
            model=str(model),
            benchmark="task",
            data=f'task="{task}",n={problems},seed={seed}',
            sampling=SamplingConfig(n=samples, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed),
            max_rows=256,
            device="cpu",
            out=str(folder),
        )
    )


def problem_metrics(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Per-problem values of the metrics that every method is judged by.

    Args:
        rows: per-problem rows with step labels; a sample whose labels are None counts for its answer only.

    Returns:
        ``pass@1`` (share of correct samples), ``mean_tokens``, ``step_accuracy`` (pairs: correct steps, steps),
        ``correct_with_wrong_step`` (pairs: correct samples with an incorrect step, those whose steps are labelled)
        and ``clean@1`` (share of correct samples without an incorrect step); one entry per problem each.
    """
    metrics: dict[str, list[Any]] = {
        name: [] for name in ("pass@1", "mean_tokens", "step_accuracy", "correct_with_wrong_step", "clean@1")
    }
    for row in rows:
        samples = row["samples"]
        correct = [sample["verdict"] == "correct" for sample in samples]
        labels = [sample["step_labels"] or [] for sample in samples]
        counts = tally(correct, labels)
        metrics["pass@1"].append(sum(correct) / len(samples))
        metrics["mean_tokens"].append(sum(sample["tokens"] for sample in samples) / len(samples))
        metrics["step_accuracy"].append(
            [sum(steps.count(True) for steps in labels), sum(len(steps) - steps.count(None) for steps in labels)]
        )
        metrics["correct_with_wrong_step"].append([counts.flawed, counts.labelled])
        metrics["clean@1"].append((counts.correct - counts.flawed) / len(samples))
    return metrics


def label_tiny(
    out: Path, solutions: SolutionsConfig, labeller: LabellerConfig, steps: StepsConfig | None = None
) -> tuple[Path, dict[str, Any]]:
    """Run (or resume) a labelling job in the tiny world.

    Args:
        out: the job's folder.
        solutions: what is labelled (:func:`sampled`, or existing ones).
        labeller: who labels it.
        steps: how it is cut; None: as it is, or into lines.

    Returns:
        The labels' file and the job's summary.
    """
    config = LabelConfig(out=str(out), solutions=solutions, labeller=labeller, steps=steps or OwnSteps(), **JOB)
    summary = run_label_job(config)
    assert summary is not None, "one rank does all the work"
    return out / "labels.jsonl", summary


def read_labels(path: Path) -> list[Row]:
    """The rows of a file of labelled solutions or pairs."""
    return [row for row, _ in read_rows(path)]


def by_problem(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rollout rows grouped by problem, in the order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["problem_id"], []).append(row)
    return groups


def score_tiny(model: str | Path, rows: Sequence[Row]) -> list[list[list[float]]]:
    """Step scores of rollout rows by a reward model: per problem, per solution (:func:`by_problem`), per step."""
    scorer = PRMScorer(load_trained(model), template="task", max_rows=256)
    groups = by_problem(rows)
    found = iter(scorer.score_rows([row for group in groups.values() for row in group]))
    return [[next(found) for _ in group] for group in groups.values()]


def align_scores(
    rows: Sequence[Row], scores: Sequence[Sequence[float | None]], wanted: Sequence[Row]
) -> list[list[float | None]]:
    """Scores of one cut of some rollouts in the order of another cut of them.

    Args:
        rows: the rows that were scored.
        scores: one score per problem and solution, in the order of :func:`by_problem` of ``rows``.
        wanted: the same rollouts, perhaps more of them, under the same ids.

    Returns:
        One score per problem and solution of ``wanted``; None for a solution that is not among ``rows``.
    """
    scored = [row for group in by_problem(rows).values() for row in group]
    values = [score for solutions in scores for score in solutions]
    found = {row["id"]: score for row, score in zip(scored, values, strict=True)}
    return [[found.get(row["id"]) for row in group] for group in by_problem(wanted).values()]


def curves_tiny(
    rows: Sequence[Row], scores: Mapping[str, Sequence[Sequence[float | None]]], ks: Sequence[int], *, seed: int
) -> CurveResult:
    """Best-of-N curves of graded rollout rows (:func:`stepkd.evaluation.best_of_n.bon_curve`).

    Args:
        rows: graded rollout rows.
        scores: scorer -> one score per problem and solution, in the order of :func:`by_problem`.
        ks: numbers of samples; a solution that could not be labelled (it has no text) left its problem with fewer, and
            stands as an incorrect one without score or vote.
        seed: seed of the intervals and of drawn subsets.
    """
    groups, size = by_problem(rows), max(ks)

    def padded(values: Sequence[Any], value: Any = None) -> list[Any]:
        return [*values, *[value] * (size - len(values))]

    with Grader() as grader:
        votes = votes_of(list(groups.values()), ("hash",), grader)
    problems = [
        ProblemSamples(name, padded([bool(row["correct"]) for row in group], False), padded(own))
        for (name, group), own in zip(groups.items(), votes, strict=True)
    ]
    return bon_curve(
        problems, ks, {name: [padded(each) for each in found] for name, found in scores.items()}, seed=seed
    )
