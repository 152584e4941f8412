"""Labelled rows side by side: what a label says, where the first error is, and whether two rows cut alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stepkd.data.checks import label_kind
from stepkd.errors import DataError

Row = Mapping[str, Any]
Label = bool | int | float | None
Neutral = Literal["right", "wrong", "mask"]
"""What a rating of 0 becomes where only right and wrong exist; ``mask``: nothing."""

SOFT_RIGHT = 0.5
"""A soft label counts as right from here on."""


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


def verdicts(labels: Sequence[Label]) -> list[bool | None]:
    """What each label says: right, wrong, or nothing.

    Args:
        labels: of one row, of one kind: bool; -1/0/1, where neutral counts as right; or chances, right from 0.5 on.

    Raises:
        DataError: no label at all, kinds mixed, or a label out of range.
    """
    limit = {"bool": 1, "rating": 0, "soft": SOFT_RIGHT}[label_kind(labels)]
    return [None if label is None else label >= limit for label in labels]


def cast_labels(labels: Sequence[Label], *, neutral: Neutral = "right", threshold: float = 0.5) -> list[bool | None]:
    """Labels as right, wrong or nothing, with the choices left open by :func:`verdicts`.

    Args:
        labels: of one row, of one kind.
        neutral: what a rating of 0 becomes.
        threshold: a chance above it is right.

    Raises:
        DataError: no label at all, kinds mixed, or a label out of range.
    """
    kind = label_kind(labels)
    if kind == "rating":
        meaning = {1: True, -1: False, 0: {"right": True, "wrong": False, "mask": None}[neutral], None: None}
        return [meaning[None if label is None else int(label)] for label in labels]
    limit = threshold if kind == "soft" else 0
    return [None if label is None else label > limit for label in labels]


def first_error(labels: Sequence[Label]) -> int | None:
    """Place of the first wrong step: its 0-based index, -1 if every step is right, None if the labels leave it open."""
    for index, right in enumerate(verdicts(labels)):
        if right is not True:
            return None if right is None else index
    return -1


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
