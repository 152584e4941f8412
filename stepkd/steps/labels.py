"""What a step label says: the one rule that labelling, training, search and evaluation share.

A label is true or false; a rating -1, 0 or 1, where 0 is neutral; or a probability in [0, 1] that the step is correct.
A probability is correct when it is **at least** the threshold, and so is a step score. None stands for no label.

Monte-Carlo labels (:func:`reduce_values`) say whether the correct answer can still be reached from the end of a step,
and stand in for whether the step is correct: an incorrect step from which the model recovers counts as correct.

On the way from a file to a loss four places apply the rule, in this order:

1. ``_read_binary_labels`` (:mod:`stepkd.data.load`): whole numbers of rows without a -1 become booleans, 0 incorrect.
2. ``StepData.ratings`` (:mod:`stepkd.data.datamodule`): a -1 in one split makes 0 neutral in those read after it.
3. :class:`~stepkd.data.encode.LabelRule`: probabilities stay soft targets, and ``after_error`` begins behind the first
   step from which **no** continuation succeeded (:data:`ANY_SUCCESS`); ``harden`` is a threshold for both, and
   ``progress`` compares each with the one before (:class:`Progress`).
4. :class:`~stepkd.data.feedback.FeedbackEncoder` (KTO, Step-KTO): a label that is still soft is refused.
"""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from stepkd.errors import ConfigError, DataError, check_bounds

Label = bool | int | float | None
LabelKind = Literal["bool", "rating", "soft"]
Neutral = Literal["correct", "incorrect", "mask"]
"""What a rating of 0 counts as: correct, incorrect, or (``mask``) no label."""

Reduce = Literal["any", "mean", "first_error", "propagate"]
"""From the values of a solution's steps to labels: see :func:`reduce_values`."""

THRESHOLD = 0.5
"""The threshold where none is given."""
ANY_SUCCESS = math.ulp(0.0)
"""The threshold that every probability above 0 reaches: one continuation succeeded."""


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Refuse a threshold that would call every step correct, or none.

    Raises:
        ConfigError: it does not lie between 0 and 1.
    """
    if not 0 < threshold < 1:
        hint = "0 would call every step correct; for 'any continuation succeeded' take a small one, such as 0.001"
        raise ConfigError(f"{name}={threshold}: must lie between 0 and 1{f' ({hint})' if threshold == 0 else ''}")


def passes(score: float | None, threshold: float = THRESHOLD) -> bool | None:
    """Whether a step score calls its step correct.

    Args:
        score: a probability in [0, 1]; None or NaN: there is none.
        threshold: the score is correct from here on (at least, not above).

    Returns:
        True or False; None where there is no score.
    """
    return None if score is None or math.isnan(score) else bool(score >= threshold)


def correct_targets(targets: Any) -> Any:
    """Whether a step's target, the probabilities of its classes, calls it correct: all classes but the worst together
    are at least :data:`THRESHOLD`, so that even odds and a neutral class in the middle count as correct.

    Args:
        targets: (..., C) array or tensor, worst class first; each row sums to one.

    Returns:
        A boolean array or tensor (...).
    """
    return targets[..., 1:].sum(-1) >= THRESHOLD


def verdicts(
    labels: Sequence[Label], *, neutral: Neutral = "correct", threshold: float = THRESHOLD
) -> list[bool | None]:
    """What each step label of a solution says: correct, incorrect, or None for nothing.

    Args:
        labels: (steps,) of one kind.
        neutral: what a rating of 0 counts as.
        threshold: a probability is correct from here on.

    Raises:
        ConfigError: a threshold that does not lie between 0 and 1.
        DataError: kinds mixed, or a label out of range.
    """
    check_threshold(threshold)
    if all(label is None for label in labels):
        return [None] * len(labels)
    if label_kind(labels) == "rating":
        least = 0 if neutral == "correct" else 1
        return [None if label is None or (label == 0 and neutral == "mask") else label >= least for label in labels]
    return [passes(label, threshold) for label in labels]  # True is 1 and False is 0


def first_incorrect(
    labels: Sequence[Label], *, neutral: Neutral = "correct", threshold: float = THRESHOLD
) -> int | None:
    """The 0-based index of the first incorrect step, -1 if all are correct, None if a missing label leaves it open.

    Raises:
        DataError: kinds mixed, or a label out of range.
    """
    for index, correct in enumerate(verdicts(labels, neutral=neutral, threshold=threshold)):
        if correct is not True:
            return None if correct is None else index
    return -1


def reduce_values(values: Sequence[float], reduce: Reduce) -> tuple[bool | float | None, ...]:
    """Labels of the steps of one solution, from its estimated values.

    Args:
        values: v_i of every step, in [0, 1]: the share of continuations from its end that reach the correct answer.
        reduce: ``any``: true where v_i > 0 (Math-Shepherd's hard estimate, arXiv 2312.08935; GLoRe's label of V*, arXiv
            2402.10963); ``mean``: v_i (Math-Shepherd's soft estimate); ``first_error``: true up to the first step with
            v_i = 0, false at it, None behind it (Qwen2.5-Math-PRM, arXiv 2501.07301); ``propagate``: true where any of
            v_i, v_i+1, ... > 0, because what can still be solved from a later step could be solved before it (GLoRe).

    Returns:
        One label per step: booleans and None, or for ``mean`` the values themselves.
    """
    if reduce == "mean":
        return tuple(map(float, values))
    labels = [passes(value, ANY_SUCCESS) is True for value in values]
    if reduce == "propagate":
        return tuple(any(labels[i:]) for i in range(len(labels)))
    first = labels.index(False) if reduce == "first_error" and False in labels else len(labels)
    return tuple(label if i <= first else None for i, label in enumerate(labels))


class Progress(ABC):
    """Relative progress: a step is correct by its value (:func:`reduce_values`) relative to the value before it, the
    pass rate of the problem for the first step. Members: :class:`ValueRatio`, :class:`EffectiveReward`."""

    @abstractmethod
    def advances(self, value: float, before: float) -> bool:
        """Whether a step is correct.

        Args:
            value: after the step, in [0, 1].
            before: before it, in [0, 1].
        """

    def labels(self, values: Sequence[float | None], pass_rate: float) -> list[bool | None]:
        """Labels of the steps of one solution.

        Args:
            values: (steps,) in [0, 1]; None: not known (a prefix that ``order: binary`` passed over): neither the step
                nor the next one has a label, because a loss of value over several steps is no single one's.
            pass_rate: the share of the problem's samples that are correct, in [0, 1]: the value before the first step.
        """
        return [
            None if value is None or before is None else self.advances(value, before)
            for before, value in pairwise([pass_rate, *values])
        ]


@dataclass(frozen=True, kw_only=True)
class ValueRatio(Progress):
    """Value after over value before, correct from a threshold on (GenPRM, arXiv 2504.00891; StepWiser's Rel-Ratio,
    arXiv 2508.19229, which asks for more than the threshold).

    A step of value 0 is incorrect. Behind one GenPRM calls all steps incorrect (by a secondary source); here one from
    which a continuation succeeds is correct, and ``after_error: truncate`` leaves them out.
    """

    threshold: float = 0.8
    """Least ratio of a correct step, > 0: 0.8 in GenPRM, and in StepWiser for 1.5B parameters (0.7 for 7B)."""

    def __post_init__(self) -> None:
        check_bounds("labels.progress.", self, threshold="(0, inf)")

    def advances(self, value: float, before: float) -> bool:
        """See :meth:`Progress.advances`."""
        return 0 < value >= self.threshold * before - 1e-9  # shares are no binary fractions


@dataclass(frozen=True, kw_only=True)
class EffectiveReward(Progress):
    """Value plus a weighted difference, correct above 0 (StepWiser's Rel-Effective, arXiv 2508.19229): the difference
    is of the best-of-n policy's values, after the step and before it, where that of a value v is ``1 - (1 - v)^n``."""

    alpha: float = 0.4
    """Weight of the difference, >= 0: 0.4 in the paper for 1.5B parameters, 0.8 for 7B; the larger, the more the
    difference alone decides."""
    best_of: int = 4
    """n of the best-of-n policy, >= 1, the paper's 4; 1 takes the difference of the values themselves."""

    def __post_init__(self) -> None:
        check_bounds("labels.progress.", self, alpha="[0, inf)", best_of="[1, inf)")

    def advances(self, value: float, before: float) -> bool:
        """See :meth:`Progress.advances`."""
        return value + self.alpha * ((1 - before) ** self.best_of - (1 - value) ** self.best_of) > 0


class Tally(NamedTuple):
    """Correct answers of a set of completions, and what their step labels say of them."""

    correct: int
    """Completions whose answer is correct."""
    labelled: int
    """Of these, those whose steps are all labelled. Labels up to an incorrect step are enough: they settle it."""
    correct_with_incorrect_step: int
    """Of these, those with an incorrect step (Step-KTO's conflicts, arXiv 2501.10799). Summaries, logs, claims and
    reports have this number and its :attr:`share` under this name."""

    @property
    def share(self) -> float | None:
        """``correct_with_incorrect_step`` over ``labelled``, in [0, 1]; None where none is labelled: that is not 0."""
        return self.correct_with_incorrect_step / self.labelled if self.labelled else None


def tally(outcomes: Iterable[bool | None], marks: Iterable[Sequence[bool | None] | None]) -> Tally:
    """Count the correct answers that hold an incorrect step.

    Args:
        outcomes: (completions,) whether the answer is correct; None: not graded.
        marks: (completions,) what :func:`verdicts` says of the steps of each; None or empty: no labels.

    Returns:
        Correct answers, those of them whose steps are labelled, and those of these with an incorrect step.

    Raises:
        ValueError: more of one than of the other.
    """
    correct = [steps or () for outcome, steps in zip(outcomes, marks, strict=True) if outcome is True]
    labelled = [steps for steps in correct if is_settled(len(steps), steps.count(True), steps.count(False))]
    return Tally(len(correct), len(labelled), sum(False in steps for steps in labelled))


def is_settled(steps: Any, correct: Any, incorrect: Any) -> Any:
    """Whether labels settle if a completion holds an incorrect step: one is incorrect, or all are labelled.

    Args:
        steps, correct, incorrect: how many steps it has, and how many of them are labelled so: numbers, or arrays or
            tensors of one shape.

    Returns:
        A boolean, or a boolean array or tensor of that shape; False without steps.
    """
    return (incorrect > 0) | ((steps > 0) & (correct == steps))


def label_kind(labels: Sequence[object]) -> LabelKind:
    """Tell what a row's step labels are, without casting any of them.

    Args:
        labels: one per step; None marks a step without a label.

    Returns:
        "bool" (all True or False), "rating" (all whole numbers -1, 0 or 1, where 0 is neutral) or "soft" (floats in
        [0, 1], the probability that the step is correct; 0 and 1 may be written as whole numbers beside floats).

    Raises:
        DataError: no label at all, NaN, a value outside the range, or kinds mixed.
    """
    known = [label for label in labels if label is not None]
    if not known:
        raise DataError("has zero labelled steps; give at least one label that is not null, or drop the row")
    for index, label in enumerate(labels, start=1):
        whole = isinstance(label, int) and label in (-1, 0, 1)
        if not (label is None or whole or (isinstance(label, float) and 0 <= label <= 1)):
            raise DataError(
                f"label {index} of {len(labels)} is {reprlib.repr(label)}: a label is true/false, a float in [0, 1] or "
                "a whole number -1, 0 or 1; null for none"
            )
    booleans = sum(isinstance(label, bool) for label in known)
    if booleans:
        if booleans < len(known):
            raise DataError("mixes true/false with numbers; use one kind per row, nothing is cast")
        return "bool"
    if not any(isinstance(label, float) for label in known):
        return "rating"
    if -1 in known:
        raise DataError("mixes the rating -1 with floats in [0, 1]; use one kind per row, nothing is cast")
    return "soft"
