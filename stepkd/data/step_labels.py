"""From the labels of a row to training targets: one probability vector per step, or none.

Nothing is guessed: a kind that was not declared, a neutral rating without a rule, or a soft label for three classes is
an error that names the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepkd.data.checks import label_kind
from stepkd.errors import ConfigError, DataError, check_choice

Target = tuple[float, ...]


@dataclass(frozen=True)
class LabelRule:
    """How step labels become targets."""

    kind: Literal["auto", "bool", "rating", "soft"] = "auto"
    """What the labels must be: right/wrong, -1/0/1, or chances in [0, 1]; ``auto`` takes what each row has."""
    after_error: Literal["keep", "truncate", "mask"] = "truncate"
    """Steps after the first wrong one: keep their labels, cut the solution off there, or leave it whole without these
    labels. A soft label is a wrong step where it is 0, or not above ``harden``. A causal model gives the same gradient
    for ``truncate`` and ``mask``."""
    neutral: Literal["right", "wrong", "mask"] = "right"
    """What a rating of 0 means to a head of two classes."""
    harden: float | None = None
    """Soft labels above it become right and all others wrong; None keeps them soft. 0 is "any rollout succeeded"."""
    scope: Literal["steps", "outcome"] = "steps"
    """``steps``: a process reward model; ``outcome``: one label at the last step, whether the answer is right (an
    outcome reward model)."""

    def __post_init__(self) -> None:
        check_choice("labels.kind", self.kind, ("auto", "bool", "rating", "soft"))
        check_choice("labels.after_error", self.after_error, ("keep", "truncate", "mask"))
        check_choice("labels.neutral", self.neutral, ("right", "wrong", "mask"))
        check_choice("labels.scope", self.scope, ("steps", "outcome"))
        if self.harden is not None and not 0 <= self.harden < 1:
            raise ConfigError(f"labels.harden={self.harden}: a threshold in [0, 1), or null for soft labels")


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
    targets = [None if label is None else _target(label, kind, num_classes, rule, name, column) for label in labels]
    if rule.after_error != "keep":
        neutral_is_wrong = num_classes == 2 and rule.neutral == "wrong"
        wrong = next(
            (i for i, label in enumerate(labels) if _is_error(label, kind, rule.harden, neutral_is_wrong)), num_steps
        )
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


def _target(
    label: bool | int | float, kind: str, num_classes: int, rule: LabelRule, name: str, column: str
) -> Target | None:
    best = num_classes - 1
    if kind == "bool":
        return _one_hot(best if label else 0, num_classes)
    if kind == "rating":
        if num_classes == 3:
            return _one_hot(int(label) + 1, 3)
        meaning = {1: "right", -1: "wrong", 0: rule.neutral}[int(label)]
        return None if meaning == "mask" else _one_hot(best if meaning == "right" else 0, num_classes)
    if rule.harden is not None:
        return _one_hot(best if label > rule.harden else 0, num_classes)
    if num_classes != 2:
        raise DataError(
            f"a soft label ({label}) for {num_classes} classes: soft labels need two classes, or set labels.harden",
            path=name,
            column=column,
        )
    return (1.0 - float(label), float(label))


def _is_error(label: bool | int | float | None, kind: str, harden: float | None, neutral_is_wrong: bool) -> bool:
    if label is None:
        return False
    if kind == "rating":
        return label == -1 or (label == 0 and neutral_is_wrong)
    if kind == "soft":
        return label <= (harden or 0.0)
    return not label


def _one_hot(index: int, num_classes: int) -> Target:
    return tuple(float(c == index) for c in range(num_classes))
