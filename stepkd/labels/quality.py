"""How good step labels are, against true ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stepkd.data.rows import check_unique_ids
from stepkd.errors import DataError
from stepkd.statistics import FloatArray, Interval, cluster_bootstrap, ratio_interval
from stepkd.steps.labels import ANY_SUCCESS, Label, first_incorrect, passes, tally, verdicts

Row = Mapping[str, Any]


def row_labels(row: Row) -> list[Label]:
    """The step labels of a rollout row or a stepwise row, in the column of its contract.

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
    where = f"row {row['id']!r} of {names[0]} and {names[1]}"
    hint = "label the same solutions, cut by the same segmenter"
    for column, what in (("token_ids", "other tokens"), ("step_ends", "steps that end elsewhere")):
        if row.get(column) is not None and other.get(column) is not None and row[column] != other[column]:
            raise DataError(f"{where} has {what}: {hint}", column=column)
    ours, theirs = len(row_labels(row)), len(row_labels(other))
    if ours != theirs:
        raise DataError(f"{where} has {ours} and {theirs} steps: {hint}")
    texts, other_texts = _step_texts(row), _step_texts(other)
    if texts is not None and other_texts is not None and texts != other_texts:
        step = next(i for i, (a, b) in enumerate(zip(texts, other_texts, strict=True)) if a != b)
        raise DataError(f"{where} has another step {step} ({texts[step]!r} and {other_texts[step]!r}): {hint}")


def _step_texts(row: Row) -> list[str] | None:
    """Step texts without the white space around them: a stepwise file may have dropped separators."""
    texts = row["steps"] if row.get("steps") is not None else row.get("completions")
    return None if texts is None else [text.strip() for text in texts]


_RIGHT_RIGHT, _RIGHT_WRONG, _WRONG_RIGHT, _WRONG_WRONG = range(4)  # label, truth


@dataclass(frozen=True)
class LabelQuality:
    """Agreement of labels with the truth; intervals resample problems. A share of nothing is None."""

    balanced_accuracy: Interval | None
    """Mean of the shares labelled rightly among truly right and among truly wrong steps; None if one is missing. A
    constant label, such as the always-positive baseline, has 0.5."""
    accuracy: Interval
    """Share of steps labelled rightly."""
    always_positive: Interval
    """Accuracy of calling every step right: the share of truly right steps."""
    precision: Interval | None
    """Share of truly right steps among those labelled right."""
    recall: Interval | None
    """Share labelled right among truly right steps."""
    error_precision: Interval | None
    """Share of truly wrong steps among those labelled wrong."""
    error_recall: Interval | None
    """Share labelled wrong among truly wrong steps."""
    first_error_accuracy: Interval
    """Share of solutions whose first wrong step (or its absence) is labelled exactly."""
    recoverable: Interval | None
    """Share of truly wrong steps from which a right answer was still reached (``step_values`` above 0): future success
    calls them right although the step is not. None without values."""
    balanced_accuracy_unrecoverable: Interval | None
    """Balanced accuracy without the recoverable steps; None without values."""
    steps: int
    """Steps judged."""
    solutions: int
    """Solutions they come from."""
    problems: int
    """Problems they come from."""
    unlabelled: int
    """Steps left out because either side has no label for them."""
    after_error: int
    """Steps left out because they follow the first truly wrong one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        shares = {name: value for name, value in vars(self).items() if value is None or isinstance(value, Interval)}
        return asdict(self) | {name: value and value.to_dict() for name, value in shares.items()}


def label_quality(
    rows: Sequence[Row], truth_rows: Sequence[Row], *, up_to_first_error: bool = True, seed: int = 0
) -> LabelQuality:
    """Judge labels by true ones of the same solutions.

    Args:
        rows: labelled rows, matched to the truth by ``id``.
        truth_rows: rows with true labels; those without a match are ignored.
        up_to_first_error: judge the steps up to and including the first truly wrong one: after it, what a right step
            is depends on whom one asks.
        seed: of the bootstrap.

    Raises:
        DataError: repeated ids, a row without its truth, steps that are not the same, or no step with both labels.
    """
    names = ("the labels", "the truth")
    for each, name in ((rows, names[0]), (truth_rows, names[1])):
        check_unique_ids(each, path=name)
    truths = {row["id"]: row for row in truth_rows}
    found: dict[str, FloatArray] = {}
    unlabelled = after_error = 0
    has_values = False
    for row in rows:
        if row["id"] not in truths:
            raise DataError(f"row {row['id']!r} has no true labels: give the truth of the same solutions")
        check_same_steps(row, truths[row["id"]], names=names)
        # Of each problem: steps by cell, those of them that are recoverable, solutions labelled exactly, solutions.
        counts = found.setdefault(str(row.get("problem_id") or row["id"]), np.zeros(10))
        marks, true = verdicts(row_labels(row)), verdicts(row_labels(truths[row["id"]]))
        values = row.get("step_values") or [None] * len(marks)
        wrong = true.index(False) if False in true else -1
        for i, (mark, right, value) in enumerate(zip(marks, true, values, strict=True)):
            if up_to_first_error and i > wrong >= 0:
                after_error += 1
            elif mark is None or right is None:
                unlabelled += 1
            else:
                cell = 2 * (not mark) + (not right)
                counts[cell] += 1
                counts[4 + cell] += not right and passes(value, ANY_SUCCESS) is True
                has_values |= value is not None
        counts[8:] += (first_incorrect(row_labels(row)) == wrong, 1)
    if not sum(each[:4].sum() for each in found.values()):
        raise DataError(f"no step has both a label and a true one ({unlabelled} steps lack one of them)")
    columns = np.array(list(found.values()))
    steps, recoverable = columns[:, :4], columns[:, 4:8]

    def share(top: Sequence[int], bottom: Sequence[int]) -> Interval | None:
        below = steps[:, bottom].sum(1)
        return ratio_interval(steps[:, top].sum(1), below, seed=seed) if below.sum() else None

    accuracy, positive = share([_RIGHT_RIGHT, _WRONG_WRONG], range(4)), share([_RIGHT_RIGHT, _WRONG_RIGHT], range(4))
    assert accuracy is not None
    assert positive is not None
    truly_wrong = steps[:, [_RIGHT_WRONG, _WRONG_WRONG]].sum(1)
    return LabelQuality(
        balanced_accuracy=_balanced(steps, seed),
        accuracy=accuracy,
        always_positive=positive,
        precision=share([_RIGHT_RIGHT], [_RIGHT_RIGHT, _RIGHT_WRONG]),
        recall=share([_RIGHT_RIGHT], [_RIGHT_RIGHT, _WRONG_RIGHT]),
        error_precision=share([_WRONG_WRONG], [_WRONG_WRONG, _WRONG_RIGHT]),
        error_recall=share([_WRONG_WRONG], [_WRONG_WRONG, _RIGHT_WRONG]),
        first_error_accuracy=ratio_interval(columns[:, 8], columns[:, 9], seed=seed),
        recoverable=ratio_interval(recoverable.sum(1), truly_wrong, seed=seed)
        if has_values and truly_wrong.sum()
        else None,
        balanced_accuracy_unrecoverable=_balanced(steps - recoverable, seed) if has_values else None,
        steps=int(steps.sum()),
        solutions=int(columns[:, 9].sum()),
        problems=len(columns),
        unlabelled=unlabelled,
        after_error=after_error,
    )


def _balanced(counts: FloatArray, seed: int) -> Interval | None:
    """Balanced accuracy of (problems, 4) counts; None without right or without wrong steps."""
    totals = counts.sum(0)
    if not totals[_RIGHT_RIGHT] + totals[_WRONG_RIGHT] or not totals[_WRONG_WRONG] + totals[_RIGHT_WRONG]:
        return None

    def statistic(resampled: FloatArray) -> FloatArray:
        cells = resampled.sum(axis=1)
        with np.errstate(invalid="ignore"):
            right = cells[:, _RIGHT_RIGHT] / (cells[:, _RIGHT_RIGHT] + cells[:, _WRONG_RIGHT])
            wrong = cells[:, _WRONG_WRONG] / (cells[:, _WRONG_WRONG] + cells[:, _RIGHT_WRONG])
        return np.asarray((right + wrong) / 2, dtype=np.float64)

    return cluster_bootstrap(counts, statistic, seed=seed)


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
    known = [row.get("correct", row.get("outcome")) for row in rows]
    graded = [bool(outcome) for outcome in known if outcome is not None]
    marks = [verdicts(row_labels(row)) for row in rows]
    samples = [sample for record in drawn for sample in record.get("samples", ())]
    return {
        "solutions": candidates,
        "labelled": len(rows),
        "dropped": {reason: dropped[reason] for reason in sorted(dropped)},
        "problems": len({str(row.get("problem_id", row["id"])) for row in rows}),
        "right_answers": sum(graded),
        "wrong_answers": len(graded) - sum(graded),
        "cut_off": sum(row.get("finish") == "length" for row in rows),
        "right_answers_with_a_wrong_step": tally(known, marks).flawed,
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
        "right": counts[True],
        "wrong": counts[False],
        "unlabelled": counts[None],
        "right_share": counts[True] / labelled if labelled else None,
    }


def _totals(records: Sequence[Row]) -> dict[str, int]:
    """Sums of the labeller's whole-number facts (tokens generated, tokens read) and of its trials (rollouts made)."""
    totals: Counter[str] = Counter()
    for record in records:
        facts = record["row"].get("label_facts", {}) if "row" in record else record.get("facts", {})
        if "trials" in facts:
            totals["rollouts"] += sum(facts["trials"])
        totals.update(
            {name: value for name, value in facts.items() if isinstance(value, int) and not isinstance(value, bool)}
        )
    return dict(sorted(totals.items()))
