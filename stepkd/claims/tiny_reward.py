"""Tiny reward models, labelled, trained and used on the spot: what the quick start and the claims share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from stepkd.claims.tiny import GLOBAL_BATCH, fit_and_export

Row = Mapping[str, Any]


def label_tiny(out: Path, *, model: str | Path, seed: int, **settings: Any) -> tuple[Path, dict[str, Any]]:
    """Run (or go on with) a labelling job in the tiny world, on the CPU.

    Args:
        out: the job's folder.
        model: policy that samples, continues and tokenises.
        seed: keys solutions and continuations.
        **settings: further fields of :class:`stepkd.labels.LabelSpec`.

    Returns:
        The labels' file and the job's summary.
    """
    from stepkd.labels import LabelSpec, run_label_job

    spec = LabelSpec(
        out=str(out),
        model=str(model),
        seed=seed,
        temperature=1.0,
        max_new_tokens=64,
        template="task",
        extractors=("hash",),
        device="cpu",
        max_rows=256,
        **settings,
    )
    summary = run_label_job(spec)
    assert summary is not None, "one rank does all the work"
    return out / "labels.jsonl", summary


def train_tiny_prm(
    folder: Path,
    *,
    start: str | Path,
    labels: Path,
    steps: int,
    lr: float,
    seed: int,
    meaning: Literal["correctness", "value", "outcome"] = "correctness",
    separator: str = "\n",
    after_error: Literal["keep", "truncate", "mask"] = "truncate",
    lm_weight: float = 1.0,
    allow_one_class: bool = False,
    progress: bool = False,
    reuse: bool = False,
) -> Path:
    """Train a tiny reward model on labelled solutions, on the CPU, and export it.

    Args:
        folder: where the run's metrics and model go; made when missing.
        start: tiny model preset, or the folder of a model to go on from.
        labels: labelled rollouts (``stepkd label``); for ``meaning="outcome"`` their ``correct`` is the label.
        steps: optimiser steps of 64 solutions, at least 1.
        lr: peak learning rate (cosine schedule, 5% warm-up).
        seed: seed of the order and of initial weights.
        meaning: what the scores estimate; ``outcome`` trains an outcome reward model.
        separator: text between steps; empty for steps that are cuts of one text.
        after_error: what to do with labels after the first wrong step.
        lm_weight: weight of the language-model loss on the solutions beside the labels (Cobbe et al. 2021).
        allow_one_class: train although all labels agree (scaled-down runs).
        progress: print the loss while training.
        reuse: return the model that an earlier call left in ``folder``, if it is whole.

    Returns:
        The exported model folder, ``folder/model``.
    """
    model = folder / "model"
    if reuse and model.is_dir():
        return model
    from stepkd.data import DataSpec, LabelRule, StepLabelData
    from stepkd.models import PolicySpec, StepHeadSpec
    from stepkd.modules import OptimizerSpec, PRMModule
    from stepkd.steps import StepFormat

    data = StepLabelData(
        train=DataSpec(source="rows", path=str(labels)),
        template="task",
        labels=LabelRule(after_error=after_error, scope="outcome" if meaning == "outcome" else "steps"),
        allow_one_class=allow_one_class,
        global_batch_size=GLOBAL_BATCH,
        max_length=128,
        seed=seed,
    )
    module = PRMModule(
        PolicySpec(path=str(start), init_seed=seed),
        StepHeadSpec(meaning=meaning, format=StepFormat(separator=separator)),
        lm_weight=lm_weight,
        optimizer=OptimizerSpec(lr=lr, schedule="cosine", warmup=0.05),
        micro_batch_tokens=16_384,
        seed=seed,
    )
    return fit_and_export(folder, module, data, steps=steps, progress=progress)


def by_problem(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rollout rows grouped by problem, in the order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["problem_id"], []).append(row)
    return groups


def score_tiny(model: str | Path, rows: Sequence[Row]) -> list[list[list[float]]]:
    """Step scores of rollout rows by a reward model: per problem, per solution (:func:`by_problem`), per step."""
    from stepkd.models.checkpoint import load_trained
    from stepkd.scorers import PRMScorer

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
) -> Any:
    """Best-of-N curves of graded rollout rows (:func:`stepkd.evaluation.best_of_n.bon_curve`).

    Args:
        rows: graded rollout rows.
        scores: scorer -> one score per problem and solution, in the order of :func:`by_problem`.
        ks: numbers of samples; a solution that could not be labelled (it has no text) left its problem with fewer, and
            stands as a wrong one without score or vote.
        seed: seed of the intervals and of drawn subsets.
    """
    from stepkd.evaluation.best_of_n import ProblemSamples, bon_curve
    from stepkd.grading import Grader
    from stepkd.grading.judge import votes_of

    groups, size = by_problem(rows), max(ks)
    with Grader() as grader:
        votes = votes_of(list(groups.values()), ("hash",), grader)
    problems = [
        ProblemSamples(name, _padded([bool(row["correct"]) for row in group], False, size), _padded(own, None, size))
        for (name, group), own in zip(groups.items(), votes, strict=True)
    ]
    padded = {name: [_padded(solutions, None, size) for solutions in found] for name, found in scores.items()}
    return bon_curve(problems, ks, padded, seed=seed)


def _padded(values: Sequence[Any], value: Any, size: int) -> list[Any]:
    return [*values, *[value] * (size - len(values))]
