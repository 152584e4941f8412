"""Judging a step scorer: score every step of a labelled set, append-only and resumable, and sum up.

The folder is that of any evaluation: ``manifest.json`` (what decides the numbers), ``results.jsonl`` (one line per
solution with its step scores) and ``summary.json``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepkd.data.benchmarks import PROCESS_BENCHMARKS, unknown_benchmark
from stepkd.data.io import fingerprint
from stepkd.data.spec import DataSpec, load_rows, parse_spec
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.diagnostics import task_swaps
from stepkd.evaluation.folder import SUMMARY_NAME, check_folder, prepare_folder
from stepkd.evaluation.manifest import MANIFEST_FORMAT, RESULTS_NAME, package_versions
from stepkd.evaluation.process import summarise_process
from stepkd.evaluation.store import ResultStore
from stepkd.runs.files import write_json
from stepkd.scorers.scorer import StepScorer, score_rows, step_scores
from stepkd.steps.labels import check_threshold, first_incorrect, verdicts

SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")
"""ProcessBench's subsets."""

Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class ProcessSpec:
    """One evaluation of a step scorer."""

    model: str
    """The scorer: run folder, checkpoint, export or published PRM; ``judge:MODEL``; ``checker`` (tiny world);
    ``arithmetic``."""
    benchmark: str = "processbench"
    """``processbench`` or ``step_labels``."""
    out: str = "runs/process"
    """Folder for manifest, results and summary."""
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
    """Solutions given to the scorer at once; part of the manifest, because batch shapes decide rounding."""
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

    def sets(self) -> tuple[dict[str, DataSpec], str | None]:
        """Name -> data of every set that is scored, and the name of the one the threshold is tuned on."""
        if self.benchmark == "step_labels":
            assert self.data is not None
            sets = {self.data: parse_spec(self.data)}
        else:
            path = None if self.data is None else str(Path(self.data).expanduser())
            sets = {name: DataSpec(source="processbench", path=path, split=name) for name in self.subsets}
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


def evaluate_process(
    spec: ProcessSpec,
    scorer: StepScorer | Callable[[], StepScorer],
    *,
    report: Report | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score every step of the sets (or go on where an earlier run stood) and sum up.

    Args:
        spec: what to evaluate, and where to write.
        scorer: the scorer, or a function that loads it (called once the folder and the data are in order).
        report: called after every batch with (solutions done, solutions in all, seconds per solution).
        overwrite: delete an earlier evaluation in the folder first.

    Returns:
        The summary that ``summary.json`` holds, and the manifest.

    Raises:
        ConfigError: the folder holds another evaluation, or the scorer gives one score per solution only.
        DataError: rows without step labels.
    """
    out = Path(spec.out)
    check_folder(out, overwrite=overwrite)
    sets, tune_on = spec.sets()
    rows = [(name, _with_steps(row)) for name, data in sets.items() for row in load_rows(data, contract=None)]
    loaded: StepScorer = scorer() if callable(scorer) else scorer
    if loaded.meaning == "outcome":
        raise ConfigError("an outcome reward model has one score per solution and finds no first error: use best-of-N")
    manifest = _manifest(spec, rows, loaded.provenance())
    prepare_folder(out, manifest, overwrite=overwrite)
    with ResultStore(out / RESULTS_NAME) as store:
        starts = range(0, len(rows), spec.batch_size)
        for number, start in enumerate(starts):
            if number in store.finished_batches:
                continue
            batch = rows[start : start + spec.batch_size]
            begin = time.perf_counter()
            # Sampled rows are read by their own token ids where the scorer wrote with the same tokenizer.
            scores = score_rows(loaded, [row for _, row in batch])
            seconds = (time.perf_counter() - begin) / len(batch)
            store.append_batch(
                number,
                [
                    _result(name, row, start + i, step_scores(row, found), seconds) | _swapped(row, loaded)
                    for i, ((name, row), found) in enumerate(zip(batch, scores, strict=True))
                ],
            )
            if report is not None:
                report(len(store), len(rows), seconds)
        results = store.rows()
    summary = summarise_process(
        results, threshold=spec.threshold, tune_on=tune_on, meaning=loaded.meaning, seed=spec.seed
    )
    summary |= {"benchmark": spec.benchmark, "model": spec.model, "scorer": loaded.provenance()}
    write_json(out / SUMMARY_NAME, summary)
    return summary | {"manifest": manifest}


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


def _result(
    name: str, row: Mapping[str, Any], index: int, scores: Sequence[float | None], seconds: float
) -> dict[str, Any]:
    return {
        "id": f"{name}/{row['id']}",
        "index": index,
        "set": name,
        "prompt": row["prompt"],
        "scores": [None if score is None else round(float(score), 6) for score in scores],
        "labels": verdicts(row["labels"]),
        "first_error": first_incorrect(row["labels"]),
        "seconds": round(seconds, 4),
    }


def _swapped(row: Mapping[str, Any], scorer: StepScorer) -> dict[str, Any]:
    """Scores for the order-swap test, where the exact checker knows which steps need each other (the tiny world)."""
    if "task" not in row or "meta" not in row or not (swaps := task_swaps(row)):
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


def _manifest(
    spec: ProcessSpec, rows: Sequence[tuple[str, Mapping[str, Any]]], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    import torch  # for the thread count only

    manifest = {
        "format": MANIFEST_FORMAT,
        "kind": "process",
        "scorer": dict(provenance),
        "batch_size": spec.batch_size,
        "benchmark": {
            "name": spec.benchmark,
            "sets": list(dict.fromkeys(name for name, _ in rows)),
            "data": fingerprint([dict(row) for _, row in rows]),
            "limit": spec.limit,
        },
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
    }
    return dict(json.loads(json.dumps(manifest)))
