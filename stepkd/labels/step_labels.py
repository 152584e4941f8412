"""What a labeller is given, what it says, and how estimated values become labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from stepkd.data.completion import Completion
from stepkd.errors import DataError
from stepkd.steps.labels import ANY_SUCCESS, passes

Row = Mapping[str, Any]
PROBLEM_COLUMNS = ("answer", "task", "meta")
"""Columns of a problem that labelled rows keep, so that they can be checked and labelled again."""
Reduce = Literal["any", "mean", "first_error", "propagate"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Solution(Completion):
    """A completion to be labelled; ``row`` is its problem, with ``id``, ``prompt`` and ``answer``."""

    index: int
    """Number of the solution in the whole job; keys whatever is drawn for it."""
    correct: bool | None
    """Whether the final answer is correct; None: not graded."""
    steps: tuple[str, ...] = ()
    """Text of every step, separators included; none before it is cut."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the row that it came from, or that its labelled row has beside the labels."""
    signals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Per-token signals that a segmenter reads, by the names of :class:`~stepkd.steps.text.TokenizedText`."""


@dataclass(frozen=True)
class StepLabels:
    """What a labeller says of one solution."""

    labels: tuple[bool | int | float | None, ...]
    """One per step, all of one kind (bool, -1/0/1, or float in [0, 1]); None: not labelled."""
    values: tuple[float | None, ...] | None = None
    """Estimated chance per step that the answer is correct from there on, in [0, 1]; None: not estimated."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values kept with the row: successes and trials per step, tokens generated, ..."""


class Labeller(Protocol):
    """Labels steps."""

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """Label every step of every solution; the result for a solution does not depend on the others."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What the labels came from, as JSON values: labeller, model, number of continuations, temperature, seed,
        ..."""
        ...


def reduce_values(values: Sequence[float], reduce: Reduce) -> tuple[bool | float | None, ...]:
    """Labels of the steps of one solution, from its estimated values.

    Args:
        values: v_i of every step, in [0, 1]: the share of continuations from its end that reach the correct answer.
        reduce: ``any``: true where v_i > 0 (Math-Shepherd's hard estimate, arXiv 2312.08935; GLoRe's label of V*, arXiv
            2402.10963); ``mean``: v_i (Math-Shepherd's soft estimate); ``first_error``: true up to the first step with
            v_i = 0, false at it, None behind it (Qwen2.5-Math-PRM, arXiv 2501.07301); ``propagate``: true where any of
            v_i, v_i+1, ... > 0, because what can still be solved from a later step could be solved before it (GLoRe).

    Raises:
        DataError: a value outside [0, 1].
    """
    invalid = next((value for value in values if not 0 <= value <= 1), None)
    if invalid is not None:
        raise DataError(f"{invalid} is no share of continuations: values lie in [0, 1]")
    if reduce == "mean":
        return tuple(map(float, values))
    labels = [passes(value, ANY_SUCCESS) is True for value in values]
    if reduce == "propagate":
        return tuple(any(labels[i:]) for i in range(len(labels)))
    first = labels.index(False) if reduce == "first_error" and False in labels else len(labels)
    return tuple(label if i <= first else None for i, label in enumerate(labels))


def outcome_of(row: Row) -> bool | None:
    """Whether the answer of a completion row or a stepwise row is correct; None: not graded."""
    correct: bool | None = row.get("outcome") if row.get("correct") is None else row["correct"]
    return correct
