"""Step scores of many rows, batch by batch, appended to a file so that a killed job goes on where it stood."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepkd.errors import DataError
from stepkd.evaluation.store import ResultStore
from stepkd.scorers.prm import packed
from stepkd.scorers.scorer import StepScorer, problem_key, score_rows

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class RowScores:
    """What a row got."""

    scores: list[float]
    """One per step, NaN for none."""
    error: str | None
    """Why the row could not be read; None when it could."""


def score_batches(
    path: Path, scorer: StepScorer, rows: Sequence[Mapping[str, Any]], max_rows: int, report: Report | None
) -> list[RowScores]:
    """Score every row, problem by problem, keeping finished batches in a file; what is there already is not redone.

    Args:
        path: the file of finished batches.
        scorer: scores the steps.
        rows: rows with solutions.
        max_rows: most solutions in a batch; a problem with more has one of its own.
        report: called after every batch with (solutions scored, solutions in all).

    Raises:
        DataError: no row of the first batch can be read. A later row, or one among others, is left without scores.
    """
    problems: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        problems.setdefault(problem_key(row), []).append(number)
    names = list(problems)
    blocks = _blocks(list(problems.values()), rows, max_rows)
    done = 0
    with ResultStore(path) as store:
        for number, block in enumerate(blocks):
            numbers = [n for i in block for n in problems[names[i]]]
            done += len(numbers)
            if number not in store.finished_batches:
                results = dict(zip(numbers, _results(scorer, [rows[n] for n in numbers], len(store) == 0), strict=True))
                store.append_batch(
                    number, [_stored(names[i], i, [results[n] for n in problems[names[i]]]) for i in block]
                )
            if report is not None:
                report(done, len(rows))
        found: dict[int, RowScores] = {}
        for stored in store.rows():
            for number, values, error in zip(problems[stored["id"]], stored["scores"], stored["errors"], strict=True):
                found[number] = RowScores([math.nan if value is None else value for value in values], error)
    return [found[number] for number in range(len(rows))]


def _blocks(problems: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]], limit: int) -> list[list[int]]:
    """Problems of about one length together, in an order that depends on nothing but the rows and the limit."""

    def length(row: Mapping[str, Any]) -> int:
        return len(json.dumps(row.get("prompt"))) + len(str(row.get("completion", row.get("completions"))))

    order = sorted(range(len(problems)), key=lambda i: (-max(length(rows[n]) for n in problems[i]), i))
    return [[order[b] for b in block] for block in packed([len(problems[i]) for i in order], limit)]


def _results(scorer: StepScorer, rows: Sequence[Mapping[str, Any]], first: bool) -> list[RowScores]:
    """Scores of the rows of one batch; a row that cannot be read goes without."""
    try:
        return [_row_scores(scorer, row, scores) for row, scores in zip(rows, score_rows(scorer, rows), strict=True)]
    except DataError:
        if len(rows) == 1 and first:
            raise
    results = []
    failure: DataError | None = None
    for row in rows:
        try:
            results.append(_row_scores(scorer, row, score_rows(scorer, [row])[0]))
        except DataError as error:
            failure = failure or error
            steps = row.get("completions") if row.get("step_ends") is None else row["step_ends"]
            results.append(RowScores([math.nan] * len(steps or [None]), str(error)))
    if first and failure is not None and all(result.error is not None for result in results):
        raise failure
    return results


def _row_scores(scorer: StepScorer, row: Mapping[str, Any], scores: list[float]) -> RowScores:
    """A row's scores, with the reason where the scorer could not read the solution at all."""
    reason = getattr(scorer, "unreadable", None)
    return RowScores(scores, None if reason is None or not all(map(math.isnan, scores)) else reason(row))


def _stored(name: str, index: int, results: Sequence[RowScores]) -> dict[str, Any]:
    scores = [[None if math.isnan(value) else value for value in result.scores] for result in results]
    return {"id": name, "index": index, "scores": scores, "errors": [result.error for result in results]}
