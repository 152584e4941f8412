"""From the labels of a row to training targets: one probability vector per step, or none.

Nothing is guessed: a kind that was not declared, a neutral rating without a rule, or a soft label for three classes is
an error that names the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepkd.errors import DataError, check_choice
from stepkd.steps.labels import ANY_SUCCESS, Label, LabelKind, Neutral, check_threshold, label_kind, verdicts

Target = tuple[float, ...]


@dataclass(frozen=True)
class LabelRule:
    """How step labels become targets."""

    kind: Literal["auto"] | LabelKind = "auto"
    """What the labels must be: right/wrong, -1/0/1, or chances in [0, 1]; ``auto`` takes what each row has."""
    after_error: Literal["keep", "truncate", "mask"] = "truncate"
    """Steps after the first wrong one: keep their labels, cut the solution off there, or leave it whole without these
    labels. A soft label is a wrong step below ``harden``, and without it only where it is 0. A causal model gives the
    same gradient for ``truncate`` and ``mask``."""
    neutral: Neutral = "right"
    """What a rating of 0 means to a head of two classes."""
    harden: float | None = None
    """Threshold, in (0, 1), from which on a soft label becomes right, and below it wrong; None keeps labels soft. One
    below the smallest share of continuations, such as 0.001, means "any continuation succeeded"."""
    scope: Literal["steps", "outcome"] = "steps"
    """``steps``: a process reward model; ``outcome``: one label at the last step, whether the answer is right (an
    outcome reward model)."""

    def __post_init__(self) -> None:
        check_choice("labels.kind", self.kind, ("auto", "bool", "rating", "soft"))
        check_choice("labels.after_error", self.after_error, ("keep", "truncate", "mask"))
        check_choice("labels.neutral", self.neutral, ("right", "wrong", "mask"))
        check_choice("labels.scope", self.scope, ("steps", "outcome"))
        if self.harden is not None:
            check_threshold(self.harden, "labels.harden")


def step_targets(row: Mapping[str, Any], num_steps: int, num_classes: int, rule: LabelRule) -> list[Target | None]:
    """Target of every step of a row.

    Args:
        row: has ``labels`` (step-labelled rows), or ``step_labels`` / ``step_values`` (rollouts), or, for
            ``scope="outcome"``, ``outcome`` / ``correct``.
        num_steps: how many steps the row has.
        num_classes: 2 or 3, worst to best.
        rule: see :class:`LabelRule`.

    Returns:
        One target per step; None: not trained on.

    Raises:
        DataError: no labels, another number than steps, another kind than declared, or soft labels for three classes.
    """
    name = str(row.get("id", "?"))
    if rule.scope == "outcome":
        return [None] * (num_steps - 1) + [_outcome(row, name, num_classes)]
    column, labels = _labels(row, rule)
    if labels is None:
        raise DataError("no step labels: label the row first (stepkd label)", path=name, column=column)
    if len(labels) != num_steps:
        raise DataError(f"{len(labels)} labels for {num_steps} steps", path=name, column=column)
    if all(label is None for label in labels):
        return [None] * num_steps
    try:
        kind = label_kind(labels)
    except DataError as error:
        raise DataError(str(error), path=name, column=column) from error
    if rule.kind not in ("auto", kind):
        raise DataError(
            f"labels are of kind {kind!r} and labels.kind asks for {rule.kind!r}: nothing is cast silently",
            path=name,
            column=column,
        )
    if kind == "soft" and rule.harden is None and num_classes != 2:
        raise DataError(
            f"soft labels for {num_classes} classes: they need two classes, or set labels.harden",
            path=name,
            column=column,
        )
    neutral = rule.neutral if num_classes == 2 else "right"
    marks = verdicts(labels, neutral=neutral, threshold=ANY_SUCCESS if rule.harden is None else rule.harden)
    targets = [
        _target(label, mark, kind, num_classes, rule.harden is None) for label, mark in zip(labels, marks, strict=True)
    ]
    if rule.after_error != "keep" and False in marks:
        wrong = marks.index(False)
        targets[wrong + 1 :] = [None] * (num_steps - wrong - 1)
    return targets


def _labels(row: Mapping[str, Any], rule: LabelRule) -> tuple[str, Sequence[Any] | None]:
    order = (
        ("labels", "step_values", "step_labels") if rule.kind == "soft" else ("labels", "step_labels", "step_values")
    )
    for column in order:
        if row.get(column) is not None:
            return column, row[column]
    return order[0], None


def _outcome(row: Mapping[str, Any], name: str, num_classes: int) -> Target:
    value = row.get("outcome", row.get("correct"))
    if not isinstance(value, bool):
        raise DataError(
            f"an outcome reward model needs whether the answer is right, found {value!r}: give rows with a boolean "
            "'outcome' (or rollouts with 'correct')",
            path=name,
            column="outcome",
        )
    return _one_hot(num_classes - 1 if value else 0, num_classes)


def _target(label: Label, mark: bool | None, kind: str, num_classes: int, keep_soft: bool) -> Target | None:
    if label is not None and kind == "soft" and keep_soft:
        return (1.0 - float(label), float(label))
    if label is not None and kind == "rating" and num_classes == 3:
        return _one_hot(int(label) + 1, 3)
    return None if mark is None else _one_hot(num_classes - 1 if mark else 0, num_classes)


def _one_hot(index: int, num_classes: int) -> Target:
    return tuple(float(c == index) for c in range(num_classes))
