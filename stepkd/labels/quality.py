"""How good step labels are, against true ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepkd.data.rows import check_unique_ids
from stepkd.errors import DataError
from stepkd.labels.labellers import Row, outcome_of
from stepkd.scorers.scorer import problem_key
from stepkd.statistics import FloatArray, Interval, Result, balanced_accuracy, cluster_bootstrap, ratio_interval
from stepkd.steps.labels import ANY_SUCCESS, Label, first_incorrect, passes, tally, verdicts


def row_labels(row: Row) -> list[Label]:
    """The step labels of a completion row or a stepwise row, in the column of its contract.

    Raises:
        DataError: the row has none.
    """
    column = label_column(row)
    if row.get(column) is None:
        raise DataError("no step labels: label the rows first (stepkd label)", path=str(row.get("id", "?")))
    return list(row[column])


def label_column(row: Row) -> str:
    """Where a row keeps its labels."""
    return "labels" if row.get("step_labels") is None else "step_labels"


def check_same_steps(row: Row, other: Row, *, names: tuple[str, str] = ("A", "B")) -> None:
    """Check that two rows hold one solution, cut at the same places.

    Raises:
        DataError: naming the row and what differs.
    """

    def facts(each: Row) -> dict[str, Any]:
        steps = each.get("completions") if each.get("steps") is None else each["steps"]
        # A stepwise file may have dropped the white space between steps.
        texts = steps and [text.strip() for text in steps]
        found = {"number of steps": len(row_labels(each)), "steps": texts}
        return found | {name: each.get(name) for name in ("token_ids", "step_ends")}

    for (name, ours), theirs in zip(facts(row).items(), facts(other).values(), strict=True):
        if None not in (ours, theirs) and ours != theirs:
            raise DataError(
                f"row {row['id']!r} of {names[0]} and {names[1]} differs in {name}: label the same solutions, cut by "
                "the same segmenter"
            )


@dataclass(frozen=True)
class LabelQuality(Result):
    """Agreement of labels with the truth; intervals resample problems. A share of nothing is None."""

    balanced_accuracy: Interval | None
    """Mean of the shares labelled correctly among truly correct and among truly incorrect steps; None if one is
    missing. A constant label, such as the always-positive baseline, has 0.5."""
    accuracy: Interval
    """Share of steps labelled correctly."""
    always_positive: Interval
    """Accuracy of calling every step correct: the share of truly correct steps."""
    precision: Interval | None
    """Share of truly correct steps among those labelled correct."""
    recall: Interval | None
    """Share labelled correct among truly correct steps."""
    error_precision: Interval | None
    """Share of truly incorrect steps among those labelled incorrect."""
    error_recall: Interval | None
    """Share labelled incorrect among truly incorrect steps."""
    first_error_accuracy: Interval | None
    """Share of solutions whose first incorrect step (or its absence) is labelled exactly, among those where the truth
    tells it; None where it never does."""
    recoverable: Interval | None
    """Share of truly incorrect steps from which the correct answer was still reached (``step_values`` above 0), among
    those with a value: future success calls them correct although the step is not. None without values."""
    steps: int
    """Steps judged."""
    solutions: int
    """Solutions they come from."""


def label_quality(rows: Sequence[Row], truth_rows: Sequence[Row], *, seed: int = 0) -> LabelQuality:
    """Judge labels by true ones of the same solutions, up to and including the first truly incorrect step of each:
    after it, what a correct step is depends on whom one asks.

    Args:
        rows: labelled rows, matched to the truth by ``id``; problems, by ``problem_id``, else ``prompt``, are what
            intervals resample.
        truth_rows: rows with true labels; those without a match are ignored.
        seed: of the bootstrap.

    Raises:
        DataError: repeated ids, a row without its truth, steps that are not the same, or no step with both labels.
    """
    names = ("the labels", "the truth")
    for each, name in ((rows, names[0]), (truth_rows, names[1])):
        check_unique_ids(each, path=name)
    truths = {row["id"]: row for row in truth_rows}
    found: dict[str, FloatArray] = {}
    for row in rows:
        if row["id"] not in truths:
            raise DataError(f"row {row['id']!r} has no true labels: give the truth of the same solutions")
        check_same_steps(row, truths[row["id"]], names=names)
        # Of each problem: steps by cell, recoverable ones of those with values, first errors found of those known.
        counts = found.setdefault(problem_key(row), np.zeros(8))
        marks, true = verdicts(row_labels(row)), verdicts(row_labels(truths[row["id"]]))
        values = row.get("step_values") or [None] * len(marks)
        judged = true.index(False) + 1 if False in true else len(true)
        for mark, correct, value in zip(marks[:judged], true[:judged], values[:judged], strict=True):
            if mark is not None and correct is not None:
                counts[2 * (not mark) + (not correct)] += 1
                if value is not None and not correct:
                    counts[4:6] += (passes(value, ANY_SUCCESS) is True, 1)
        if (first := first_incorrect(row_labels(truths[row["id"]]))) is not None:
            counts[6:] += (first_incorrect(row_labels(row)) == first, 1)
    if not sum(each[:4].sum() for each in found.values()):
        raise DataError(f"no step of {len(rows)} rows has both a label and a true one")
    columns = np.array(list(found.values()))
    steps = columns[:, :4]

    def share(top: FloatArray, *cells: int) -> Interval | None:
        bottom = steps[:, cells].sum(1)
        return ratio_interval(top, bottom, seed=seed) if bottom.sum() else None

    both_correct, both_incorrect = steps[:, 0], steps[:, 3]  # of label and truth; between them one of the two
    every, truly_correct, truly_incorrect = steps.sum(1), steps[:, [0, 2]].sum(1), steps[:, [1, 3]].sum(1)
    balanced = None
    if truly_correct.any() and truly_incorrect.any():
        hits = np.stack([both_correct, truly_correct, both_incorrect, truly_incorrect], axis=1)
        balanced = cluster_bootstrap(hits, balanced_accuracy, seed=seed)
    return LabelQuality(
        balanced_accuracy=balanced,
        accuracy=ratio_interval(both_correct + both_incorrect, every, seed=seed),
        always_positive=ratio_interval(truly_correct, every, seed=seed),
        precision=share(both_correct, 0, 1),
        recall=share(both_correct, 0, 2),
        error_precision=share(both_incorrect, 2, 3),
        error_recall=share(both_incorrect, 1, 3),
        first_error_accuracy=ratio_interval(columns[:, 6], columns[:, 7], seed=seed) if columns[:, 7].any() else None,
        recoverable=ratio_interval(columns[:, 4], columns[:, 5], seed=seed) if columns[:, 5].any() else None,
        steps=int(steps.sum()),
        solutions=len(rows),
    )


def summarise_labels(
    records: Sequence[Row], candidates: int, duplicates: int, drawn: Sequence[Row], *, too_long: int = 0
) -> dict[str, Any]:
    """Summary of a finished job.

    Args:
        records: one per solution that went to the labeller: ``row``, or ``dropped`` with the reason.
        candidates: solutions there were at first.
        duplicates: those dropped because another one of their problem has the same text.
        drawn: records of the first phase.
        too_long: rows dropped because they do not fit into the model's context.

    Returns:
        Plain values for JSON; depends on nothing but its arguments.
    """
    rows = [record["row"] for record in records if "row" in record]
    dropped = Counter(record["dropped"] for record in records if "dropped" in record)
    dropped += Counter({"duplicate": duplicates, "longer_than_context": too_long})
    known = [outcome_of(row) for row in rows]
    graded = [bool(outcome) for outcome in known if outcome is not None]
    marks = [verdicts(row_labels(row)) for row in rows]
    samples = [sample for record in drawn for sample in record.get("samples", ())]
    return {
        "solutions": candidates,
        "labelled": len(rows),
        "dropped": {reason: dropped[reason] for reason in sorted(dropped)},
        "problems": len(set(map(problem_key, rows))),
        "correct_answers": sum(graded),
        "incorrect_answers": len(graded) - sum(graded),
        "cut_off": sum(row.get("finish") == "length" for row in rows),
        "correct_with_incorrect_step": tally(known, marks).correct_with_incorrect_step,
        "steps": sum(map(len, marks)),
        "balance": _balance(marks),
        "by_position": [
            {"position": i} | _balance([steps[i : i + 1] for steps in marks if len(steps) > i])
            for i in range(max(map(len, marks), default=0))
        ],
        "sampling": {
            "solutions": len(samples),
            "tokens_generated": sum(len(sample["token_ids"]) for sample in samples),
            "tokens_prefilled": sum(record["prefilled"] for record in drawn if "samples" in record),
        },
        "labelling": _totals(records),
    }


def _balance(marks: Sequence[Sequence[bool | None]]) -> dict[str, Any]:
    counts = Counter(mark for steps in marks for mark in steps)
    labelled = counts[True] + counts[False]
    return {
        "correct": counts[True],
        "incorrect": counts[False],
        "unlabelled": counts[None],
        "correct_share": counts[True] / labelled if labelled else None,
    }


def _totals(records: Sequence[Row]) -> dict[str, int]:
    """Sums of the labeller's whole-number facts (tokens generated, tokens read) and of its trials (continuations
    made); what every labeller's labels cost in generated tokens, 0 where none are."""
    totals: Counter[str] = Counter({"generated_tokens": 0})
    for record in records:
        facts = record["row"].get("label_facts", {}) if "row" in record else record.get("facts", {})
        if "trials" in facts:
            totals["continuations"] += sum(facts["trials"]) - facts.get("reused", 0)
        totals.update({name: value for name, value in facts.items() if isinstance(value, int)})
    return dict(sorted(totals.items()))
