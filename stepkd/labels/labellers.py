"""Labellers: tokenised solutions in, one label per step out; what they are given, what they say, and their settings.

Labels come from continuations of every step's prefix (:mod:`stepkd.labels.monte_carlo`), from the tiny world's exact
checkers (free, and true), from the final answer alone (outcome supervision), or from what scores steps: a prompted
judge, a trained process reward model, the sums of a step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, Literal, Protocol

from stepkd.data.completion import Completion
from stepkd.errors import DataError, check_bounds
from stepkd.scorers.load import load_scorer
from stepkd.scorers.scorer import ScorerConfig, Solutions, StepScorer, facts_of
from stepkd.steps.labels import Label, check_threshold, passes
from stepkd.tasks.base import Given
from stepkd.tasks.rows import check_row

Row = Mapping[str, Any]
PROBLEM_COLUMNS = ("answer", "task", "meta")
"""Columns of a problem that labelled rows keep, so that they can be checked and labelled again."""
Need = tuple[tuple[str, ...], str]
"""Columns of which a row must have one, and what is said of a row that has none."""
A_TASK: Need = (
    ("task",),
    "has no 'task' and 'meta': only rows of the tiny world (source 'task') have an exact checker; choose another "
    "labeller or scorer",
)
"""What the exact checker needs."""
A_SOLUTION: Need = (("solution",), "has no 'solution', whose steps search.gold_steps wants: turn it off")
"""What reference steps need."""


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

    labels: tuple[Label, ...]
    """One per step, all of one kind (bool, -1/0/1, or float in [0, 1]); None: not labelled."""
    values: tuple[float | None, ...] | None = None
    """Estimated chance per step that the answer is correct from there on, in [0, 1]; None: not estimated."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values kept with the row: successes and trials per step, tokens generated, ..."""


class Labeller(Protocol):
    """Labels steps. Any class with these two methods is one; its settings (:class:`LabellerConfig`) make it."""

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """Label every step of every solution; the result for a solution does not depend on the others.

        Args:
            solutions: cut into steps, of any problems.

        Returns:
            Labels of each, one for every step.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What the labels came from, which every labelled row carries.

        Returns:
            JSON values: labeller, model, number of continuations, temperature, seed, ...
        """
        ...


def outcome_of(row: Row) -> bool | None:
    """Whether the answer of a completion row or a stepwise row is correct.

    Args:
        row: has ``correct``, or ``outcome``; the first that is not null says it.

    Returns:
        True or False; None: not graded.
    """
    correct: bool | None = row.get("outcome") if row.get("correct") is None else row["correct"]
    return correct


class LabellerConfig(ABC):
    """Who labels the steps."""

    continues = False
    """Whether it continues solutions with the policy."""
    needs = tuple[Need, ...]()  # an annotation would be evaluated in the modules of subclasses, by jsonargparse
    """What a row must have; one that lacks it is refused before any work is done."""

    @abstractmethod
    def build(self, bench: Any, engine: Any) -> Labeller:
        """The labeller.

        Args:
            bench: what the job works with (:class:`~stepkd.labels.workbench.Workbench`).
            engine: draws from its policy.
        """


@dataclass(frozen=True, kw_only=True)
class TaskChecker(LabellerConfig):
    """The exact checker of the tiny world: true labels, for rows of source ``task``."""

    given: Given = "truth"
    """What a step is judged by: what the problem demands at its place (truth), or what the steps before it claim."""
    needs = (A_TASK,)

    def __post_init__(self) -> None:
        check_bounds("", self)

    def build(self, bench: Any, engine: Any) -> Labeller:
        """Itself."""
        return self

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`Labeller`; labels are true or false."""
        return [StepLabels(tuple(check_row(each.row, each.steps, given=self.given))) for each in solutions]

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {"labeller": "checker", "given": self.given}


@dataclass(frozen=True)
class Sums(LabellerConfig):
    """The sums that a step writes out, done again; a step without one has no label."""

    def build(self, bench: Any, engine: Any) -> Labeller:
        """A :class:`ScorerLabeller`."""
        from stepkd.scorers.rules import Arithmetic

        return ScorerLabeller(Arithmetic(unchecked=float("nan")))


@dataclass(frozen=True, kw_only=True)
class Outcome(LabellerConfig):
    """Whether the final answer is correct, as an outcome reward model learns it."""

    scope: Literal["last", "all"] = "last"
    """Which steps the outcome labels: the last one only, or all, the crudest guess at a process label."""
    needs = (
        (
            ("answer", "correct", "outcome"),
            "has neither an 'answer' nor a stated outcome: nothing says whether its answer is correct",
        ),
    )

    def __post_init__(self) -> None:
        check_bounds("", self)

    def build(self, bench: Any, engine: Any) -> Labeller:
        """Itself."""
        return self

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`Labeller`; labels are true or false."""
        return [
            StepLabels((*[each.correct if self.scope == "all" else None] * (len(each.steps) - 1), each.correct))
            for each in solutions
        ]

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {"labeller": "outcome", "scope": self.scope}


@dataclass(frozen=True, kw_only=True)
class Scored(LabellerConfig):
    """What a step scorer says: a prompted judge, a process reward model trained here or published."""

    scorer: ScorerConfig | str
    """What scores the steps, a class of settings such as Judge or PRM, or a word: judge:MODEL, or a path or hub id
    alone, whose kind is told from what is there."""
    threshold: float | None = 0.5
    """Score from which on a step is correct, in (0, 1); null keeps the scores as soft labels."""

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold)

    def build(self, bench: Any, engine: Any) -> Labeller:
        """A :class:`ScorerLabeller`."""
        scorer = load_scorer(self.scorer, device=bench.config.device, max_rows=bench.config.engine.at_once)
        return ScorerLabeller(scorer, threshold=self.threshold)


class ScorerLabeller:
    """Label by the scores of a :class:`~stepkd.scorers.scorer.StepScorer`.

    Args:
        scorer: what scores the steps.
        threshold: a step is correct when its score is not below it, in (0, 1); None: the scores themselves are the
            labels.
    """

    def __init__(self, scorer: StepScorer, *, threshold: float | None = 0.5) -> None:
        self.scorer, self.threshold = scorer, threshold

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`Labeller`.

        Neighbouring solutions of one problem are scored together, so that the scorer may read their prompt once. A
        step without a score (cut off by the scorer's context, or not the last one of an outcome scorer) has no label.
        The scores are kept in ``facts``; they are no ``values``, because a scorer's guess of the future is no
        continuation's success.
        """
        problems = [list(group) for _, group in groupby(solutions, key=lambda solution: solution.row)]
        scored = self.scorer.score([Solutions(group[0].row, [list(s.steps) for s in group]) for group in problems])
        found = []
        for solution, scores in zip(solutions, chain.from_iterable(scored), strict=True):
            if len(scores) != len(solution.steps):
                raise DataError(f"{len(scores)} scores for {len(solution.steps)} steps", path=solution.id)
            known = [None if math.isnan(score) else float(score) for score in scores]
            if not all(score is None or 0 <= score <= 1 for score in known):
                raise DataError(f"scores outside [0, 1]: {known}", path=solution.id)
            labels = known if self.threshold is None else [passes(score, self.threshold) for score in known]
            found.append(StepLabels(tuple(labels), facts={"scores": known, **facts_of(scores)}))
        return found

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {
            "labeller": "scorer",
            "threshold": self.threshold,
            "meaning": self.scorer.meaning,
            "scorer": self.scorer.provenance(),
        }
