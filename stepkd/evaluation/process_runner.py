"""Judging a step scorer: score every step of a labelled set, a job of fixed batches, and sum up.

The folder is that of any evaluation: ``settings.json`` (what decides the numbers), ``results.jsonl`` (one line per
solution with its step scores) and ``summary.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepkd.data.benchmarks import PROCESS_BENCHMARKS, unknown_benchmark
from stepkd.data.io import fingerprint
from stepkd.data.spec import DataConfig, load_rows, parse_spec
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.diagnostics import task_swaps
from stepkd.evaluation.process import summarise_process
from stepkd.evaluation.score_rows import scorer_settings
from stepkd.runs.job import ALONE, RESULTS_NAME, SUMMARY_NAME, Job, JobOptions, numbered
from stepkd.scorers.scorer import StepScorer, score_rows, step_scores
from stepkd.steps.labels import check_threshold, first_incorrect, verdicts
from stepkd.tasks.rows import is_task_row

SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")
"""ProcessBench's subsets."""
KIND = "judgement of a step scorer"
SOLUTIONS = "solutions"
"""The one phase of such a job."""


@dataclass(frozen=True)
class ProcessConfig:
    """One evaluation of a step scorer."""

    model: str
    """The scorer: run folder, checkpoint, export or published PRM; ``judge:MODEL``; ``checker`` (tiny world);
    ``arithmetic``."""
    benchmark: str = "processbench"
    """``processbench`` or ``step_labels``."""
    out: str = "runs/process"
    """Folder for settings, results and summary."""
    data: str | None = None
    """ProcessBench: folder of its files (None: the hub). ``step_labels``: data settings (``prm800k:path=...``)."""
    subsets: tuple[str, ...] = ("gsm8k", "math")
    """ProcessBench subsets."""
    threshold: float = 0.5
    """A step with a lower score is predicted wrong, in (0, 1)."""
    tune_on: str | None = None
    """Set on which a second threshold is tuned for F1: a subset, or data settings; None: the first subset for
    ``processbench``, no tuning for ``step_labels``."""
    limit: int | None = None
    """Solutions per set, drawn at random (always the same ones); None for all."""
    batch_size: int = 8
    """Solutions given to the scorer at once; part of the settings, because batch shapes decide rounding."""
    seed: int = 0
    """Seed of the intervals."""

    def __post_init__(self) -> None:
        if self.benchmark not in PROCESS_BENCHMARKS:
            raise unknown_benchmark(self.benchmark)
        check_threshold(self.threshold)
        if self.benchmark == "step_labels" and self.data is None:
            raise ConfigError("step_labels needs --data: a step-labelled set, for instance prm800k:path=...")
        if unknown := [name for name in self.subsets if name not in SUBSETS]:
            raise ConfigError(f"unknown subset {unknown[0]!r}: ProcessBench has {', '.join(SUBSETS)}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit}: at least one solution, or none for all")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: at least one solution at once")

    def sets(self) -> tuple[dict[str, DataConfig], str | None]:
        """Name -> data of every set that is scored, and the name of the one the threshold is tuned on."""
        if self.benchmark == "step_labels":
            assert self.data is not None
            sets = {self.data: parse_spec(self.data)}
        else:
            path = None if self.data is None else str(Path(self.data).expanduser())
            sets = {name: DataConfig(source="processbench", path=path, split=name) for name in self.subsets}
        tune_on = self.tune_on or (next(iter(sets)) if self.benchmark == "processbench" else None)
        if tune_on is not None and tune_on not in sets:
            if tune_on in SUBSETS and self.benchmark == "processbench":
                sets[tune_on] = replace(next(iter(sets.values())), split=tune_on)
            else:
                sets[tune_on] = parse_spec(tune_on)
        if self.limit is not None:
            # Drawn, not the first ones: ProcessBench's files begin with the solutions that have an error.
            sets = {name: replace(spec, limit=self.limit, shuffle_seed=0) for name, spec in sets.items()}
        return sets, tune_on


def figure_names(name: str) -> tuple[str, str]:
    """File names of a set's figures: reliability, and where the lowest score falls."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return f"reliability-{safe}.svg", f"argmin-{safe}.svg"


def evaluate_process(
    spec: ProcessConfig, scorer: StepScorer | Callable[[], StepScorer], *, options: JobOptions = ALONE
) -> dict[str, Any]:
    """Score every step of the sets (or resume) and sum up.

    Args:
        spec: what to evaluate, and where to write.
        scorer: the scorer, or a function that loads it (called once the folder and the data are in order).
        options: which rank this is, and whether to overwrite an earlier evaluation in the folder.

    Returns:
        The summary that ``summary.json`` holds, and the settings; empty while other ranks have work left: the last one
        to finish writes the results.

    Raises:
        ConfigError: the folder holds another evaluation, or the scorer gives one score per solution only.
        DataError: rows without step labels.
    """
    sets, tune_on = spec.sets()
    figures = [name for each in sets for name in figure_names(each)]
    job = Job(Path(spec.out), KIND, (RESULTS_NAME, SUMMARY_NAME, *figures), options)
    job.check()
    rows = [(name, _with_steps(row)) for name, data in sets.items() for row in load_rows(data, contract=None)]
    loaded: StepScorer = scorer() if callable(scorer) else scorer
    if loaded.meaning == "outcome":
        raise ConfigError("an outcome reward model has one score per solution and finds no first error: use best-of-N")
    settings = job.begin(
        {
            **scorer_settings(loaded, spec.batch_size),
            "benchmark": {
                "name": spec.benchmark,
                "sets": list(sets),
                "data": fingerprint([row for _, row in rows]),
                "limit": spec.limit,
            },
        }
    )

    def work(batch: list[int]) -> list[dict[str, Any]]:
        # Sampled rows are read by their own token ids where the scorer wrote with the same tokenizer.
        found = score_rows(loaded, [rows[i][1] for i in batch])
        return [
            _result(rows[i][0], rows[i][1], i, step_scores(rows[i][1], scores)) | _swapped(rows[i][1], loaded)
            for i, scores in zip(batch, found, strict=True)
        ]

    starts = range(0, len(rows), spec.batch_size)
    units = numbered([list(range(start, min(start + spec.batch_size, len(rows)))) for start in starts])
    job.work(SOLUTIONS, units, work, lambda done: {"solutions/s": (len(done), None)})
    results = job.rows(SOLUTIONS, units)
    if results is None:
        return {}
    summary = summarise_process(
        results, threshold=spec.threshold, tune_on=tune_on, meaning=loaded.meaning, seed=spec.seed
    )
    summary |= {"benchmark": spec.benchmark, "model": spec.model, "scorer": loaded.provenance()}
    job.finish(RESULTS_NAME, results, summary)
    return summary | {"settings": settings}


def _with_steps(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with ``completions`` and ``labels``, also where it is a labelled rollout (``steps``, ``step_labels``)."""
    steps = row.get("completions", row.get("steps"))
    labels = row.get("labels", row.get("step_labels"))
    if steps is None or labels is None or len(steps) != len(labels):
        raise DataError(
            "judging a step scorer needs a step-labelled row: 'completions' and 'labels', or 'steps' and "
            f"'step_labels', of one length; found {len(steps or ())} steps and {len(labels or ())} labels",
            path=str(row.get("id", "?")),
            column="labels",
        )
    return {**row, "completions": steps, "labels": labels}


def _result(name: str, row: Mapping[str, Any], index: int, scores: Sequence[float | None]) -> dict[str, Any]:
    return {
        "id": f"{name}/{row['id']}",
        "index": index,
        "set": name,
        "prompt": row["prompt"],
        "scores": [None if score is None else round(float(score), 6) for score in scores],
        "labels": verdicts(row["labels"]),
        "first_error": first_incorrect(row["labels"]),
    }


def _swapped(row: Mapping[str, Any], scorer: StepScorer) -> dict[str, Any]:
    """Scores for the order-swap test, where the exact checker knows which steps need each other (the tiny world)."""
    if not is_task_row(row) or not (swaps := task_swaps(row)):
        return {}
    scores = scorer.score([swap.solutions() for swap in swaps])
    return {
        "swaps": [
            {"position": swap.position, "dependent": swap.dependent, "scores": [_plain(part) for part in parts]}
            for swap, parts in zip(swaps, scores, strict=True)
        ]
    }


def _plain(scores: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(score) else round(float(score), 6) for score in scores]
