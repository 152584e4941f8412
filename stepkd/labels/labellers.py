"""Labellers: tokenised solutions in, one label per step out.

Labels come from the tiny world's exact checkers (free, and true), from the final answer alone (outcome supervision), or
from what scores steps: a prompted judge, a trained process reward model, the sums of a step. Those from continuations
are in :mod:`stepkd.labels.monte_carlo`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, Protocol, get_args

from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.scorers.scorer import Solutions, StepScorer
from stepkd.steps.labels import ANY_SUCCESS, check_threshold, passes
from stepkd.steps.segment import Span
from stepkd.tasks.base import Given
from stepkd.tasks.rows import check_row, is_task_row


@dataclass(frozen=True)
class Solution:
    """One solution to label, in one tokenisation."""

    id: str
    """Unique over the job, ``<problem id>/<sample>``."""
    index: int
    """Number of the solution in the whole job; keys whatever is drawn for it."""
    row: Mapping[str, Any]
    """Problem row: ``id``, ``prompt``, ``answer``; rows of the tiny world also carry ``task`` and ``meta``."""
    prompt_ids: tuple[int, ...]
    """Prompt as the sampler read it."""
    completion_ids: tuple[int, ...]
    """Sampled (or tokenised) ids, the end token included where there is one."""
    spans: tuple[Span, ...]
    """Step spans: a partition of ``range(len(completion_ids))``."""
    steps: tuple[str, ...]
    """Text of every step, separators included."""
    correct: bool | None
    """Whether the final answer is right; None: not graded."""
    finish: Literal["stop", "length"] = "stop"
    """``length``: the solution was cut off."""


@dataclass(frozen=True)
class StepLabels:
    """What a labeller says of one solution."""

    labels: tuple[bool | int | float | None, ...]
    """One per step, all of one kind (bool, -1/0/1, or float in [0, 1]); None: not labelled."""
    values: tuple[float | None, ...] | None = None
    """Estimated chance per step that the answer comes out right from there, in [0, 1]; None: not estimated."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values kept with the row: successes and trials per step, tokens generated, ..."""


class Labeller(Protocol):
    """Labels steps."""

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """Label every step of every solution; the result for a solution does not depend on the others."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What the labels came from, as JSON values: labeller, model, number of rollouts, temperature, seed, ..."""
        ...


class CheckerLabeller:
    """Label by the exact checker of the task that generated the problem.

    Args:
        given: ``truth``: a step is right iff it is what the problem demands at its place; ``claims``: iff it follows
            from what the steps before it claim.
    """

    def __init__(self, given: Given = "truth") -> None:
        check_choice("given", given, get_args(Given))
        self.given = given

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`~stepkd.labels.labellers.Labeller`; labels are true or false.

        Raises:
            DataError: a row that no task of the tiny world generated.
        """
        return [StepLabels(tuple(self._check(solution))) for solution in solutions]

    def _check(self, solution: Solution) -> list[bool]:
        if not is_task_row(solution.row):
            raise DataError(
                "no exact checker for this row: it has no 'task' and 'meta' (rows of source 'task' have them); use "
                "another labeller",
                path=solution.id,
            )
        return check_row(solution.row, solution.steps, given=self.given)

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {"labeller": "checker", "given": self.given}


class OutcomeLabeller:
    """Label by whether the final answer is right.

    Args:
        scope: ``last``: the last step only, as an outcome reward model is trained; ``all``: every step gets the
            outcome, the crudest guess at a process label.
    """

    def __init__(self, scope: Literal["last", "all"] = "last") -> None:
        check_choice("scope", scope, ("last", "all"))
        self.scope = scope

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`~stepkd.labels.labellers.Labeller`; labels are true or false.

        Raises:
            DataError: a solution that was not graded.
        """
        return [StepLabels(self._labels(solution)) for solution in solutions]

    def _labels(self, solution: Solution) -> tuple[bool | None, ...]:
        if solution.correct is None:
            raise DataError(
                "whether its answer is right is not known: give rows with an 'answer', or an 'outcome' of true or "
                "false",
                path=solution.id,
                column="answer",
            )
        before: bool | None = solution.correct if self.scope == "all" else None
        return (*[before] * (len(solution.steps) - 1), solution.correct)

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {"labeller": "outcome", "scope": self.scope}


class ScorerLabeller:
    """Label by the scores of a :class:`~stepkd.scorers.scorer.StepScorer`.

    Args:
        scorer: what scores the steps.
        threshold: a step is right when its score is not below it, in (0, 1).
        soft: the scores themselves are the labels.
        name: name of the labeller in the provenance: ``judge``, ``prm``, ``arithmetic``.
    """

    def __init__(self, scorer: StepScorer, *, threshold: float = 0.5, soft: bool = False, name: str = "judge") -> None:
        check_threshold(threshold)
        self.scorer = scorer
        self.threshold = threshold
        self.soft = soft
        self.name = name

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`~stepkd.labels.labellers.Labeller`.

        Neighbouring solutions of one problem are scored together, so that the scorer may read their prompt once. A
        step without a score (cut off by the scorer's context, or not the last one of an outcome scorer) has no label.
        The scores are kept in ``facts``, and as ``values`` where that is what the scorer estimates.

        Raises:
            DataError: the scorer's answer does not fit the solutions, or a score is outside [0, 1].
        """
        problems = [list(group) for _, group in groupby(solutions, key=lambda solution: solution.row)]
        scored = self.scorer.score([Solutions(group[0].row, [list(s.steps) for s in group]) for group in problems])
        if [len(scores) for scores in scored] != [len(group) for group in problems]:
            raise DataError("the scorer gave another number of solutions than it was asked for")
        return [
            self._labels(solution, scores)
            for group, group_scores in zip(problems, scored, strict=True)
            for solution, scores in zip(group, group_scores, strict=True)
        ]

    def _labels(self, solution: Solution, scores: Sequence[float]) -> StepLabels:
        if len(scores) != len(solution.steps):
            raise DataError(f"the scorer gave {len(scores)} scores for {len(solution.steps)} steps", path=solution.id)
        wrong = [score for score in scores if not (math.isnan(score) or 0 <= score <= 1)]
        if wrong:
            raise DataError(f"the scorer gave {wrong[0]}: scores lie in [0, 1]", path=solution.id)
        known = tuple(None if math.isnan(score) else float(score) for score in scores)
        hard = tuple(passes(score, self.threshold) for score in known)
        return StepLabels(
            known if self.soft else hard,  # no values: a scorer's guess of the future is no rollout's success
            facts={"scores": list(known)},
        )

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {
            "labeller": self.name,
            "threshold": None if self.soft else self.threshold,
            "soft": self.soft,
            "meaning": self.scorer.meaning,
            "scorer": self.scorer.provenance(),
        }


Asked = tuple[Mapping[str, Any], Sequence[str], Sequence[str]]
"""Problem row, the steps before, and candidates for the next step."""


class StepCheck:
    """Passes the candidate steps that a scorer does not put below a threshold.

    Args:
        scorer: scores steps in [0, 1].
        threshold: lowest score that passes.
    """

    def __init__(self, scorer: StepScorer, threshold: float = 0.5) -> None:
        self.scorer = scorer
        self.threshold = threshold

    def passes(self, asked: Sequence[Asked]) -> list[list[bool]]:
        """Whether each candidate passes; one without a score (cut off by the scorer's context) does not.

        Raises:
            DataError: the scorer's answer does not fit what it was asked.
        """
        used = [Solutions(row, [[*before, step] for step in steps]) for row, before, steps in asked if steps]
        scored = iter(self.scorer.score(used) if used else ())
        found = []
        for _, before, candidates in asked:
            scores = next(scored) if candidates else []
            if len(scores) != len(candidates) or any(len(values) != len(before) + 1 for values in scores):
                raise DataError("the scorer gave another number of scores than it was asked for")
            found.append([passes(values[-1], self.threshold) is True for values in scores])
        return found

    def provenance(self) -> dict[str, Any]:
        """What the check asks, as JSON values."""
        return {"threshold": self.threshold, "meaning": self.scorer.meaning, "scorer": self.scorer.provenance()}


Reduce = Literal["any", "mean", "first_error"]
REDUCTIONS: tuple[Reduce, ...] = ("any", "mean", "first_error")
"""Reductions by name."""


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
    """Labels of the steps of one solution, from its estimated values.

    Args:
        values: v_i of every step, in [0, 1]: the share of continuations from its end that reach the correct answer.
        reduce: ``any``: true where v_i > 0 (Math-Shepherd's hard estimate, arXiv 2312.08935; GLoRe's label of V*, arXiv
            2402.10963); ``mean``: v_i (Math-Shepherd's soft estimate); ``first_error``: true up to the first step with
            v_i = 0, false at it, None behind it (Qwen2.5-Math-PRM, arXiv 2501.07301).
        propagate_positive: first, a positive step makes all before it positive (not with ``mean``): what can still be
            solved from a later step could be solved before it (GLoRe).

    Raises:
        ConfigError: see :func:`check_reduction`.
        DataError: a value outside [0, 1].
    """
    check_reduction(reduce, propagate_positive=propagate_positive)
    wrong = next((value for value in values if not 0 <= value <= 1), None)
    if wrong is not None:
        raise DataError(f"{wrong} is no share of continuations: values lie in [0, 1]")
    if reduce == "mean":
        return tuple(map(float, values))
    labels = [passes(value, ANY_SUCCESS) is True for value in values]
    if propagate_positive:
        last = max((i for i, label in enumerate(labels) if label), default=-1)
        labels = [i <= last for i in range(len(labels))]
    first = labels.index(False) if reduce == "first_error" and False in labels else len(labels)
    return tuple(label if i <= first else None for i, label in enumerate(labels))
