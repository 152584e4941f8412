"""Labelled rows side by side: where their labels stand, and whether two rows cut alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepkd.errors import DataError
from stepkd.steps.labels import Label

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
