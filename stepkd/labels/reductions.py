"""From estimated values to labels: what a step's successes say about it.

v_i is the share of continuations from the end of step i that reach the right answer, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.randomness import generator

Reduce = Literal["any", "mean", "first_error"]
REDUCTIONS: tuple[Reduce, ...] = ("any", "mean", "first_error")
"""Reductions by name."""


class StepBalance(NamedTuple):
    """What balancing did to the steps of one number."""

    step: int
    """The step's number in its solution, from 0: the prefix has one step more."""
    positives: int
    """Positive labels before."""
    negatives: int
    """Negative labels before."""
    kept: int
    """Labels of either sign that remain."""


class Balanced(NamedTuple):
    """Rows whose labels are balanced at every prefix length."""

    rows: list[dict[str, Any]]
    """Copies of the rows; labels in surplus are None."""
    steps: list[StepBalance]
    """One record per prefix length."""
    num_emptied: int
    """Rows that had a label and have none now."""


def label_any(values: Sequence[float]) -> tuple[bool, ...]:
    """True where any continuation succeeded: v_i > 0.

    Source: Math-Shepherd's hard estimate (arXiv 2312.08935); GLoRe's label of V* (arXiv 2402.10963).
    """
    return tuple(value > 0 for value in values)


def label_mean(values: Sequence[float]) -> tuple[float, ...]:
    """The values themselves. Source: Math-Shepherd's soft estimate (arXiv 2312.08935)."""
    return tuple(float(value) for value in values)


def cut_after_first_error(labels: Sequence[bool]) -> tuple[bool | None, ...]:
    """Labels up to and including the first negative one; None behind it.

    Source: Qwen2.5-Math-PRM (arXiv 2501.07301) drops the steps after the first negative one.
    """
    first = next((i for i, label in enumerate(labels) if not label), len(labels))
    return tuple(label if i <= first else None for i, label in enumerate(labels))


def positives_reach_back(labels: Sequence[bool]) -> tuple[bool, ...]:
    """A positive step makes every step before it positive.

    What can still be solved from a later step could be solved before it. Source: GLoRe (arXiv 2402.10963).
    """
    last = max((i for i, label in enumerate(labels) if label), default=-1)
    return tuple(i <= last for i in range(len(labels)))


def check_reduction(reduce: str, *, propagate_positive: bool = False) -> None:
    """Refuse a reduction that does not exist, or soft labels whose positives are to reach back.

    Raises:
        ConfigError: either of these.
    """
    check_choice("reduce", reduce, REDUCTIONS)
    if propagate_positive and reduce == "mean":
        raise ConfigError("propagate_positive needs labels that are right or wrong: reduce 'any' or 'first_error'")


def reduce_values(
    values: Sequence[float], reduce: Reduce, *, propagate_positive: bool = False
) -> tuple[bool | float | None, ...]:
    """Labels of the steps of one solution.

    Args:
        values: v_i of every step, in [0, 1].
        reduce: ``any``: true where v_i > 0; ``mean``: v_i; ``first_error``: true up to the first step with v_i = 0,
            false at it, None behind it.
        propagate_positive: positives reach back first (not with ``mean``).

    Raises:
        ConfigError: see :func:`check_reduction`.
        DataError: a value outside [0, 1].
    """
    check_reduction(reduce, propagate_positive=propagate_positive)
    wrong = next((value for value in values if not 0 <= value <= 1), None)
    if wrong is not None:
        raise DataError(f"{wrong} is no share of continuations: values lie in [0, 1]")
    if reduce == "mean":
        return label_mean(values)
    labels = label_any(values)
    if propagate_positive:
        labels = positives_reach_back(labels)
    return cut_after_first_error(labels) if reduce == "first_error" else labels


def balance_by_prefix_length(rows: Sequence[Mapping[str, Any]], seed: int) -> Balanced:
    """Make positive and negative labels equal in number at every prefix length, by dropping labels in surplus.

    Without it a model learns "early is good", because an early prefix can nearly always still be solved. Which labels
    go is drawn by the stream of ``(seed, "balance", step)``. Where all labels of a prefix length have one sign, all go.

    Args:
        rows: rows with ``labels``: true or false, or -1/0/1 of which 0 counts as neither and stays; None: no label.
        seed: seed of the run.

    Returns:
        New rows in the same order, what was done per prefix length, and how many rows have no label left.

    Raises:
        DataError: a row without ``labels``, or with soft ones.

    Source: GLoRe (arXiv 2402.10963).
    """
    labels = [_hard_labels(row, number) for number, row in enumerate(rows, start=1)]
    had_any = [any(label is not None for label in each) for each in labels]
    steps = []
    for step in range(max((len(each) for each in labels), default=0)):
        here = [(number, each[step]) for number, each in enumerate(labels) if step < len(each)]
        positives = [number for number, label in here if label is not None and label > 0]
        negatives = [number for number, label in here if label is False or (label is not None and label < 0)]
        kept = min(len(positives), len(negatives))
        surplus = max(positives, negatives, key=len)
        for i in generator(seed, "balance", step).permutation(len(surplus))[kept:]:
            labels[surplus[i]][step] = None
        steps.append(StepBalance(step, len(positives), len(negatives), kept))
    num_emptied = sum(had and all(label is None for label in each) for had, each in zip(had_any, labels, strict=True))
    balanced = [{**row, "labels": each} for row, each in zip(rows, labels, strict=True)]
    return Balanced(balanced, steps, num_emptied)


def _hard_labels(row: Mapping[str, Any], line: int) -> list[bool | int | None]:
    labels = row.get("labels")
    if not isinstance(labels, list | tuple):
        raise DataError("no list of labels to balance", line=line, column="labels")
    for label in labels:
        if not (label is None or isinstance(label, bool) or (isinstance(label, int) and label in (-1, 0, 1))):
            raise DataError(
                f"{label!r} is no hard label (true, false, -1, 0, 1): soft labels cannot be balanced",
                line=line,
                column="labels",
            )
    return list(labels)
